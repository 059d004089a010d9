"""Which samples share a row: plan_packs and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nova_kernels.packing import reference

Strategy = Literal["auto", "best_fit", "sequential"]
Overlong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """Samples assigned to packs. Pack b holds the samples order[offsets[b] : offsets[b + 1]]."""

    order: np.ndarray  # int64 [n], sample numbers, pack after pack
    offsets: np.ndarray  # int64 [B + 1], into order
    lengths: np.ndarray  # int64 [N], tokens of every sample given, after truncation
    dropped: np.ndarray  # int64, numbers of the samples left out
    truncated: np.ndarray  # int64, numbers of the samples that were cut
    lost_tokens: int  # tokens of the dropped samples and of the cut ends
    capacity: int  # tokens per pack
    lower_bound: int  # packs that any plan needs at least: max(L1, L2)

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
        return self.num_packs * self.capacity - int(self.lengths[self.order].sum())

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
    lengths: Sequence[int] | np.ndarray,
    capacity: int,
    *,
    strategy: Strategy = "auto",
    overlong: Overlong = "error",
    seed: int | None = None,
) -> PackPlan:
    """Assign samples to packs of at most `capacity` tokens, using few packs.

    Args:
        lengths: tokens per sample, integers [N], each at least 1.
        capacity: tokens per pack, at least 1.
        strategy: "best_fit" (best fit decreasing), "sequential" (samples stay in order, next fit), or "auto",
            which is best_fit.
        overlong: a sample longer than the capacity is an error, is cut to the capacity, or is left out.
        seed: shuffles the order of the packs and, for best_fit, which of several equally long samples goes where;
            the number of packs does not depend on it. None keeps the order of the strategy.

    Returns:
        A PackPlan, a pure function of the arguments: the same on every rank and platform.

    Raises:
        ValueError: a sample longer than the capacity (overlong="error") or without tokens, an unknown option.

    Source: nova_kernels/packing/reference.py states the strategies and the lower bound.
    """
    sizes = _as_lengths(lengths)
    if capacity < 1:
        raise ValueError(f"plan_packs: capacity must be at least 1 token, got {capacity}")
    too_long = np.flatnonzero(sizes > capacity)
    if too_long.size and overlong == "error":
        raise ValueError(
            f"plan_packs: sample {too_long[0]} has {sizes[too_long[0]]} tokens, capacity is {capacity}; "
            "raise the capacity or pass overlong='truncate' or 'drop'"
        )
    if overlong not in ("error", "truncate", "drop"):
        raise ValueError(f"plan_packs: overlong must be 'error', 'truncate' or 'drop', got {overlong!r}")
    none = np.empty(0, dtype=np.int64)
    dropped, truncated = (too_long, none) if overlong == "drop" else (none, too_long)
    lost = int(sizes[dropped].sum() + (sizes[truncated] - capacity).sum())
    final = sizes.copy()
    final[truncated] = capacity
    kept = np.setdiff1d(np.arange(sizes.size), dropped)
    order, offsets = _solve(final[kept], capacity, strategy, seed)
    return PackPlan(
        order=kept[order],
        offsets=offsets,
        lengths=final,
        dropped=dropped,
        truncated=truncated,
        lost_tokens=lost,
        capacity=capacity,
        lower_bound=reference.lower_bound(final[kept], capacity),
    )


def _solve(lengths: np.ndarray, capacity: int, strategy: str, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    if strategy in ("auto", "best_fit"):
        order, offsets = reference.best_fit(lengths, capacity, seed)
    elif strategy == "sequential":
        order, offsets = reference.sequential(lengths, capacity)
    else:
        raise ValueError(f"plan_packs: strategy must be 'auto', 'best_fit' or 'sequential', got {strategy!r}")
    return (order, offsets) if seed is None else reference.shuffle_packs(order, offsets, seed)


def _as_lengths(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    sizes = np.asarray(lengths)
    if sizes.size == 0:
        return np.empty(0, dtype=np.int64)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu":
        raise ValueError(f"plan_packs: expected integer lengths [N], got {sizes.dtype} {list(sizes.shape)}")
    sizes = sizes.astype(np.int64)
    if sizes.min() < 1:
        raise ValueError(
            f"plan_packs: sample {int(sizes.argmin())} has {int(sizes.min())} tokens, expected at least 1; "
            "leave empty samples out"
        )
    return sizes
