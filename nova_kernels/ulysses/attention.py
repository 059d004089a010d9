"""Attention over a packed row that the ranks of a group hold in parts: local shards in, local shard out.

    q, k, v [t, H, D]  --one exchange-->  [T, hq, D], [T, hkv, D], [T, hkv, D]     all tokens, some heads
    varlen_attention over all tokens, with the boundaries of the whole row
    out [T, hq, D]     --one exchange-->  [t, Hq, D]                                 some tokens, all heads

It is the same attention: no head and no token is treated differently because of the ranks.
"""

# Shape suffixes: t = tokens of this rank, T = tokens of all, P = ranks, Hq and Hkv = heads of the whole model, hq and
# hkv = heads that this rank computes, D = head width, S = sequences.

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nova_kernels.attention.dispatch import attend, autocast, boundaries_on, check_boundaries, check_options
from nova_kernels.backend import ENVIRONMENT_VARIABLE
from nova_kernels.ulysses.collective import Arrive, Collect, Depart, Route, Spread, packing, schedule
from nova_kernels.ulysses.pack import rotate
from nova_kernels.ulysses.plan import HeadPlan, HeadRun, TokenPlan
from nova_kernels.varlen import check_cu_seqlens

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _uncompiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Between ranks, run as it is under torch.compile, which cannot follow exchanges: one break of the graph, not many.

    Decided at the call, since torch.compiler.disable takes seconds to import.
    """

    @wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        group: Any = options.get("group")
        if torch.compiler.is_compiling() and dist.get_world_size(group) != 1:
            run: Callable[Arguments, Result] = torch.compiler.disable(function)
            return run(*args, **options)
        return function(*args, **options)

    return call


@_uncompiled
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    group: dist.ProcessGroup,
    head_plan: HeadPlan | None = None,
    token_plan: TokenPlan | None = None,
    chunks: int = 1,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
    pack_backend: str | None = None,
    on_device: Tensor | None = None,
) -> Tensor:
    """Attention of each packed sequence to itself; the row's tokens are spread over the ranks of a group.

    All ranks call it together, with the same boundaries, plans and options. A rank that finds a mistake in what all of
    them share raises before anything is sent, and so do the others; one that finds it in its own tensors (its number of
    tokens, their dtypes) raises alone, and the others wait for it until the group's timeout or the launcher ends them.

    Args:
        q: [t, Hq, D], this rank's tokens, all heads; any strides, a view of a fused projection for instance.
        k, v: [t, Hkv, D] with Hq a multiple of Hkv.
        cu_seqlens: int32 [S + 1], boundaries of the WHOLE row, from 0 to T, as its packing made them; best on the CPU.
        max_seqlen: tokens of the longest sequence of the whole row, or an upper bound of it.
        group: the ranks that share the row. Of one rank: this is varlen_attention.
        head_plan: which heads each rank computes; None = HeadPlan.build(Hq, Hkv, P).
        token_plan: which tokens each rank holds; None = TokenPlan.build(T, P), with cu_seqlens on the CPU.
        chunks: exchanges that q, k, v are sent in, and the output; while one is computed others are on their way.
        cos, sin: [t, D], rotate q and k by their tokens' positions on the way, in halves as Hugging Face models do; no
            gradient flows to them. None = as they are.
        causal, window, softmax_scale, softcap, backend: as in varlen_attention.
        pack_backend: what packs and unpacks heads, "triton" or "reference" (PyTorch); None = the first that can run.
        on_device: a checked copy of cu_seqlens on the device of q, for callers with many layers; None makes one.

    Returns:
        [t, Hq, D] in the dtype of q (under torch.autocast in its dtype). Its backward has to run on every rank, also on
        one whose tokens are all ignored by the loss.

    Raises:
        ValueError: shapes, dtypes, boundaries, plans and group disagree, or an option is out of range.
        TypeError: a plan or an option has another type.
        BackendUnavailableError: the named backend cannot run these inputs.
    """
    q, k, v = autocast(q, k, v)
    boundaries: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "backend": backend,
    }
    check_options(max_seqlen=max_seqlen, **options)
    if not isinstance(chunks, int) or isinstance(chunks, bool):
        raise TypeError(f"ulysses_attention: chunks must be an int, a number of exchanges, got {chunks!r}; 1 = one")
    token_plan = _token_plan(q, cu_seqlens, group, token_plan)
    head_plan = _check_shared(q, k, v, group, head_plan, token_plan)
    head_plan.split(chunks)  # refuses more chunks than heads
    rank, width = dist.get_rank(group), q.shape[2]
    _check_own(q, k, v, token_plan, rank, cos, sin)
    module = packing(q.device, pack_backend)
    if head_plan.world_size == 1:
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return attend(q, k, v, **boundaries, **options, on_device=on_device)
    plans = head_plan, token_plan, rank
    way = Route(group, schedule(*plans, width, chunks=chunks, keys=True), module, cos=cos, sin=sin)
    back = Route(group, schedule(*plans, width, chunks=chunks, keys=False), module)
    boundaries["on_device"] = _boundaries(q.device, cu_seqlens, token_plan.num_tokens, max_seqlen, on_device)
    options["window"] = None if window is None or window >= max_seqlen else window
    _rehearse(q.device, q.dtype, width, os.environ.get(ENVIRONMENT_VARIABLE), **options)
    tokens = Spread.apply(way, q, k, v)
    arrived: list[tuple[Tensor, Tensor]] = []  # keys and values of each chunk
    departed = []
    for chunk, runs in enumerate(head_plan.runs(rank, chunks)):
        heads, *keys = Arrive.apply(way, chunk, tokens[chunk])
        arrived.append((keys[0], keys[1]))
        out = _attend_runs(heads, arrived, runs, {**boundaries, **options})
        departed.append(Depart.apply(back, chunk, out))
    result: Tensor = Collect.apply(back, *departed)
    return result


@_uncompiled
def scatter_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    token_plan: TokenPlan,
    head_plan: HeadPlan | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of this rank's tokens to this rank's heads of all tokens, in one all-to-all.

    For those who bring their own attention: head_plan.kv_index(rank) tells which key head a query head reads.

    Args:
        q, k, v, group, head_plan, token_plan, cos, sin: as in `ulysses_attention`.
        backend: its `pack_backend`.

    Returns:
        q [T, hq, D], k [T, hkv, D], v [T, hkv, D]: views of one buffer, in the order of the packed row. Their
        gradients go back the same way; those of copied key heads are summed.

    Raises:
        ValueError: shapes, dtypes, plans and group disagree.
        TypeError: a plan or the backend has another type.
        BackendUnavailableError: the named backend cannot run on this device.
    """
    head_plan = _check_shared(q, k, v, group, head_plan, token_plan)
    _check_own(q, k, v, token_plan, dist.get_rank(group), cos, sin)
    module = packing(q.device, backend)
    if head_plan.world_size == 1:
        return (q, k, v) if cos is None or sin is None else (rotate(q, cos, sin), rotate(k, cos, sin), v)
    plan = schedule(head_plan, token_plan, dist.get_rank(group), q.shape[2], keys=True)
    route = Route(group, plan, module, cos=cos, sin=sin)
    (token,) = Spread.apply(route, q, k, v)
    heads: tuple[Tensor, Tensor, Tensor] = Arrive.apply(route, 0, token)
    return heads


