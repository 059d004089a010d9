"""Packing in plain Python: lengths in, packs out; samples in, one row out.

n samples of 1 <= l_i <= C tokens go into packs of capacity C.

    best_fit     longest first, each into the fullest pack that still takes it (best fit decreasing)
    search       a stream of the samples in a random order
    sequential   the samples in their order, a new pack when the next one does not fit (next fit)
    Stream       at most W samples wait; when W do, the oldest and those that fill its pack best are one pack

best_fit and search see only how many samples there are of each length; which samples those are is decided by `deal`.
No plan uses fewer packs than

    L1 = ceil(sum l / C)
    L2 = max over 0 <= a <= C/2 of  |J1| + |J2| + max(0, ceil((sum J3 - (|J2| C - sum J2)) / C))
         J1 = {l > C - a},  J2 = {C/2 < l <= C - a},  J3 = {a <= l <= C/2}
    Lk = ceil(sum u_k(l / C)),  u_k(x) = x if (k + 1) x is an integer, floor((k + 1) x) / k otherwise,  1 <= k <= 100

A sample of J1 shares its pack with nothing from J3, two samples above C/2 never share one (Martello and Toth, 1990).
Whatever sums to at most 1 still does after u_k (a dual feasible function: Fekete and Schepers, 2001): where all samples
are a little longer than C/4, L3 knows that only three fit.

csrc/packing has the same functions in C++; both give the same plan, item by item.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import numpy as np

PLAN_VERSION = 1  # raised when the same arguments give another plan
GOLDEN = 0x9E3779B97F4A7C15  # step of splitmix64
ITEMS, PACKS, SEARCH = 0, 1, 2  # streams of random draws
WINDOWS = (256, 32)  # of the two searches
TRIES = 512  # complete fillings compared for one pack, at most

Placement = tuple[int, int]  # (pack, length): the next sample of this length goes into this pack


def plan(lengths: np.ndarray, capacity: int, strategy: str, seed: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """(order, offsets, lower bound): pack b holds the samples order[offsets[b] : offsets[b + 1]]."""
    sizes = lengths.tolist()
    bound = lower_bound(sizes, capacity)
    if strategy == "sequential":
        packs = sequential(sizes, capacity)
    else:
        found = [] if strategy == "search" else [best_fit(sizes, capacity)]
        if strategy == "search" or (strategy == "auto" and (count_packs(found[0]) - bound) * 1000 > bound):
            found += [search(sizes, capacity, window) for window in WINDOWS]
        packs = deal(min(found, key=count_packs), sizes, seed)
    if seed is not None:
        packs = [packs[b] for b in shuffled(range(len(packs)), seed, PACKS)]
    order = np.array([item for pack in packs for item in pack], dtype=np.int64)
    return order, np.cumsum([0] + [len(pack) for pack in packs], dtype=np.int64), bound


def best_fit(lengths: Sequence[int], capacity: int) -> list[Placement]:
    """Best fit decreasing; of equally full packs the one that was touched last is taken."""
    placements: list[Placement] = []
    num_packs = 0
    spaces: list[tuple[int, int, int]] = []  # (free tokens, -time of the last touch, pack), sorted
    for time, length in enumerate(sorted(lengths, reverse=True)):
        at = bisect_left(spaces, (length,))
        if at == len(spaces):
            pack, space = num_packs, capacity
            num_packs += 1
        else:
            space, _, pack = spaces.pop(at)
        placements.append((pack, length))
        if space > length:
            insort(spaces, (space - length, -time, pack))
    return placements


def search(lengths: Sequence[int], capacity: int, window: int) -> list[Placement]:
    """The samples in a random order, as a stream."""
    deck = shuffled(sorted(lengths), 0, SEARCH)
    stream = Stream(capacity, window, min(max(TRIES * 100_000 // max(len(deck), 1), 64), TRIES))
    packs = stream.push(np.array(deck, dtype=np.int64))
    while len(stream):
        packs.append(stream.close())
    return [(b, deck[item]) for b, pack in enumerate(packs) for item in pack.tolist()]


def count_packs(placements: Sequence[Placement]) -> int:
    """How many packs there are; they are numbered as they are opened."""
    return 1 + max((pack for pack, _ in placements), default=-1)


def sequential(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Next fit; the packs' samples."""
    packs: list[list[int]] = []
    space = 0
    for item, length in enumerate(lengths):
        if length > space:
            packs.append([])
            space = capacity
        packs[-1].append(item)
        space -= length
    return packs


def deal(placements: Sequence[Placement], lengths: Sequence[int], seed: int | None) -> list[list[int]]:
    """Lengths -> samples, those of one length by number or in a seeded order; the packs' samples."""
    items: dict[int, list[int]] = {length: [] for length in sorted(set(lengths))}
    for item, length in enumerate(lengths):
        items[length].append(item)
    first = 0
    for length, same in items.items():
        items[length] = (same if seed is None else shuffled(same, seed, ITEMS, first))[::-1]
        first += len(same)
    packs: list[list[int]] = [[] for _ in range(count_packs(placements))]
    for pack, length in placements:
        packs[pack].append(items[length].pop())
    return packs


