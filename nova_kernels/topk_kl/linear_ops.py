"""Operators of torch.library for what starts from hidden states: plain tensors, fake and autograd registered.

    nova_kernels::linear_topk_select            ids, values, lse
    nova_kernels::linear_topk_kl_div            kl [N], and for the backward by_kept [N, K] and, if the tail is a
                                                bucket, by_lse, maximum, total [N]
    nova_kernels::linear_topk_kl_div_backward   dL/d(hidden, weight, bias); empty where not needed

The forward keeps the derivatives of KL by the K kept logits, folded with the softcap's slope and the temperature, so
that without a bucket the backward needs no logits at all.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nova_kernels.backend import runs_triton
from nova_kernels.lm_head import Head, RowTerms, arithmetic_dtype, kept_logits, kept_rows, parallel, spread, take, walk
from nova_kernels.lm_head.rows import log_sum_exp
from nova_kernels.topk_kl import dense, gather, selection, union
from nova_kernels.topk_kl.entries import check_ids, check_k
from nova_kernels.topk_kl.kept import kept_kl

PATHS = {"dense": dense, "union": union, "gather": gather}


def _path(backend: str, vocabulary: int) -> ModuleType:
    return (
        PATHS[backend] if vocabulary > 0 else dense
    )  # a rank may have no part of the vocabulary, and no rows to gather


@torch.library.custom_op("nova_kernels::linear_topk_select", mutates_args=())
def linear_topk_select(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    k: int,
    softcap: float | None,
    vocabulary: int,
    temperature: float,
    factors: torch.dtype,
    group: str | None,
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-K of each row; where `mask` is False its slots are unused and its lse is -inf."""
    rows = kept_rows(mask)
    head = Head.prepare(weight, bias, softcap, vocabulary, factors)
    kept = head.hidden(take(hidden, rows))
    ranks = parallel.named(group)
    check_k("linear_topk_select", k, parallel.end_of_vocabulary(vocabulary, vocab_start, ranks, hidden.device))
    found = selection.select_from_head(
        kept, head, k, temperature, in_triton=runs_triton(hidden.device, factors), vocab_start=vocab_start, group=ranks
    )
    if rows is None:
        return found
    fillings = (-1, -torch.inf, -torch.inf)
    wholes = (x.new_full((len(hidden), *x.shape[1:]), fill) for x, fill in zip(found, fillings, strict=True))
    ids, values, lse = (whole.index_copy_(0, rows, x) for whole, x in zip(wholes, found, strict=True))
    return ids, values, lse


@linear_topk_select.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    k: int,
    softcap: float | None,
    vocabulary: int,
    temperature: float,
    factors: torch.dtype,
    group: str | None,
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = hidden.new_empty(hidden.shape[0], dtype=arithmetic_dtype(hidden, weight))
    values = lse.new_empty(hidden.shape[0], k)
    return torch.empty_like(values, dtype=torch.int32), values, lse


