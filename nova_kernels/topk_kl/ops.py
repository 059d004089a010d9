"""Operators of torch.library for what starts from logits: plain tensors in and out, fake and autograd registered.

nova_kernels::topk_select                 ids, values, lse
nova_kernels::topk_kl_div                 kl [n], by_kept [n, K] = dKL/dlogits at the ids      by_kept stays sparse;
nova_kernels::topk_kl_div_from_logits     kl, by_kept, ids                                     it becomes dense
nova_kernels::topk_kl_div_backward        dL/dlogits [n, V]                                    here alone
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nova_kernels.backend import choose, fastest_first, runs_triton, why_not_triton
from nova_kernels.lm_head import arithmetic_dtype, parallel
from nova_kernels.topk_kl import cuda, selection, sparse, triton
from nova_kernels.topk_kl.entries import check_ids, check_k


def backends(policy_logits: Tensor) -> dict[str, str | None]:
    """Backends of topk_kl_div, fastest first, each with the reason it cannot run."""
    double = "it has no float64" if policy_logits.dtype == torch.float64 else None
    compiled = {"triton": why_not_triton(policy_logits.device) or double}
    return fastest_first(policy_logits.device, compiled, {"sparse": None, "reference": None})


def backends_from_logits(policy_logits: Tensor, ref_logits: Tensor, k: int) -> dict[str, str | None]:
    """Backends of topk_kl_div_from_logits: those that finish the KL where they select, and those that do not."""
    policy, ref = (selection.backends(logits, k) for logits in (policy_logits, ref_logits))
    compiled = {name: policy[name] or ref[name] for name in ("cuda", "triton")}
    return fastest_first(policy_logits.device, compiled, {"sparse": None, "reference": None})


@torch.library.custom_op("nova_kernels::topk_select", mutates_args=())
def topk_select(
    logits: Tensor, k: int, temperature: float, group: str | None, vocab_start: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """ids int32 [n, K], values [n, K] and lse [n] of logits [n, V] (with a group: this rank's columns)."""
    own = min(k, logits.shape[1])  # a rank may have fewer columns
    backend = choose("topk_select", backend, selection.backends(logits, own))
    ranks = parallel.named(group)
    if ranks is None:
        return selection.select(logits, k, temperature, backend)
    check_k("topk_select", k, parallel.end_of_vocabulary(logits.shape[1], vocab_start, ranks, logits.device))
    selected = selection.select(logits, own, temperature, backend)
    ids, values = selection.merged(selected[0], selected[1], k, vocab_start, ranks)
    return ids, values, parallel.gather(selected[2], ranks).logsumexp(dim=0)


@topk_select.register_fake
def _(
    logits: Tensor, k: int, temperature: float, group: str | None, vocab_start: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    values = logits.new_empty(logits.shape[0], k, dtype=arithmetic_dtype(logits))
    return torch.empty_like(values, dtype=torch.int32), values, values.new_empty(logits.shape[0])


@torch.library.custom_op("nova_kernels::topk_kl_div", mutates_args=())
def topk_kl_div(
    policy_logits: Tensor,
    ids: Tensor,
    values: Tensor,
    mask: Tensor | None,
    temperature: float,
    direction: str,
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """KL [n] of logits [n, V] from ids int32 and values [n, K], and by_kept [n, K] ([0] without `gradient`)."""
    ids = ids if mask is None else ids.masked_fill(~mask.unsqueeze(1), -1)
    check_ids("topk_kl_div", ids, policy_logits.shape[1])
    values = values.masked_fill(ids < 0, -torch.inf)
    run = triton.topk_kl_div if backend == "triton" else sparse.topk_kl_div
    kl, by_kept = run(policy_logits, ids, values, temperature, direction, mask, gradient=gradient)
    return kl, kl.new_empty(0) if by_kept is None else by_kept


@topk_kl_div.register_fake
def _(
    policy_logits: Tensor,
    ids: Tensor,
    values: Tensor,
    mask: Tensor | None,
    temperature: float,
    direction: str,
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kl = policy_logits.new_empty(ids.shape[0], dtype=arithmetic_dtype(policy_logits))
    return kl, kl.new_empty(ids.shape) if gradient else kl.new_empty(0)


@torch.library.custom_op("nova_kernels::topk_kl_div_from_logits", mutates_args=())
def topk_kl_div_from_logits(
    policy_logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    k: int,
    temperature: float,
    direction: str,
    gradient: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL [n], by_kept [n, K] ([0] without `gradient`) and ids int32 [n, K]."""
    backend = choose("topk_kl_div_from_logits", backend, backends_from_logits(policy_logits, ref_logits, k))
    if backend == "sparse":
        ids, values, _ = selection.select(ref_logits, k, temperature, selection.fastest(ref_logits, k))
        kl, by_kept = sparse.topk_kl_div(policy_logits, ids, values, temperature, direction, mask, gradient=gradient)
    else:
        run = (cuda if backend == "cuda" else triton).topk_kl_div_from_logits
        kl, by_kept, ids = run(policy_logits, ref_logits, k, temperature, direction, mask, gradient=gradient)
    return kl, kl.new_empty(0) if by_kept is None else by_kept, ids


@topk_kl_div_from_logits.register_fake
def _(
    policy_logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    k: int,
    temperature: float,
    direction: str,
    gradient: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kl = policy_logits.new_empty(policy_logits.shape[0], dtype=arithmetic_dtype(policy_logits))
    ids = policy_logits.new_empty(policy_logits.shape[0], k, dtype=torch.int32)
    return kl, torch.empty_like(ids, dtype=kl.dtype) if gradient else kl.new_empty(0), ids


@torch.library.custom_op("nova_kernels::topk_kl_div_backward", mutates_args=())
def topk_kl_div_backward(
    by_kept: Tensor, upstream: Tensor, ids: Tensor, vocabulary: int, dtype: torch.dtype, backend: str | None
) -> Tensor:
    """dL/dlogits [n, V] of `dtype` from upstream [n] and by_kept [n, K]."""
    in_triton = backend == "triton" or (backend != "sparse" and runs_triton(ids.device, by_kept.dtype))
    run = triton.scatter_kept if in_triton else sparse.scatter_kept
    return run(by_kept, upstream, ids, vocabulary, dtype)


@topk_kl_div_backward.register_fake
def _(by_kept: Tensor, upstream: Tensor, ids: Tensor, vocabulary: int, dtype: torch.dtype, backend: str) -> Tensor:
    return by_kept.new_empty(by_kept.shape[0], vocabulary, dtype=dtype)


def _save(ctx: Any, policy_logits: Tensor, ids: Tensor, by_kept: Tensor, backend: str | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(by_kept, ids)
    ctx.vocabulary, ctx.dtype = policy_logits.shape[1], policy_logits.dtype
    ctx.backend = backend


def _save_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs[0], inputs[1], output[1], inputs[-1])


def _save_from_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs[0], output[2], output[1], inputs[-1])


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    by_kept, ids = ctx.saved_tensors
    gradient = None
    if upstream is not None:
        gradient = topk_kl_div_backward(by_kept, upstream, ids, ctx.vocabulary, ctx.dtype, ctx.backend)
    return gradient, None, None, None, None, None, None, None


topk_kl_div.register_autograd(_backward, setup_context=_save_kl)
topk_kl_div_from_logits.register_autograd(_backward, setup_context=_save_from_logits)
