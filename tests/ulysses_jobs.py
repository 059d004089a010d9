"""What four gloo processes compute for the tests of Ulysses, started once: every case in a group of some of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attention_truth import one_mask
from nova_kernels.backend import ENVIRONMENT_VARIABLE, BackendUnavailableError, why_not_triton
from nova_kernels.ulysses import (
    HeadPlan,
    SequenceShards,
    TokenPlan,
    attention,
    gather_heads,
    pack,
    scatter_heads,
    ulysses_attention,
)
from nova_kernels.ulysses.collective import Route
from nova_kernels.varlen import cu_seqlens_from_lengths
from ulysses_ranks import CASES, GROUPS, HEADS, LENGTHS, WIDTH, Case, Layer, counting, inputs, shared

WORLD = 4
STACK = ((14, 2), (8, 8), (3, 1))
TRITON = Case(GROUPS[2], 14, 2, torch.float32, chunks=2, rotated=True, pack_backend="triton")


def _last_copy(buffer: Tensor, blocks: Any, **sizes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """pack.unpack_heads, but copies of a key head replace each other."""
    q, k, v = _UNPACK(buffer, blocks, **sizes)
    heads = [many for block in blocks for many in (block.heads, block.kv_heads, block.kv_heads)]
    parts = pack._parts(buffer, heads, sizes["num_tokens"], sizes["head_dim"])
    for block, from_k, from_v in zip(blocks, parts[1::3], parts[2::3], strict=True):
        k[:, block.kv_start : block.kv_end], v[:, block.kv_start : block.kv_end] = from_k, from_v
    return q, k, v


def _cut_at_shards(case: Case) -> Tensor:
    """Boundaries as if a document ended where a shard ends."""
    edges = {end for rank in range(len(case.ranks)) for end in case.token_plan.bounds(rank)}
    return torch.tensor(sorted({*edges, *cu_seqlens_from_lengths(case.lengths).tolist()}), dtype=torch.int32)


_UNPACK = pack.unpack_heads
BROKEN = Case((0, 1, 2, 3), 8, 2)
ALONE = CASES["one rank"]


def broken(group: dist.ProcessGroup) -> dict[str, Any]:
    """Results of the mistakes that the comparison has to notice."""
    pack.unpack_heads = _last_copy
    try:
        found = {"copies not summed": shared(BROKEN, group)}
    finally:
        pack.unpack_heads = _UNPACK
    found["cut at shards"] = shared(BROKEN, group, _cut_at_shards(BROKEN))
    return found


def adjoint(case: Case, group: dist.ProcessGroup) -> dict[str, tuple[float, float]]:
    """<S x, y> and <x, S' y> over all ranks, for both halves; S' is what autograd makes of S."""
    rank, tokens = dist.get_rank(group), case.tokens
    start, end = case.token_plan.bounds(rank)
    generator = torch.Generator().manual_seed(rank)
    plans = {"group": group, "head_plan": case.head_plan, "token_plan": case.token_plan}

    def dots(operation: Callable[..., Any], x: list[Tensor]) -> tuple[float, float]:
        out = operation(*x, **plans)
        y = [out] if isinstance(out, Tensor) else list(out)
        weights = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in y]
        products = [(a * b).sum() for a, b in zip(y, weights, strict=True)]
        gradients = torch.autograd.grad(y, x, weights)
        both = torch.stack([sum(products), sum((a * b).sum() for a, b in zip(x, gradients, strict=True))])
        dist.all_reduce(both, group=group)
        return both[0].item(), both[1].item()

    def random(count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, WIDTH, generator=generator, dtype=case.dtype).requires_grad_()

    local = [random(end - start, heads) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    computed = random(tokens, len(case.head_plan.q_heads(rank)))
    return {"scatter": dots(scatter_heads, local), "gather": dots(gather_heads, [computed])}


def own_attention(case: Case, group: dist.ProcessGroup) -> tuple[float, float]:
    """scatter_heads, an attention that wants as many key as query heads, gather_heads: the loss, and by one mask."""
    rank, generator = dist.get_rank(group), torch.Generator().manual_seed(1)
    whole = [
        torch.randn(case.tokens, heads, WIDTH, generator=generator, dtype=case.dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    ]
    start, end = case.token_plan.bounds(rank)
    plans = {"group": group, "head_plan": case.head_plan, "token_plan": case.token_plan}
    q, k, v = scatter_heads(*(x[start:end] for x in whole), **plans)
    index = list(case.head_plan.kv_index(rank))
    out = gather_heads(one_mask(q, k[:, index], v[:, index], list(case.lengths)), **plans)
    return (out - one_mask(*whole, list(case.lengths))[start:end]).abs().max().item(), out.abs().max().item()


def backward_twice(case: Case, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Input gradients of two backward passes through one graph."""
    layer, (x, *_), rank = Layer(case), inputs(case), dist.get_rank(group)
    x = x[slice(*case.token_plan.bounds(rank))].clone().requires_grad_()
    boundaries = {"cu_seqlens": cu_seqlens_from_lengths(case.lengths), "max_seqlen": max(case.lengths)}
    loss = layer(x, partial(ulysses_attention, group=group, chunks=2, **boundaries)).square().sum()
    return torch.autograd.grad(loss, x, retain_graph=True)[0], torch.autograd.grad(loss, x)[0]