@torch.library.custom_op("nova_kernels::linear_topk_kl_div", mutates_args=())
def linear_topk_kl_div(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    values: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    vocabulary: int,
    temperature: float,
    direction: str,
    tail: str,
    factors: torch.dtype,
    group: str | None,
    vocab_start: int,
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KL [N], by_kept [N, K], by_lse, maximum and total [N]; [0] where the backward does not need them."""
    ranks, rows = parallel.named(group), kept_rows(mask)
    ids, values, lse = (take(x, rows) for x in (ids, values, lse))
    check_ids("linear_topk_kl_div", ids, parallel.end_of_vocabulary(vocabulary, vocab_start, ranks, ids.device))
    values = values.masked_fill(ids < 0, -torch.inf)
    ids = parallel.local_ids(ids, vocabulary, vocab_start)
    in_triton, hidden_kept = runs_triton(hidden.device, factors), take(hidden.detach(), rows).to(factors)
    stats = lses = None
    if tail == "bucket":
        head = Head.prepare(weight, bias, softcap, vocabulary, factors)
        stats = walk.forward(hidden_kept, head, temperature, None, ids, entropy=False, in_triton=in_triton)
        stats = parallel.merged(stats, ranks)
        assert stats.kept is not None, "ids were given"
        lses, kept = (log_sum_exp(stats), lse), stats.kept
    else:
        products = _path(backend, vocabulary).kept_logits(hidden_kept, weight.detach()[:vocabulary], ids)
        own_bias = None if bias is None else bias.detach()[:vocabulary].to(products.dtype)
        kept = parallel.sum_(kept_logits(products, ids, own_bias, softcap), ranks)
    found = kept_kl(
        kept,
        values,
        temperature,
        direction,
        softcap=softcap,
        lse=lses,
        log_mass=False,
        gradient=gradient,
        in_triton=in_triton,
    )
    row_state = (None, None) if stats is None or not gradient else (stats.maximum, stats.total)
    terms = (found.kl, found.by_kept, found.by_lse, *row_state)
    kl, by_kept, by_lse, maximum, total = (
        found.kl.new_empty(0) if term is None else spread(term, rows, len(hidden)) for term in terms
    )
    return kl, by_kept, by_lse, maximum, total


@linear_topk_kl_div.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    values: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    vocabulary: int,
    temperature: float,
    direction: str,
    tail: str,
    factors: torch.dtype,
    group: str | None,
    vocab_start: int,
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kl = hidden.new_empty(hidden.shape[0], dtype=arithmetic_dtype(hidden, weight))
    by_kept = kl.new_empty(ids.shape) if gradient else kl.new_empty(0)
    by_lse, maximum, total = (
        torch.empty_like(kl) if gradient and tail == "bucket" else kl.new_empty(0) for _ in range(3)
    )
    return kl, by_kept, by_lse, maximum, total


@torch.library.custom_op("nova_kernels::linear_topk_kl_div_backward", mutates_args=())
def linear_topk_kl_div_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    by_kept: Tensor,
    by_lse: Tensor,
    maximum: Tensor,
    total: Tensor,
    softcap: float | None,
    vocabulary: int,
    temperature: float,
    factors: torch.dtype,
    group: str | None,
    vocab_start: int,
    backend: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/d(hidden, weight, bias) from upstream [N]; [0] where not needed."""
    rows = kept_rows(mask)
    upstream, ids, by_kept = (take(x, rows) for x in (upstream, ids, by_kept))
    ids = parallel.local_ids(ids, vocabulary, vocab_start)
    by_kept = by_kept * upstream.unsqueeze(1)
    hidden_kept = take(hidden.detach(), rows).to(factors)
    if by_lse.numel() > 0:
        by_lse, maximum, total = (take(x, rows) for x in (by_lse, maximum, total))
        scale = upstream * by_lse / (temperature * total)
        terms = RowTerms(maximum, scale, by_target=None, targets=None, by_kept=by_kept, ids=ids)
        head = Head.prepare(weight, bias, softcap, vocabulary, factors)
        found = walk.backward(
            hidden_kept,
            head,
            temperature,
            terms,
            weight=weight,
            bias=bias,
            needed=(needed[0], needed[1], needed[2]),
            in_triton=runs_triton(hidden.device, factors),
            whole=group is None,
        )
    else:
        dhidden, dweight = _path(backend, vocabulary).backward(
            hidden_kept,
            weight.detach()[:vocabulary],
            ids,
            by_kept,
            needs_hidden=needed[0],
            needs_weight=needed[1],
        )
        dbias = _bias_gradient(bias, ids, by_kept) if bias is not None and needed[2] else None
        found = walk.Gradients(dhidden, dweight, dbias)
    return walk.whole_gradients(found, hidden, weight, rows, parallel.named(group))


@linear_topk_kl_div_backward.register_fake
def _(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return walk.fake_gradients(hidden, weight, bias, needed=rest[-1])


def _bias_gradient(bias: Tensor, ids: Tensor, by_kept: Tensor) -> Tensor:
    # index_put_ adds in a fixed order on CUDA too.
    gradient = torch.zeros_like(bias, dtype=by_kept.dtype)
    added = by_kept.masked_fill(ids < 0, 0.0)
    return gradient.index_put_((ids.clamp(min=0).long(),), added, accumulate=True).to(bias.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, _, _, mask, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, bias, ids, mask, *output[1:])
    softcap, vocabulary, temperature, _, _, factors, group, vocab_start, _, backend = options
    ctx.options = (softcap, vocabulary, temperature, factors, group, vocab_start, backend)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    found: tuple[Tensor | None, ...] = (None, None, None)
    if upstream is not None:
        gradients = linear_topk_kl_div_backward(upstream, *ctx.saved_tensors, *ctx.options, needed)
        found = tuple(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))
    return *found, *([None] * 14)


linear_topk_kl_div.register_autograd(_backward, setup_context=_save)