@_uncompiled
def gather_heads(
    out: Tensor,
    *,
    group: dist.ProcessGroup,
    head_plan: HeadPlan,
    token_plan: TokenPlan,
    backend: str | None = None,
) -> Tensor:
    """From this rank's heads of all tokens to all heads of this rank's tokens, in one all-to-all.

    Args:
        out: [T, hq, D], hq = len(head_plan.q_heads(rank)); a rank without heads passes [T, 0, D], made of what
            scatter_heads gave it, so that its backward takes part.
        group, head_plan, token_plan: as in `ulysses_attention`.
        backend: its `pack_backend`.

    Returns:
        [t, Hq, D].

    Raises:
        ValueError: the shape, plans and group disagree.
        TypeError: a plan or the backend has another type.
        BackendUnavailableError: the named backend cannot run on this device.
    """
    rank = _check_group(group, head_plan, token_plan)
    heads = len(head_plan.q_heads(rank))
    if out.ndim != 3 or out.shape[:2] != (token_plan.num_tokens, heads):
        raise ValueError(
            f"gather_heads: rank {rank} computes {heads} heads of {token_plan.num_tokens} tokens, expected "
            f"[{token_plan.num_tokens}, {heads}, D], got {list(out.shape)}"
        )
    module = packing(out.device, backend)
    if head_plan.world_size == 1:
        return out
    route = Route(group, schedule(head_plan, token_plan, rank, out.shape[2], keys=False), module)
    result: Tensor = Collect.apply(route, Depart.apply(route, 0, out))
    return result


