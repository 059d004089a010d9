"""Activations of several layers, thrown away in forward and computed again in backward.

A frame is one segment of one forward pass. While its layers run, every tensor that autograd saves is replaced by its
number; the frame keeps its boundary (the first input) and the calls. The first number that backward asks for runs the
calls again, up to the last tensor that was saved, collects the tensors, and hands each out once.

In a nested segment every layer has a frame of its own, and the boundaries inside are not kept: the first that is asked
for runs the layers once more, keeps nothing but their inputs, and hands these out.

The graph is the one of the first forward: the later ones only supply tensors. So there are no restrictions on
which inputs require gradients, and gradients are those of the ordinary backward, bit for bit, as long as the layers
compute the same thing twice. For that, autocast is repeated and the random generators are set back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from nova_kernels.checkpoint.context import Surroundings
from nova_kernels.checkpoint.offload import Stored
from nova_kernels.checkpoint.stack import hidden_of, without_graph


class Previous:
    """Stands for the hidden states in the recorded arguments of a call."""


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's call; Previous() where its hidden states stood, or none where they are no plain tensor."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    surroundings: Surroundings

    def arguments(self, hidden: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with for these hidden states."""
        args = tuple(hidden if isinstance(value, Previous) else value for value in self.args)
        return args, {name: hidden if isinstance(value, Previous) else value for name, value in self.kwargs.items()}

    def run(self, hidden: Any) -> Any:
        """The layer's hidden states for this input."""
        args, kwargs = self.arguments(hidden)
        with self.surroundings.again():
            return hidden_of(self.layer(*args, **kwargs))

    @classmethod
    def without(
        cls,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: Any,
        surroundings: Surroundings,
    ) -> Call:
        """The call with Previous() wherever `hidden` stands; a hidden of None stands nowhere.

        Other tensors are kept without their graphs: one may come from an earlier layer, whose graph holds this call.
        """

        def recorded(value: Any) -> Any:
            if hidden is not None and value is hidden:
                return Previous()
            return tree_map_only(Tensor, without_graph, value)

        named = {name: recorded(value) for name, value in kwargs.items()}
        return cls(layer, tuple(map(recorded, args)), named, surroundings)


class Boundary(Protocol):
    """Where a frame's hidden states come from when it is computed again."""

    def fetch(self) -> Tensor: ...


class Held:
    """A boundary that stays where it is."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden.detach().requires_grad_(hidden.requires_grad)
        self._version = self._hidden._version

    def fetch(self) -> Tensor:
        if self._hidden._version != self._version:
            raise RuntimeError(
                f"checkpoint_segments: the input {list(self._hidden.shape)} of a segment was changed in place after it "
                "was kept; a layer must not write to its input, which is needed again in backward"
            )
        return self._hidden


class Nest:
    """The layers of a nested segment in one forward pass, and the one input of theirs that is kept."""

    def __init__(self, frame: Frame, rerun: Rerun) -> None:
        self._frame = frame  # of the first layer: it has the boundary
        self._rerun = rerun
        self._calls: list[Call] = list(frame.calls)
        self._inputs: list[weakref.ref[Inner]] = []  # of the second layer, the third, ...

    def add(self, call: Call) -> Inner:
        """The boundary in front of the next layer."""
        inner = Inner(self)
        self._calls.append(call)
        self._inputs.append(weakref.ref(inner))
        return inner

    def compute_inputs(self) -> None:
        """Run the layers once more, as far as somebody waits for their outputs."""
        waiting = [inner if (inner := ref()) is not None and inner.hidden is None else None for ref in self._inputs]
        while waiting and waiting[-1] is None:
            waiting.pop()
        hidden = self._frame.first_input()
        with self._rerun.packing(lambda _: None):
            for call, inner in zip(self._calls, waiting, strict=False):
                hidden = without_graph(self._rerun.run(call, hidden))
                self._rerun.done_with(call.layer)
                if inner is not None:
                    inner.hidden = hidden


class Inner:
    """A boundary inside a nested segment: there once it is asked for, gone with the frame that asked."""

    def __init__(self, nest: Nest) -> None:
        self._nest = nest
        self.hidden: Tensor | None = None

    def fetch(self) -> Tensor:
        if self.hidden is None:
            self._nest.compute_inputs()
        assert self.hidden is not None, "computing the inputs of a nest fills every one that is waited for"
        return self.hidden


class Rerun:
    """What the layers of a segment share while they are computed again.

    A layer is called as a whole, since fully_shard works by hooks on it; but what its own forward is given is what it
    was given the first time, whatever hooks in front of it do, and only what that saves counts.
    """

    def __init__(self, *, reshard: bool) -> None:
        self._pack: Callable[[Tensor], Any] | None = None
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._reshard = reshard

    @property
    def running(self) -> bool:
        """Whether the layers are being computed again."""
        return self._pack is not None

    @contextmanager
    def packing(self, pack: Callable[[Tensor], Any]) -> Iterator[None]:
        """The layers are computed again inside the `with`, and what they save goes to `pack`."""
        self._pack = pack
        try:
            yield
        finally:
            self._pack, self._arguments = None, ((), {})

    def run(self, call: Call, hidden: Any) -> Any:
        """The hidden states that a call returns for this input."""
        self._arguments = call.arguments(hidden)
        return call.run(hidden)

    def forward(self, own: Callable[..., Any]) -> Any:
        """A layer's own forward, within its call."""
        args, kwargs = self._arguments
        assert self._pack is not None, "called while the layers are computed again"
        with saved_tensors_hooks(self._pack, _refuse):
            return own(*args, **kwargs)

    def done_with(self, layer: nn.Module) -> None:
        """Shard a layer of FSDP2 again, where the plan says so: its backward will gather it once more."""
        if self._reshard and isinstance(layer, torch.distributed.fsdp.FSDPModule):
            layer.reshard()


