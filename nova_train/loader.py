"""Optimiser steps from samples: packed rows, or shuffled items. A source's position is one counter.

What a step holds is a pure function of (data, options, seed, epoch): the same when resumed, and whatever the number of
micro-batches it is cut into. `len()` is the exact number of optimiser steps. No sample is left out or repeated within
an epoch: the last step of items may be smaller; for the last step of packs the fullest packs are halved.
"""

from __future__ import annotations

import hashlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from nova_kernels.packing import PackedBatch, PackSampler, pack_samples
from nova_train.config import fingerprint
from nova_train.datafiles import DataError
from nova_train.mesh import Mesh, Repeat, mapped

ItemT = TypeVar("ItemT")
UnitT = TypeVar("UnitT")
BatchT = TypeVar("BatchT")


class _EpochLoader(ABC, Generic[UnitT, BatchT]):
    """The counter, its limits, and how an epoch's units (packs or items) are cut into steps and micro-batches.

    A subclass sets what its `_plan` needs, then calls `__init__`, which plans the first epoch.
    """

    def __init__(
        self,
        *,
        per_step: int,
        per_micro_batch: int,
        epochs: float | None,
        max_steps: int | None,
        identity: str,
        mesh: Mesh,
    ) -> None:
        name = type(self).__name__
        if per_step < 1 or per_micro_batch < 1:
            raise ValueError(f"{name}: a step and a micro-batch hold at least 1, got {per_step} and {per_micro_batch}")
        if epochs is not None and epochs <= 0:
            raise ValueError(f"{name}: epochs must be positive or None (for ever), got {epochs}")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"{name}: max_steps must be at least 1 or None, got {max_steps}")
        self._planned = 0  # the epoch that _units belong to
        self._units = self._plan(0)
        if not self._units:
            raise DataError(f"{name}: empty data set: nothing to load")
        self.steps_per_epoch = math.ceil(len(self._units) / per_step)
        self._per_step, self._per_micro_batch, self._mesh = per_step, per_micro_batch, mesh
        # 1e-9: 0.07 epochs of 100 steps are 7 steps, although 0.07 * 100 > 7 in floating point.
        self._total = max_steps or (None if epochs is None else math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self._identity = identity
        self._step = 0

    def __len__(self) -> int:
        """Optimiser steps in all, those already taken included; `max_steps` goes before epochs."""
        if self._total is None:
            raise TypeError(f"{type(self).__name__} has no length: epochs=None goes on for ever")
        return self._total

    @property
    def epoch(self) -> float:
        """Epochs done so far."""
        return self._step / self.steps_per_epoch

    @property
    def identity(self) -> str:
        """Of the data and the options: the same on every rank."""
        return self._identity

    def next_step(self) -> list[BatchT | Repeat[BatchT]]:
        """This rank's micro-batches of the next optimiser step.

        Raises:
            IndexError: all steps are taken.
        """
        if self._total is not None and self._step >= self._total:
            raise IndexError(f"{type(self).__name__}: all {self._total} steps are taken")
        epoch, number = divmod(self._step, self.steps_per_epoch)
        if epoch != self._planned:
            self._planned, self._units = epoch, self._plan(epoch)
        units = self._units[number * self._per_step : (number + 1) * self._per_step]
        size = self._per_micro_batch
        micro_batches = [units[start : start + size] for start in range(0, len(units), size)]
        self._step += 1
        return [mapped(self._build, chosen) for chosen in self._mesh.share(micro_batches)]

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {"step": self._step, "identity": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: it was taken over other data or options, so the position means nothing here.
        """
        if state["identity"] != self._identity:
            raise DataError(
                f"{type(self).__name__}: the data, the tokenizer or the batch changed since this run was saved at step "
                f"{state['step']}; put them back, or choose another output_dir"
            )
        self._step = int(state["step"])

    @abstractmethod
    def _plan(self, epoch: int) -> list[UnitT]:
        """The epoch's units in order; as many in every epoch."""

    @abstractmethod
    def _build(self, units: list[UnitT]) -> BatchT:
        """One micro-batch."""


class PackedLoader(_EpochLoader[np.ndarray, PackedBatch]):
    """Packs of at most `capacity` tokens; a micro-batch is `packs_per_micro_batch` packs side by side in one row.

    The packs of a step do not depend on `packs_per_micro_batch`. With packing=False every sample is a pack of its own
    (still without padding), in an order drawn anew each epoch.
    """

    def __init__(
        self,
        samples: Sequence[Mapping[str, Any]],
        *,
        capacity: int,
        packs_per_step: int,
        packs_per_micro_batch: int,
        epochs: float | None,
        seed: int,
        packing: bool = True,
        max_steps: int | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Plan the first epoch.

        Args:
            samples: each with "input_ids" [T] and any further per-token fields, as `pack_samples` takes them.
            capacity: tokens per pack.
            epochs: passes over the samples, fractions allowed; None = for ever.
            max_steps: optimiser steps; goes before epochs.
            mesh: every rank plans the same steps and takes its share of each; None = one process takes all.

        Raises:
            DataError: no samples.
            ValueError: a sample longer than `capacity`; an impossible number.
        """
        self._samples, self._capacity, self._seed, self._packing = samples, capacity, seed, packing
        self._lengths = np.array([len(sample["input_ids"]) for sample in samples], dtype=np.int64)
        if samples and not packing and self._lengths.max() > capacity:
            longest = int(self._lengths.argmax())
            raise ValueError(
                f"PackedLoader: sample {longest} has {self._lengths[longest]} tokens, capacity is {capacity}; "
                "raise max_length or set overlong: truncate or drop"
            )
        plan = "one sample a pack"
        if packing:
            self._sampler = PackSampler(self._lengths, capacity, packs_per_step=packs_per_step, seed=seed, window=1)
            plan = self._sampler.state_dict()["identity"]
        super().__init__(
            per_step=packs_per_step,
            per_micro_batch=packs_per_micro_batch,
            epochs=epochs,
            max_steps=max_steps,
            identity=samples_fingerprint(samples, (capacity, packs_per_step, seed, plan)),
            mesh=mesh or Mesh(),
        )

    @property
    def num_packs(self) -> int:
        """Packs per epoch."""
        return len(self._units)

    @property
    def utilization(self) -> float:
        """Used share of the packs' capacity."""
        return float(self._lengths.sum()) / (self.num_packs * self._capacity)

    def _build(self, units: list[np.ndarray]) -> PackedBatch:
        return pack_samples([self._samples[i] for pack in units for i in pack])

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """Sample numbers of each pack."""
        if not self._packing:
            return list(_generator(self._seed, epoch).permutation(len(self._lengths))[:, None])
        return [pack for packs in self._sampler.steps(epoch) for pack in packs if pack.size]


class ShuffledLoader(_EpochLoader[ItemT, Any]):
    """Items in an order drawn anew each epoch; a micro-batch is a list of `per_micro_batch` items, or its `collate`."""

    def __init__(
        self,
        items: Sequence[ItemT],
        *,
        per_step: int,
        per_micro_batch: int,
        epochs: float | None,
        seed: int,
        max_steps: int | None = None,
        collate: Callable[[list[ItemT]], Any] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """See `PackedLoader` for epochs, max_steps and mesh.

        Raises:
            DataError: no items.
            ValueError: an impossible number.
        """
        self._items, self._seed, self._collate = items, seed, collate
        super().__init__(
            per_step=per_step,
            per_micro_batch=per_micro_batch,
            epochs=epochs,
            max_steps=max_steps,
            identity=fingerprint({"items": _as_texts(items), "per_step": per_step, "seed": seed}),
            mesh=mesh or Mesh(),
        )

    def _build(self, units: list[ItemT]) -> Any:
        return units if self._collate is None else self._collate(units)

    def _plan(self, epoch: int) -> list[ItemT]:
        return [self._items[i] for i in _generator(self._seed, epoch).permutation(len(self._items))]


def _as_texts(items: Sequence[object]) -> list[str]:
    """Every item in full, whatever the length of its arrays."""
    with np.printoptions(threshold=sys.maxsize):
        return [repr(item) for item in items]


def items_fingerprint(items: Sequence[object]) -> str:
    """SHA-256 over every item in full."""
    return fingerprint({"items": _as_texts(items)})


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])


def samples_fingerprint(samples: Sequence[Mapping[str, Any]], options: tuple[object, ...] = ()) -> str:
    """SHA-256 over the options and every field of every sample."""
    digest = hashlib.sha256(repr(options).encode())
    for sample in samples:
        for name in sorted(sample):
            values = np.ascontiguousarray(sample[name])
            digest.update(f"{name} {values.dtype} {values.size}".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()