def some_gradients(case: Case, group: dist.ProcessGroup) -> list[tuple[float, float]]:
    """Distance and size of each of q, k, v's gradients, when it is the only one that is asked for."""
    start, end = case.token_plan.bounds(dist.get_rank(group))
    heads = (case.heads, case.kv_heads, case.kv_heads)
    generator = torch.Generator().manual_seed(start)
    inputs = [torch.randn(end - start, many, WIDTH, generator=generator, dtype=case.dtype) for many in heads]
    boundaries = {"cu_seqlens": cu_seqlens_from_lengths(case.lengths), "max_seqlen": max(case.lengths)}

    def gradients(*wanted: int) -> list[Tensor]:
        given = [x.clone().requires_grad_(place in wanted) for place, x in enumerate(inputs)]
        out = ulysses_attention(*given, group=group, **boundaries)
        with torch.no_grad():  # another call in between, which leaves nothing behind
            assert torch.equal(ulysses_attention(*given, group=group, **boundaries), out)
        return list(torch.autograd.grad(out.square().sum(), [given[place] for place in wanted]))

    pairs = [(gradients(place)[0], whole) for place, whole in enumerate(gradients(0, 1, 2))]
    return [((alone - whole).abs().max().item(), whole.abs().max().item()) for alone, whole in pairs]


def gathered(case: Case, group: dist.ProcessGroup) -> list[Tensor]:
    """Rows that were cut and put together again, along either dimension."""
    shards = SequenceShards(case.token_plan, dist.get_rank(group))
    fields = {
        "input_ids": torch.arange(case.tokens)[None],
        "inputs_embeds": torch.arange(case.tokens * 2.0).view(-1, 2),
    }
    mine = shards.shard(fields)
    return [shards.gather(mine["input_ids"], group, dim=1), shards.gather(mine["inputs_embeds"], group)]


