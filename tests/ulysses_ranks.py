"""One attention layer on the ranks of a group, and the same without ranks; the cases that tests of Ulysses compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_truth import one_mask
from nova_kernels.ulysses import (
    HeadPlan,
    TokenPlan,
    pack,
    ulysses_attention,
)
from nova_kernels.varlen import cu_seqlens_from_lengths

WIDTH, HIDDEN = 4, 6
LENGTHS = (5, 1, 14, 17)  # 37 tokens: nothing divides them, and every edge of a shard is inside of a document


@dataclass(frozen=True)
class Case:
    ranks: tuple[int, ...]
    heads: int
    kv_heads: int
    dtype: torch.dtype = torch.float64
    lengths: tuple[int, ...] = LENGTHS
    sizes: tuple[int, ...] | None = None  # tokens per rank; None = equal shares
    chunks: int = 1
    ignored: int | None = None  # the rank whose tokens the loss ignores
    rotated: bool = False
    checkpointed: str = ""  # "layer" or "attention": what is computed again in backward
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    pack_backend: str | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def token_plan(self) -> TokenPlan:
        return TokenPlan(self.sizes) if self.sizes else TokenPlan.build(self.tokens, len(self.ranks))

    @property
    def head_plan(self) -> HeadPlan:
        return HeadPlan.build(self.heads, self.kv_heads, len(self.ranks))


class Layer(nn.Module):
    """Projections around attention; q, k, v are views of one product."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.heads)
        self.heads = [case.heads, case.kv_heads, case.kv_heads]
        self.qkv = nn.Linear(HIDDEN, sum(self.heads) * WIDTH)
        self.out = nn.Linear(case.heads * WIDTH, HIDDEN)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.to(case.dtype)

    def forward(self, x: Tensor, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, WIDTH)).split(self.heads, dim=1)
        return self.out(attention(q, k, v).flatten(1))


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, hidden], targets [T, hidden], what each token counts [T], angles [T, D] of the rotation."""
    generator = torch.Generator().manual_seed(7)
    x, targets = (torch.randn(case.tokens, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    counts = torch.randint(0, 3, (case.tokens,), generator=generator).double()
    if case.ignored is not None:
        start, end = case.token_plan.bounds(case.ignored)
        counts[start:end] = 0
    angles = torch.rand(case.tokens, WIDTH // 2, generator=generator, dtype=torch.float64).repeat(1, 2) * 6
    return x.to(case.dtype), targets.to(case.dtype), counts.to(case.dtype), angles


def loss_of(y: Tensor, targets: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    return ((y - targets).square().sum(1) * counts).sum() / total.clamp(min=1)


def one_process(case: Case) -> dict[str, Tensor]:
    """By one T x T mask, in float64 and then the dtype of the case."""
    layer, (x, targets, counts, angles) = Layer(case).double(), inputs(case)
    x = x.double().requires_grad_()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.rotated:
            q, k = (pack.rotate(each, angles.cos(), angles.sin()) for each in (q, k))
        return one_mask(q, k, v, list(case.lengths), **case.options)

    loss = loss_of(layer(x, attention), targets, counts, counts.double().sum())
    loss.backward()
    assert x.grad is not None
    return {
        "loss": loss.detach(),
        "x": x.grad,
        **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None},
    }


def shared(case: Case, group: dist.ProcessGroup, cu_seqlens: Tensor | None = None) -> dict[str, Any]:
    """Loss and weight gradients of all ranks together, the input gradient of this one, and what was exchanged."""
    rank, (x, targets, counts, angles) = dist.get_rank(group), inputs(case)
    start, end = case.token_plan.bounds(rank)
    mine = slice(start, end)
    x = x[mine].clone().requires_grad_()
    layer = Layer(case)
    rotation = {"cos": angles[mine].cos(), "sin": angles[mine].sin()} if case.rotated else {}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ulysses_attention(
            q,
            k,
            v,
            cu_seqlens=cu_seqlens_from_lengths(case.lengths) if cu_seqlens is None else cu_seqlens,
            max_seqlen=max(case.lengths),
            group=group,
            token_plan=case.token_plan if case.sizes else None,
            chunks=case.chunks,
            pack_backend=case.pack_backend,
            **rotation,
            **case.options,
        )

    run = partial(checkpoint, use_reentrant=False)
    if case.checkpointed == "attention":
        attention = partial(run, attention)
    with counting() as forward:
        y = run(layer, x, attention) if case.checkpointed == "layer" else layer(x, attention)
    with counting() as backward:
        loss = loss_of(y, targets[mine], counts[mine], counts.sum())
        loss.backward()
    found: dict[str, Any] = {"loss": loss.detach().clone()}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    for value in found.values():
        dist.all_reduce(value, group=group)
    return {**found, "x": x.grad, "forward": forward, "backward": backward}


@dataclass
class Counted:
    calls: list[str] = field(default_factory=list)  # collectives, by name
    bytes: list[int] = field(default_factory=list)  # that each all-to-all sends to others


COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "irecv", "isend", "recv", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip


@contextmanager
def counting() -> Iterator[Counted]:
    """Every collective of torch.distributed."""
    counted, own = Counted(), {name: getattr(dist, name) for name in COLLECTIVES}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted.calls.append(name)
            if name == "all_to_all_single":
                _, buffer, _, send, group = args
                counted.bytes.append((sum(send) - send[dist.get_rank(group)]) * buffer.element_size())
                assert buffer.numel() == sum(send)
            return own[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, watched(name))
    try:
        yield counted
    finally:
        for name, function in own.items():
            setattr(dist, name, function)


HEADS = ((8, 8), (8, 2), (6, 3), (14, 2), (7, 1), (28, 4))
GROUPS = ((0, 1), (0, 1, 2), (0, 1, 2, 3))


def _cases() -> dict[str, Case]:
    cases = {}
    for ranks in GROUPS:
        for heads, kv_heads in HEADS:
            for dtype in (torch.float64, torch.float32):
                name = f"P={len(ranks)} heads {heads}/{kv_heads} {str(dtype)[6:]}"
                cases[name] = Case(ranks, heads, kv_heads, dtype, ignored=len(ranks) - 1)
    two, three, four = GROUPS
    return cases | {
        "fewer tokens than ranks": Case(four, 6, 3, lengths=(2, 1)),
        "documents of one token": Case(three, 8, 2, lengths=(1,) * 7),
        "empty documents": Case(two, 8, 2, lengths=(0, 4, 0, 9, 0)),
        "no tokens": Case(two, 8, 2, lengths=(0,)),
        "documents end at shards": Case(three, 6, 3, lengths=(4, 4, 4)),
        "more ranks than heads": Case(four, 3, 1),
        "more ranks than heads, checkpointed": Case(four, 2, 2, checkpointed="layer"),
        "more ranks than heads, attention checkpointed": Case(four, 2, 2, checkpointed="attention"),
        "attention checkpointed": Case(three, 28, 4, chunks=3, checkpointed="attention"),
        "one head": Case(three, 1, 1),
        "sizes of the caller": Case(three, 14, 2, sizes=(0, 30, 7)),
        "another group": Case((1, 3), 14, 2),
        "one rank": Case((2,), 14, 2),
        "one rank rotated": Case((2,), 14, 2, rotated=True),
        "rotated": Case(three, 14, 2, rotated=True),
        "window": Case(two, 8, 2, options={"window": 3}),
        "both ways, scale, softcap": Case(three, 6, 3, options={"causal": False, "softmax_scale": 0.3, "softcap": 5.0}),
        "checkpointed": Case(four, 14, 2, chunks=2, checkpointed="layer"),
        **{
            f"P={len(ranks)} heads {heads}/{kv_heads} chunks {chunks}": Case(ranks, heads, kv_heads, chunks=chunks)
            for ranks in GROUPS
            for heads, kv_heads in HEADS
            for chunks in ((2, 3) if heads >= 3 * len(ranks) else (2,))
            if heads > len(ranks)
        },
        "chunks rotated": Case(two, 28, 4, chunks=5, rotated=True),
    }


CASES = _cases()
