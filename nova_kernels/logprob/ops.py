"""Log-probabilities, entropy and top-K KL from hidden states in one pass, as operators of torch.library.

    nova_kernels::linear_logprobs            logprobs, entropy, kl, policy_mass [N], and what the backward needs
    nova_kernels::linear_logprobs_backward   dL/d(hidden, weight, bias); empty where not needed

Forward, per row, with z the logits over the temperature T and m, s, w as in nova_kernels.lm_head:

    log p(t) = (z_t - m) - log s      entropy = log s - w / s      mass of S = exp(logsumexp_S z - m - log s)

Backward, with upstream gradients a (log-probabilities) and b (KL, whose derivatives by the kept logits and by the
log-sum-exp are kept from the forward):

    dz = c exp(z - m) + a [v = t] + scatter(b by_kept, ids)        c = (b by_lse - a) / s        all over T

Both are walks over blocks of logits; a vocabulary split over ranks meets once, between the walk and these equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nova_kernels.lm_head import Head, RowTerms, arithmetic_dtype, parallel, spread, take, walk
from nova_kernels.lm_head.rows import RowStats, log_sum_exp
from nova_kernels.logprob.targets import check_targets, counted_rows
from nova_kernels.topk_kl.entries import check_ids
from nova_kernels.topk_kl.kept import KeptKL, kept_kl

NineTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Outputs(NamedTuple):
    """Of nova_kernels::linear_logprobs: each [N], by_kept [N, K], exponentials [N, V], or [0] where it is not there."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    policy_mass: Tensor
    by_kept: Tensor  # from here on for the backward
    by_lse: Tensor
    maximum: Tensor
    total: Tensor
    exponentials: Tensor


@torch.library.custom_op("nova_kernels::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ids: Tensor | None,
    values: Tensor | None,
    lse: Tensor | None,
    softcap: float | None,
    vocabulary: int,
    temperature: float,
    direction: str,
    tail: str,
    ignore_index: int | None,
    entropy: bool,
    factors: torch.dtype,
    group: str | None,
    vocab_start: int,
    gradient: bool,
    in_triton: bool,
) -> NineTensors:
    """Outputs; `entropy` and `gradient` say what is wanted, ids, values [N, K] and lse [N] are the reference's."""
    ranks, rows = parallel.named(group), counted_rows(targets, ignore_index)
    targets = take(targets, rows)
    end = parallel.end_of_vocabulary(vocabulary, vocab_start, ranks, hidden.device)
    check_targets(targets, end, ignore_index)
    local_ids = None
    if ids is not None and values is not None:
        check_ids("linear_logprobs", ids := take(ids, rows), end)
        values = take(values, rows).masked_fill(ids < 0, -torch.inf)
        local_ids = parallel.local_ids(ids, vocabulary, vocab_start)
    head = Head.prepare(weight, bias, softcap, vocabulary, factors)
    exponentials = _exponentials(hidden, weight, softcap, vocabulary, group, gradient, in_triton)
    stats = walk.forward(
        head.hidden(take(hidden, rows)),
        head,
        temperature,
        targets - vocab_start,
        local_ids,
        entropy=entropy,
        in_triton=in_triton,
        exponentials=exponentials if exponentials.numel() > 0 else None,
    )
    exponentials[len(targets) :].zero_()
    stats = parallel.merged(stats, ranks)
    kl = None
    if stats.kept is not None and values is not None and lse is not None:
        kl = kept_kl(
            stats.kept,
            values,
            temperature,
            direction,
            softcap=softcap,
            lse=(log_sum_exp(stats), take(lse, rows)) if tail == "bucket" else None,
            log_mass=True,
            gradient=gradient,
            in_triton=in_triton,
        )
    everything = _row_terms(stats, kl, entropy=entropy, gradient=gradient)
    outputs = (stats.total.new_empty(0) if x is None else spread(x, rows, len(hidden)) for x in everything)
    return Outputs._make([*outputs, exponentials])


def _row_terms(stats: RowStats, kl: KeptKL | None, *, entropy: bool, gradient: bool) -> tuple[Tensor | None, ...]:
    """All Outputs but the last, of the rows that count; None where it is not there."""
    assert stats.target is not None, "targets were given"
    log_total = stats.total.log()
    logprobs = (stats.target - stats.maximum) - log_total
    entropies = log_total - stats.weighted / stats.total if entropy else None
    state = (stats.maximum, stats.total) if gradient else (None, None)
    if kl is None:
        return logprobs, entropies, None, None, None, None, *state
    assert kl.log_mass is not None, "it was asked for"
    mass = (kl.log_mass - log_sum_exp(stats)).exp_()
    return logprobs, entropies, kl.kl, mass, kl.by_kept, kl.by_lse, *state


