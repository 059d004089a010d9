"""A packing plan as a sampler: the samples of a rank's next batch, an exact length, a position to resume from."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from nova_kernels.packing.balance import LINEAR, RankPlan, Remainder, balance_ranks
from nova_kernels.packing.plan import Overlong, Strategy, plan_packs
from nova_kernels.packing.reference import PLAN_VERSION, splitmix64

EPOCHS = 4  # stream of random draws; reference.py and balance.py have the others


class PackSampler(Sampler[list[int]]):
    """Batches of sample numbers for a DataLoader's `batch_sampler`; each is one or more packs of one rank.

    Every rank computes the plan of all ranks from (lengths, options, seed, epoch) and takes its own part: no
    communication, the same number of batches everywhere. Each whole pass is one epoch, planned anew; the next pass is
    the next epoch, unless `set_epoch` says otherwise.
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
            ValueError: rank or packs_per_step do not fit; all packs together do not fill a step, and remainder="drop"
                or "carry" would leave nothing; see also `plan_packs` and `balance_ranks`.
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
        self._capacity, self._seed = capacity, operator.index(seed)
        self._num_ranks, self._rank, self._per_batch = num_ranks, rank, packs_per_batch
        self._planning: dict[str, Any] = {"strategy": strategy, "overlong": overlong}
        self._sharing: dict[str, Any] = {
            "packs_per_step": per_step,
            "linear": linear,
            "quadratic": quadratic,
            "remainder": remainder,
            "window": window,
        }
        self._carried = (0, np.empty(0, dtype=np.int64))  # (epoch, samples that come to it from the one before)
        self._epoch = self._start = self._done = 0  # of the next pass, or of the one under way
        self._planned = (0, *self._plan(0))
        if self._planned[1].plan.num_packs and not len(self):
            raise ValueError(
                f"PackSampler: {self._planned[1].plan.num_packs} packs do not fill one step of {per_step}; with "
                f"remainder={remainder!r} nothing is left; lower packs_per_step or use 'split' or 'empty'"
            )
        options = (PLAN_VERSION, capacity, self._seed, self._planning, self._sharing)
        self._identity = hashlib.sha256(repr(options).encode() + self._lengths.astype(np.int64).tobytes()).hexdigest()

    @property
    def epoch(self) -> int:
        """The epoch that is being handed out, or was handed out last."""
        return self._epoch

    @property
    def ranks(self) -> RankPlan:
        """The plan of this epoch for all ranks: packs, bound, what was dropped or truncated, balance.

        With remainder="carry" its sample numbers count the entries of the epoch: all samples, then those carried over.
        """
        return self._current()[0]

    def steps(self, epoch: int) -> list[list[np.ndarray]]:
        """The packs of this rank, step by step: sample numbers, int64, none in an empty pack.

        A pure function of the sampler's arguments and of `epoch`.
        """
        return self._packs(*self._plan(epoch))

    def set_epoch(self, epoch: int) -> None:
        """Start this epoch with the next pass; a position that was loaded in it is kept.

        A loader that sets the epoch itself (accelerate's counts from 0) has to be told `sampler.epoch` after a resume.
        """
        if epoch < 0:
            raise ValueError(f"PackSampler: epoch must be at least 0, got {epoch}")
        if epoch != self._epoch or self._finished:
            self._epoch, self._start, self._done = epoch, 0, 0

    def __len__(self) -> int:
        """Batches of this rank in the current epoch, those already taken included."""
        steps = self._current()[0].steps
        return steps.shape[0] * steps.shape[2] // self._per_batch

    def __iter__(self) -> Iterator[list[int]]:
        """A pass over the current epoch: all of it, or what is left of it after `load_state_dict`.

        A pass that was left early starts again; after a whole one the next epoch is current. Behind a DataLoader with
        workers a pass is whole as soon as they have fetched all of it; `set_epoch` decides where that matters.
        """
        if self._finished:
            self.set_epoch(self._epoch + 1)
        start, self._start = self._start, 0
        self._done = start
        packs = [pack for step in self._packs(*self._current()) for pack in step]
        return self._batches(packs, start)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Where the next batch comes from; plain types.

        Args:
            batches: batches of this epoch that are done with. None = those handed out so far, which may be more than
                the training loop has seen if a DataLoader fetches ahead in workers.
        """
        epoch, done = self._epoch, self._done if batches is None else batches
        if done >= len(self):
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "packs": done * self._per_batch * self._num_ranks, "identity": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, on any rank, and on another number of ranks after a whole step at least.

        Raises:
            ValueError: it was taken over other lengths or options, or where no batch of this number of ranks begins.
        """
        if state["identity"] != self._identity:
            raise ValueError(
                f"PackSampler: the state was saved at epoch {state['epoch']} after {state['packs']} packs of other "
                "lengths or options, or by another version of the planner; put them back, or start anew"
            )
        done, rest = divmod(int(state["packs"]), self._per_batch * self._num_ranks)
        if rest:
            raise ValueError(
                f"PackSampler: the state was saved after {state['packs']} packs, inside a batch of {self._num_ranks} "
                f"ranks x {self._per_batch} packs; resume on the old number of ranks, or save after a whole step"
            )
        self._epoch, self._start, self._done = int(state["epoch"]), done, done

    @property
    def _finished(self) -> bool:
        return 0 < len(self) <= self._done

    def _plan(self, epoch: int) -> tuple[RankPlan, np.ndarray]:
        """The plan of an epoch over its entries, and the sample number of every entry."""
        carries = self._sharing["remainder"] == "carry"
        first, carried = self._carried if self._carried[0] <= epoch else (0, self._carried[1][:0])
        for number in range(first if carries else epoch, epoch + 1):
            self._carried = (number, carried)
            samples = np.append(np.arange(self._lengths.size), carried)
            seed = int(splitmix64(np.array([number], dtype=np.uint64), self._seed, EPOCHS)[0])
            plan = plan_packs(self._lengths[samples], self._capacity, seed=seed, **self._planning)
            ranks = balance_ranks(plan, self._num_ranks, seed=seed, **self._sharing)
            carried = samples[ranks.left_out_samples] if carries else carried
        return ranks, samples

    def _current(self) -> tuple[RankPlan, np.ndarray]:
        if self._planned[0] != self._epoch:
            self._planned = (self._epoch, *self._plan(self._epoch))
        return self._planned[1], self._planned[2]

    def _packs(self, ranks: RankPlan, samples: np.ndarray) -> list[list[np.ndarray]]:
        packs = np.split(samples[ranks.plan.order], ranks.plan.offsets[1:])  # the last one is empty, as pack -1 is
        return [[packs[number] for number in numbers] for numbers in ranks.steps[:, self._rank].tolist()]

    def _batches(self, packs: list[np.ndarray], start: int) -> Iterator[list[int]]:
        for number in range(start, len(packs) // self._per_batch):
            self._done = number + 1
            yield np.concatenate(packs[number * self._per_batch :][: self._per_batch]).tolist()
