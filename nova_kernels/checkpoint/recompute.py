"""Activations of several layers, thrown away in forward and computed again in backward.

A frame is one segment of one forward pass. While its layers run, every tensor that autograd saves is replaced by its
number; the frame keeps the calls (the first one with its input, the boundary) and nothing else. The first number that
backward asks for runs the calls again, collects the tensors that are saved this time, and hands each out once.

The graph is the one of the first forward: the second one only supplies tensors. So there are no restrictions on
which inputs require gradients, and gradients are those of the ordinary backward, bit for bit, as long as the layers
compute the same thing twice. Random numbers repeat if the generators are set back, which is done where a dropout is on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Previous:
    """Stands for the previous layer's hidden states in the recorded arguments of a call."""


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's call; Previous() where its input was the output of the call before."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Segment:
    """Consecutive layers, and what is known about them while they run."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self.recomputing = False
        self.last_hidden: Any = None  # what the last call returned; the next call continues it, or a frame begins
        self._frame: Frame | None = None

    def begin_or_continue(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Frame, Call]:
        """The frame this call belongs to, and the call with the previous layer's output left out of it."""
        last = self.last_hidden
        inputs = (*args, *kwargs.values())
        if self._frame is not None and any(value is last for value in inputs):
            link = Previous()
            args = tuple(link if value is last else value for value in args)
            kwargs = {name: link if value is last else value for name, value in kwargs.items()}
        else:
            device = next((value.device for value in inputs if isinstance(value, Tensor)), torch.device("cpu"))
            self._frame = Frame(self, device)
        return self._frame, Call(layer, args, kwargs)

    def close(self) -> None:
        """The next call begins a new frame."""
        self._frame = self.last_hidden = None


class Frame:
    """One segment of one forward pass."""

    def __init__(self, segment: Segment, device: torch.device) -> None:
        self.calls: list[Call] = []
        self._segment = segment
        self._saved: list[tuple[torch.Size, torch.dtype]] = []  # of every tensor saved in forward, in order
        self._recomputed: dict[int, Tensor] = {}
        self._autocast = [_autocast_state(kind) for kind in sorted({"cpu", device.type})]
        self._generators = _generator_states(device) if has_dropout(segment.layers) else None
        self._device = device

    @contextmanager
    def recording(self, call: Call) -> Iterator[None]:
        """Add a call; what autograd saves inside the `with` is thrown away and can be had again."""
        self.calls.append(call)
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> int:
        self._saved.append((tensor.shape, tensor.dtype))
        return len(self._saved) - 1

    def _unpack(self, index: int) -> Tensor:
        if index not in self._recomputed:
            self._recompute()
        return self._recomputed.pop(index)

    def _recompute(self) -> None:
        again: list[Tensor] = []

        def collect(tensor: Tensor) -> None:
            again.append(tensor.detach())

        def refuse(_: None) -> Tensor:
            raise RuntimeError("checkpoint_segments: backward through a recomputation; its graph supplies tensors only")

        self._segment.recomputing = True
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                for kind, dtype, enabled, cache in self._autocast:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
                stack.enter_context(_generators_set_to(self._generators, self._device))
                stack.enter_context(saved_tensors_hooks(collect, refuse))
                self._run_calls()
        finally:
            self._segment.recomputing = False
        if [(tensor.shape, tensor.dtype) for tensor in again] != self._saved:
            raise RuntimeError(
                f"checkpoint_segments: a segment of {len(self.calls)} layers saved {len(self._saved)} tensors in "
                f"forward and {len(again)} others when computed again; its layers must do the same thing twice "
                "(check for state changed in forward, and for random numbers outside of dropout modules)"
            )
        self._recomputed = dict(enumerate(again))

    def _run_calls(self) -> None:
        hidden: Any = None
        for call in self.calls:
            args = tuple(hidden if isinstance(value, Previous) else value for value in call.args)
            kwargs = {name: hidden if isinstance(value, Previous) else value for name, value in call.kwargs.items()}
            hidden = hidden_of(call.layer(*args, **kwargs))


def hidden_of(output: Any) -> Any:
    """A layer's hidden states: its output, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


def has_dropout(layers: list[nn.Module]) -> bool:
    """Whether a dropout is on: a dropout module with p > 0, or a module's own rate (attention_dropout = 0.1)."""
    return any(_drops(module) for layer in layers for module in layer.modules() if module.training)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("dropout" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())


def _autocast_state(kind: str) -> tuple[str, torch.dtype, bool, bool]:
    return (
        kind,
        torch.get_autocast_dtype(kind),
        torch.is_autocast_enabled(kind),
        torch.is_autocast_cache_enabled(),
    )


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _generators_set_to(states: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    """The random generators as they were when the segment began; afterwards as they are now."""
    if states is None:
        yield
        return
    on_cpu, on_device = states
    with torch.random.fork_rng(devices=[device] if on_device is not None else []):
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        yield
