"""The all-to-all of attention heads: one route, four stops, and the gradients go the same way back.

    Spread   q, k, v [t, H, D]    packed into one buffer, every exchange is begun          adjoint: Collect
    Arrive   an exchange is waited for: the rank's heads of all tokens, [T, w, D]         adjoint: Depart
    Depart   heads of all tokens [T, h, D] are begun to be sent, by token                  adjoint: Arrive
    Collect  every exchange is waited for, what came is unpacked                           adjoint: Spread

q, k and v take Spread and Arrive, the attention output Depart and Collect. Begun and waited for are different nodes of
the autograd graph, and autograd runs nodes in the reverse order of their making: with several chunks, one chunk's
exchange runs during another one's attention, in the backward pass as well, without any stream or hook of ours.

Between two stops a tensor of 0 elements carries the dependency; what is in flight belongs to the Route. All ranks of a
group make the same calls in the same order, whatever they hold; a rank without heads or tokens takes part too.
"""

# Shape suffixes: t = tokens of this rank, T = tokens of all, P = ranks, C = chunks, D = head width, h = heads of one
# tensor, w = those of all that travel together.

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nova_kernels.backend import choose, fastest_first, why_not_triton
from nova_kernels.ulysses import pack
from nova_kernels.ulysses.plan import HeadBlock, HeadPlan, TokenPlan


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a rank sends and receives, from the plans alone; made once for them, by `schedule`."""

    blocks: tuple[HeadBlock, ...]  # [C P], the heads that each rank is sent in each exchange
    here: tuple[HeadBlock, ...]  # [C], those that this rank computes
    tokens: tuple[int, ...]  # [P], of each rank
    # Elements that go to each rank and that come from each, [C][P]; exchanged on the way back.
    out: tuple[tuple[int, ...], ...]
    into: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]  # [C + 1], where the chunks are in the packed buffer
    sizes: dict[str, int]  # of what this rank holds, as unpack_heads wants them


@lru_cache(maxsize=128)
def schedule(
    head_plan: HeadPlan, token_plan: TokenPlan, rank: int, head_dim: int, *, chunks: int = 1, keys: bool
) -> Schedule:
    """The schedule of a rank; `keys` tells whether key and value heads travel with the query heads.

    Raises:
        ValueError: no rank has so many heads as there are chunks.
    """
    blocks, tokens = head_plan.split(chunks), token_plan.sizes
    if not keys:
        blocks = tuple(tuple(HeadBlock(b.q_start, b.q_end, 0, 0) for b in chunk) for chunk in blocks)
    out = tuple(tuple(tokens[rank] * block.width * head_dim for block in chunk) for chunk in blocks)
    sizes = {
        "num_tokens": tokens[rank],
        "num_heads": head_plan.num_heads,
        "num_kv_heads": head_plan.num_kv_heads if keys else 0,
        "head_dim": head_dim,
    }
    return Schedule(
        blocks=tuple(chain(*blocks)),
        here=tuple(chunk[rank] for chunk in blocks),
        tokens=tokens,
        out=out,
        into=tuple(tuple(held * chunk[rank].width * head_dim for held in tokens) for chunk in blocks),
        bounds=(0, *accumulate(map(sum, out))),
        sizes=sizes,
    )


def packing(device: torch.device, backend: str | None = None) -> Any:
    """The module whose pack_heads and unpack_heads run on tensors of this device.

    Args:
        device: of q, k, v.
        backend: "triton" or "reference" (PyTorch); None takes the first that can run.

    Raises:
        ValueError: no backend of this name.
        TypeError: it is no name.
        BackendUnavailableError: the named one cannot run there.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"ulysses packing: the backend must be a name, got {backend!r}; None = the first that can run")
    reason = why_not_triton(device)
    compiled = {"triton": reason and f"{reason}; 'reference' packs anywhere"}
    if choose("ulysses packing", backend, fastest_first(device, compiled, {"reference": None})) == "reference":
        return pack
    from nova_kernels.ulysses import kernels

    module: ModuleType = kernels
    return module


class Route:
    """The way of heads to the ranks that compute them, and back, for one call of one layer.

    Args:
        group: P ranks; nothing else is remembered of them.
        plan: what this rank sends and receives.
        module: packs and unpacks; see `packing`.
        cos, sin: [t, D] each, the rotation of q and k while they are packed; None = none.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        plan: Schedule,
        module: Any,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> None:
        self.plan = plan
        self._group, self._module, self._cos, self._sin = group, module, cos, sin
        self._home: Tensor | None = None  # the buffer that is received on the way back
        self._flying: dict[int, tuple[dist.Work | None, Tensor, Tensor]] = {}  # of each chunk: sent and received buffer

    def spread(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Pack and begin to send [t, Hq, D], [t, Hkv, D], [t, Hkv, D]."""
        plan = self.plan
        buffer = self._module.pack_heads(q, k, v, plan.blocks, cos=self._cos, sin=self._sin)
        for chunk, (send, receive) in enumerate(zip(plan.out, plan.into, strict=True)):
            self._begin(chunk, self._part(buffer, chunk), send, buffer.new_empty(sum(receive)), receive)

    def arrive(self, chunk: int) -> Tensor:
        """[T, w, D]: the rank's heads of this chunk for all tokens, when they are there."""
        shape = (sum(self.plan.tokens), self.plan.here[chunk].width, self.plan.sizes["head_dim"])
        return self._finish(chunk).view(shape)

    def depart(self, chunk: int, *heads: Tensor) -> None:
        """Begin to send [T, h, D], one or more, back to where the tokens are held."""
        plan, rows = self.plan, pack.join_heads(heads, self.plan.tokens)
        if self._home is None:
            self._home = rows.new_empty(plan.bounds[-1])
        self._begin(chunk, rows, plan.into[chunk], self._part(self._home, chunk), plan.out[chunk])

    def collect(self) -> tuple[Tensor, Tensor, Tensor]:
        """[t, Hq, D], [t, Hkv, D], [t, Hkv, D], when everything is back; copies of a key head are summed."""
        for chunk in range(len(self.plan.here)):
            self._finish(chunk)
        home, self._home = self._home, None
        if home is None:
            raise RuntimeError("Route.collect: nothing departed; every chunk has to depart before they are collected")
        found: tuple[Tensor, Tensor, Tensor] = self._module.unpack_heads(
            home, self.plan.blocks, cos=self._cos, sin=self._sin, **self.plan.sizes
        )
        return found

    def _part(self, buffer: Tensor, chunk: int) -> Tensor:
        return buffer[self.plan.bounds[chunk] : self.plan.bounds[chunk + 1]]

    def _begin(self, chunk: int, buffer: Tensor, send: tuple[int, ...], into: Tensor, receive: tuple[int, ...]) -> None:
        work = dist.all_to_all_single(into, buffer, list(receive), list(send), self._group, async_op=True)
        self._flying[chunk] = work, buffer, into

    def _finish(self, chunk: int) -> Tensor:
        work, _, into = self._flying.pop(chunk)
        if work is not None:
            work.wait()
        return into


class Spread(torch.autograd.Function):
    """(route, q, k, v) -> one token per chunk."""

    @staticmethod
    def forward(ctx: Any, route: Route, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.route = route
        route.spread(q, k, v)
        return tuple(q.new_empty(0) for _ in route.plan.here)

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
        block = route.plan.here[chunk]
        q, k, v = route.arrive(chunk).split([block.heads, block.kv_heads, block.kv_heads], dim=1)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        ctx.route.depart(ctx.chunk, *gradients)
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
        return None, *(gradient.new_empty(0) for _ in route.plan.here)
