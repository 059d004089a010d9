"""Packing in plain NumPy: lengths in, packs out.

n items of 1 <= l_i <= C tokens go into packs of capacity C.

    best_fit     longest item first, each into the fullest pack that still takes it (best fit decreasing)
    sequential   items in their order, a new pack when the next one does not fit (next fit)

No plan uses fewer packs than

    L1 = ceil(sum l / C)
    L2 = max over 0 <= a <= C/2 of  |J1| + |J2| + max(0, ceil((sum J3 - (|J2| C - sum J2)) / C))
         J1 = {l > C - a},  J2 = {C/2 < l <= C - a},  J3 = {a <= l <= C/2}

An item of J1 shares its pack with nothing from J3, two items above C/2 never share one (Martello and Toth, 1990).
A plan is a pair (order, offsets): pack b holds the items order[offsets[b] : offsets[b + 1]].
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # step of splitmix64


def best_fit(lengths: np.ndarray, capacity: int, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing; the seed only decides which of several equally long items is taken first."""
    ties = np.arange(lengths.size) if seed is None else shuffle_keys(lengths.size, seed, stream=0)
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for item in np.lexsort((ties, -lengths)).tolist():
        length = int(lengths[item])
        at = bisect_left(spaces, (length, -1))
        if at == len(spaces):
            pack, space = len(packs), capacity
            packs.append([])
        else:
            space, pack = spaces.pop(at)
        packs[pack].append(item)
        if space > length:
            insort(spaces, (space - length, pack))
    return as_csr(packs)


def sequential(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Next fit: the order of the items is kept."""
    packs: list[list[int]] = []
    space = 0
    for item, length in enumerate(lengths.tolist()):
        if length > space or not packs:
            packs.append([])
            space = capacity
        packs[-1].append(item)
        space -= length
    return as_csr(packs)


def as_csr(packs: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of items -> order int64 [n], offsets int64 [B + 1]."""
    order = np.array([item for pack in packs for item in pack], dtype=np.int64)
    offsets = np.cumsum([0] + [len(pack) for pack in packs], dtype=np.int64)
    return order, offsets


def shuffle_packs(order: np.ndarray, offsets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same packs in a seeded order."""
    keys = shuffle_keys(offsets.size - 1, seed, stream=1)
    return as_csr([order[offsets[pack] : offsets[pack + 1]].tolist() for pack in np.argsort(keys, kind="stable")])


def shuffle_keys(count: int, seed: int, stream: int) -> np.ndarray:
    """splitmix64 of (seed, stream, index): uint64 [count]. Integers only, so every platform sorts alike."""
    start = _mix(np.array([(seed + stream * GOLDEN) % 2**64], dtype=np.uint64))
    return _mix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def lower_bound(lengths: np.ndarray, capacity: int) -> int:
    """max(L1, L2), by prefix sums over the histogram of lengths."""
    counts = np.bincount(lengths, minlength=capacity + 1).astype(np.int64)
    items = np.concatenate([[0], np.cumsum(counts)])  # items[x] = how many are shorter than x
    tokens = np.concatenate([[0], np.cumsum(counts * np.arange(capacity + 1))])
    half = capacity // 2 + 1  # the shortest length above C / 2
    a = np.arange(capacity // 2 + 1)
    count_1 = items[capacity + 1] - items[capacity - a + 1]
    count_2 = items[capacity - a + 1] - items[half]
    tokens_2 = tokens[capacity - a + 1] - tokens[half]
    tokens_3 = tokens[half] - tokens[a]
    spill = -((count_2 * capacity - tokens_2 - tokens_3) // capacity)  # = ceil((J3 - room left beside J2) / C)
    l1 = -(-int(lengths.sum()) // capacity)
    return max(l1, int((count_1 + count_2 + np.maximum(spill, 0)).max()))


def concatenate(columns: Sequence[np.ndarray], total: int, fill: int) -> np.ndarray:
    """Columns side by side in one row [1, total]; what is left over holds `fill`."""
    dtype = np.result_type(*columns) if columns else np.dtype(np.int64)
    row = np.full((1, total), fill, dtype=dtype)
    used = sum(column.size for column in columns)
    if used:
        np.concatenate(columns, out=row[0, :used])
    return row
