"""Bytes that are alive, exactly: every storage from its first appearance to its end.

    with StorageTracker() as tracker:
        loss(model).backward()
    tracker.peak

A storage is counted when an operation inside the `with` returns it and none of the operation's inputs had it: views and
in-place results are not new, weights and inputs from before are not counted. It ends when the last tensor or graph node
that holds it is gone. Backward counts, too. Works on every device, and without memory on the meta device.

Not seen: what an operator allocates and frees inside itself (workspaces; the chunks of a torch.library operator), what
an allocator rounds up, sparse tensors, tensors made from Python data (`torch.tensor`) or by other threads, and storages
resized past the dispatcher until an operation returns them. Every operation takes some microseconds longer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageTracker(TorchDispatchMode):
    """Context manager: counts the bytes of the storages that are born inside and alive."""

    current: int  # bytes alive now
    peak: int  # most bytes alive at once since the start, or the last reset_peak()

    def __init__(self, device: str | None = None) -> None:
        """Count storages on every kind of device, or on this kind alone ("cuda" leaves pinned host memory out)."""
        super().__init__()
        self._device = device
        self.current = 0
        self.peak = 0
        self.totals: list[int] = []  # bytes alive after each operation that made a storage
        self._sizes: dict[int, int] = {}  # address of a living storage -> bytes

    def reset_peak(self) -> None:
        """Begin a new phase: the peak is what is alive now."""
        self.peak = self.current
        self.totals = []

    def bytes_of(self, tensor: Tensor) -> int:
        """How much of `current` is this tensor's storage: 0 if it was born outside."""
        return self._sizes.get(tensor.untyped_storage()._cdata, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        born = []
        for storage in _storages(result):
            if storage._cdata not in self._sizes:
                born.append(storage)
            elif storage.nbytes() != self._sizes[storage._cdata]:
                self._resize(storage)
        if born:
            before = {storage._cdata for storage in _storages((args, kwargs))}
            for storage in born:
                if storage._cdata not in before and storage._cdata not in self._sizes and self._counts(storage):
                    self._count(storage)
            self.totals.append(self.current)
        return result

    def _counts(self, storage: torch.UntypedStorage) -> bool:
        return self._device is None or storage.device.type == self._device

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, num_bytes = storage._cdata, storage.nbytes()
        self._sizes[address] = num_bytes
        self.current += num_bytes
        self.peak = max(self.peak, self.current)
        # torch keeps the Python object of a storage for as long as the storage lives.
        weakref.finalize(storage, self._forget, address).atexit = False

    def _resize(self, storage: torch.UntypedStorage) -> None:
        self.current += storage.nbytes() - self._sizes[storage._cdata]
        self.peak = max(self.peak, self.current)
        self._sizes[storage._cdata] = storage.nbytes()

    def _forget(self, address: int) -> None:
        self.current -= self._sizes.pop(address)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value.untyped_storage()
