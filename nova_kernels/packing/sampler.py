"""A packing plan as a sampler: the samples of a rank's next batch, an exact length, a position to resume from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from nova_kernels.packing.balance import LINEAR, Remainder, balance_ranks
from nova_kernels.packing.plan import Overlong, Strategy, plan_packs
from nova_kernels.packing.reference import splitmix64

EPOCHS = 4  # stream of random draws; reference.py and balance.py have the others


class PackSampler(Sampler[list[int]]):
    """Batches of sample numbers for a DataLoader's `batch_sampler`; each is one or more packs of one rank.

    Every rank computes the plan of all ranks from (lengths, options, seed, epoch) and takes its own part: no
    communication, the same number of batches everywhere. Each pass is one epoch, planned anew; the next pass is the
    next epoch, unless `set_epoch` says otherwise.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | Tensor,
        capacity: int,
        *,
        packs_per_step: int | None = None,
        packs_per_batch: int = 1,
        num_ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        strategy: Strategy = "auto",
        overlong: Overlong = "error",
        remainder: Remainder = "split",
        linear: int = LINEAR,
        quadratic: int = 1,
        window: int = 16,
    ) -> None:
        """Plan the first epoch.

        Args:
            lengths: tokens per sample, integers [N]; the same on every rank.
            capacity: tokens per pack. With overlong="truncate" whoever reads the samples has to cut them, as
                `PackCollator(max_length=capacity)` does.
            packs_per_step: packs of one optimiser step over all ranks; None = one batch for every rank.
            packs_per_batch: packs of one batch, which the collator lays in one row.
            num_ranks, rank: of the data-parallel group.
            seed: which packs there are, and in which order.
            strategy, overlong: as in `plan_packs`.
            remainder, linear, quadratic, window: as in `balance_ranks`; what is carried over is planned again in the
                next epoch, with the samples of that epoch.

        Raises:
            ValueError: rank or packs_per_step do not fit; see `plan_packs` and `balance_ranks`.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"PackSampler: rank must be 0 ... {num_ranks - 1}, got {rank}")
        if packs_per_batch < 1:
            raise ValueError(f"PackSampler: packs_per_batch must be at least 1, got {packs_per_batch}")
        per_step = num_ranks * packs_per_batch if packs_per_step is None else packs_per_step
        if per_step % (num_ranks * packs_per_batch):
            raise ValueError(
                f"PackSampler: packs_per_step must be a multiple of num_ranks x packs_per_batch = "
                f"{num_ranks} x {packs_per_batch}, got {per_step}"
            )
        self._lengths = np.array(lengths)
        self._capacity, self._seed = capacity, seed
        self._num_ranks, self._rank, self._per_batch = num_ranks, rank, packs_per_batch
        self._planning: dict[str, Any] = {"strategy": strategy, "overlong": overlong}
        self._sharing: dict[str, Any] = {
            "packs_per_step": per_step,
            "linear": linear,
            "quadratic": quadratic,
            "remainder": remainder,
            "window": window,
        }
        self._epoch = self._position = 0  # of the next batch
        self._planned = (0, self._batches(0))
        options = (capacity, seed, self._planning, self._sharing)
        self._identity = hashlib.sha256(repr(options).encode() + self._lengths.astype(np.int64).tobytes()).hexdigest()

    def steps(self, epoch: int) -> list[list[np.ndarray]]:
        """The packs of this rank, step by step: sample numbers, int64, none in an empty pack.

        A pure function of the sampler's arguments and of `epoch`.
        """
        carries = self._sharing["remainder"] == "carry"
        carried = np.empty(0, dtype=np.int64)
        for number in range(0 if carries else epoch, epoch + 1):
            samples = np.append(np.arange(self._lengths.size), carried)
            seed = int(splitmix64(np.array([number], dtype=np.uint64), self._seed, EPOCHS)[0])
            plan = plan_packs(self._lengths[samples], self._capacity, seed=seed, **self._planning)
            ranks = balance_ranks(plan, self._num_ranks, seed=seed, **self._sharing)
            carried = samples[ranks.left_out_samples] if carries else carried
        order = np.split(samples[ranks.plan.order], ranks.plan.offsets[1:])  # the last one is empty, as pack -1 is
        return [[order[pack] for pack in packs] for packs in ranks.steps[:, self._rank].tolist()]

    def set_epoch(self, epoch: int) -> None:
        """Start this epoch with the next pass; the position is kept if it is the current one."""
        if epoch != self._epoch:
            self._epoch, self._position = epoch, 0

    def __len__(self) -> int:
        """Batches of this rank in the current epoch, those already taken included."""
        return len(self._current())

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the current epoch; afterwards the next one is current."""
        batches = self._current()
        for number in range(self._position, len(batches)):
            self._position = number + 1
            yield batches[number].tolist()
        self.set_epoch(self._epoch + 1)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Where the next batch comes from; plain types.

        Args:
            batches: batches of this epoch that are done with. None = those handed out so far, which may be more than
                the training loop has seen if a DataLoader fetches ahead in workers.
        """
        done = self._position if batches is None else batches
        return {"epoch": self._epoch, "packs": done * self._per_batch * self._num_ranks, "identity": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, on any rank, and on another number of ranks after a whole step.

        Raises:
            ValueError: it was taken over other lengths or options, or inside a step of another number of ranks.
        """
        if state["identity"] != self._identity:
            raise ValueError(
                f"PackSampler: the state was saved at epoch {state['epoch']} after {state['packs']} packs of other "
                "lengths or options; put them back, or start anew"
            )
        position, rest = divmod(state["packs"], self._per_batch * self._num_ranks)
        if rest:
            raise ValueError(
                f"PackSampler: the state was saved after {state['packs']} packs, inside a batch of {self._num_ranks} "
                f"ranks x {self._per_batch} packs; resume on the old number of ranks, or save after a whole step"
            )
        self._epoch, self._position = int(state["epoch"]), int(position)

    def _current(self) -> list[np.ndarray]:
        if self._planned[0] != self._epoch:
            self._planned = (self._epoch, self._batches(self._epoch))
        return self._planned[1]

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """Sample numbers of every batch."""
        size = self._per_batch
        return [
            np.concatenate(packs[start : start + size]) if size > 1 else packs[start]
            for packs in self.steps(epoch)
            for start in range(0, len(packs), size)
        ]