def _attend_runs(
    q: Tensor, arrived: list[tuple[Tensor, Tensor]], runs: tuple[HeadRun, ...], options: dict[str, Any]
) -> Tensor:
    """Attention of one chunk's heads [T, hq, D], in one call for every stretch of equal groups."""
    if not runs:
        return q  # [T, 0, D], and part of the graph
    outputs = []
    for run in runs:
        k, v = (_heads(x, run.kv) for x in arrived[run.source])
        outputs.append(attend(_heads(q, run.q), k, v, **options))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _heads(x: Tensor, part: slice) -> Tensor:
    """x[:, part]; all heads are x itself, whose gradient then needs no copy."""
    return x if part == slice(0, x.shape[1]) else x[:, part]


def _token_plan(q: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup, token_plan: TokenPlan | None) -> TokenPlan:
    """The one given, or equal shares of the row; needs boundaries of the right shape."""
    check_boundaries(q, cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"ulysses_attention: cu_seqlens must be int32 of shape [S + 1], got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}; pass the boundaries of the whole row, from cu_seqlens_from_lengths"
        )
    size = _size_of(group)
    if token_plan is not None or size == 1:
        return TokenPlan((q.shape[0],)) if token_plan is None else token_plan
    if cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"ulysses_attention: cu_seqlens is on {cu_seqlens.device}, where reading T would wait; keep it on the CPU, "
            f"or pass token_plan=TokenPlan.build(T, {size})"
        )
    return TokenPlan.build(int(cu_seqlens[-1]), size)


def _boundaries(
    device: torch.device, cu_seqlens: Tensor, num_tokens: int, max_seqlen: int, on_device: Tensor | None
) -> Tensor:
    """Boundaries where a kernel reads them, checked on every rank, with or without heads.

    Done for every layer: NumPy looks whether they are right, which takes 5 us, and check_cu_seqlens, 13, says what is
    not.
    """
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.numpy()
        if bounds[-1] != num_tokens:
            raise ValueError(
                f"ulysses_attention: cu_seqlens ends at {bounds[-1]}, the token plan at {num_tokens}; cu_seqlens is "
                "about the whole row, not about this rank's part"
            )
        lengths = bounds[1:] - bounds[:-1]
        if bounds[0] != 0 or lengths.min(initial=0) < 0 or lengths.max(initial=0) > max_seqlen:
            check_cu_seqlens(cu_seqlens, num_tokens, max_seqlen)
    return boundaries_on(device, cu_seqlens, num_tokens, max_seqlen) if on_device is None else on_device


def _size_of(group: dist.ProcessGroup) -> int:
    if dist.get_rank(group) < 0:
        raise ValueError("ulysses: this process is not in the group; pass the group that shares its packed row")
    return dist.get_world_size(group)


