"""What the KL over S cannot see: the mass of S on both sides, and how many of its ids the policy ranks as high."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nova_kernels.topk_kl import ops, reference
from nova_kernels.topk_kl.entries import TopK, check_divergence, check_ids, check_lse_temperature


class TopKMetrics(NamedTuple):
    """Each [...], in [0, 1], without gradient."""

    policy_mass: Tensor  # the policy's probability of S
    ref_mass: Tensor  # the reference's probability of S
    overlap: Tensor  # share of S that is in the policy's own top K


@torch.no_grad()
def topk_kl_metrics(policy_logits: Tensor, ref: TopK, *, temperature: float = 1.0) -> TopKMetrics:
    """TopKMetrics of policy logits [..., V] and a reference [..., K] whose lse was taken at `temperature`.

    Raises:
        ValueError: as topk_kl_div, and for an lse of another temperature.
    """
    where = "topk_kl_metrics"
    *shape, vocabulary = policy_logits.shape
    check_divergence(where, ref, torch.Size(shape), vocabulary, temperature, "policy_ref", "none")
    check_lse_temperature(where, ref, temperature)
    check_ids(where, ref.ids, vocabulary)
    logits, flat = policy_logits.reshape(-1, vocabulary), ref.reshape(-1)
    own_ids, _, lse = ops.topk_select(logits, ref.k, temperature, None, 0, None)
    used = flat.ids.masked_fill(flat.values == -torch.inf, -1)
    policy_mass = reference.mass(reference.kept_logits(logits, used), lse, temperature)
    ref_mass = reference.mass(flat.values.masked_fill(flat.ids < 0, -torch.inf), flat.lse, temperature)
    overlap = reference.overlap(own_ids, used, vocabulary).to(lse.dtype)
    return TopKMetrics(policy_mass.reshape(shape), ref_mass.reshape(shape), overlap.reshape(shape))
