"""The all-to-all of attention heads: one route, four stops, and the gradients go the same way back.

    Spread   q, k, v [t, H, D]    packed into one buffer, every exchange is begun          adjoint: Collect
    Arrive   an exchange is waited for: the rank's heads of all tokens, [T, w, D]         adjoint: Depart
    Depart   heads of all tokens [T, w, D] are the send buffer as they are: begun          adjoint: Arrive
    Collect  every exchange is waited for, what came is unpacked                           adjoint: Spread

q, k and v take Spread and Arrive, the attention output Depart and Collect. Begun and waited for are different nodes of
the autograd graph, and autograd runs nodes in the reverse order of their making: with several chunks, one chunk's
exchange runs during another one's attention, in the backward pass as well, without any stream or hook of ours.

Between two stops a tensor of 0 elements carries the dependency; what is in flight belongs to the Route. All ranks of a
group make the same calls in the same order, whatever they hold; a rank without heads or tokens takes part too.
"""

# Shape suffixes: t = tokens of this rank, T = tokens of all, P = ranks, C = chunks, D = head width, w = heads in a row.

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nova_kernels.backend import runs_triton
from nova_kernels.ulysses import pack
from nova_kernels.ulysses.plan import HeadBlock, HeadPlan, TokenPlan


class Route:
    """The way of heads to the ranks that compute them, and back, for one call of one layer.

    Args:
        group: P ranks; nothing else is remembered of them.
        head_plan, token_plan: who has which heads and tokens.
        blocks: [C][P], the heads that each rank is sent in each exchange.
        head_dim: D.
        keys: whether key and value heads travel with the query heads.
        cos, sin: [t, D] each, the rotation of q and k while they are packed; None = none.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        head_plan: HeadPlan,
        token_plan: TokenPlan,
        blocks: Sequence[Sequence[HeadBlock]],
        head_dim: int,
        *,
        keys: bool,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> None:
        if not keys:
            blocks = [[HeadBlock(b.q_start, b.q_end, 0, 0) for b in chunk] for chunk in blocks]
        rank = dist.get_rank(group)
        tokens = token_plan.sizes
        self.group, self.blocks, self.cos, self.sin = group, list(chain(*blocks)), cos, sin
        self.here = [chunk[rank] for chunk in blocks]  # what this rank computes
        self.num_tokens = token_plan.num_tokens
        self.local = {
            "num_tokens": tokens[rank],
            "num_heads": head_plan.num_heads,
            "num_kv_heads": head_plan.num_kv_heads if keys else 0,
            "head_dim": head_dim,
        }
        # Elements that go to each rank, and that come from each rank; exchanged on the way back.
        self._out = [[tokens[rank] * block.width * head_dim for block in chunk] for chunk in blocks]
        self._in = [[held * chunk[rank].width * head_dim for held in tokens] for chunk in blocks]
        self._parts = [0, *accumulate(map(sum, self._out))]  # where each chunk begins in the packed buffer
        self._home: Tensor | None = None  # the buffer that is received on the way back
        self._flying: dict[int, tuple[dist.Work | None, Tensor, Tensor]] = {}  # of each chunk: sent and received buffer

    def spread(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Pack and begin to send [t, Hq, D], [t, Hkv, D], [t, Hkv, D]."""
        buffer = twin(q).pack_heads(q, k, v, self.blocks, cos=self.cos, sin=self.sin)
        for chunk, (send, receive) in enumerate(zip(self._out, self._in, strict=True)):
            part = buffer[self._parts[chunk] : self._parts[chunk + 1]]
            self._begin(chunk, part, send, buffer.new_empty(sum(receive)), receive)

    def arrive(self, chunk: int) -> Tensor:
        """[T, w, D]: the rank's heads of this chunk for all tokens, when they are there."""
        shape = (self.num_tokens, self.here[chunk].width, self.local["head_dim"])
        return self._finish(chunk).view(shape)

    def depart(self, chunk: int, rows: Tensor) -> None:
        """Begin to send [T, w, D] back to where the tokens are held."""
        if self._home is None:
            self._home = rows.new_empty(self._parts[-1])
        home = self._home[self._parts[chunk] : self._parts[chunk + 1]]
        self._begin(chunk, rows.contiguous().view(-1), self._in[chunk], home, self._out[chunk])

    def collect(self) -> tuple[Tensor, Tensor, Tensor]:
        """[t, Hq, D], [t, Hkv, D], [t, Hkv, D], when everything is back; copies of a key head are summed."""
        for chunk in range(len(self.here)):
            self._finish(chunk)
        home, self._home = self._home, None
        if home is None:
            raise RuntimeError("Route.collect: nothing departed; every chunk has to depart before they are collected")
        return twin(home).unpack_heads(home, self.blocks, cos=self.cos, sin=self.sin, **self.local)

    def _begin(self, chunk: int, buffer: Tensor, send: list[int], into: Tensor, receive: list[int]) -> None:
        work = dist.all_to_all_single(into, buffer, receive, send, self.group, async_op=True)
        self._flying[chunk] = work, buffer, into

    def _finish(self, chunk: int) -> Tensor:
        work, _, into = self._flying.pop(chunk)
        if work is not None:
            work.wait()
        return into


def twin(tensor: Tensor) -> Any:
    """The module whose pack_heads and unpack_heads run on this tensor: Triton's, or PyTorch's."""
    if not runs_triton(tensor.device, tensor.dtype):
        return pack
    from nova_kernels.ulysses import kernels

    module: ModuleType = kernels
    return module


class Spread(torch.autograd.Function):
    """(route, q, k, v) -> one token per chunk."""

    @staticmethod
    def forward(ctx: Any, route: Route, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.route = route
        route.spread(q, k, v)
        return tuple(q.new_empty(0) for _ in route.here)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_tokens: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.route.collect()


class Arrive(torch.autograd.Function):
    """(route, chunk, token) -> q [T, hq, D], k [T, hkv, D], v [T, hkv, D]: views of one buffer."""

    @staticmethod
    def forward(ctx: Any, route: Route, chunk: int, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Saved on every rank, so that activation checkpointing, which stops after the last tensor that is needed, comes
        # as far as this exchange on ranks without heads too.
        ctx.save_for_backward(token)
        ctx.route, ctx.chunk = route, chunk
        block = route.here[chunk]
        q, k, v = route.arrive(chunk).split([block.heads, block.kv_heads, block.kv_heads], dim=1)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        ctx.route.depart(ctx.chunk, torch.cat(gradients, dim=1))
        return None, None, torch.empty_like(token)


class Depart(torch.autograd.Function):
    """(route, chunk, out [T, hq, D]) -> token."""

    @staticmethod
    def forward(ctx: Any, route: Route, chunk: int, out: Tensor) -> Tensor:
        ctx.route, ctx.chunk = route, chunk
        route.depart(chunk, out)
        return out.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _token: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.route.arrive(ctx.chunk)


class Collect(torch.autograd.Function):
    """(route, one token per chunk) -> out [t, Hq, D]."""

    @staticmethod
    def forward(ctx: Any, route: Route, *tokens: Tensor) -> Tensor:
        ctx.route = route
        return route.collect()[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        route = ctx.route
        route.spread(gradient, gradient[:, :0], gradient[:, :0])
        return None, *(gradient.new_empty(0) for _ in route.here)