def _check_group(group: dist.ProcessGroup, head_plan: HeadPlan, token_plan: TokenPlan) -> int:
    """This process's rank in the group."""
    for plan, kind in ((head_plan, HeadPlan), (token_plan, TokenPlan)):
        if not isinstance(plan, kind):
            raise TypeError(f"ulysses: expected a {kind.__name__}, got {plan!r}; {kind.__name__}.build makes one")
    size = _size_of(group)
    if not size == head_plan.world_size == token_plan.world_size:
        raise ValueError(
            f"ulysses: the group has {size} ranks, the head plan is for {head_plan.world_size} and the token plan for "
            f"{token_plan.world_size}; build both with dist.get_world_size(group)"
        )
    return dist.get_rank(group)


def _check_shared(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, head_plan: HeadPlan | None, token_plan: TokenPlan
) -> HeadPlan:
    """The head plan, if plans, group and heads agree. All ranks share them: what one refuses, every one refuses."""
    if not q.ndim == k.ndim == v.ndim == 3:
        expected = "q [t, Hq, D] and k, v [t, Hkv, D], this rank's tokens first"
        raise ValueError(f"ulysses: expected {expected}, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    head_plan = HeadPlan.build(q.shape[1], k.shape[1], _size_of(group)) if head_plan is None else head_plan
    _check_group(group, head_plan, token_plan)
    heads, kv_heads, width = head_plan.num_heads, head_plan.num_kv_heads, q.shape[2]
    if q.shape[1] != heads or not k.shape[1:] == v.shape[1:] == (kv_heads, width):
        raise ValueError(
            f"ulysses: the head plan is for {heads} query and {kv_heads} key heads, of one width, expected "
            f"q [t, {heads}, {width}] and k, v [t, {kv_heads}, {width}], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    return head_plan


def _check_own(
    q: Tensor, k: Tensor, v: Tensor, token_plan: TokenPlan, rank: int, cos: Tensor | None, sin: Tensor | None
) -> None:
    """Tensors of this rank, which it may refuse alone."""
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            "ulysses: q, k, v must have one floating-point dtype and one device, got "
            f"{q.dtype} on {q.device}, {k.dtype} on {k.device}, {v.dtype} on {v.device}"
        )
    start, end = token_plan.bounds(rank)
    if not q.shape[0] == k.shape[0] == v.shape[0] == end - start:
        raise ValueError(
            f"ulysses: rank {rank} holds the {end - start} tokens {start} to {end} of {token_plan.num_tokens}, got "
            f"{q.shape[0]}, {k.shape[0]}, {v.shape[0]} in q, k, v; shard the row with this token plan"
        )
    if (cos is None) != (sin is None):
        raise ValueError("ulysses: cos and sin rotate together; pass both or neither")
    each = (end - start, q.shape[2])
    if cos is not None and sin is not None and (not cos.shape == sin.shape == each or q.shape[2] % 2):
        raise ValueError(
            f"ulysses: cos and sin must be {list(each)}, for this rank's tokens and an even width, got "
            f"{list(cos.shape)} and {list(sin.shape)}"
        )


@lru_cache(maxsize=64, typed=True)
def _rehearse(device: torch.device, dtype: torch.dtype, width: int, _environment: str | None, **options: Any) -> None:
    """Attention of one made-up token: what it refuses, every rank refuses before anything is sent.

    Otherwise a rank without heads, which never attends, would wait for the others. Done once for what backends are
    chosen by; of max_seqlen that is whether the window is narrower: else there is none in `options`.
    """
    token = torch.zeros(1, 1, width, dtype=dtype, device=device)
    boundaries = torch.tensor([0, 1], dtype=torch.int32, device="cpu")
    longest = (options["window"] or 0) + 1
    attend(token, token, token, cu_seqlens=boundaries, max_seqlen=longest, **options)
