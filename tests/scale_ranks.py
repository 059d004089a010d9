"""What the ranks of a training hold, byte by byte; every process of a test runs `occupied`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nova_train import loop
from nova_train.stages import sft


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were there, or are born inside, and are alive.

    FSDP2 frees what it gathered by resizing it, and allocates it again so: a storage counts what it holds now.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self.where = ""
        self._sizes: dict[int, int] = {}  # of those that nobody resizes
        self._empty: dict[int, Any] = {}  # those that FSDP2 may
        self._sum = 0
        for tensor in there:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value, resized=func is torch.ops.aten.empty.memory_format)
        now = self._sum + sum(storage.nbytes() for each in list(self._empty.values()) if (storage := each()))
        if now > self.peak:
            self.peak, self.where = now, str(func)
        return result

    def _add(self, tensor: Tensor, *, resized: bool = False) -> None:
        storage = local(tensor).untyped_storage()
        address = storage._cdata
        if address in self._sizes or address in self._empty:
            return
        if resized:
            self._empty[address] = weakref.ref(storage, lambda _: self._empty.pop(address, None))
        else:
            self._sizes[address] = storage.nbytes()
            self._sum += storage.nbytes()
            weakref.finalize(storage, self._forget, address).atexit = False

    def _forget(self, address: int) -> None:
        self._sum -= self._sizes.pop(address)


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct storages: a tied weight, or a shard within its padding, counts once."""
    sizes = {s._cdata: s.nbytes() for s in (local(tensor).untyped_storage() for tensor in tensors)}
    return sum(sizes.values())


def occupied(folder: Path, cases: Mapping[str, dict[str, Any]]) -> None:
    """Two optimiser steps of SFT for each case; what the second one took is saved as `<name>-<rank>.pt`."""
    own = loop.train_step
    for name, options in cases.items():
        found: dict[str, Any] = {}
        live: list[LiveBytes] = []

        def step(run: loop.Training[Any], found: Any = found, live: Any = live) -> int:
            if not live:
                live.append(LiveBytes([*run.model.parameters(), *run.model.buffers()]))
            live[0].peak = 0
            update, meter = run.optimizers.step, run.meter.row

            def row(tokens: int) -> Any:
                found["tokens"] = tokens  # of the last one, when all gradients are there
                return meter(tokens)

            def counted(factor: float) -> None:
                trained = list(run.model.parameters())
                found["weights"] = storage_bytes(trained)
                found["gradients"] = storage_bytes(p.grad for p in trained if p.grad is not None)
                update(factor)
                states = (s for o in run.optimizers.by_name.values() for s in o.state.values())
                found["AdamW"] = storage_bytes(s[key] for s in states for key in ("exp_avg", "exp_avg_sq"))

            run.optimizers.step, run.meter.row = counted, row
            try:
                with live[0]:
                    tokens = own(run)
            finally:
                del run.optimizers.step, run.meter.row
            found["peak"], found["where"] = live[0].peak, live[0].where
            return tokens

        loop.train_step = step
        try:
            sft.run(sft.SFTConfig(output_dir=str(folder / name), **options))
        finally:
            loop.train_step = own
        rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
        torch.save(found, folder / f"{name}-{rank}.pt")
