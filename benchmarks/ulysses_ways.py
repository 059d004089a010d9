"""Heads to their ranks and back, each way behind the same parts; what they are given and what is right.

nova_kernels       one buffer for q, k, v, rotated while it is filled; the output is unpacked by one kernel
three permutes     what is written without a kernel, as DeepSpeed's and its successors' users have it: q, k, v on their
                   own, each permuted to [P, t, H / P, D] and made contiguous, exchanged in three all-to-alls; key heads
                   repeated before that where there are fewer than ranks; the output permuted back and contiguous, as
                   the projection after it reads it; rotations before all that, as Hugging Face models do. Heads have
                   to divide by ranks or ranks by key heads

In place of attention is one that takes no time: its output and its gradients are made beforehand, and laid out as those
of real attention are. Whatever has to be moved is, forward and backward, and nothing else is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import lm_inputs
from benchmarks.ways import Way
from nova_kernels.ulysses import HeadBlock, HeadPlan, TokenPlan, gather_heads, pack, scatter_heads
from nova_kernels.ulysses.collective import packing

# Made once, as for a model.
head_plan = lru_cache(HeadPlan.build)
token_plan = lru_cache(TokenPlan.build)


@lru_cache
def blocks_of(plan: HeadPlan, *, keys: bool = True) -> tuple[HeadBlock, ...]:
    """What each rank is sent; without keys, of the output alone."""
    (blocks,) = plan.split()
    return blocks if keys else tuple(HeadBlock(block.q_start, block.q_end, 0, 0) for block in blocks)


@dataclass(frozen=True)
class Problem:
    """A layer's heads, and how many ranks share its tokens. Tokens and heads divide, so that every way can."""

    where: str  # "gloo", or "emulated": see ulysses_groups
    ranks: int
    tokens: int  # T, of all ranks
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    device: str
    rotated: bool = False

    @property
    def held(self) -> int:
        """t, tokens of one rank."""
        return self.tokens // self.ranks

    @property
    def copies(self) -> int:
        """Of each key head."""
        return max(1, self.ranks // self.kv_heads)

    @property
    def plan(self) -> HeadPlan:
        return head_plan(self.heads, self.kv_heads, self.ranks)

    @property
    def token_plan(self) -> TokenPlan:
        return token_plan(self.tokens, self.ranks)

    @property
    def blocks(self) -> tuple[HeadBlock, ...]:
        return blocks_of(self.plan)

    @property
    def element(self) -> int:
        return torch.empty(0, dtype=self.dtype).element_size()

    def facts(self) -> dict[str, Any]:
        return {
            "case": self.where,
            "ranks": self.ranks,
            "tokens": self.tokens,
            "heads": f"{self.heads} / {self.kv_heads}",
            "width": self.width,
            "dtype": lm_inputs.name_of(self.dtype),
            "rotated": "yes" if self.rotated else "no",
        }

    def here(self, rank: int) -> tuple[int, int, int]:
        """q, k and v heads that a rank computes."""
        keys = len(self.plan.kv_heads(rank))
        return len(self.plan.q_heads(rank)), keys, keys

    def sender(self, rank: int) -> tuple[int, int]:
        """(whose tokens rank 0 gets as those of `rank`, whose heads): the copy of a device is from itself."""
        return (rank, 0) if self.where == "gloo" else (0, rank)

    def returner(self, rank: int) -> tuple[int, slice]:
        """(who sends rank 0's tokens back as `rank`, which rows of all tokens)."""
        rows = slice(0, self.held) if self.where == "gloo" else slice(rank * self.held, (rank + 1) * self.held)
        return (rank if self.where == "gloo" else 0), rows


@dataclass(frozen=True, eq=False)
class Shard:
    """What one rank holds, and what its attention would say."""

    inputs: list[Tensor]  # q, k, v [t, H, D], views of one projection
    cos: Tensor  # [t, D]
    sin: Tensor
    out: Tensor  # [T, hq, D], the output of its heads
    by_heads: list[Tensor]  # gradients of q [T, hq, D], of k and v [T, hkv, D]
    by_out: Tensor  # [t, Hq, D], the gradient of the output of its tokens

    def angles(self, problem: Problem) -> dict[str, Tensor]:
        return {"cos": self.cos, "sin": self.sin} if problem.rotated else {}


@lru_cache(maxsize=4)
def shard(problem: Problem, rank: int) -> Shard:
    random = torch.Generator(problem.device).manual_seed(lm_inputs.SEED + rank)
    keys, t, width = problem.kv_heads, problem.held, problem.width

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, width, generator=random, device=problem.device).to(problem.dtype)

    inputs = list(normal(t, problem.heads + 2 * keys).split([problem.heads, keys, keys], dim=1))
    places = torch.arange(t, device=problem.device) + rank * t
    turns = places[:, None] * 10000.0 ** (-torch.arange(width // 2, device=problem.device) * 2 / width)
    cos, sin = (torch.cat([x, x], dim=1).to(problem.dtype) for x in (turns.cos(), turns.sin()))
    out, *by_heads = (normal(problem.tokens, heads) for heads in (*problem.here(rank)[:1], *problem.here(rank)))
    return Shard(inputs, cos, sin, out, by_heads, normal(t, problem.heads))


class NoAttention(torch.autograd.Function):
    """q [T, hq, D], k, v [T, hkv, D] -> the shard's output; what it was given, both ways, is in `seen`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, given: Shard, seen: list[Tensor]) -> Tensor:
        ctx.given, ctx.seen = given, seen
        seen[:] = [q.detach(), k.detach(), v.detach()]
        return given.out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.seen.append(gradient)
        return *ctx.given.by_heads, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in Hugging Face models: x cos + [-b, a] sin, in the dtype of x."""
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


class Truth:
    """What rank 0 has to have, in float64, from the definition: the heads of one rank's tokens at a time."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def _turned(self, rank: int, inputs: list[Tensor]) -> list[Tensor]:
        given = shard(self.problem, rank)
        if not self.problem.rotated:
            return inputs
        cos, sin = given.cos.double(), given.sin.double()
        return [rotate(inputs[0], cos, sin), rotate(inputs[1], cos, sin), inputs[2]]

    def _heads(self, rank: int) -> list[list[int]]:
        """Of q, k and v, which a rank computes."""
        plan = self.problem.plan
        return [list(plan.q_heads(rank)), *([list(plan.kv_heads(rank))] * 2)]

    @cached_property
    def arrived(self) -> list[Tensor]:
        """q, k, v [T, heads of this rank, D] of all tokens."""
        pieces: list[list[Tensor]] = []
        for rank in range(self.problem.ranks):
            source, owner = self.problem.sender(rank)
            turned = self._turned(source, [x.double() for x in shard(self.problem, source).inputs])
            pieces.append([x[:, own] for x, own in zip(turned, self._heads(owner), strict=True)])
        return [torch.cat(column) for column in zip(*pieces, strict=True)]

    @cached_property
    def by_arrived(self) -> Tensor:
        """The gradient of the output, [T, heads of this rank, D]."""
        senders = map(self.problem.sender, range(self.problem.ranks))
        found = [shard(self.problem, source).by_out[:, self._heads(owner)[0]] for source, owner in senders]
        return torch.cat(found).double()

    @cached_property
    def output(self) -> Tensor:
        """[t, Hq, D]: all heads of this rank's tokens."""
        returners = map(self.problem.returner, range(self.problem.ranks))
        return torch.cat([shard(self.problem, owner).out[rows] for owner, rows in returners], dim=1).double()

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Of q, k, v [t, H, D], by autograd."""
        leaves = [x.double().requires_grad_() for x in shard(self.problem, 0).inputs]
        turned = self._turned(0, leaves)
        total = turned[0].new_zeros(())
        for rank in range(self.problem.ranks):
            owner, rows = self.problem.returner(rank)
            by = [x[rows].double() for x in shard(self.problem, owner).by_heads]
            for x, heads, gradient in zip(turned, self._heads(rank), by, strict=True):
                total = total + (x[:, heads] * gradient).sum()
        return list(torch.autograd.grad(total, leaves))


Pack = Callable[[Tensor, Tensor, Tensor, Shard, Problem], list[Tensor]]  # -> send buffers
Unpack = Callable[[Tensor, Shard, Problem], Tensor]  # received output -> [t, Hq, D]


@dataclass(frozen=True, kw_only=True)
class HeadWay(Way):
    """`run` moves q, k, v there and the output back; its parts are what a rank does before and after an exchange."""

    pack: Pack
    arrived: Callable[[list[Tensor], Problem], list[Tensor]]  # received buffers -> q, k, v [T, h, D], no work
    unpack: Unpack
    gradients: Callable[[list[Tensor], Shard, Problem], list[Tensor]]  # of q, k, v [T, h, D] -> [t, H, D]
    parts_only: bool = False


# --- ours


def our_pack(q: Tensor, k: Tensor, v: Tensor, given: Shard, problem: Problem, module: Any = None) -> list[Tensor]:
    return [(module or packing(q.device)).pack_heads(q, k, v, problem.blocks, **given.angles(problem))]


def our_arrived(received: list[Tensor], problem: Problem) -> list[Tensor]:
    block = problem.blocks[0]
    rows = received[0].view(problem.tokens, block.width, problem.width)
    return list(rows.split([block.heads, block.kv_heads, block.kv_heads], dim=1))


def our_unpack(out: Tensor, given: Shard, problem: Problem, module: Any = None) -> Tensor:
    blocks = blocks_of(problem.plan, keys=False)
    sizes = {"num_tokens": problem.held, "num_heads": problem.heads, "num_kv_heads": 0, "head_dim": problem.width}
    found: Tensor = (module or packing(out.device)).unpack_heads(out.view(-1), blocks, **sizes)[0]
    return found


def our_gradients(found: list[Tensor], given: Shard, problem: Problem, module: Any = None) -> list[Tensor]:
    """Joined before they leave, and unpacked, as if they were back."""
    buffer = pack.join_heads(found, problem.token_plan.sizes)
    sizes = {"num_tokens": problem.held, "num_heads": problem.heads, "num_kv_heads": problem.kv_heads}
    options = {**sizes, "head_dim": problem.width, **given.angles(problem)}
    return list((module or packing(buffer.device)).unpack_heads(buffer, problem.blocks, **options))


def our_layer(
    q: Tensor, k: Tensor, v: Tensor, given: Shard, problem: Problem, group: dist.ProcessGroup, seen: list[Tensor]
) -> Tensor:
    plans: dict[str, Any] = {"group": group, "head_plan": problem.plan, "token_plan": problem.token_plan}
    heads = scatter_heads(q, k, v, **plans, **given.angles(problem))
    return gather_heads(NoAttention.apply(*heads, given, seen), **plans)


# --- three permutes


class Exchange(torch.autograd.Function):
    """[P, t, h, D] to [P, t, h, D]: block p to rank p, block p from rank p."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        received = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, gradient.contiguous(), group=ctx.group)
        return received, None


def to_ranks(x: Tensor, ranks: int) -> Tensor:
    tokens, heads, width = x.shape
    return x.view(tokens, ranks, heads // ranks, width).permute(1, 0, 2, 3).contiguous()


def from_ranks(blocks: Tensor) -> Tensor:
    ranks, tokens, heads, width = blocks.shape
    return blocks.permute(1, 0, 2, 3).reshape(tokens, ranks * heads, width)


def by_rank(x: Tensor, problem: Problem) -> Tensor:
    return x.reshape(problem.ranks, problem.held, -1, problem.width)


def permutes_pack(q: Tensor, k: Tensor, v: Tensor, given: Shard, problem: Problem) -> list[Tensor]:
    if problem.rotated:
        q, k = rotate(q, given.cos, given.sin), rotate(k, given.cos, given.sin)
    if problem.copies > 1:
        k, v = k.repeat_interleave(problem.copies, 1), v.repeat_interleave(problem.copies, 1)
    return [to_ranks(x, problem.ranks) for x in (q, k, v)]


def permutes_arrived(received: list[Tensor], problem: Problem) -> list[Tensor]:
    return [x.view(problem.tokens, -1, problem.width) for x in received]


def permutes_unpack(out: Tensor, given: Shard, problem: Problem) -> Tensor:
    return from_ranks(by_rank(out, problem)).contiguous()


def permutes_gradients(found: list[Tensor], given: Shard, problem: Problem) -> list[Tensor]:
    """What autograd does to them when they are back."""
    dq, dk, dv = (from_ranks(by_rank(x, problem)) for x in found)
    if problem.copies > 1:
        dk, dv = (x.view(problem.held, problem.kv_heads, problem.copies, problem.width).sum(2) for x in (dk, dv))
    if problem.rotated:
        dq, dk = (rotate_back(x, given.cos, given.sin) for x in (dq, dk))
    return [dq, dk, dv]


def rotate_back(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, d = (y * sin[:, None]).chunk(2, dim=-1)
    return y * cos[:, None] + torch.cat([d, -c], dim=-1)


def permutes_layer(
    q: Tensor, k: Tensor, v: Tensor, given: Shard, problem: Problem, group: dist.ProcessGroup, seen: list[Tensor]
) -> Tensor:
    received = [Exchange.apply(blocks, group) for blocks in permutes_pack(q, k, v, given, problem)]
    out = NoAttention.apply(*permutes_arrived(received, problem), given, seen)
    return from_ranks(Exchange.apply(by_rank(out, problem), group)).contiguous()


OURS = HeadWay(
    "nova_kernels",
    our_layer,
    "nova-kernels",
    tolerance=1e-5,
    pack=our_pack,
    arrived=our_arrived,
    unpack=our_unpack,
    gradients=our_gradients,
)


def plain(part: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: part(*given, module=pack)


PLAIN = HeadWay(
    "nova_kernels, PyTorch",
    our_layer,
    "nova-kernels",
    tolerance=1e-5,
    pack=plain(our_pack),
    arrived=our_arrived,
    unpack=plain(our_unpack),
    gradients=plain(our_gradients),
    parts_only=True,
)
PERMUTES = HeadWay(
    "three permutes",
    permutes_layer,
    tolerance=1e-5,
    pack=permutes_pack,
    arrived=permutes_arrived,
    unpack=permutes_unpack,
    gradients=permutes_gradients,
)
COMPILED = HeadWay(
    "three permutes, compiled",
    permutes_layer,
    compiled=True,
    tolerance=1e-5,
    pack=permutes_pack,
    arrived=permutes_arrived,
    unpack=permutes_unpack,
    gradients=permutes_gradients,
    parts_only=True,
)
