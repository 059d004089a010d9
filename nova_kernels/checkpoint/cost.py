"""What a plan costs on a chain of layers: bytes at the worst moment, and work done twice.

While segment j runs backward, the bytes that segments 0 .. j - 1 keep are alive, and nothing of the later ones:

    peak = fixed + max over    forward of layer l      kept so far + input of l + forward(l)
                               loss                    kept by all + loss
                               backward of segment j   kept by 0 .. j - 1 + what j needs
                               embedding               its own backward, last of all

    keep      keeps what autograd saves; layer l needs   saved up to l + backward(l)
    segment   keeps its boundary (its first input); needs the same, computed again from there
    nested    keeps its boundary; needs the inputs of its layers up to l, and saved and backward of l alone
    offload   keeps nothing on the device; needs what a segment needs, and its boundary one segment earlier

With FSDP2 the layers that are whole count as well, and the buffers in which weights come and gradients go:

    computed again   all layers that the segment has so far, the one that waits for backward, those gathered ahead,
                     and the buffer in which the layer came
    backward         the same without that buffer, and the layer's gradients so far
    then             its gradients and the buffer in which they are summed; its weights are gone
    both first       the buffer of the layer above, until its sum is done

Plain integers; nothing here knows of tensors. docs/kernels/checkpoint.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

Action = Literal["keep", "segment", "nested", "offload"]
ACTIONS: tuple[Action, ...] = ("keep", "segment", "nested", "offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """One layer at one number of tokens; bytes, unless stated otherwise."""

    boundary: int  # its input
    saved: int  # kept by autograd for backward, without the input, parameters and what several layers share
    saves_input: bool  # whether autograd keeps the input as well
    forward: int  # most alive in a forward pass that keeps nothing, above what was alive before; its output counts
    recompute: int  # the same for a pass that keeps `saved`
    recompute_cut: int  # the same up to the last tensor saved, where a second pass ends
    backward: int  # most alive in backward above `saved` and the input; the gradient that comes in counts
    copies: int = 0  # of `saved`: weights in another dtype, which autocast holds until it ends in any case
    weights: int = 0  # its parameters, as FSDP2 gathers them
    gradients: int | None = None  # theirs, before they are summed over ranks; None: as large as the weights
    sent: int | None = None  # the buffer in which they are summed; None: as large as the weights
    backward_sharded: int | None = None  # `backward` with these gradients as they come; None: with all, all along
    flops: int = 1  # of one forward pass
    tail_flops: int = 0  # of those, behind the last tensor saved: a second pass leaves them out
    saves: bool = True  # whether autograd saves anything of it: of layers below the first trained parameter it does not

    @property
    def new_gradients(self) -> int:
        """Of its weights."""
        return self.weights if self.gradients is None else self.gradients

    @property
    def summed(self) -> int:
        """The buffer in which they are summed over ranks."""
        return self.weights if self.sent is None else self.sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Layers in order, and what surrounds them."""

    layers: tuple[LayerCost, ...]
    loss: int = 0  # most alive in head, loss and their backward, above what the layers keep
    under_autocast: int = 0  # the same while the layers' autocast lasts, with its copies of all layers' weights
    # Alive while the layers run backward: logits that somebody holds. Below 0: what of `fixed` is gone by then.
    after_loss: int = 0
    embedding: int = 0  # most alive in the backward of what comes before the layers
    fixed: int = 0  # alive all along: what layers share
    held: int = 0  # the first layer's input, which the model holds through forward, where no segment keeps it
    num_tokens: int | None = None  # at which this holds, for messages

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("Chain: expected at least one layer, got none")

    @property
    def flops(self) -> int:
        """Of one forward pass through the layers."""
        return sum(layer.flops for layer in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class FSDP:
    """Layers sharded one by one by FSDP2's fully_shard."""

    prefetch: int = 1  # layers gathered ahead of the one that runs
    reshard: bool = False  # shard each layer again within a recomputation: two are whole instead of a segment's


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The road to host memory, for offloaded boundaries."""

    flops_per_second: float = 400e12  # of the layers, to know what a copy can hide behind
    bytes_per_second: float = 25e9  # of the link, one way
    latency_seconds: float = 20e-6  # of one copy; never hidden, so that nothing is offloaded without need
    host_bytes: int | None = None  # pinned memory there is; None: as much as it takes

    def exposed_flops(self, num_bytes: int, flops: int) -> int:
        """Work that could be done while the segment waits for its two copies; `flops` of its forward pass."""
        copy, forward = num_bytes / self.bytes_per_second, flops / self.flops_per_second
        waits = 2 * self.latency_seconds + max(0.0, copy - forward) + max(0.0, copy - 3 * forward)
        return round(waits * self.flops_per_second)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentCost:
    """One segment by itself; bytes above what the segments before it keep."""

    forward: int  # most alive in forward, with autocast's copies of all layers so far
    backward: int  # most alive in backward
    kept: int  # left alive between the two
    copies: int = 0  # of these, what autocast holds anyway as long as it lasts
    in_flight: int = 0  # an offloaded boundary: it sets out for the device when the next segment runs backward
    host_bytes: int = 0
    recompute_flops: int = 0
    time_flops: int = 0  # the same and the waits, in work that could be done meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A whole plan."""

    peak_bytes: int
    peak_at: str  # "forward of segment 3", "loss", "backward of segment 3"
    recompute_flops: int
    time_flops: int
    host_bytes: int
    segments: tuple[SegmentCost, ...] = field(repr=False)


def simulate(
    chain: Chain,
    bounds: Sequence[int],
    actions: Sequence[Action],
    *,
    fsdp: FSDP | None = None,
    host: Host | None = None,
) -> Cost:
    """The cost of a plan: segment j holds the layers bounds[j] .. bounds[j + 1] - 1 and does actions[j].

    Raises:
        ValueError: bounds that do not run from 0 to the number of layers, or as many actions as segments missing.
    """
    check_plan(len(chain.layers), bounds, actions)
    costs = [
        segment_cost(chain, start, stop, action, fsdp=fsdp, host=host)
        for (start, stop), action in zip(pairwise(bounds), actions, strict=True)
    ]
    moments: list[tuple[int, str]] = []
    kept = before = copies = 0
    for index, (action, cost) in enumerate(zip(actions, costs, strict=True)):
        moments.append((kept - copies + cost.forward, f"forward of segment {index}"))
        moments.append((kept + before + cost.backward + chain.after_loss, f"backward of segment {index}"))
        kept, copies = kept + cost.kept, copies + cost.copies
        before = before if action == "keep" else cost.in_flight
    under_autocast = kept - copies + chain.under_autocast
    moments += [(kept + chain.held + chain.loss, "loss"), (chain.held + under_autocast, "loss, under autocast")]
    moments.append((chain.embedding, "backward of the embedding"))
    peak, where = max(moments, key=lambda moment: moment[0])
    return Cost(
        peak_bytes=chain.fixed + peak,
        peak_at=where,
        recompute_flops=sum(cost.recompute_flops for cost in costs),
        time_flops=sum(cost.time_flops for cost in costs),
        host_bytes=sum(cost.host_bytes for cost in costs),
        segments=tuple(costs),
    )


def segment_cost(
    chain: Chain, start: int, stop: int, action: Action, *, fsdp: FSDP | None = None, host: Host | None = None
) -> SegmentCost:
    """The cost of the layers start .. stop - 1 as one segment."""
    layers = chain.layers[start:stop]
    boundary = layers[0].boundary
    if action == "keep":
        return _kept(chain, start, stop, fsdp)
    forward = _forward(chain, start, stop, fsdp)
    if not any(layer.saves for layer in layers):
        # No backward asks for anything that was thrown away.
        return SegmentCost(forward=forward, backward=max(layer.backward for layer in layers), kept=0)
    flops = sum(layer.flops for layer in layers)
    if action == "nested":
        backward = _backward_nested(chain, start, stop, fsdp)
        alone = sum(layer.flops - layer.tail_flops for layer in layers if layer.saves)
        recompute = flops - layers[-1].flops + alone
    else:
        backward = _backward(chain, start, stop, fsdp)
        recompute = flops - layers[-1].tail_flops
    if action != "offload":
        return SegmentCost(
            forward=forward, backward=backward, kept=boundary, recompute_flops=recompute, time_flops=recompute
        )
    return SegmentCost(
        forward=forward,
        backward=backward,
        kept=0,
        in_flight=boundary,
        host_bytes=1 << (boundary - 1).bit_length(),  # torch's pinned blocks are powers of two
        recompute_flops=recompute,
        time_flops=recompute + (host or Host()).exposed_flops(boundary, flops),
    )


def _kept(chain: Chain, start: int, stop: int, fsdp: FSDP | None) -> SegmentCost:
    forward = backward = kept = 0
    before = _copies(chain, start)
    for index in range(start, stop):
        layer = chain.layers[index]
        whole = layer.boundary + _held(chain, index) + _in_forward(layer, fsdp)
        forward = max(forward, before + kept + layer.recompute + whole)
        earlier, kept = kept, kept + layer.saved + layer.boundary * layer.saves_input
        if layer.saves or layer.backward:
            gathered = kept + _arriving(chain, index, fsdp)
            backward = max(backward, gathered, _layer_backward(chain, index, index, earlier, kept, fsdp))
    copies = sum(layer.copies for layer in chain.layers[start:stop])
    return SegmentCost(forward=forward, backward=backward, kept=kept, copies=copies)


def _forward(chain: Chain, start: int, stop: int, fsdp: FSDP | None) -> int:
    """Most alive while a segment runs forward and keeps its boundary alone."""
    layers, copies, peak = chain.layers, _copies(chain, start), 0
    for index in range(start, stop):
        layer = layers[index]
        hidden = layers[start].boundary + (layer.boundary if index > start else 0)
        peak = max(peak, hidden + copies + layer.forward + _in_forward(layer, fsdp))
        copies += layer.copies
    return peak + _held(chain, start)


def _backward(chain: Chain, start: int, stop: int, fsdp: FSDP | None) -> int:
    """Most alive while a segment is computed again, and then while its layers run backward."""
    layers, gradient = chain.layers, _incoming(chain, stop)
    alive = layers[start].boundary
    peak = alive + _arriving(chain, stop - 1, fsdp)
    for index in range(start, stop):
        layer = layers[index]
        hidden = layer.boundary if index > start else 0
        again = layer.recompute if index < stop - 1 else layer.recompute_cut
        peak = max(peak, alive + hidden + again + gradient + _whole(chain, start, index, stop - 1, fsdp))
        earlier, alive = alive, alive + layer.saved + hidden * layer.saves_input
        peak = max(peak, _layer_backward(chain, start, index, earlier, alive, fsdp))
    return peak


def _backward_nested(chain: Chain, start: int, stop: int, fsdp: FSDP | None) -> int:
    """Most alive while the inputs of a segment's layers are computed again, and then one layer after the other."""
    layers, gradient = chain.layers, _incoming(chain, stop)
    inputs, peak = 0, layers[start].boundary + _arriving(chain, stop - 1, fsdp)
    for index in range(start, stop):
        layer = layers[index]
        kept = layer.saves or index == start  # the first input is kept in any case
        inputs += layer.boundary * kept
        if index < stop - 1:
            hidden = layer.boundary * (not kept)
            peak = max(peak, inputs + hidden + layer.forward + gradient + _whole(chain, start, index, stop - 1, fsdp))
        again = layer.recompute_cut + gradient if layer.saves else 0
        peak = max(peak, inputs + again + _whole(chain, start, index, index, fsdp))
        peak = max(peak, _layer_backward(chain, start, index, inputs, inputs + layer.saved, fsdp))
    return peak


def _layer_backward(chain: Chain, start: int, index: int, before: int, alive: int, fsdp: FSDP | None) -> int:
    """Most alive while a layer runs backward, and its gradients leave; `alive` then, and `before` without the layer."""
    layer = chain.layers[index]
    if fsdp is None:
        return alive + layer.backward
    own = layer.backward_sharded
    running = alive + (layer.backward + layer.new_gradients if own is None else own)
    leaving = before + layer.boundary + layer.new_gradients + layer.summed
    whole = _whole(chain, start, index, index, fsdp)
    above = chain.layers[index + 1].summed if index + 1 < len(chain.layers) else 0
    return max(running + whole, leaving + whole - layer.weights - above)


def _held(chain: Chain, start: int) -> int:
    """The first layer's input while layer `start` runs forward; while the first one does, it is its own."""
    return chain.held if start > 0 else 0


def _copies(chain: Chain, start: int) -> int:
    """What autocast holds of the layers in front."""
    return sum(layer.copies for layer in chain.layers[:start])


def _incoming(chain: Chain, stop: int) -> int:
    """The gradient that waits while a segment is computed again: as large as the segment's output."""
    return chain.layers[min(stop, len(chain.layers) - 1)].boundary


def _in_forward(layer: LayerCost, fsdp: FSDP | None) -> int:
    """Weights that FSDP2 has while a layer runs forward: its own, and the buffer in which they came."""
    return 0 if fsdp is None else 2 * layer.weights


def _arriving(chain: Chain, index: int, fsdp: FSDP | None) -> int:
    """What is there when the backward of a layer begins: its gradient, weights, and the buffer in which they came."""
    if fsdp is None:
        return 0
    above = chain.layers[index + 1].summed if index + 1 < len(chain.layers) else 0
    return _incoming(chain, index + 1) + 2 * chain.layers[index].weights + above


def _whole(chain: Chain, start: int, index: int, top: int, fsdp: FSDP | None) -> int:
    """Weights that FSDP2 has at hand while layer `index` is computed again, or runs backward.

    `top` is the layer whose backward has begun: the segment's last one while others are computed again, else `index`.
    Whole are both, what the segment has computed before (unless sharded again), and what is gathered ahead of `top`.
    On top of that come the buffer of a layer that was just gathered, and the gradients of the layer above, which are
    still being summed.
    """
    if fsdp is None:
        return 0
    layers = chain.layers
    whole = {index, top} if fsdp.reshard else {*range(start, index + 1), top}
    whole |= set(range(max(0, top - fsdp.prefetch), top))
    arrived = layers[index].weights if index < top else 0
    summed = layers[top + 1].summed if top + 1 < len(layers) else 0
    return sum(layers[each].weights for each in whole) + arrived + summed


def check_plan(num_layers: int, bounds: Sequence[int], actions: Sequence[str]) -> None:
    """Refuse bounds and actions that are no plan for this many layers.

    Raises:
        ValueError: naming the value.
    """
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_layers or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(f"bounds must rise from 0 to the {num_layers} layers, got {list(bounds)}")
    if len(actions) != len(bounds) - 1:
        raise ValueError(f"expected one action for each of {len(bounds) - 1} segments, got {len(actions)}")
    for action in actions:
        if action not in ACTIONS:
            raise ValueError(f"unknown action {action!r}; expected one of {list(ACTIONS)}")
