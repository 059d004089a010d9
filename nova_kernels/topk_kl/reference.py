"""Top-K selection and the KL divergence over the kept entries, as defined.

Over S = the reference's top-K ids, with z the policy's and v the reference's logits, both divided by the temperature:

    p = softmax_S(z)    r = softmax_S(v)    d = log p - log r

    policy_ref   KL(p||r) = sum_S p d + r - p        dKL/dz = p (d - KL)
    ref_policy   KL(r||p) = sum_S p - r - r d        dKL/dz = p - r

sum_S (r - p) = 0, so these are the usual sums; each term is >= 0 and is computed so that it is >= 0 in floating point:
p d + r - p = p (d + exp(-d) - 1), by its series for small |d|. It is 0 where d = 0.

tail="bucket" adds one entry, the mass outside S: p and r are then softmaxes over the whole vocabulary (log-sum-exps L
and L_ref), the bucket holds p_t = 1 - sum_S p and r_t = 1 - sum_S r, floored at the dtype's epsilon (below it is
rounding noise), and

    policy_ref   dKL/dz_k = p_k (d_k - d_t)          dKL/dL = d_t - KL
    ref_policy   dKL/dz_k = p_k r_t / p_t - r_k      dKL/dL = 1 - r_t / p_t        (dL/dz = softmax over the vocabulary)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this |d| the series of d + exp(-d) - 1 is the more accurate form: eight terms leave out less than the rounding.
SERIES_BELOW = {torch.float32: 0.7, torch.float64: 0.1}
SERIES = (-1 / 362880, 1 / 40320, -1 / 5040, 1 / 720, -1 / 120, 1 / 24, -1 / 6, 1 / 2)  # of d^9 down to d^2


def topk_select(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids int32 [n, K] ascending (-1 unused) and values [n, K] of the K largest of each row of [n, V].

    Ties, and -0 with +0, go to the lowest index; NaN is the largest; entries of -inf are never kept.
    """
    # Adding +0 turns -0 into +0, which the sort on CUDA would tell apart.
    order = (logits + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    unused = logits.gather(1, order) == -torch.inf
    ids = order.masked_fill(unused, logits.shape[1]).sort(dim=-1).values
    unused = ids == logits.shape[1]
    values = logits.gather(1, ids.masked_fill(unused, 0)).masked_fill_(unused, -torch.inf)
    return ids.masked_fill_(unused, -1).int(), values


def kept_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """The policy's logits [n, K] at the kept ids, -inf in unused slots (whose id -1 must never reach a gather)."""
    return logits.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, -torch.inf)


