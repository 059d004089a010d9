"""Boundaries wait in pinned host memory between forward and backward; they are copied beside the computation.

    compute   | segment 1 | segment 2 | segment 3 | loss | backward 3 | backward 2 | backward 1
    side      | 1 -> host | 2 -> host | 3 -> host |      | host -> 2  | host -> 1  |

At most two boundaries are on the device: the one in use and one on its way. One that has not been let go yet when
backward wants it is used as it is. Three rules make the copies safe; streams wait for events, the host for nothing.

1. The side stream waits for the compute stream before each copy: the source is complete, the target's memory is free.
2. The compute stream waits for a copy before the result is read.
3. The device tensor of a copy is referenced until the compute stream has waited for the copy. Device memory belongs to
   the compute stream's pool, so from then on any reuse of it comes after the copy. `record_stream` would do as well,
   but the allocator would then find out by polling, and the peak would depend on the timing of the host.

Host memory needs no pool of ours. torch's caching host allocator keeps freed pinned blocks for reuse, and a
non-blocking copy registers its stream with the block: it is not handed out again until that stream has got past the
point where the block was freed. Blocks are as large as the next power of two.

On a CPU there is no other memory to go to: the boundary itself is kept.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class CudaTransport:
    """Copies on a stream of their own; streams and events are opaque to the offloader."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)

    def stream(self) -> torch.cuda.Stream:
        """The compute stream: the current one."""
        return torch.cuda.current_stream(self.device)

    def to_host(self, source: Tensor, compute: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
        """Start a copy into a new pinned tensor: (the copy, the event of its end)."""
        try:
            target = torch.empty_like(source, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"Offloader: no {source.nbytes:,} bytes of pinned host memory for a boundary of shape "
                f"{list(source.shape)}; offload fewer segments, or tell the planner how much there is"
            ) from error
        return target, self._copy(source, target, compute)

    def to_device(self, source: Tensor, compute: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
        """Start a copy into memory of the compute stream: (the copy, the event of its end)."""
        with torch.cuda.stream(compute):
            target = torch.empty_like(source, device=self.device)
        return target, self._copy(source, target, compute)

    def wait(self, copied: torch.cuda.Event, compute: torch.cuda.Stream) -> None:
        """What the compute stream is given from now on runs after the copy."""
        compute.wait_event(copied)

    def _copy(self, source: Tensor, target: Tensor, compute: torch.cuda.Stream) -> torch.cuda.Event:
        self._side.wait_stream(compute)
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
        return self._side.record_event()


class Stored:
    """One boundary that waits for backward; made by Offloader.store. Dropping it frees its host memory."""

    def __init__(self, offloader: Offloader, waiting: Tensor, requires_grad: bool, stream: Any) -> None:
        self.waiting = waiting  # on the host; on a CPU the boundary itself
        self.version = waiting._version
        self.requires_grad = requires_grad
        self.stream = stream  # of the forward pass; autograd runs the backward pass on it, too
        self._offloader = offloader

    def prefetch(self) -> None:
        """Start the copy back to the device, for a fetch to come: of the boundary that backward needs next.

        Raises:
            RuntimeError: a stored tensor was changed in place.
        """
        self._offloader._prefetch(self)

    def fetch(self) -> Tensor:
        """The boundary as it was, detached; may be called again.

        Dtype, shape, device and requires_grad are those of the stored tensor, and so are its strides unless they leave
        gaps or overlap.

        Raises:
            RuntimeError: a stored tensor was changed in place.
        """
        return self._offloader._fetch(self).detach().requires_grad_(self.requires_grad)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A copy that may still be running, and the device tensor that it reads or writes."""

    stored: weakref.ref[Stored]
    tensor: Tensor
    version: int
    stream: Any
    copied: Any


class Offloader:
    """Stores boundaries and hands them out again, with at most one copy under way.

    Several forward passes may come before their backward passes. A boundary is fetched on the stream on which it was
    stored, as autograd does by itself. CUDA tensors are moved, those on a CPU or the meta device are kept.

    Args:
        transport: who copies; the default is a stream of our own on the device of the first boundary.
    """

    def __init__(self, transport: CudaTransport | None = None) -> None:
        self._flight: _Flight | None = None
        self._transport = transport

    def __reduce__(self) -> tuple[Any, ...]:
        return Offloader, ()  # a copied model begins with nothing stored

    def __del__(self) -> None:
        # A backward pass that failed may leave a copy that still writes to memory which is about to be free.
        if self._flight is not None and self._transport is not None:
            self._transport.wait(self._flight.copied, self._flight.stream)

    def store(self, hidden: Tensor) -> Stored:
        """Start the copy of a boundary to the host, and return at once.

        The tensor must not be changed in place. It stays alive until settle or the next copy.

        Args:
            hidden: float [...], dense; with or without requires_grad.

        Raises:
            TypeError: not a tensor.
            ValueError: not a floating-point dtype, not a plain strided tensor, on a device of another kind, or not on
                the device of the boundaries before.
            RuntimeError: the boundary before was changed in place; no pinned host memory left.
        """
        _check(hidden)
        source = hidden.detach()
        if self._transport is None and hidden.is_cuda:
            self._transport = CudaTransport(hidden.device)
        if self._transport is None:
            return Stored(self, source, hidden.requires_grad, None)
        if hidden.device != self._transport.device:
            raise ValueError(
                f"Offloader: the hidden states are on {hidden.device}, those before were on {self._transport.device}; "
                "the layers of one stack run on one device. Attach the segments anew after moving the model"
            )
        self.settle()
        if torch.empty_like(source, device="meta").stride() != source.stride():
            source = source.clone()  # without gaps and overlaps, so that the copy is one block of bytes
        stream = self._transport.stream()
        waiting, copied = self._transport.to_host(source, stream)
        stored = Stored(self, waiting, hidden.requires_grad, stream)
        self._flight = _Flight(weakref.ref(stored), source, source._version, stream, copied)
        return stored

    def settle(self) -> None:
        """Let go of the device tensor of the copy under way, if any: the compute stream waits for the copy first.

        Called when a segment's forward pass is queued, it gives the copy that long, and the tensor is not alive in what
        follows. Without it the same happens before the next copy begins.

        Raises:
            RuntimeError: the tensor was changed in place.
        """
        self._land()

    def _prefetch(self, stored: Stored) -> None:
        if self._transport is None or (self._flight is not None and self._flight.stored() is stored):
            return
        self.settle()
        target, copied = self._transport.to_device(stored.waiting, stored.stream)
        self._flight = _Flight(weakref.ref(stored), target, target._version, stored.stream, copied)

    def _fetch(self, stored: Stored) -> Tensor:
        if self._transport is None:
            if stored.waiting._version != stored.version:
                raise _changed_in_place(stored.waiting)
            return stored.waiting
        landed = self._land(stored)
        if landed is not None:
            return landed
        target, copied = self._transport.to_device(stored.waiting, stored.stream)
        self._transport.wait(copied, stored.stream)
        return target

    def _land(self, wanted: Stored | None = None) -> Tensor | None:
        """End the flight under way; its tensor if it is the wanted one."""
        flight, self._flight = self._flight, None
        if flight is None or self._transport is None:
            return None
        changed = flight.tensor._version != flight.version
        self._transport.wait(flight.copied, flight.stream)
        if changed:
            raise _changed_in_place(flight.tensor)
        return flight.tensor if wanted is not None and flight.stored() is wanted else None


def _check(hidden: Tensor) -> None:
    if not isinstance(hidden, Tensor):
        raise TypeError(f"Offloader: expected a tensor of hidden states, got {type(hidden).__name__}")
    if hidden.layout is not torch.strided or hidden.is_nested or is_traceable_wrapper_subclass(hidden):
        raise ValueError(
            f"Offloader: expected a plain dense tensor, got a {type(hidden).__name__} of layout {hidden.layout}; use "
            'the action "segment" for this boundary'
        )
    if not hidden.is_floating_point():
        raise ValueError(f"Offloader: expected floating-point hidden states, got {hidden.dtype}")
    if hidden.device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(
            f"Offloader: cannot offload from {str(hidden.device)!r}; expected a CUDA device or the CPU. Use the action "
            '"segment" instead of "offload"'
        )


def _changed_in_place(boundary: Tensor) -> RuntimeError:
    return RuntimeError(
        f"Offloader: a stored boundary of shape {list(boundary.shape)} was changed in place; a layer must not write to "
        "its input, which is needed again in backward"
    )