def mistakes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> dict[str, dict[str, Any]]:
    """Arguments that ulysses_attention refuses, instead of the right ones."""
    held, tensors = len(q), {"q": q, "k": k, "v": v}
    return {
        "tokens": {"q": torch.randn(37, 3, WIDTH)},
        "heads": {"head_plan": HeadPlan.build(6, 3, WORLD)},
        "key heads": {"k": torch.randn(held, 2, WIDTH)},
        "width": {"v": torch.randn(held, 1, 2 * WIDTH)},
        "dtype": {"k": k.double()},
        "shape": {"q": q[0]},
        "one dimension": {"q": q[0, 0]},
        "keys of one dimension": {"k": k[0, 0]},
        "head plan": {"head_plan": HeadPlan.build(3, 1, 2)},
        "token plan": {"token_plan": TokenPlan.build(37, 2)},
        "boundaries dtype": {"cu_seqlens": cu_seqlens.long()},
        "boundaries of a shard": {"cu_seqlens": cu_seqlens[:3], "token_plan": TokenPlan.build(37, 4)},
        "boundaries decrease": {"cu_seqlens": torch.tensor([0, 38, 37], dtype=torch.int32)},
        "boundaries elsewhere": {"cu_seqlens": cu_seqlens.to("meta")},
        "boundaries on the device": {n: x.to("meta") for n, x in {**tensors, "cu_seqlens": cu_seqlens}.items()},
        "boundaries in a list": {"cu_seqlens": [0, 37]},
        "settled, decrease": {"cu_seqlens": torch.tensor([0, 17, 16, 30, 37]).int(), "on_device": cu_seqlens},
        "settled, start": {"cu_seqlens": torch.tensor([1, 5, 6, 20, 37]).int(), "on_device": cu_seqlens},
        "settled, max_seqlen": {"max_seqlen": 16, "on_device": cu_seqlens},
        "head plan's type": {"head_plan": (0, 1, 2, 3, 3)},
        "token plan's type": {"token_plan": (10, 9, 9, 9)},
        "max_seqlen": {"max_seqlen": 16},
        "max_seqlen's type": {"max_seqlen": 17.0},
        "chunks": {"chunks": 2},
        "chunks' type": {"chunks": "1"},
        "window's type": {"window": 3.0},
        "scale's type": {"softmax_scale": torch.tensor(0.5)},
        "causal's type": {"causal": 1},
        "window": {"window": 0},
        "softcap": {"softcap": -1.0},
        "backend": {"backend": "flash"},
        "packing": {"pack_backend": "cuda"},
        "packing's type": {"pack_backend": ["reference"]},
        "empty heads": {"q": q[:, :, :0], "k": k[:, :, :0], "v": v[:, :, :0]},
        "softcap, heads for all": {"q": q.repeat(1, 4, 1), "softcap": -1.0},
        "cos alone": {"cos": torch.ones(held, WIDTH)},
        "cos of the row": {"cos": torch.ones(37, WIDTH), "sin": torch.ones(37, WIDTH)},
    }  # fmt: skip


def refusals(group: dist.ProcessGroup, other: dist.ProcessGroup) -> dict[str, str]:
    """What each mistake is answered with, on this rank. Nothing is sent, so the group works afterwards."""
    rank, cu_seqlens = dist.get_rank(group), cu_seqlens_from_lengths(LENGTHS)
    tokens, heads = TokenPlan.build(37, WORLD), HeadPlan.build(3, 1, WORLD)
    start, end = tokens.bounds(rank)
    q, k, v = (torch.randn(end - start, heads, WIDTH) for heads in (3, 1, 1))
    good = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "max_seqlen": 17, "group": group}

    def attend(**wrong: Any) -> Tensor:
        given = good | wrong
        return ulysses_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)

    calls: dict[str, Callable[[], Any]] = {
        **{name: partial(attend, **wrong) for name, wrong in mistakes(q, k, v, cu_seqlens).items()},
        "scatter": lambda: scatter_heads(q[0, 0], k, v, group=group, token_plan=tokens),
        "scatter's plan": lambda: scatter_heads(q, k, v, group=group, token_plan=tokens.sizes),
        "gather": lambda: gather_heads(q, group=group, head_plan=heads, token_plan=tokens),
        "gather rows": lambda: SequenceShards(tokens, rank).gather(torch.zeros(37), group),
        "gather rank": lambda: SequenceShards(tokens, rank).gather(torch.zeros(end - start), other),
    }
    if rank >= 2:
        calls["not in the group"] = partial(attend, group=other)
    attend(), attend(window=3)  # the right ones are known, and the mistakes are no less noticed
    said = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except (ValueError, TypeError, BackendUnavailableError) as error:
            said[name] = str(error)

    with counting() as counted:
        for name, call in calls.items():
            note(name, call)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(ENVIRONMENT_VARIABLE, "flash")
            note("backend of the environment", attend)
    return said if not counted.calls else {}


def rehearsals(group: dist.ProcessGroup) -> list[list[tuple[int | None, int]]]:
    """Windows and longest sequences that each of several calls rehearses."""
    rank, attend, seen = dist.get_rank(group), attention.attend, []
    q = torch.randn(TokenPlan.build(37, WORLD).sizes[rank], 3, WIDTH)

    def watched(q: Tensor, *keys: Tensor, **options: Any) -> Tensor:
        if len(q) == 1:
            seen[-1].append((options["window"], options["max_seqlen"]))
        return attend(q, *keys, **options)

    attention._rehearse.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend", watched)
        for long, window in ((20, None), (30, None), (36, 36), (30, 3), (36, 3), (19, 3), (37, None), (37, 36)):
            seen.append([])
            cu_seqlens = cu_seqlens_from_lengths([long, 37 - long])
            ulysses_attention(q, q, q, cu_seqlens=cu_seqlens, max_seqlen=long, group=group, window=window)
    return seen