def kl_terms(
    policy: Tensor,
    ref: Tensor,
    direction: str,
    policy_lse: Tensor | None = None,
    ref_lse: Tensor | None = None,
    *,
    padded: bool = True,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """KL of each row, and its derivatives.

    Args:
        policy, ref: logits [n, K] at the kept ids, over the temperature; -inf in both where a slot is unused.
        direction: "policy_ref" or "ref_policy".
        policy_lse, ref_lse: log-sum-exps [n] over the vocabulary; given both, the tail is a bucket.
        padded: whether there may be unused slots.
        gradient: False leaves the derivatives out.

    Returns:
        KL [n]; its derivative by `policy` [n, K] (at fixed policy_lse) and by `policy_lse` [n], or None.
    """
    if policy_lse is None or ref_lse is None:
        log_p, log_r = policy.log_softmax(dim=-1), ref.log_softmax(dim=-1)
    else:
        log_p, log_r = _with_tail(policy, policy_lse), _with_tail(ref, ref_lse)
    p, r = log_p.exp(), log_r.exp()
    d = log_p - log_r
    if padded:
        d.masked_fill_(log_r == -torch.inf, 0.0)  # it was -inf - -inf
    if direction == "policy_ref":
        d.clamp_(min=torch.finfo(d.dtype).min)  # p = 0 at log p = -inf: its term is r, its gradient 0
        kl = _divergence(p, r, d).sum(dim=-1)
    else:
        kl = _divergence(r.clamp(min=torch.finfo(r.dtype).tiny), p, -d).sum(dim=-1)  # not 0 * inf
    if not gradient:
        return kl, None, None
    if policy_lse is None:
        return kl, p * (d - kl.unsqueeze(1)) if direction == "policy_ref" else p - r, None
    (p, p_t), (r, r_t), (d, d_t) = ((x[:, :-1], x[:, -1]) for x in (p, r, d))
    if direction == "policy_ref":
        return kl, p * (d - d_t.unsqueeze(1)), d_t - kl
    ratio = r_t / p_t
    return kl, p * ratio.unsqueeze(1) - r, 1 - ratio


def log_tail(kept: Tensor, lse: Tensor) -> Tensor:
    """Log of the mass [n] outside the kept logits [n, K], floored at epsilon."""
    mass = -torch.expm1(kept.logsumexp(dim=-1) - lse)
    return mass.clamp_(min=torch.finfo(mass.dtype).eps).log_()


def _with_tail(kept: Tensor, lse: Tensor) -> Tensor:
    return torch.cat([kept - lse.unsqueeze(1), log_tail(kept, lse).unsqueeze(1)], dim=1)


def _divergence(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """a (d + exp(-d) - 1) = a d + b - a for d = log a - log b."""
    series = d * SERIES[0]
    for coefficient in SERIES[1:]:
        series.add_(coefficient).mul_(d)
    series.mul_(d).mul_(a)
    exact = torch.addcmul(b, a, d).sub_(a)
    return torch.where(d.abs() < SERIES_BELOW[d.dtype], series, exact)


class _KL(torch.autograd.Function):
    """KL [n] of policy logits [n, K], through the derivatives above; none flows to the reference."""

    @staticmethod
    def forward(
        ctx: Any, policy: Tensor, policy_lse: Tensor | None, ref: Tensor, ref_lse: Tensor | None, direction: str
    ) -> Tensor:
        kl, by_policy, by_lse = kl_terms(policy, ref, direction, policy_lse, ref_lse)
        ctx.save_for_backward(by_policy, by_lse)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        by_policy, by_lse = ctx.saved_tensors
        return upstream.unsqueeze(1) * by_policy, None if by_lse is None else upstream * by_lse, None, None, None


def topk_kl_div(
    logits: Tensor,
    ids: Tensor,
    values: Tensor,
    lse: Tensor,
    temperature: float,
    direction: str,
    tail: str,
    mask: Tensor | None,
) -> Tensor:
    """KL [N] of policy logits [N, V] and a reference's ids, values [N, K], lse [N]; 0 where `mask` [N] is False."""
    if mask is not None and not bool(mask.all()):
        kept = topk_kl_div(logits[mask], ids[mask], values[mask], lse[mask], temperature, direction, tail, None)
        return kept.new_zeros(mask.shape).index_put((mask,), kept)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    values = values.masked_fill(ids < 0, -torch.inf)
    policy = kept_logits(logits, ids.masked_fill(values == -torch.inf, -1)).to(dtype) / temperature
    policy_lse = (logits.to(dtype) / temperature).logsumexp(dim=-1) if tail == "bucket" else None
    ref_lse = lse.to(dtype) if tail == "bucket" else None
    kl: Tensor = _KL.apply(policy, policy_lse, values.to(dtype) / temperature, ref_lse, direction)
    return kl


def mass(kept: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """Probability [n] of the kept raw logits [n, K], given the log-sum-exp [n] at this temperature."""
    dtype = torch.promote_types(kept.dtype, torch.float32)
    return ((kept.to(dtype) / temperature).logsumexp(dim=-1) - lse).exp()


def overlap(ids: Tensor, ref_ids: Tensor, vocabulary: int) -> Tensor:
    """Share [n] of the used slots of `ref_ids` [n, K] whose id is in `ids` [n, K]; both ascending, -1 last."""
    used = ref_ids >= 0
    ascending = ids.masked_fill(ids < 0, vocabulary)
    place = torch.searchsorted(ascending, ref_ids.clamp(min=0)).clamp_(max=ids.shape[1] - 1)
    found = (ascending.gather(1, place) == ref_ids) & used
    return found.sum(dim=1) / used.sum(dim=1)
