"""Packs to data-parallel ranks: as many for each, of as equal work as can be.

The work of a pack is the sum over its samples of

    linear * l + quadratic * l^2

A dense layer of hidden size h spends 24 h^2 FLOPs a token in its matrices and 4 h l in attention over l tokens, so
linear = 6 h and quadratic = 1 (12 h where a kernel skips the masked half). Ranks that wait for each other take the time
of the slowest one: packs that run at the same time should cost the same.

    1. the number of packs is brought to a multiple of `packs_per_step` (see `remainder`)
    2. every `window` steps' worth of packs, in the plan's order, are sorted by work and cut into steps, whose order is
       then shuffled: a step holds packs of similar work, and depends on `packs_per_step`, not on the number of ranks
    3. within a step the ranks take neighbours in that order; every other round runs backwards

The plan's packs are never taken apart or joined (but by remainder="split"), so no rank ever exceeds the capacity.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from nova_kernels.packing.plan import PackPlan
from nova_kernels.packing.reference import splitmix64

Remainder = Literal["split", "empty", "drop", "carry"]

STEPS = 3  # stream of random draws; reference.py has the others
LINEAR = 24576  # 6 x 4096, a model of about 7B parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """Packs assigned to ranks. In step s rank r runs the packs steps[s, r], one after the other."""

    plan: PackPlan  # the packs shared out; with remainder="split" more than were given
    steps: np.ndarray  # int64 [num_steps, num_ranks, packs per rank], numbers of packs; -1 = an empty pack
    left_out: np.ndarray  # int64, packs that no step holds (remainder="drop" or "carry")
    work: np.ndarray  # int64 [B], of each pack

    @property
    def num_steps(self) -> int:
        """Optimiser steps, the same on every rank."""
        return self.steps.shape[0]

    @property
    def left_out_samples(self) -> np.ndarray:
        """Numbers of the samples in the packs that are left out, int64."""
        packs = [self.plan.pack(pack) for pack in self.left_out.tolist()]
        return np.concatenate(packs) if packs else np.empty(0, dtype=np.int64)

    @property
    def overhead(self) -> float:
        """Work of the slowest ranks over mean work, all ranks waiting after every pack; 1.0 = perfectly balanced."""
        work = np.append(self.work, 0)[self.steps]  # -1 picks the 0
        return float(work.max(axis=1).sum() / work.mean(axis=1).sum()) if work.any() else 1.0


def balance_ranks(
    plan: PackPlan,
    num_ranks: int,
    *,
    packs_per_step: int | None = None,
    linear: int = LINEAR,
    quadratic: int = 1,
    remainder: Remainder = "split",
    window: int = 16,
    seed: int | None = None,
) -> RankPlan:
    """Share the packs of a plan among the ranks.

    Args:
        plan: as `plan_packs` makes it.
        num_ranks: data-parallel ranks.
        packs_per_step: packs of one optimiser step over all ranks, a multiple of num_ranks; None = num_ranks.
        linear, quadratic: work of a sample of l tokens, linear * l + quadratic * l^2, integers.
        remainder: what happens when the packs do not fill the last step. "split" halves those with the most tokens
            until they do (single samples cannot be halved: if there are not enough others, the rest are empty packs);
            "empty" adds empty packs, whose loss has no tokens; "drop" leaves out the packs with the fewest tokens;
            "carry" leaves out the same ones, for the caller to plan again with the next epoch (`left_out_samples`).
        window: steps whose packs are sorted by work together; 1 leaves every step as random as the plan is.
        seed: any integer; shuffles the order of the steps. None keeps it.

    Returns:
        A RankPlan, a pure function of the arguments: every rank computes the same one, no broadcast is needed.

    Raises:
        ValueError: numbers out of range, an unknown remainder, work that does not fit in 63 bits.
    """
    per_step = num_ranks if packs_per_step is None else packs_per_step
    if num_ranks < 1 or per_step < 1 or per_step % num_ranks:
        raise ValueError(
            f"balance_ranks: packs_per_step must be a multiple of num_ranks, got {per_step} packs for {num_ranks} ranks"
        )
    if linear < 0 or quadratic < 0 or window < 1:
        raise ValueError(
            f"balance_ranks: expected linear, quadratic >= 0 and window >= 1, got {linear}, {quadratic}, {window}"
        )
    if remainder not in get_args(Remainder):
        raise ValueError(f"balance_ranks: remainder must be one of {list(get_args(Remainder))}, got {remainder!r}")
    if remainder == "split":
        plan = _split(plan, -plan.num_packs % per_step)
    work = _work(plan, linear, quadratic)
    packs, left_out = np.arange(plan.num_packs), np.empty(0, dtype=np.int64)
    if remainder in ("drop", "carry"):
        fullest_first = np.argsort(-_per_pack(plan, plan.lengths.astype(np.int64)), kind="stable")
        kept = plan.num_packs - plan.num_packs % per_step
        packs, left_out = np.sort(fullest_first[:kept]), np.sort(fullest_first[kept:])
    packs = np.append(packs, np.full(-packs.size % per_step, -1))
    steps = _steps(packs, np.append(work, 0)[packs], per_step, window)
    if seed is not None:
        seed = operator.index(seed)
        keys = splitmix64(np.arange(len(steps), dtype=np.uint64), seed, STEPS)
        steps = steps[np.argsort(keys, kind="stable")]
    rounds = steps.reshape(len(steps), per_step // num_ranks, num_ranks).copy()
    rounds[:, 1::2] = rounds[:, 1::2, ::-1]
    return RankPlan(plan=plan, steps=rounds.swapaxes(1, 2), left_out=left_out, work=work)


def _steps(packs: np.ndarray, work: np.ndarray, per_step: int, window: int) -> np.ndarray:
    """Steps [num_steps, per_step] of similar work, most first within each window and each step."""
    windows = np.arange(packs.size) // (window * per_step)
    return packs[np.lexsort((-work, windows))].reshape(-1, per_step)


def _per_pack(plan: PackPlan, values: np.ndarray) -> np.ndarray:
    """Sums [B] over the samples of each pack."""
    if not plan.num_packs:
        return np.empty(0, dtype=np.int64)
    return np.add.reduceat(values[plan.order], plan.offsets[:-1])


def _work(plan: PackPlan, linear: int, quadratic: int) -> np.ndarray:
    lengths = plan.lengths.astype(np.int64)
    most = float(linear) * float(lengths.sum()) + quadratic * float(np.square(lengths, dtype=np.float64).sum())
    if most >= 2**63:
        raise ValueError(f"balance_ranks: work of {most:.3g} does not fit in 63 bits; use smaller factors")
    return _per_pack(plan, linear * lengths + quadratic * lengths**2)


def _split(plan: PackPlan, missing: int) -> PackPlan:
    """The plan with `missing` packs more: those with the most tokens are halved between two of their samples."""
    lengths = plan.lengths.astype(np.int64)[plan.order]
    ends = np.cumsum(lengths)
    offsets = plan.offsets
    while missing:
        sizes = np.diff(offsets)
        tokens = np.diff(np.append(0, ends)[offsets])
        divisible = np.flatnonzero(sizes > 1)
        if not divisible.size:
            break
        chosen = divisible[np.argsort(-tokens[divisible], kind="stable")[:missing]]
        starts, stops = offsets[chosen], offsets[chosen + 1]
        # The first cut with half of the tokens on its left, one sample at least on either side.
        target = np.append(0, ends)[starts] + tokens[chosen] // 2
        cuts = np.clip(np.searchsorted(ends, target) + 1, starts + 1, stops - 1)
        offsets = np.sort(np.concatenate([offsets, cuts]))
        missing -= chosen.size
    return replace(plan, offsets=offsets)