def another_default_device(group: dist.ProcessGroup) -> bool:
    """Whether results stay the same where new tensors are made elsewhere."""
    q = torch.randn(TokenPlan.build(37, WORLD).sizes[dist.get_rank(group)], 3, WIDTH)
    boundaries = {"cu_seqlens": cu_seqlens_from_lengths(LENGTHS), "max_seqlen": max(LENGTHS)}
    truth = ulysses_attention(q, q, q, group=group, **boundaries)
    attention._rehearse.cache_clear()
    with torch.device("meta"):
        return torch.equal(ulysses_attention(q, q, q, group=group, **boundaries), truth)


def stack(group: dist.ProcessGroup | None) -> list[Tensor]:
    """Two layers and one beside them, of different heads: all weight gradients, and the loss. None = one process."""
    torch.manual_seed(3)
    case = Case(GROUPS[2], 1, 1)
    x, targets, *_ = inputs(case)
    first, second, beside = layers = [Layer(Case(GROUPS[2], *heads)) for heads in STACK]

    def attention(chunks: int) -> Callable[..., Tensor]:
        if group is None:
            return partial(one_mask, lengths=list(LENGTHS))
        boundaries = {"cu_seqlens": cu_seqlens_from_lengths(LENGTHS), "max_seqlen": max(LENGTHS)}
        return partial(ulysses_attention, group=group, chunks=chunks, **boundaries)

    mine = slice(None) if group is None else slice(*case.token_plan.bounds(dist.get_rank(group)))
    y = second(torch.tanh(first(x[mine], attention(3))), attention(2)) + beside(x[mine], attention(1))
    loss = ((y - targets[mine]) ** 2).sum()
    found = [loss.detach(), *torch.autograd.grad(loss, [p for layer in layers for p in layer.parameters()])]
    for value in found if group is not None else ():
        dist.all_reduce(value, group=group)
    return found


def order_of_chunks(group: dist.ProcessGroup) -> tuple[list[str], list[str]]:
    """What happens one after the other in a layer of two chunks: forward, backward."""
    case, seen = Case(GROUPS[2], 8, 8), []
    x, rank = inputs(case)[0], dist.get_rank(group)
    begin, finish, attend = Route._begin, Route._finish, attention.attend

    class Attended(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, out: Tensor) -> Tensor:
            seen.append("attend")
            return out.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen.append("attend")
            return gradient

    def say(what: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(route: Route, chunk: int, *rest: Any) -> Any:
            seen.append(f"{what} {'qkv' if route.plan.sizes['num_kv_heads'] else 'out'} {chunk}")
            return own(route, chunk, *rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "_begin", say("begin", begin))
        patch.setattr(Route, "_finish", say("wait for", finish))
        patch.setattr(attention, "attend", lambda *args, **options: Attended.apply(attend(*args, **options)))
        boundaries = {"cu_seqlens": cu_seqlens_from_lengths(LENGTHS), "max_seqlen": max(LENGTHS)}
        mine = x[slice(*case.token_plan.bounds(rank))].requires_grad_()
        y = Layer(case)(mine, partial(ulysses_attention, group=group, chunks=2, **boundaries))
        forward, seen = seen, []
        y.sum().backward()
    return forward, seen


def with_triton(group: dist.ProcessGroup) -> dict[str, Any] | None:
    """A case with the kernels that CUDA takes, interpreted; None where there is no interpreter."""
    if why_not_triton(torch.device("cpu")) is not None:
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "pack_heads", None)
        patch.setattr(pack, "unpack_heads", None)
        return shared(TRITON, group)


