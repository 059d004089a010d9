"""Segments on a stack of layers that stays as it is: only the layers' `forward` is wrapped, on the instances."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from nova_kernels.checkpoint.context import being_compiled
from nova_kernels.checkpoint.cost import Action
from nova_kernels.checkpoint.frames import Segment
from nova_kernels.checkpoint.offload import Offloader
from nova_kernels.checkpoint.plan import SegmentPlan
from nova_kernels.checkpoint.stack import PLACES, has_segments, hidden_of, layers_of

CACHES = ("past_key_values", "past_key_value", "layer_past")  # names under which layers take a KV cache


def uniform_segments(num_layers: int, n: float) -> list[int]:
    """Equal segments by the rule k = sqrt(L / n), the minimiser of L / k + k n.

    Args:
        num_layers: L, at least 1.
        n: activations saved by one layer, in units of its input (bytes / bytes), positive.

    Returns:
        Segment sizes that sum to L and differ by at most one, the longer ones first: fewer boundaries are alive
        when their backward runs. k is the better of the two integers around the square root.

    Raises:
        ValueError: num_layers or n out of range.
    """
    if num_layers < 1:
        raise ValueError(f"uniform_segments: num_layers must be at least 1, got {num_layers}")
    if not n > 0 or math.isinf(n):
        raise ValueError(f"uniform_segments: n must be positive, got {n}; it is activation bytes / boundary bytes")
    below = min(max(1, math.floor(math.sqrt(num_layers / n))), num_layers)
    count = min((math.ceil(num_layers / k) + k * n, k) for k in (below, min(below + 1, num_layers)))[1]
    segments = math.ceil(num_layers / count)
    size, longer = divmod(num_layers, segments)
    return [size + 1] * longer + [size] * (segments - longer)


def checkpoint_segments(
    layers: nn.Module | Sequence[nn.Module], segments: int | Sequence[int] | SegmentPlan
) -> CheckpointHandle:
    """Keep only each segment's input in forward and compute its activations again in backward.

    Gradients are those of the ordinary backward, bit for bit. Nothing happens while gradients are off. The layers run
    one after the other, the output of one being the input of the next; where the model changes the hidden states in
    between, a new segment begins there. Random generators are set back for the second pass, and restored. Layers that
    are compiled, or sharded by fully_shard, are so before this is called, and the model around them is not compiled. A
    deep copy of a layer that `layer.compile()` has compiled is neither compiled nor in a segment.

    Args:
        layers: the layers in order, or a model that holds them in its only outermost ModuleList (Hugging Face
            decoders do), whose forward calls them in that order.
        segments: layers per segment (the last one holds the rest), the size of every segment, or a plan that also
            says which segments are kept, nested or offloaded.

    Returns:
        A handle: `.restore()` undoes it; as a context manager it restores on leaving. `.sizes` are the segments.

    Raises:
        ValueError: sizes that do not fit the layers; a model without exactly one stack of layers; layers that have
            segments or another checkpointing already, or stand in the list twice. In forward: a KV cache inside a
            segment, or an input that is no tensor where it has to be moved or computed again (offload, nested).
        RuntimeError: in forward, a layer or a model that is compiled around its segments.
    """
    stack = layers_of(layers, "checkpoint_segments")
    for index, layer in enumerate(stack):
        if any(layer is before for before in stack[:index]):
            raise ValueError(f"checkpoint_segments: layer {index} is in the list twice; a layer runs once in a stack")
        if has_segments(layer):
            raise ValueError(f"checkpoint_segments: layer {index} has segments already; restore them first")
        if getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                f"checkpoint_segments: layer {index} ({type(layer).__name__}) has the model's own gradient "
                "checkpointing on; turn one of the two off"
            )
    if isinstance(segments, SegmentPlan):
        if segments.num_layers != len(stack):
            raise ValueError(
                f"checkpoint_segments: the plan is for {segments.num_layers} layers, the model has {len(stack)}"
            )
        return CheckpointHandle(stack, segments.sizes, segments.actions, reshard=segments.reshard)
    sizes = _sizes(len(stack), segments)
    return CheckpointHandle(stack, sizes, ["segment"] * len(sizes), reshard=False)


class CheckpointHandle:
    """Segments attached to layers; made by checkpoint_segments."""

    def __init__(self, layers: list[nn.Module], sizes: list[int], actions: Sequence[Action], *, reshard: bool) -> None:
        self.sizes = sizes
        self.actions = tuple(actions)
        self._wrapped: list[_LayerForward] = []
        offloader = Offloader()
        previous: Segment | None = None
        start = 0
        for size, action in zip(sizes, self.actions, strict=True):
            members = layers[start : start + size]
            start += size
            if action == "keep":
                continue
            previous = Segment(members, action, offloader, previous, reshard=reshard)
            self._wrapped += [_LayerForward(previous, layer) for layer in members]

    def restore(self) -> None:
        """Give the layers their own forward back; calling it twice is harmless."""
        for wrapped in reversed(self._wrapped):
            wrapped.unwrap()
        self._wrapped = []

    def __enter__(self) -> CheckpointHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


class _LayerForward:
    """Takes the place of a layer's forward, or of the compiled call that `layer.compile()` has made.

    A class, so that a copied model's layers refer to their own copies.
    """

    def __init__(self, segment: Segment, layer: nn.Module) -> None:
        self.segment = segment
        self.layer = layer
        self.place = PLACES[0] if layer._compiled_call_impl is None else PLACES[1]
        self.own: Callable[..., Any] = getattr(layer, self.place)
        self.was_on_instance = self.place in vars(layer)
        setattr(layer, self.place, self)

    def unwrap(self) -> None:
        if self.was_on_instance:
            setattr(self.layer, self.place, self.own)
        else:
            delattr(self.layer, self.place)
        self.segment.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        segment = self.segment
        if segment.rerun.running:
            return segment.rerun.forward(self.own)
        if not torch.is_grad_enabled():
            return self.own(*args, **kwargs)
        if being_compiled():
            raise RuntimeError(
                f"checkpoint_segments: {type(self.layer).__name__} has segments and is being compiled; compile each "
                "layer before checkpoint_segments, with layer.compile(), and not the model around them"
            )
        for name in CACHES:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"checkpoint_segments: {type(self.layer).__name__} was given a KV cache ({name}), which would be "
                    "filled a second time in backward; pass use_cache=False"
                )
        frame, call = segment.begin_or_continue(self.layer, args, kwargs)
        try:
            with frame.recording(call):
                output = self.own(*args, **kwargs)
        except BaseException:
            segment.close()
            raise
        if self.layer is segment.layers[-1]:
            segment.close()
        else:
            segment.continue_from(hidden_of(output))
        return output


def _sizes(num_layers: int, segments: int | Sequence[int]) -> list[int]:
    if isinstance(segments, bool | float | str):
        raise TypeError(f"checkpoint_segments: expected layers per segment, sizes or a plan, got {segments!r}")
    if not isinstance(segments, Sequence):
        segments = operator.index(segments)
        if segments < 1:
            raise ValueError(f"checkpoint_segments: expected at least 1 layer per segment, got {segments}")
        full, rest = divmod(num_layers, segments)
        return [segments] * full + ([rest] if rest else [])
    sizes = [operator.index(size) for size in segments]
    if sum(sizes) != num_layers or min(sizes, default=1) < 1:
        raise ValueError(
            f"checkpoint_segments: sizes {sizes} must be positive and sum to the {num_layers} layers; they sum to "
            f"{sum(sizes)}: change them, or give one number of layers per segment"
        )
    return sizes
