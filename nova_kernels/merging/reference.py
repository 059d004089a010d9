"""Weight merging as formulas on lists of tensors.

theta_i = the same tensor of N models, theta_0 = of the model they all continued from, d_i = theta_i - theta_0:

    linear            sum_i w_i theta_i
    task_arithmetic   theta_0 + lam sum_i w_i d_i
    model_stock       theta_0 + t mean_i d_i,   t = N cos / (1 + (N - 1) cos)

cos is the mean cosine over all pairs (d_i, d_j), for the whole tensor or for each of its rows (Jang et al., 2024). A
pair with a d of 0 counts as cos 0; a negative mean counts as 0, because the formula's geometry (tunes around a centre,
seen from theta_0) has no such case and t would run to minus infinity. So 0 <= t <= 1 always.

Sums are float32 (float64 for float64 inputs), scalar products float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float] | None = None, *, normalize: bool | None = None
) -> Tensor:
    """Weighted sum of same-shaped tensors, float32 (float64 for float64).

    Args:
        weights: one per tensor; None = 1 / N each.
        normalize: True divides the weights by their sum, False takes them as they are; None demands that they sum
            to 1, so that nothing is rescaled by surprise.
    """
    _check_alike("linear", tensors)
    return weighted_sum(tensors, resolve_weights("linear", len(tensors), weights, normalize))


def task_arithmetic(
    tensors: Sequence[Tensor],
    base: Tensor,
    weights: Sequence[float] | None = None,
    *,
    lam: float = 1.0,
    normalize: bool | None = None,
) -> Tensor:
    """The base plus `lam` times the weighted sum of the differences from it, float32 (float64 for float64).

    Args:
        weights: one per tensor; None = 1 each.
        normalize: True divides the weights by their sum; None and False take them as they are.
    """
    _check_alike("task_arithmetic", [*tensors, base])
    factors = resolve_weights("task_arithmetic", len(tensors), weights, normalize)
    return step_from(base, tensors, [lam * factor for factor in factors])


def model_stock(tensors: Sequence[Tensor], base: Tensor, *, filter_wise: bool = False) -> Tensor:
    """The base plus t times the mean difference from it, float32 (float64 for float64).

    Args:
        tensors: at least two.
        filter_wise: one t for each row (first dimension); tensors of one dimension are one row.
    """
    _check_alike("model_stock", [*tensors, base])
    if len(tensors) < 2:
        raise ValueError(f"model_stock: expected at least 2 tensors beside the base, got {len(tensors)}")
    ratio = stock_ratio(stock_gram(tensors, base, filter_wise))
    return step_from(base, tensors, [1 / len(tensors)] * len(tensors), ratio)


def resolve_weights(method: str, count: int, weights: Sequence[float] | None, normalize: bool | None) -> list[float]:
    """The weights that are applied, one per model."""
    if weights is None:
        equal = 1 / count if method == "linear" or normalize else 1.0
        return [equal] * count
    if len(weights) != count:
        raise ValueError(f"{method}: expected {count} weights, one per model, got {len(weights)}: {list(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"{method}: weights must be finite, got {list(weights)}")
    total = math.fsum(weights)
    if method == "linear" and normalize is None and abs(total - 1) > 1e-6:
        raise ValueError(
            f"linear: weights {list(weights)} sum to {total:g}, not 1; pass normalize=True to divide them by "
            "their sum, or normalize=False to take them as they are"
        )
    if not normalize:
        return [float(weight) for weight in weights]
    if abs(total) < 1e-8:
        raise ValueError(f"{method}: weights {list(weights)} sum to 0 and cannot be normalised; pass normalize=False")
    return [weight / total for weight in weights]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i theta_i."""
    dtype = sum_dtype(tensors)
    total = tensors[0].to(dtype) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(dtype), alpha=weight)
    return total


def step_from(base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], ratio: Tensor | None = None) -> Tensor:
    """theta_0 + ratio * sum_i w_i d_i; ratio [1] or [rows]."""
    start = base.to(sum_dtype([*tensors, base]))
    step = weighted_sum([tensor.to(start.dtype) - start for tensor in tensors], weights)
    if ratio is not None:
        step *= ratio.to(step.dtype).view(-1, *[1] * (step.ndim - 1)) if ratio.numel() > 1 else ratio.item()
    return start + step


def stock_gram(tensors: Sequence[Tensor], base: Tensor, filter_wise: bool) -> Tensor:
    """Scalar products d_i . d_j, float64 [rows, N, N], or [1, N, N] for the whole tensor; they add up over chunks."""
    rows = base.shape[0] if filter_wise and base.ndim > 1 else 1
    start = base.double().reshape(rows, -1)
    deltas = torch.stack([tensor.double().reshape(rows, -1) - start for tensor in tensors], dim=1)
    return deltas @ deltas.transpose(1, 2)


def stock_ratio(gram: Tensor) -> Tensor:
    """t = N cos / (1 + (N - 1) cos) from scalar products [rows, N, N]: float64 [rows], in [0, 1]."""
    count = gram.shape[-1]
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    lengths = norms[:, :, None] * norms[:, None, :]
    cosines = torch.where(lengths > 0, gram / lengths, torch.zeros_like(gram)).clamp(-1, 1)
    pairs = torch.ones(count, count, dtype=torch.bool).triu(1)
    cos = cosines[:, pairs].mean(1).clamp(min=0)
    return count * cos / (1 + (count - 1) * cos)


def sum_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _check_alike(method: str, tensors: Sequence[Tensor]) -> None:
    if not tensors:
        raise ValueError(f"{method}: expected at least one tensor, got none")
    for index, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{method}: tensor {index} has shape {list(tensor.shape)}, tensor 0 has {list(tensors[0].shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{method}: expected floating-point tensors, tensor {index} is {tensor.dtype}")