def under_autocast(group: dist.ProcessGroup) -> tuple[torch.dtype, list[int], float]:
    """Dtype of the output, bytes sent, and the distance from float32 without ranks."""
    case = Case(GROUPS[2], 8, 2, torch.float32)
    rank, generator = dist.get_rank(group), torch.Generator().manual_seed(1)
    whole = [torch.randn(case.tokens, heads, WIDTH, generator=generator) for heads in (8, 2, 2)]
    start, end = case.token_plan.bounds(rank)
    boundaries = {"cu_seqlens": cu_seqlens_from_lengths(LENGTHS), "max_seqlen": max(LENGTHS)}
    with torch.autocast("cpu", torch.bfloat16), counting() as counted:
        out = ulysses_attention(*(x[start:end] for x in whole), group=group, **boundaries)
    difference = (out.float() - one_mask(*whole, list(LENGTHS))[start:end]).abs().max().item()
    return out.dtype, counted.bytes, difference


def compiled(case: Case, group: dist.ProcessGroup, **options: Any) -> tuple[float, float, int]:
    """Distance from what is not compiled, results and gradients; the largest of them; how many graphs there are."""
    layer, (x, *_), rank = Layer(case), inputs(case), dist.get_rank(group)
    x = x[slice(*case.token_plan.bounds(rank))].clone().requires_grad_()
    boundaries = {"cu_seqlens": cu_seqlens_from_lengths(case.lengths), "max_seqlen": max(case.lengths)}
    plan = case.token_plan if len(case.ranks) == 1 else None  # read by nobody while a compiler is tracing
    attend, graphs = partial(ulysses_attention, group=group, token_plan=plan, chunks=2, **boundaries), []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def both(run: Callable[..., Tensor]) -> list[Tensor]:
        y = run(x, attend)
        return [y, *torch.autograd.grad(y.square().sum(), x)]

    pairs = list(zip(both(layer), both(torch.compile(layer, backend=count, **options)), strict=True))
    gap = max((a - b).abs().max().item() for a, b in pairs)
    return gap, max(a.abs().max().item() for a, _ in pairs), len(graphs)


def refused_alone(group: dist.ProcessGroup) -> list[str]:
    """What a group of one rank answers to numbers of chunks that more ranks refuse."""
    boundaries = {"cu_seqlens": cu_seqlens_from_lengths(LENGTHS), "max_seqlen": max(LENGTHS)}
    said, (q, k) = [], (torch.randn(37, heads, WIDTH) for heads in (ALONE.heads, ALONE.kv_heads))
    for chunks in (15, 1.0):
        with pytest.raises((ValueError, TypeError)) as error:
            ulysses_attention(q, k, k, group=group, chunks=chunks, **boundaries)
        said.append(str(error.value))
    return said


def on_every_rank() -> dict[str, Any]:
    """One process: its part of every case."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = {ranks: dist.new_group(ranks) for ranks in dict.fromkeys(case.ranks for case in CASES.values())}
    two, _, four = (groups[ranks] for ranks in GROUPS)
    found: dict[str, Any] = {"refusals": refusals(four, two)}
    for name, case in CASES.items():
        if rank in case.ranks:
            found[name] = shared(case, groups[case.ranks])
    found["broken"] = broken(four)
    found["adjoint"] = {heads: adjoint(Case(GROUPS[2], *heads), four) for heads in (*HEADS, (3, 1))}
    found["own attention"] = own_attention(Case(GROUPS[2], 14, 2), four)
    found["some gradients"] = some_gradients(Case(GROUPS[2], 14, 2), four)
    found["gathered"] = [gathered(Case(GROUPS[2], 1, 1, sizes=sizes), four) for sizes in (None, (0, 30, 1, 6))]
    found["stack"] = stack(four)
    found["triton"] = with_triton(four)
    found["order"] = order_of_chunks(four)
    found["autocast"] = under_autocast(four)
    found["backward twice"] = backward_twice(Case(GROUPS[2], 14, 2), four)
    found["rehearsals"] = rehearsals(four)
    found["another default device"] = another_default_device(four)
    if rank in GROUPS[0]:
        found["compiled"] = compiled(Case(GROUPS[0], 14, 2), two)
    if rank in ALONE.ranks:
        found["compiled"] = compiled(ALONE, groups[ALONE.ranks], fullgraph=True)
        found["refused alone"] = refused_alone(groups[ALONE.ranks])
    return found