class Frame:
    """One segment of one forward pass, or one layer of a nested one."""

    def __init__(self, rerun: Rerun, boundary: Boundary | None, ahead: Stored | None) -> None:
        self.calls: list[Call] = []
        self._boundary = boundary
        self._ahead = None if ahead is None else weakref.ref(ahead)  # the boundary that backward needs next
        self._rerun = rerun
        self._saved: list[tuple[torch.Size, torch.dtype]] = []  # of every tensor saved in forward, in order
        self._recomputed: dict[int, Tensor] = {}

    @contextmanager
    def recording(self, call: Call) -> Iterator[None]:
        """Add a call; what autograd saves inside the `with` is thrown away and can be had again."""
        self.calls.append(call)
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def first_input(self) -> Tensor | None:
        """The hidden states that the first call begins with; None where they stand in its arguments."""
        hidden = None if self._boundary is None else self._boundary.fetch()
        if self._ahead is not None and (stored := self._ahead()) is not None:
            stored.prefetch()
        return hidden

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
            if len(again) == len(self._saved) or (tensor.shape, tensor.dtype) != self._saved[len(again)]:
                raise _changed(
                    len(self.calls), f"saved {list(tensor.shape)} as tensor {len(again)} when computed again"
                )
            again.append(tensor.detach())
            if len(again) == len(self._saved):
                raise _Complete

        hidden = self.first_input()
        with suppress(_Complete), self._rerun.packing(collect):
            for call in self.calls:
                hidden = self._rerun.run(call, hidden)
                self._rerun.done_with(call.layer)  # not with the last one, in which the last tensor is saved
        if len(again) < len(self._saved):
            raise _changed(len(self.calls), f"saved {len(self._saved)} tensors in forward and {len(again)} again")
        self._recomputed = dict(enumerate(again))


class _Complete(BaseException):
    """All tensors are there; what the layers would still compute is not needed. Not an Exception: nobody catches it."""


def _changed(num_layers: int, what: str) -> RuntimeError:
    return RuntimeError(
        f"checkpoint_segments: a segment of {num_layers} layers {what}; its layers must do the same thing twice "
        "(check for state that forward changes, and for random numbers from a generator of its own)"
    )


def _refuse(_: None) -> Tensor:
    raise RuntimeError("checkpoint_segments: backward through a recomputation; its graph supplies tensors only")
