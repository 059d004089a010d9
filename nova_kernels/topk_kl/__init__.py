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

from nova_kernels import lm_head
from nova_kernels.backend import choose
from nova_kernels.topk_kl import dense, reference, threshold
from nova_kernels.topk_kl.entries import TopK, check_divergence, check_k, check_lse_temperature, check_temperature
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


def linear_topk_select(
    hidden: Tensor,
    weight: Tensor,
    k: int = 500,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> TopK:
    """topk_select of the logits of hidden [N, H] under a head weight [V, H], never holding [N, V]; no gradient.

    Rows where `mask` bool [N] is False are skipped (ids -1, values and lse -inf). With the same rows left in, other
    linear ops see these very logits, to the bit. Backends: dense (chunked), reference.
    """
    where = "linear_topk_select"
    vocabulary = lm_head.check_head(where, hidden, weight, bias, softcap, vocab_size)
    check_temperature(where, temperature)
    check_k(where, k, vocabulary)
    lm_head.check_mask(where, mask, hidden)
    rows = None if mask is None else lm_head.kept_rows(mask)
    hidden = hidden.detach()
    if choose(where, backend, {"dense": None, "reference": None}) == "dense":
        head = lm_head.Head.prepare(hidden, weight, bias, softcap, vocab_size)
        return dense.linear_topk_select(hidden, head, k, temperature=temperature, rows=rows)
    with torch.no_grad():
        logits = lm_head.dense_logits(hidden, weight, bias, softcap, vocab_size)
    top = select_blocks(logits, k, temperature=temperature, select=reference.topk_select)
    return top if mask is None else top.where(mask)


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
    options = {"temperature": temperature, "direction": direction, "tail": tail}
    logits = policy_logits.reshape(-1, vocabulary)
    return reference.topk_kl_div(logits, flat.ids, flat.values, flat.lse, **options, mask=kept).reshape(shape)


def topk_kl_div_from_logits(policy_logits: Tensor, ref_logits: Tensor, k: int = 500, **options: Any) -> Tensor:
    """topk_select of ref_logits [..., V], then topk_kl_div; options are those of topk_kl_div."""
    if ref_logits.requires_grad:
        raise ValueError("topk_kl_div_from_logits: ref_logits requires grad, but no gradient flows to it; detach it")
    ref = topk_select(ref_logits, k, temperature=options.get("temperature", 1.0))
    return topk_kl_div(policy_logits, ref, **options)


def linear_topk_kl_div(
    hidden: Tensor,
    weight: Tensor,
    ref: TopK,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    direction: str = "policy_ref",
    tail: str = "none",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """topk_kl_div of the logits of hidden [N, H] under a head weight [V, H] -> [N], never holding [N, V].

    Gradients to hidden, weight and bias. Rows where `mask` bool [N] is False cost nothing. Backends: dense (chunked),
    reference. Raises as topk_kl_div does.
    """
    where = "linear_topk_kl_div"
    vocabulary = lm_head.check_head(where, hidden, weight, bias, softcap, vocab_size)
    check_divergence(where, ref, hidden.shape[:1], vocabulary, temperature, direction, tail, mask)
    if choose(where, backend, {"dense": None, "reference": None}) == "reference":
        logits = lm_head.dense_logits(hidden, weight, bias, softcap, vocab_size)
        options = {"temperature": temperature, "direction": direction, "tail": tail}
        return reference.topk_kl_div(logits, ref.ids, ref.values, ref.lse, **options, mask=mask)
    asked = dense.KLOptions(
        ref=ref,
        temperature=temperature,
        direction=direction,
        tail=tail,
        rows=None if mask is None else lm_head.kept_rows(mask),
        gradient=lm_head.wants_gradient(hidden, weight, bias),
    )
    return dense.linear_topk_kl_div(hidden, weight, bias, softcap=softcap, vocab_size=vocab_size, options=asked)


@torch.no_grad()
def topk_kl_metrics(policy_logits: Tensor, ref: TopK, *, temperature: float = 1.0) -> TopKMetrics:
    """What the KL over S cannot see: the mass of S on both sides, and how many of its ids the policy ranks as high."""
    where = "topk_kl_metrics"
    *shape, vocabulary = policy_logits.shape
    check_divergence(where, ref, torch.Size(shape), vocabulary, temperature, "policy_ref", "none")
    check_lse_temperature(where, ref, temperature)
    own = topk_select(policy_logits, ref.k, temperature=temperature)
    policy_mass, ref_mass = reference.masses(policy_logits, own.lse, ref.ids, ref.values, ref.lse, temperature)
    return TopKMetrics(policy_mass, ref_mass, reference.overlap(own.ids, ref.ids))
