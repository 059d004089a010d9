"""Which samples share a row: plan_packs and its result."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from nova_kernels.backend import choose
from nova_kernels.packing import native, reference
from nova_kernels.varlen import MAX_TOKENS

Strategy = Literal["auto", "best_fit", "search", "sequential"]
Overlong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """Samples assigned to packs. Pack b holds the samples order[offsets[b] : offsets[b + 1]]."""

    order: np.ndarray  # int64 [n], sample numbers, pack after pack
    offsets: np.ndarray  # int64 [B + 1], into order
    lengths: np.ndarray  # int32 [N], tokens of every sample given, after truncation; of dropped samples 0
    dropped: np.ndarray  # int64, numbers of the samples left out
    truncated: np.ndarray  # int64, numbers of the samples that were cut
    lost_tokens: int  # tokens of the dropped samples and of the cut ends
    capacity: int  # tokens per pack
    lower_bound: int  # packs that any plan needs at least

    @property
    def num_packs(self) -> int:
        """Packs used, B."""
        return self.offsets.size - 1

    @property
    def gap(self) -> int:
        """Packs above the lower bound; 0 proves the plan optimal."""
        return self.num_packs - self.lower_bound

    @property
    def waste(self) -> int:
        """Unused tokens over all packs."""
        return self.num_packs * self.capacity - int(self.lengths.sum(dtype=np.int64))

    @property
    def utilization(self) -> float:
        """Used share of all packs, 1.0 for an empty plan."""
        room = self.num_packs * self.capacity
        return 1.0 - self.waste / room if room else 1.0

    def pack(self, index: int) -> np.ndarray:
        """Sample numbers of one pack, int64."""
        if not 0 <= index < self.num_packs:
            raise IndexError(f"PackPlan.pack: {index} is not one of the {self.num_packs} packs")
        return self.order[self.offsets[index] : self.offsets[index + 1]]


def plan_packs(
    lengths: Sequence[int] | np.ndarray | Tensor,
    capacity: int,
    *,
    strategy: Strategy = "auto",
    overlong: Overlong = "error",
    seed: int | None = None,
    backend: str | None = None,
) -> PackPlan:
    """Assign samples to packs of at most `capacity` tokens, using few packs.

    Args:
        lengths: tokens per sample, integers [N], each at least 1, N < 2^31; a list, a NumPy array, a CPU tensor or an
            Arrow array.
        capacity: tokens per pack, at least 1.
        strategy: "best_fit" (best fit decreasing), "search" (samples in a random order, each pack completed by a
            bounded search in a small window: for lengths that cluster near a fraction of the capacity), "sequential"
            (samples stay in order, next fit), or "auto": best_fit, and search as well where best_fit uses more than
            one pack in a thousand above the lower bound; the better one is kept.
        overlong: a sample longer than the capacity is an error, is cut to the capacity, or is left out.
        seed: any integer; shuffles the order of the packs and, but for sequential, which of several equally long
            samples goes where; the number of packs does not depend on it. None keeps the order of the strategy.
        backend: "native" (C++) or "reference"; None takes the first that can run. Both give the same plan.

    Returns:
        A PackPlan, a pure function of the arguments: the same on every rank and platform.

    Raises:
        TypeError: a capacity or seed that is no integer.
        ValueError: a sample longer than the capacity (overlong="error") or without tokens, lengths that are no
            integers, an unknown option.
        BackendUnavailableError: the named backend cannot run.

    Source: nova_kernels/packing/reference.py states the strategies and the lower bound.
    """
    for name, value, known in (("strategy", strategy, Strategy), ("overlong", overlong, Overlong)):
        if value not in get_args(known):
            raise ValueError(f"plan_packs: {name} must be one of {list(get_args(known))}, got {value!r}")
    capacity, seed = operator.index(capacity), None if seed is None else operator.index(seed)
    if not 1 <= capacity <= MAX_TOKENS:
        raise ValueError(f"plan_packs: capacity must be 1 ... {MAX_TOKENS} tokens (int32 boundaries), got {capacity}")
    given = _as_lengths(lengths)
    reasons = {"native": native.why_not(capacity), "reference": None}
    planner = {"native": native, "reference": reference}[choose("plan_packs", backend, reasons)]
    none = np.empty(0, dtype=np.int64)
    too_long = np.flatnonzero(given > capacity) if given.size and given.max() > capacity else none
    if too_long.size and overlong == "error":
        raise ValueError(
            f"plan_packs: sample {too_long[0]} has {given[too_long[0]]} tokens, capacity is {capacity}; "
            "raise the capacity or pass overlong='truncate' or 'drop'"
        )
    final = np.minimum(given, capacity) if too_long.size else given
    final = final.astype(np.int32)
    dropped, truncated = (too_long, none) if overlong == "drop" else (none, too_long)
    final[dropped] = 0
    kept = np.flatnonzero(final) if dropped.size else None
    order, offsets, bound = planner.plan(final if kept is None else final[kept], capacity, strategy, seed)
    return PackPlan(
        order=order if kept is None else kept[order],
        offsets=offsets,
        lengths=final,
        dropped=dropped,
        truncated=truncated,
        lost_tokens=int((given[too_long].astype(np.int64) - final[too_long]).sum()),
        capacity=capacity,
        lower_bound=bound,
    )


def _as_lengths(lengths: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
    """Integers [N], each at least 1; the caller's memory where it is an array already."""
    sizes = np.asarray(lengths)
    if sizes.size == 0:
        return np.empty(0, dtype=np.int64)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu":
        raise ValueError(
            f"plan_packs: expected integer lengths [N], got {sizes.dtype} {list(sizes.shape)}"
            + ("; are there missing values among them?" if sizes.dtype.kind in "fO" and sizes.ndim == 1 else "")
        )
    if sizes.min() < 1:
        raise ValueError(
            f"plan_packs: sample {int(sizes.argmin())} has {int(sizes.min())} tokens, expected at least 1; "
            "leave empty samples out"
        )
    if sizes.max() > MAX_TOKENS:
        raise ValueError(
            f"plan_packs: sample {int(sizes.argmax())} has {int(sizes.max())} tokens, more than int32 boundaries count"
        )
    return sizes