@linear_logprobs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ids: Tensor | None,
    values: Tensor | None,
    lse: Tensor | None,
    softcap: float | None,
    vocabulary: int,
    temperature: float,
    direction: str,
    tail: str,
    ignore_index: int | None,
    entropy: bool,
    factors: torch.dtype,
    group: str | None,
    vocab_start: int,
    gradient: bool,
    in_triton: bool,
) -> NineTensors:
    def row(wanted: bool) -> Tensor:
        size = hidden.shape[0] if wanted else 0
        return hidden.new_empty(size, dtype=arithmetic_dtype(hidden, weight))

    kl = ids is not None
    by_kept = row(False) if ids is None or not gradient else row(True).new_empty(ids.shape)
    exponentials = _exponentials(hidden, weight, softcap, vocabulary, group, gradient, in_triton)
    bucket = kl and gradient and tail == "bucket"
    terms = (row(True), row(entropy), row(kl), row(kl))
    return *terms, by_kept, row(bucket), row(gradient), row(gradient), exponentials


def _exponentials(
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None,
    vocabulary: int,
    group: str | None,
    gradient: bool,
    in_triton: bool,
) -> Tensor:
    """Memory [N, V] for the exponentials that the backward uses again, or [0]."""
    kept = gradient and not in_triton and group is None
    kept = kept and walk.keeps_exponentials(hidden.shape[0], vocabulary, softcap, hidden.device)
    shape = (hidden.shape[0], vocabulary) if kept else (0,)
    return hidden.new_empty(shape, dtype=arithmetic_dtype(hidden, weight))


@torch.library.custom_op("nova_kernels::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    by_logprob: Tensor | None,
    by_kl: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ids: Tensor | None,
    by_kept: Tensor,
    by_lse: Tensor,
    maximum: Tensor,
    total: Tensor,
    exponentials: Tensor,
    softcap: float | None,
    vocabulary: int,
    temperature: float,
    ignore_index: int | None,
    factors: torch.dtype,
    group: str | None,
    vocab_start: int,
    in_triton: bool,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/d(hidden, weight, bias) from the upstream gradients [N] of logprobs and KL; [0] where not needed."""
    rows = counted_rows(targets, ignore_index)
    targets, maximum, total = (take(x, rows) for x in (targets, maximum, total))
    a, b, ids = (None if x is None else take(x, rows) for x in (by_logprob, by_kl, ids))
    kept, lse = (take(x, rows) if x.numel() > 0 else None for x in (by_kept, by_lse))
    scale = None if a is None else -a
    if b is not None and lse is not None:
        scale = b * lse if scale is None else scale + b * lse
    terms = RowTerms(
        maximum=maximum,
        scale=None if scale is None else scale / (temperature * total),
        by_target=None if a is None else a / temperature,
        targets=targets - vocab_start,
        by_kept=None if b is None or kept is None else kept * b.unsqueeze(1),
        ids=None if ids is None else parallel.local_ids(ids, vocabulary, vocab_start),
    )
    head = Head.prepare(weight, bias, softcap, vocabulary, factors)
    found = walk.backward(
        head.hidden(take(hidden, rows)),
        head,
        temperature,
        terms,
        weight=weight,
        bias=bias,
        needed=(needed[0], needed[1], needed[2]),
        in_triton=in_triton,
        exponentials=exponentials[: len(targets)] if exponentials.numel() > 0 else None,
        whole=group is None,
    )
    return walk.whole_gradients(found, hidden, weight, rows, parallel.named(group))


@linear_logprobs_backward.register_fake
def _(
    by_logprob: Tensor | None, by_kl: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return walk.fake_gradients(hidden, weight, bias, needed=rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, ids, _, _, softcap, vocabulary, temperature, _, _, ignore_index, _, *rest = inputs
    factors, group, vocab_start, _, in_triton = rest
    outputs = Outputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(outputs.entropy, *outputs[3 if ids is not None else 2 :])
    ctx.save_for_backward(hidden, weight, bias, targets, ids, *outputs[4:])
    ctx.options = (softcap, vocabulary, temperature, ignore_index, factors, group, vocab_start, in_triton)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    by_logprob, by_kl, needed = upstream[0], upstream[2], list(ctx.needs_input_grad[:3])
    found: tuple[Tensor | None, ...] = (None, None, None)
    if by_logprob is not None or by_kl is not None:
        gradients = linear_logprobs_backward(by_logprob, by_kl, *ctx.saved_tensors, *ctx.options, needed)
        found = tuple(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))
    return *found, *([None] * 16)


linear_logprobs.register_autograd(_backward, setup_context=_save)
