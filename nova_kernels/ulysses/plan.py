"""Who computes what: heads and tokens of the ranks of a group, and the bytes between them. No tensors.

    HeadPlan    rank p computes hq_p query heads, one range of them, and is sent the hkv_p key heads that they read
    TokenPlan   rank p holds t_p tokens, one range of the packed row
    comm_bytes  what a rank sends, per layer

Between the layers a rank holds all heads of its tokens; inside attention, its heads of all tokens. Nothing has to
divide: there may be fewer key heads than ranks (each then goes to several), fewer heads, and fewer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple


class HeadBlock(NamedTuple):
    """The heads that one rank is sent in one exchange: query heads [q_start, q_end), key heads [kv_start, kv_end)."""

    q_start: int
    q_end: int
    kv_start: int
    kv_end: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q_end - self.q_start

    @property
    def kv_heads(self) -> int:
        """Key heads; there are as many value heads."""
        return self.kv_end - self.kv_start

    @property
    def width(self) -> int:
        """Heads per token in the buffer: query, key and value heads."""
        return self.heads + 2 * self.kv_heads


class HeadRun(NamedTuple):
    """Heads of a block that one attention call takes: equally many query heads for every key head."""

    q: slice  # of the block's query heads
    kv: slice  # of the key heads that came with chunk `source`
    source: int


class CommBytes(NamedTuple):
    """Bytes that one rank sends to others in the forward pass of one attention layer; the backward sends as many."""

    qkv: int
    out: int

    @property
    def total(self) -> int:
        """Both exchanges."""
        return self.qkv + self.out


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """Which heads each of P ranks computes: query heads bounds[p] to bounds[p + 1], and the key heads they read.

    Query head h reads key head h // (Hq / Hkv), as in varlen_attention.
    """

    num_heads: int  # Hq, query heads of the whole model
    num_kv_heads: int  # Hkv, key heads of the whole model
    bounds: tuple[int, ...]  # P + 1 numbers from 0 to Hq

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(self.bounds))  # plans are keys of caches
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"HeadPlan: num_heads must be a positive multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}; both count the heads of the whole model, not of one rank"
            )
        ends = self.bounds
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != self.num_heads or any(b < a for a, b in pairwise(ends)):
            raise ValueError(
                f"HeadPlan: bounds must go from 0 to num_heads = {self.num_heads} without decreasing, got {ends}; "
                "HeadPlan.build(num_heads, num_kv_heads, world_size) makes them"
            )

    @classmethod
    def build(cls, num_heads: int, num_kv_heads: int, world_size: int) -> HeadPlan:
        """The plan for a group of `world_size` ranks, the same on every rank.

        Every rank has Hq / P heads, rounded up or down. Which ranks have one more is chosen so that the fewest copies
        of key heads are sent and, among these, attention is in the fewest calls.

        Args:
            num_heads: Hq, a multiple of num_kv_heads.
            num_kv_heads: Hkv.
            world_size: P, at least 1; with P > Hq some ranks have no heads.

        Raises:
            ValueError: Hq is no positive multiple of Hkv, or P < 1.
        """
        _check_world_size("HeadPlan", world_size)
        cls(num_heads, num_kv_heads, (0, num_heads))  # refuses the numbers of heads
        return cls(num_heads, num_kv_heads, _bounds(num_heads, num_heads // num_kv_heads, world_size))

    @property
    def world_size(self) -> int:
        """P, ranks."""
        return len(self.bounds) - 1

    @property
    def group_size(self) -> int:
        """Query heads that read one key head."""
        return self.num_heads // self.num_kv_heads

    def q_heads(self, rank: int) -> range:
        """The query heads that this rank computes."""
        return range(self.bounds[rank], self.bounds[rank + 1])

    def kv_heads(self, rank: int) -> range:
        """The key heads that they read; the first and the last may be copies of what other ranks have."""
        heads = self.q_heads(rank)
        first = heads.start // self.group_size
        return range(first, -(-heads.stop // self.group_size) if heads else first)

    def kv_index(self, rank: int) -> tuple[int, ...]:
        """For each of this rank's query heads, which of its key heads it reads; counted from 0 on this rank."""
        first = self.kv_heads(rank).start
        return tuple(head // self.group_size - first for head in self.q_heads(rank))

    @lru_cache(maxsize=64)  # noqa: B019  a plan is a small value: what keeps it alive does not matter
    def split(self, chunks: int = 1) -> tuple[tuple[HeadBlock, ...], ...]:
        """What each rank is sent when its heads come in `chunks` exchanges; [chunks][P].

        A rank's chunks are whole groups (a key head and its query heads) if it has groups enough, else equal parts of
        its query heads. A key head goes with the first chunk that reads it, and only with that one.

        Raises:
            ValueError: chunks is less than 1, or more than the heads of any rank.
        """
        most = max(len(self.q_heads(rank)) for rank in range(self.world_size))
        if not 1 <= chunks <= most:
            raise ValueError(f"HeadPlan.split: chunks must be from 1 to {most}, the heads of a rank; got {chunks}")
        columns = [self._split_rank(rank, chunks) for rank in range(self.world_size)]
        return tuple(zip(*columns, strict=True))

    @lru_cache(maxsize=64)  # noqa: B019
    def runs(self, rank: int, chunks: int = 1) -> tuple[tuple[HeadRun, ...], ...]:
        """The attention calls of a rank, for each chunk: usually one, more where borders cut through groups."""
        sent: dict[int, int] = {}  # key head -> chunk that it came with
        blocks = self._split_rank(rank, chunks)
        calls = []
        for chunk, block in enumerate(blocks):
            sent.update(dict.fromkeys(range(block.kv_start, block.kv_end), chunk))
            counts = _heads_per_kv(block.q_start, block.q_end, self.group_size)
            runs, head, kv = [], 0, block.q_start // self.group_size
            sources = [sent[key] for key in range(kv, kv + len(counts))]
            for (heads, source), same in groupby(zip(counts, sources, strict=True)):
                many = len(list(same))
                first = kv - blocks[source].kv_start
                runs.append(HeadRun(slice(head, head + many * heads), slice(first, first + many), source))
                head, kv = head + many * heads, kv + many
            calls.append(tuple(runs))
        return tuple(calls)

    def _split_rank(self, rank: int, chunks: int) -> list[HeadBlock]:
        heads, keys, group = self.q_heads(rank), self.kv_heads(rank), self.group_size
        if len(keys) >= chunks:
            inner = [(keys.start + len(keys) * c // chunks) * group for c in range(1, chunks)]
        else:
            inner = [heads.start + len(heads) * c // chunks for c in range(1, chunks)]
        blocks, next_kv = [], keys.start
        for start, end in pairwise([heads.start, *inner, heads.stop]):
            last_kv = max(next_kv, -(-end // group)) if end > start else next_kv
            blocks.append(HeadBlock(start, end, next_kv, last_kv))
            next_kv = last_kv
        return blocks


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """Which tokens of the packed row each of P ranks holds: rank 0 the first sizes[0], and so on; no padding."""

    sizes: tuple[int, ...]  # tokens per rank, 0 is allowed

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))  # plans are keys of caches
        if not self.sizes or min(self.sizes) < 0:
            raise ValueError(f"TokenPlan: sizes must be one number >= 0 for every rank, got {self.sizes}")

    @classmethod
    def build(cls, num_tokens: int, world_size: int) -> TokenPlan:
        """Equal shares: T / P tokens each, rounded up on the first ranks and down on the others.

        Args:
            num_tokens: T >= 0.
            world_size: P, at least 1; with P > T some ranks hold no token.
        """
        _check_world_size("TokenPlan", world_size)
        if num_tokens < 0:
            raise ValueError(f"TokenPlan: num_tokens must be >= 0, got {num_tokens}")
        few, extra = divmod(num_tokens, world_size)
        return cls(tuple(few + (rank < extra) for rank in range(world_size)))

    @property
    def world_size(self) -> int:
        """P, ranks."""
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        """T, tokens of all ranks."""
        return sum(self.sizes)

    def bounds(self, rank: int) -> tuple[int, int]:
        """This rank holds tokens start to end of the row, the end not included."""
        start = sum(self.sizes[:rank])
        return start, start + self.sizes[rank]


def comm_bytes(head_plan: HeadPlan, token_plan: TokenPlan, *, rank: int, head_dim: int, element_size: int) -> CommBytes:
    """Bytes that a rank sends to other ranks in the forward pass of one attention layer.

        qkv = D e t_rank * sum_{p != rank} (hq_p + 2 hkv_p)          out = D e hq_rank * sum_{p != rank} t_p

    The backward pass sends as many; layers that are computed again send the forward's once more. The number of chunks
    does not change it.

    Args:
        rank: which rank of the group.
        head_dim: D.
        element_size: e, bytes per element: 2 for bfloat16.
    """
    _check_same_group(head_plan, token_plan)
    others = [p for p in range(head_plan.world_size) if p != rank]
    tokens, unit = token_plan.sizes, head_dim * element_size
    return CommBytes(
        qkv=unit * tokens[rank] * sum(len(head_plan.q_heads(p)) + 2 * len(head_plan.kv_heads(p)) for p in others),
        out=unit * len(head_plan.q_heads(rank)) * sum(tokens[p] for p in others),
    )


def allgather_kv_bytes(
    head_plan: HeadPlan, token_plan: TokenPlan, *, rank: int, head_dim: int, element_size: int
) -> int:
    """For comparison: bytes that a rank would send if all keys and values went to all ranks (or around a ring).

        2 D e t_rank Hkv (P - 1)

    in the forward pass; a ring's backward pass sends keys and values again, and their gradients.
    """
    _check_same_group(head_plan, token_plan)
    tokens = token_plan.sizes[rank] * (head_plan.world_size - 1)
    return 2 * head_dim * element_size * head_plan.num_kv_heads * tokens


def _check_world_size(what: str, world_size: int) -> None:
    if world_size < 1:
        raise ValueError(f"{what}: world_size must be at least 1, got {world_size}; it is dist.get_world_size(group)")


def _check_same_group(head_plan: HeadPlan, token_plan: TokenPlan) -> None:
    if head_plan.world_size != token_plan.world_size:
        raise ValueError(
            f"the head plan is for {head_plan.world_size} ranks, the token plan for {token_plan.world_size}; "
            "build both for one group"
        )


@lru_cache(maxsize=64)
def _bounds(num_heads: int, group: int, world_size: int) -> tuple[int, ...]:
    """Equal ranges of query heads, one head more where the fewest copies of key heads and then fewest runs follow."""
    few, extra = divmod(num_heads, world_size)
    # best[b]: cost and bounds of the ranks so far when b of them have one head more.
    best: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {0: ((0, 0), (0,))}
    for rank in range(world_size):
        after: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {}
        for used, (cost, bounds) in best.items():
            for more in (1, 0):
                if used + more > extra or extra - used - more > world_size - rank - 1:
                    continue
                start, end = bounds[-1], bounds[-1] + few + more
                counts = _heads_per_kv(start, end, group)
                total = (cost[0] + len(counts), cost[1] + sum(1 for _ in groupby(counts)))
                if used + more not in after or total < after[used + more][0]:
                    after[used + more] = total, (*bounds, end)
        best = after
    return best[extra][1]


def _heads_per_kv(start: int, end: int, group: int) -> list[int]:
    """How many of the query heads start..end read each key head, beginning with that of `start`."""
    if start == end:
        return []
    borders = [start, *range((start // group + 1) * group, end, group), end]
    return [after - before for before, after in pairwise(borders)]
