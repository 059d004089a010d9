"""KL divergence of a policy from a frozen reference over the reference's K most likely tokens.

S = ids of the reference's top K, p and r = policy and reference renormalised over S at the same temperature:

    policy_ref   KL(p||r) = sum_S p log(p / r)            ref_policy   KL(r||p) = sum_S r log(r / p)

Both are >= 0 in floating point too, and exactly 0 for equal logits. Mass that leaves S is not seen unless
tail="bucket" adds it as one more entry. Gradients flow to the policy alone. Per token, never reduced.
Results are float32 (float64 for float64 inputs). Derivation, edge rules and limits: docs/kernels/topk_kl.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nova_kernels.backend import asked_for, choose
from nova_kernels.lm_head import parallel, wants_gradient
from nova_kernels.topk_kl import ops, reference
from nova_kernels.topk_kl.cache import CacheHeader, TopKReferenceCache
from nova_kernels.topk_kl.entries import (
    TopK,
    check_divergence,
    check_ids,
    check_logits,
    check_options,
    check_temperature,
    only_reference_has_buckets,
)
from nova_kernels.topk_kl.linear import linear_topk_kl_div, linear_topk_select
from nova_kernels.topk_kl.metrics import TopKMetrics, topk_kl_metrics

__all__ = [
    "CacheHeader",
    "TopK",
    "TopKMetrics",
    "TopKReferenceCache",
    "linear_topk_kl_div",
    "linear_topk_select",
    "topk_kl_div",
    "topk_kl_div_from_logits",
    "topk_kl_metrics",
    "topk_select",
]


def topk_select(
    logits: Tensor,
    k: int = 500,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int = 0,
    backend: str | None = None,
) -> TopK:
    """The k largest logits of each row of [..., V], exact and deterministic; no gradient.

    Ties, and -0 with +0, go to the lowest index; NaN is the largest; -inf is never kept. Columns from `vocab_size` on
    are not looked at. `temperature` applies to the lse alone. With a `group`, the columns are this rank's, from id
    `vocab_start` on, and every rank gets the top k of all. Backends: cuda, triton, threshold, reference.

    Raises:
        ValueError: k < 2 or k above the vocabulary; a temperature that is not positive; logits that are not floats.
    """
    check_temperature("topk_select", temperature)
    logits = check_logits("topk_select", logits, k, vocab_size, vocab_start, group)
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
    ids, values, lse = ops.topk_select(rows, k, temperature, parallel.name_of(group), vocab_start, backend)
    return TopK(ids=ids, values=values, lse=lse, temperature=temperature).reshape(*logits.shape[:-1])


def topk_kl_div(
    policy_logits: Tensor,
    ref: TopK,
    *,
    temperature: float = 1.0,
    direction: str = "policy_ref",
    tail: str = "none",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL [...] of policy logits [..., V] from a reference's top K [..., K]; 0 where `mask` bool [...] is False.

    `temperature` divides both sides. Raises ValueError where shapes, ids or options do not fit, and for tail="bucket"
    with an lse taken at another temperature. Backends: triton, sparse (PyTorch), reference; tail="bucket" has a dense
    gradient, which only reference gives.
    """
    where = "topk_kl_div"
    *shape, vocabulary = policy_logits.shape
    check_divergence(where, ref, torch.Size(shape), vocabulary, temperature, direction, tail, mask)
    reasons = only_reference_has_buckets(("triton", "sparse")) if tail == "bucket" else ops.backends(policy_logits)
    name = choose(where, backend, reasons)
    flat, kept = ref.reshape(-1), None if mask is None else mask.reshape(-1)
    logits = policy_logits.reshape(-1, vocabulary)
    if name == "reference":
        check_ids(where, flat.ids if kept is None else flat.ids.masked_fill(~kept.unsqueeze(1), -1), vocabulary)
        kl = reference.topk_kl_div(logits, flat.ids, flat.values, flat.lse, temperature, direction, tail, kept)
        return kl.reshape(shape)
    options = (temperature, direction, wants_gradient(policy_logits), name)
    return ops.topk_kl_div(logits, flat.ids, flat.values, kept, *options)[0].reshape(shape)


def topk_kl_div_from_logits(
    policy_logits: Tensor,
    ref_logits: Tensor,
    k: int = 500,
    *,
    temperature: float = 1.0,
    direction: str = "policy_ref",
    tail: str = "none",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """topk_select of ref_logits [..., V], then topk_kl_div with the same options, in one call.

    Backends: cuda, triton (both finish the KL where they select), sparse (PyTorch), reference.
    """
    where = "topk_kl_div_from_logits"
    if ref_logits.requires_grad:
        raise ValueError(f"{where}: ref_logits requires grad, but no gradient flows to it; detach it")
    check_logits(where, ref_logits, k)
    if policy_logits.shape != ref_logits.shape:
        raise ValueError(
            f"{where}: expected policy and reference logits of one shape, got {list(policy_logits.shape)} and "
            f"{list(ref_logits.shape)}; cut padded vocabularies to the smaller one"
        )
    check_options(where, policy_logits.shape[:-1], temperature, direction, tail, mask)
    if tail == "bucket":
        choose(where, backend, only_reference_has_buckets(("cuda", "triton", "sparse")))
    if tail == "bucket" or asked_for(backend, "reference"):
        ref = topk_select(ref_logits, k, temperature=temperature, backend="reference")
        return topk_kl_div(
            policy_logits,
            ref,
            temperature=temperature,
            direction=direction,
            tail=tail,
            mask=mask,
            backend="reference",
        )
    rows = (logits.reshape(-1, logits.shape[-1]) for logits in (policy_logits, ref_logits))
    kept = None if mask is None else mask.reshape(-1)
    options = (k, temperature, direction, wants_gradient(policy_logits), backend)
    return ops.topk_kl_div_from_logits(*rows, kept, *options)[0].reshape(policy_logits.shape[:-1])
