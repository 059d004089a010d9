"""The reference backend: the definitions of the parts, put together on all of [N, V]."""

from __future__ import annotations

import torch
from torch import Tensor

from nova_kernels.lm_head import dense_logits, spread, take
from nova_kernels.logprob import reference
from nova_kernels.logprob.targets import check_targets, counted_rows
from nova_kernels.logprob.terms import LogprobTerms
from nova_kernels.topk_kl import TopK
from nova_kernels.topk_kl import reference as kl_reference
from nova_kernels.topk_kl.entries import check_ids


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref: TopK | None,
    *,
    softcap: float | None,
    vocabulary: int,
    temperature: float,
    ignore_index: int | None,
    direction: str = "policy_ref",
    tail: str = "none",
) -> LogprobTerms:
    """Terms of each row of hidden [N, H], differentiable by autograd."""
    rows = counted_rows(targets, ignore_index)
    targets = take(targets, rows)
    check_targets(targets, vocabulary, ignore_index)
    logits = dense_logits(take(hidden, rows), weight, bias, softcap, vocabulary)
    terms: list[Tensor | None] = [*reference.linear_logprobs(logits / temperature, targets), None, None]
    if ref is not None:
        ids, values, lse = (take(x, rows) for x in (ref.ids, ref.values, ref.lse))
        check_ids("linear_logprobs", ids, vocabulary)
        ids = ids.masked_fill(values == -torch.inf, -1)
        terms[2] = kl_reference.topk_kl_div(logits, ids, values, lse, temperature, direction, tail, None)
        policy_lse = (logits.detach() / temperature).logsumexp(dim=-1)
        terms[3] = kl_reference.mass(kl_reference.kept_logits(logits.detach(), ids), policy_lse, temperature)
    logprobs, entropy, kl, mass = (None if x is None else spread(x, rows, len(hidden)) for x in terms)
    assert logprobs is not None and entropy is not None, "both are always there"
    return LogprobTerms(logprobs, entropy, kl, mass)