class Stream:
    """A stream of samples into packs; see the top of the file."""

    def __init__(self, capacity: int, window: int, tries: int = TRIES) -> None:
        self._capacity, self._window, self._tries = capacity, window, tries
        self._waiting: list[tuple[int, int]] = []  # (number, length), oldest first
        self._pushed = 0

    def push(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Samples, numbered as they come; the numbers of each pack that closes, int64."""
        packs = []
        for length in lengths.tolist():
            self._waiting.append((self._pushed, length))
            self._pushed += 1
            if len(self._waiting) == self._window:
                packs.append(self.close())
        return packs

    def __len__(self) -> int:
        return len(self._waiting)

    def pushed(self) -> int:
        """Samples that have come."""
        return self._pushed

    def restore(self, numbers: np.ndarray, lengths: np.ndarray, pushed: int) -> None:
        """Take over what waits in another stream, oldest first, and how many samples have come to it."""
        self._waiting = list(zip(numbers.tolist(), lengths.tolist(), strict=True))
        self._pushed = pushed

    def waiting(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and lengths of the samples that wait, oldest first."""
        table = np.array(self._waiting, dtype=np.int64).reshape(-1, 2)
        return table[:, 0].copy(), table[:, 1].copy()

    def close(self) -> np.ndarray:
        """Numbers of the samples of the next pack, however few wait."""
        number, length = self._waiting.pop(0)
        pack = [number]
        for chosen in fill([size for _, size in self._waiting], self._capacity - length, self._tries):
            oldest = next(at for at, (_, size) in enumerate(self._waiting) if size == chosen)
            pack.append(self._waiting.pop(oldest)[0])
        return np.array(pack, dtype=np.int64)


def fill(lengths: Sequence[int], space: int, tries: int) -> list[int]:
    """Those of the lengths that leave the least of `space`, longest first; the first of equals wins.

    A depth-first search, longest first, that ends when nothing is left over or after `tries` complete fillings
    (minimum bin slack: Gupta and Ho, 1999).
    """
    left = Counter(lengths)
    present = sorted(left)  # lengths of which some are left
    shortest, least = present[0] if present else 0, space + 1
    best: list[int] = []
    chosen: list[int] = []

    def at_most(limit: int) -> int | None:
        return present[at - 1] if (at := bisect_right(present, limit)) else None

    following = at_most(space)
    while following is not None or chosen:
        if following is not None:
            left[following] -= 1
            if not left[following]:
                present.remove(following)
            chosen.append(following)
            space -= following
            following = at_most(min(following, space))
            if following is not None:
                continue
            if space < least:
                least, best = space, list(chosen)
            tries -= 1
            if least == 0 or tries == 0:
                break
        # Back: a shorter one in the place of the last, if another sample still fits beside it.
        last = chosen.pop()
        if not left[last]:
            insort(present, last)
        left[last] += 1
        space += last
        following = at_most(min(last - 1, space - shortest))
    return best


def lower_bound(lengths: Sequence[int], capacity: int) -> int:
    """max(L1, L2, L1 ... L100 of the dual feasible functions), over the distinct lengths."""
    counts = Counter(lengths)
    bound = -(-sum(lengths) // capacity)
    for a in {0, *(length for length in counts if 2 * length <= capacity)}:
        long = sum(count for length, count in counts.items() if 2 * length > capacity)
        room = sum(
            count * (capacity - length) for length, count in counts.items() if 2 * length > capacity >= length + a
        )
        short = sum(count * length for length, count in counts.items() if a <= length and 2 * length <= capacity)
        bound = max(bound, long + max(0, -((room - short) // capacity)))
    for k in range(1, 101):
        bound = max(bound, ceil(sum(count * _u(k, length, capacity) for length, count in counts.items())))
    return bound


def _u(k: int, length: int, capacity: int) -> Fraction:
    parts, rest = divmod((k + 1) * length, capacity)
    return Fraction(parts, k) if rest else Fraction(length, capacity)


def shuffled(values: Sequence[int], seed: int, stream: int, first: int = 0) -> list[int]:
    """The values in a seeded order (Fisher and Yates); integers only, so every platform gives the same."""
    result = list(values)
    keys = splitmix64(first + np.arange(len(result), dtype=np.uint64), seed, stream) >> np.uint64(32)
    for k in range(len(result) - 1, 0, -1):
        other = int(keys[k]) * (k + 1) >> 32
        result[k], result[other] = result[other], result[k]
    return result


def splitmix64(index: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Random uint64, one for each entry of `index` (uint64): a function of (seed, stream, index)."""
    start = _mix(np.array([(seed + stream * GOLDEN) % 2**64], dtype=np.uint64))
    return _mix(start + (index + np.uint64(1)) * np.uint64(GOLDEN))


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def lay_out(
    ids: Sequence[np.ndarray],
    labels: Sequence[np.ndarray] | None,
    input_ids: np.ndarray,
    labels_out: np.ndarray,
    position_ids: np.ndarray,
    cu_seqlens: np.ndarray,
) -> int:
    """Write one row: input_ids, labels_out, position_ids int64 [T], cu_seqlens int32 [S + 1]; the longest segment.

    What the samples leave free is one segment of id 0. Labels (missing = the ids) are -100 there and at the first token
    of every sample.
    """
    total = input_ids.size
    sizes = [tokens.size for tokens in ids]
    used = sum(sizes)
    segments = [*sizes, total - used] if used < total else sizes
    cu_seqlens[:] = np.cumsum([0, *segments])
    for start, end, size in zip(cu_seqlens[:-1], cu_seqlens[1:], segments, strict=True):
        position_ids[start:end] = np.arange(size)
    for number, (start, tokens) in enumerate(zip(cu_seqlens[:-1], ids, strict=False)):
        input_ids[start : start + tokens.size] = tokens
        labels_out[start : start + tokens.size] = tokens if labels is None else labels[number]
        labels_out[start] = -100
    input_ids[used:] = 0
    labels_out[used:] = -100
    return max(segments, default=0)


def concatenate(arrays: Sequence[np.ndarray], out: np.ndarray) -> None:
    """The arrays one after the other along the first dimension, then zeros."""
    at = 0
    for array in arrays:
        out[at : at + len(array)] = array
        at += len(array)
    out[at:] = 0
