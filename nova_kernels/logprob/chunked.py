"""Log-probabilities, entropy and top-K KL from hidden states in one pass over chunks of logits (see lm_head).

Forward, per row, with z the logits over the temperature T, m = max z, e = exp(z - m), s = sum e:

    log p(t) = (z_t - m) - log s      entropy = log s - sum e (z - m) / s
    mass of S = exp(logsumexp_S z - m - log s)

Backward, with upstream gradients a (log-probabilities) and b (KL, whose derivatives by the kept logits and by the
log-sum-exp are kept from the forward):

    dz = w e + a [v = t] + scatter(b by_kept, ids)        w = (b by_lse - a) / s        all over T

e is computed again from h, except for the last chunk, whose e the forward keeps; m and s are kept for every row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nova_kernels import lm_head
from nova_kernels.lm_head import Head, HeadGradients
from nova_kernels.logprob.terms import Asked, Terms
from nova_kernels.topk_kl.dense import chunk_kl


class _Kept(NamedTuple):
    """What a chunk leaves for the backward; None where it is not needed or is computed again."""

    maximum: Tensor  # m [n]
    total: Tensor  # s [n]
    by_kept: Tensor | None  # [n, K], by the logits before softcap and temperature
    by_lse: Tensor | None  # [n]


def linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, softcap: float | None, vocab_size: int | None, asked: Asked
) -> Terms:
    """Terms of each row of hidden [N, H]; gradients through logprobs and kl."""
    return Terms(*_LinearLogprobs.apply(hidden, weight, bias, softcap, vocab_size, asked))


def _chunk_terms(logits: Tensor, exponentials: Tensor, part: slice, head: Head, asked: Asked) -> tuple[Terms, _Kept]:
    """Terms of one chunk; overwrites its raw logits [n, V] and fills `exponentials` [n, V]."""
    options = asked.kl
    kept = None if options is None else logits.gather(1, options.ids(part))
    maximum, total = lm_head.log_normalizer_(logits, asked.temperature, exponentials)
    log_total = total.log()
    logprobs = logits.gather(1, asked.targets[part].unsqueeze(1)).squeeze(1) - log_total
    entropy = kl = mass = by_kept = by_lse = None
    if options is not None and kept is not None:
        lse = maximum + log_total
        kl, policy, by_kept, by_lse = chunk_kl(kept, part, lse if options.tail == "bucket" else None, head, options)
        mass = policy.logsumexp(dim=-1).sub_(lse).exp_()
    if asked.entropy:
        if head.bias is not None:  # it can hold -inf, and 0 * -inf is not 0
            logits.clamp_(min=torch.finfo(logits.dtype).min)
        entropy = log_total - logits.mul_(exponentials).sum(dim=-1) / total
    return Terms(logprobs, entropy, kl, mass), _Kept(maximum, total, by_kept, by_lse)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        vocab_size: int | None,
        asked: Asked,
    ) -> tuple[Tensor | None, ...]:
        head = Head.prepare(hidden, weight, bias, softcap, vocab_size)
        num_rows = asked.targets.numel()
        wanted = (True, asked.entropy, asked.kl is not None, asked.kl is not None)
        results = [head.weight.new_empty(num_rows) if want else None for want in wanted]
        buffer = head.buffer(num_rows)
        exponentials = torch.empty_like(buffer)
        saved: list[Tensor | None] = []
        with lm_head.without_autocast(hidden.device):
            for part in lm_head.chunks(num_rows, len(buffer)):
                logits = head.logits(head.rows(hidden, asked.rows, part), buffer)
                terms, kept = _chunk_terms(logits, exponentials[: len(logits)], part, head, asked)
                for result, term in zip(results, terms, strict=True):
                    if result is not None and term is not None:
                        result[part] = term
                if asked.gradient:
                    saved += kept
        ctx.save_for_backward(hidden, weight, bias, *saved)
        ctx.softcap, ctx.vocab_size, ctx.asked = softcap, vocab_size, asked
        ctx.set_materialize_grads(False)
        # Not through save_for_backward: the first backward overwrites it, a second one computes it again.
        ctx.last_exponentials = exponentials if asked.gradient and softcap is None else None
        spread = [None if x is None else lm_head.spread(x, asked.rows, hidden.shape[0]) for x in results]
        ctx.mark_non_differentiable(*(x for x in (spread[1], spread[3]) if x is not None))
        return tuple(spread)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved = ctx.saved_tensors
        asked: Asked = ctx.asked
        head = Head.prepare(hidden, weight, bias, ctx.softcap, ctx.vocab_size)
        gradients = HeadGradients(head, hidden, weight, bias, asked.rows, ctx.needs_input_grad)
        by_logprob, by_kl = (
            None if x is None else lm_head.take(x, asked.rows, slice(None)) for x in (upstream[0], upstream[2])
        )
        num_rows = asked.targets.numel()
        exponentials, ctx.last_exponentials = ctx.last_exponentials, None
        buffer = head.buffer(num_rows) if exponentials is None else exponentials
        parts = enumerate(lm_head.chunks(num_rows, len(buffer)))
        with lm_head.without_autocast(hidden.device):
            for index, part in reversed(list(parts)):  # the last chunk first: then its memory serves the others
                kept = _Kept(*saved[4 * index : 4 * index + 4])
                chunk_hidden = head.rows(hidden, asked.rows, part)
                a, b = (None if x is None else x[part] for x in (by_logprob, by_kl))
                filled = exponentials is not None and part.stop == num_rows
                dlogits = _dlogits(head, chunk_hidden, buffer, filled, part, kept, asked, a, b)
                gradients.add(part, chunk_hidden, dlogits)
        return *gradients.result(), None, None, None


def _dlogits(
    head: Head,
    hidden: Tensor,
    buffer: Tensor,
    filled: bool,
    part: slice,
    kept: _Kept,
    asked: Asked,
    a: Tensor | None,
    b: Tensor | None,
) -> Tensor:
    """dL/d(h W^T + b) [n, V] of a chunk, in `buffer`, which is `filled` if e is in it already.

    `a` and `b` [n] are the upstream gradients of logprobs and KL.
    """
    out, temperature = buffer[: len(hidden)], asked.temperature
    scale = None if a is None else -a
    if b is not None and kept.by_lse is not None:
        scale = b * kept.by_lse - a if a is not None else b * kept.by_lse
    slope: Tensor | float = 1.0
    if scale is None:
        out.zero_()
    else:
        scale = scale / (temperature * kept.total)
        if filled:
            out.mul_(scale.unsqueeze(1))
        else:
            slope = head.softcap_slope(head.logits(hidden, buffer))
            lm_head.scaled_exp_(out, temperature, kept.maximum, scale)
    if a is not None:
        out.scatter_add_(1, asked.targets[part].unsqueeze(1), (a / temperature).unsqueeze(1))
    if head.softcap is not None:
        out.mul_(slope)
    if b is not None and kept.by_kept is not None and asked.kl is not None:
        out.scatter_add_(1, asked.kl.ids(part), kept.by_kept * b.unsqueeze(1))
    return out
