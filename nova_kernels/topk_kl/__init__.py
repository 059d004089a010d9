"""KL divergence of a policy from a frozen reference over the reference's K most likely tokens.

S = ids of the reference's top K, p and r = policy and reference renormalised over S at the same temperature:

    policy_ref   KL(p||r) = sum_S p log(p / r)            ref_policy   KL(r||p) = sum_S r log(r / p)

Both are >= 0 in floating point too, and exactly 0 for equal logits. Mass that leaves S is not seen unless
tail="bucket" adds it as one more entry. Gradients flow to the policy alone. Per token, never reduced.
Results are float32 (float64 for float64 inputs). Derivation, edge rules and limits: docs/kernels/topk_kl.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nova_kernels.backend import choose
from nova_kernels.topk_kl import reference, threshold
from nova_kernels.topk_kl.entries import TopK, check_divergence, check_k, check_lse_temperature, check_temperature
from nova_kernels.topk_kl.linear import linear_topk_kl_div, linear_topk_select
from nova_kernels.topk_kl.selection import select_blocks

__all__ = [
    "TopK",
    "TopKMetrics",
    "linear_topk_kl_div",
    "linear_topk_select",
    "topk_kl_div",
    "topk_kl_div_from_logits",
    "topk_kl_metrics",
    "topk_select",
]


class TopKMetrics(NamedTuple):
    """Each [...], in [0, 1], without gradient."""

    policy_mass: Tensor  # the policy's probability of S
    ref_mass: Tensor  # the reference's probability of S
    overlap: Tensor  # share of S that is in the policy's own top K


def topk_select(
    logits: Tensor,
    k: int = 500,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TopK:
    """The k largest logits of each row of [..., V], exact and deterministic; no gradient.

    Ties, and -0 with +0, go to the lowest index; NaN is the largest; -inf is never kept. Columns from `vocab_size` on
    are not looked at. `temperature` applies to the lse alone. Backends: threshold, reference.

    Raises:
        ValueError: k < 2 or k above the vocabulary; a temperature that is not positive; logits that are not floats.
    """
    check_temperature("topk_select", temperature)
    if logits.ndim < 1 or not logits.is_floating_point():
        raise ValueError(f"topk_select: expected logits float [..., V], got {logits.dtype} {list(logits.shape)}")
    if vocab_size is not None and not 0 < vocab_size <= logits.shape[-1]:
        raise ValueError(f"topk_select: vocab_size must lie between 1 and V = {logits.shape[-1]}, got {vocab_size}")
    logits = logits.detach()[..., :vocab_size]
    check_k("topk_select", k, logits.shape[-1])
    name = choose("topk_select", backend, {"threshold": None, "reference": None})
    select = threshold.topk_select if name == "threshold" else reference.topk_select
    return select_blocks(logits, k, temperature=temperature, select=select)


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
    with an lse taken at another temperature. Backend: reference.
    """
    where = "topk_kl_div"
    *shape, vocabulary = policy_logits.shape
    check_divergence(where, ref, torch.Size(shape), vocabulary, temperature, direction, tail, mask)
    choose(where, backend, {"reference": None})
    flat, kept = ref.reshape(-1), None if mask is None else mask.reshape(-1)
    logits = policy_logits.reshape(-1, vocabulary)
    kl = reference.topk_kl_div(logits, flat.ids, flat.values, flat.lse, temperature, direction, tail, kept)
    return kl.reshape(shape)


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
    """topk_select of ref_logits [..., V], then topk_kl_div with the same options. Backend: reference."""
    if ref_logits.requires_grad:
        raise ValueError("topk_kl_div_from_logits: ref_logits requires grad, but no gradient flows to it; detach it")
    ref = topk_select(ref_logits, k, temperature=temperature, backend=backend)
    return topk_kl_div(
        policy_logits, ref, temperature=temperature, direction=direction, tail=tail, mask=mask, backend=backend
    )


@torch.no_grad()
def topk_kl_metrics(policy_logits: Tensor, ref: TopK, *, temperature: float = 1.0) -> TopKMetrics:
    """What the KL over S cannot see: the mass of S on both sides, and how many of its ids the policy ranks as high."""
    where = "topk_kl_metrics"
    *shape, vocabulary = policy_logits.shape
    check_divergence(where, ref, torch.Size(shape), vocabulary, temperature, "policy_ref", "none")
    check_lse_temperature(where, ref, temperature)
    own, flat = topk_select(policy_logits, ref.k, temperature=temperature).reshape(-1), ref.reshape(-1)
    kept = reference.kept_logits(policy_logits.reshape(-1, vocabulary), flat.ids)
    policy_mass = reference.mass(kept, own.lse, temperature)
    ref_mass = reference.mass(flat.values, flat.lse, temperature)
    overlap = reference.overlap(own.ids, flat.ids, vocabulary).to(own.lse.dtype)
    return TopKMetrics(policy_mass.reshape(shape), ref_mass.reshape(shape), overlap.reshape(shape))
