"""A segment while its layers run: to which frame a call belongs, and where that frame's boundary waits.

A frame begins with a segment's first call and goes on while each call takes the output of the one before. In a nested
segment every call has its own frame, and all of one pass share a nest.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from nova_kernels.checkpoint.context import Surroundings
from nova_kernels.checkpoint.cost import Action
from nova_kernels.checkpoint.offload import Offloader, Stored
from nova_kernels.checkpoint.recompute import Boundary, Call, Frame, Held, Nest, Rerun
from nova_kernels.checkpoint.stack import Output, hidden_states


class Segment:
    """Consecutive layers that are computed again together, and what is known about them while they run."""

    def __init__(
        self,
        layers: list[nn.Module],
        action: Action,
        offloader: Offloader,
        previous: Segment | None,
        *,
        reshard: bool,
    ) -> None:
        self.layers = layers
        self.rerun = Rerun(reshard=reshard)
        self._last: Output | None = None  # of the last call; the next call takes it, or a frame begins
        self._action = action
        self._offloader = offloader
        self._previous = previous  # the segment in front, if it is computed again, too
        self._stored: weakref.ref[Stored] | None = None  # the latest boundary that was offloaded
        self._frame: Frame | None = None
        self._nest: Nest | None = None

    def begin_or_continue(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Frame, Call]:
        """The frame this call belongs to, and the call without its hidden states."""
        inputs = (*args, *kwargs.values())
        device = next((value.device for value in inputs if isinstance(value, Tensor)), torch.device("cpu"))
        surroundings = Surroundings(device)
        hidden = None if self._last is None else self._last.among(inputs)
        if self._frame is not None and hidden is not None:
            call = Call.without(layer, args, kwargs, hidden, surroundings)
            if self._action == "nested":
                self._require_tensor(layer, hidden)
                self._frame = self._nested_frame(call, self._frame)
            return self._frame, call
        hidden = hidden_states(args, kwargs)
        if self._action in ("nested", "offload"):
            self._require_tensor(layer, hidden)
        ahead = None if self._previous is None or self._previous._stored is None else self._previous._stored()
        boundary = None if hidden is None else self._boundary(hidden)
        self._nest = None
        self._frame = Frame(self.rerun, boundary, ahead)
        return self._frame, Call.without(layer, args, kwargs, hidden, surroundings)

    def __getstate__(self) -> dict[str, Any]:
        """Without a pass under way: a copied or saved model begins with none."""
        return vars(self) | {"_last": None, "_stored": None, "_frame": None, "_nest": None}

    def continue_from(self, hidden: Any) -> None:
        """These hidden states are what the last call returned."""
        self._last = Output(hidden)

    def close(self) -> None:
        """The next call begins a new frame; a copy of the boundary has had the time of the segment."""
        if self._action == "offload":
            self._offloader.settle()
        self._frame = self._nest = self._last = None

    def _boundary(self, hidden: Tensor) -> Boundary:
        if self._action != "offload" or not self._has_backward(hidden):
            return Held(hidden)
        stored = self._offloader.store(hidden)
        self._stored = weakref.ref(stored)
        return stored

    def _has_backward(self, hidden: Tensor) -> bool:
        return hidden.requires_grad or any(p.requires_grad for layer in self.layers for p in layer.parameters())

    def _nested_frame(self, call: Call, before: Frame) -> Frame:
        if self._nest is None:
            self._nest = Nest(before, self.rerun)
        return Frame(self.rerun, self._nest.add(call), None)

    def _require_tensor(self, layer: nn.Module, hidden: Any) -> None:
        if not isinstance(hidden, Tensor):
            raise ValueError(
                f"checkpoint_segments: the input of {type(layer).__name__} is no tensor of its own, so it cannot be "
                f'{"offloaded" if self._action == "offload" else "computed again"}; use the action "segment"'
            )
