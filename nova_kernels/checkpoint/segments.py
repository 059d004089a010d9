"""Segments on a stack of layers that stays as it is: only the layers' `forward` is wrapped, on the instances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from nova_kernels.checkpoint.recompute import Segment, hidden_of

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


def checkpoint_segments(layers: nn.Module | Sequence[nn.Module], segments: int | Sequence[int]) -> CheckpointHandle:
    """Keep only each segment's input in forward and compute its activations again in backward.

    Gradients are those of the ordinary backward, bit for bit. Nothing happens while gradients are off. The layers run
    one after the other, the output of one being the input of the next; where the model changes the hidden states in
    between, a new segment begins there. Random states are restored where a dropout is on.

    Args:
        layers: the layers in order, or a model that holds them in its only outermost ModuleList (Hugging Face
            decoders do), whose forward calls them in that order.
        segments: layers per segment (the last one holds the rest), or the size of every segment.

    Returns:
        A handle: `.restore()` undoes it; as a context manager it restores on leaving. `.sizes` are the segments.

    Raises:
        ValueError: sizes that do not fit the layers; a model without exactly one stack of layers; layers that have
            segments or another checkpointing already. In forward: a KV cache inside a segment.
    """
    stack = _stack(layers) if isinstance(layers, nn.Module) else list(layers)
    for index, layer in enumerate(stack):
        if isinstance(vars(layer).get("forward"), _LayerForward):
            raise ValueError(f"checkpoint_segments: layer {index} has segments already; restore them first")
        if getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                f"checkpoint_segments: layer {index} ({type(layer).__name__}) has the model's own gradient "
                "checkpointing on; turn one of the two off"
            )
    return CheckpointHandle(stack, _sizes(len(stack), segments))


class CheckpointHandle:
    """Segments attached to layers; made by checkpoint_segments."""

    def __init__(self, layers: list[nn.Module], sizes: list[int]) -> None:
        self.sizes = sizes
        self._wrapped: list[_LayerForward] = []
        start = 0
        for size in sizes:
            segment = Segment(layers[start : start + size])
            self._wrapped += [_LayerForward(segment, layer) for layer in segment.layers]
            start += size

    def restore(self) -> None:
        """Give the layers their own forward back; calling it twice is harmless."""
        for wrapped in self._wrapped:
            wrapped.unwrap()
        self._wrapped = []

    def __enter__(self) -> CheckpointHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


class _LayerForward:
    """Takes the place of a layer's forward. A class, so that a copied model's layers refer to their own copies."""

    def __init__(self, segment: Segment, layer: nn.Module) -> None:
        self.segment = segment
        self.layer = layer
        self.own: Callable[..., Any] = layer.forward
        self.was_on_instance = "forward" in vars(layer)
        layer.forward = self

    def unwrap(self) -> None:
        if self.was_on_instance:
            self.layer.forward = self.own
        else:
            del self.layer.forward
        self.segment.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        segment = self.segment
        if not torch.is_grad_enabled() or segment.recomputing:
            return self.own(*args, **kwargs)
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
        segment.last_hidden = hidden_of(output)
        if self.layer is segment.layers[-1]:
            segment.close()
        return output


def _stack(model: nn.Module) -> list[nn.Module]:
    """The layers of a ModuleList, or of the only outermost ModuleList of a model."""
    if isinstance(model, nn.ModuleList | nn.Sequential):
        return list(model)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"checkpoint_segments: expected one stack of layers in {type(model).__name__}, found {sorted(found)}; "
            "pass the layers themselves"
        )
    return list(next(iter(found.values())))


def _sizes(num_layers: int, segments: int | Sequence[int]) -> list[int]:
    if isinstance(segments, int):
        if segments < 1:
            raise ValueError(f"checkpoint_segments: expected at least 1 layer per segment, got {segments}")
        full, rest = divmod(num_layers, segments)
        return [segments] * full + ([rest] if rest else [])
    sizes = list(segments)
    if sum(sizes) != num_layers or min(sizes, default=1) < 1:
        raise ValueError(f"checkpoint_segments: sizes {sizes} must be positive and sum to the {num_layers} layers")
    return sizes
