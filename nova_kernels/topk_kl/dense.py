"""Selection and KL from hidden states, chunk by chunk, without [N, V] in memory (see lm_head for the walk).

Forward keeps, per row, the derivatives of KL by the K kept logits (and by the log-sum-exp, with a tail bucket):

    dKL/dz = scatter(by_kept, ids) + by_lse softmax(z)

so without a bucket the backward needs no logits at all: it scatters K numbers per row into a chunk and multiplies by
W and h. With a bucket it computes the chunk's logits again. A softcap's slope 1 - (z/c)^2 is folded into by_kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nova_kernels import lm_head
from nova_kernels.lm_head import Head, HeadGradients
from nova_kernels.topk_kl import reference, threshold
from nova_kernels.topk_kl.entries import TopK


@torch.no_grad()
def linear_topk_select(hidden: Tensor, head: Head, k: int, *, temperature: float, rows: Tensor | None) -> TopK:
    """Top-K of the logits of hidden [N, H]; where `rows` leaves a row out, its slots are unused and its lse is -inf."""
    num_rows = hidden.shape[0]
    ids = torch.full((num_rows, k), -1, dtype=torch.int32, device=hidden.device)
    values = head.weight.new_full((num_rows, k), -torch.inf)
    lse = head.weight.new_full((num_rows,), -torch.inf)
    places = torch.arange(num_rows, device=hidden.device) if rows is None else rows
    buffer = head.buffer(places.numel())
    exponentials = torch.empty_like(buffer)
    with lm_head.without_autocast(hidden.device):
        for part in lm_head.chunks(places.numel(), len(buffer)):
            logits = head.logits(head.rows(hidden, rows, part), buffer)
            ids[places[part]], values[places[part]] = threshold.topk_select(logits, k)
            maximum, total = lm_head.log_normalizer_(logits, temperature, exponentials[: len(logits)])
            lse[places[part]] = maximum + total.log()
    return TopK(ids=ids, values=values, lse=lse, temperature=temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class KLOptions:
    """What is asked for, beside the tensors that take gradients."""

    ref: TopK  # [N, K]
    temperature: float
    direction: str
    tail: str
    rows: Tensor | None  # int64 [n], the rows that count; None: all
    padded: bool  # whether these rows may have unused slots
    gradient: bool  # keep what the backward needs

    def ids(self, part: slice) -> Tensor:
        """A chunk's ids int64 [n, K], safe to gather and scatter at: 0 in unused slots."""
        ids = lm_head.take(self.ref.ids, self.rows, part).long()
        return ids.clamp_(min=0) if self.padded else ids


def may_be_padded(ref: TopK, rows: Tensor | None) -> bool:
    """Whether the rows that count have unused slots; off the CPU always yes, so as not to wait for the answer."""
    last = lm_head.take(ref.ids[:, -1], rows, slice(None))
    return last.device.type != "cpu" or bool((last < 0).any())


class ChunkKL(NamedTuple):
    """KL of a chunk's rows, and its derivatives where asked for."""

    kl: Tensor  # [n]
    policy: Tensor  # [n, K], the policy's kept logits over the temperature; -inf in unused slots
    by_kept: Tensor | None  # [n, K], by the kept logits before softcap and temperature
    by_lse: Tensor | None  # [n], by the policy's log-sum-exp


def chunk_kl(kept: Tensor, part: slice, lse: Tensor | None, head: Head, options: KLOptions) -> ChunkKL:
    """KL of one chunk from the policy's raw logits [n, K] at `options.ids(part)`.

    `lse` [n] is their log-sum-exp over the vocabulary at the temperature, or None if the tail is no bucket.
    """
    ref, rows, temperature = options.ref, options.rows, options.temperature
    values = lm_head.take(ref.values, rows, part).to(kept.dtype)
    ref_lse = None if lse is None else lm_head.take(ref.lse, rows, part).to(kept.dtype)
    policy = kept.masked_fill(values == -torch.inf, -torch.inf) if options.padded else kept
    if temperature != 1.0:
        policy, values = policy / temperature, values / temperature
    kl, by_kept, by_lse = reference.kl_terms(
        policy, values, options.direction, lse, ref_lse, padded=options.padded, gradient=options.gradient
    )
    if by_kept is not None and (temperature != 1.0 or head.softcap is not None):
        by_kept.mul_(head.softcap_slope(kept) / temperature)
    return ChunkKL(kl, policy, by_kept, by_lse)


def linear_topk_kl_div(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    vocab_size: int | None,
    options: KLOptions,
) -> Tensor:
    """KL [N] of the head's distribution from the reference's; 0 where `options.rows` leaves a row out."""
    kl: Tensor = _LinearKL.apply(hidden, weight, bias, softcap, vocab_size, options)
    return kl


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        vocab_size: int | None,
        options: KLOptions,
    ) -> Tensor:
        head = Head.prepare(hidden, weight, bias, softcap, vocab_size)
        num_rows = hidden.shape[0] if options.rows is None else options.rows.numel()
        buffer = head.buffer(num_rows)
        exponentials = torch.empty_like(buffer) if options.tail == "bucket" else None
        kl = head.weight.new_empty(num_rows)
        saved: list[Tensor | None] = []
        with lm_head.without_autocast(hidden.device):
            for part in lm_head.chunks(num_rows, len(buffer)):
                logits = head.logits(head.rows(hidden, options.rows, part), buffer)
                kept = logits.gather(1, options.ids(part))
                maximum = total = lse = None
                if exponentials is not None:
                    maximum, total = lm_head.log_normalizer_(logits, options.temperature, exponentials[: len(logits)])
                    lse = maximum + total.log()
                terms = chunk_kl(kept, part, lse, head, options)
                kl[part] = terms.kl
                if options.gradient:
                    saved += (terms.by_kept, terms.by_lse, maximum, total)
        ctx.save_for_backward(hidden, weight, bias, *saved)
        ctx.softcap, ctx.vocab_size, ctx.options = softcap, vocab_size, options
        return lm_head.spread(kl, options.rows, hidden.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved = ctx.saved_tensors
        options: KLOptions = ctx.options
        head = Head.prepare(hidden, weight, bias, ctx.softcap, ctx.vocab_size)
        gradients = HeadGradients(head, hidden, weight, bias, options.rows, ctx.needs_input_grad)
        upstream = lm_head.take(upstream, options.rows, slice(None))
        buffer = head.buffer(len(upstream))
        with lm_head.without_autocast(hidden.device):
            for index, part in enumerate(lm_head.chunks(len(upstream), len(buffer))):
                by_kept, by_lse, maximum, total = saved[4 * index : 4 * index + 4]
                chunk_hidden = head.rows(hidden, options.rows, part)
                if by_lse is None:
                    dlogits = buffer[: len(chunk_hidden)].zero_()
                else:
                    logits = head.logits(chunk_hidden, buffer)
                    slope = head.softcap_slope(logits)
                    scale = upstream[part] * by_lse / (options.temperature * total)
                    dlogits = lm_head.scaled_exp_(logits, options.temperature, maximum, scale).mul_(slope)
                dlogits.scatter_add_(1, options.ids(part), by_kept * upstream[part].unsqueeze(1))
                gradients.add(part, chunk_hidden, dlogits)
        return *gradients.result(), None, None, None
