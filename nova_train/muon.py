"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al., 2024).

    m <- mu m + (1 - mu) g        u = (1 - mu) g + mu m                         Nesterov momentum
    X_0 = u / |u|_F               X_{k+1} = a X_k + (b S + c S^2) X_k,  S = X_k X_k^T       five Newton-Schulz steps
    w <- (1 - rate * decay) w - rate * sqrt(max(1, rows / columns)) X_5

The update rule is torch.optim.Muon's. That one works matrix by matrix in bfloat16, which a CPU without bfloat16
arithmetic emulates: 2.3 s a step for a one-million-parameter model where this one takes 0.03 s (docs/experiments.md).
Here matrices of one shape go through each step together, up to TOGETHER elements, in float32 on CPUs and bfloat16 on
GPUs. Of sharded weights every rank orthogonalises the whole matrix and keeps its part. An update takes about four
copies of what goes together, when activations are gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nova_train.sharding import full_tensor, like_parameter

_A, _B, _C = 3.4445, -4.775, 2.0315  # quintic coefficients: singular values go to about 1 fastest, not exactly
_STEPS = 5
_EPS = 1e-7
TOGETHER = 1 << 24  # elements; a matrix that has more goes alone


class Muon(torch.optim.Optimizer):
    """For 2-D weights only; give embeddings, heads and vectors to AdamW."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon: expected 2-D weights, got one of shape {list(p.shape)}; use AdamW for it")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; closures are not supported."""
        if closure is not None:
            raise ValueError("Muon.step: closures are not supported; compute the gradients first")
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), weights in by_shape.items():
                scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
                count = max(1, TOGETHER // (rows * columns))
                for first in range(0, len(weights), count):
                    self._update(weights[first : first + count], scale, group)

    def _update(self, weights: list[Tensor], scale: float, group: dict[str, Any]) -> None:
        """One update of weights of one shape."""
        updates = torch.stack([full_tensor(self._momentum(p, group["momentum"])) for p in weights])
        for p, update in zip(weights, orthogonalize(updates), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(like_parameter(update.to(p.dtype), p), alpha=-scale)

    def _momentum(self, p: Tensor, mu: float) -> Tensor:
        """The Nesterov update of one weight; its buffer is part of the state."""
        assert p.grad is not None, "only parameters with a gradient come here"
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum"].lerp_(p.grad, 1 - mu)
        return p.grad.lerp(buffer, mu)


def orthogonalize(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> the same shape with all singular values near 1 and the singular vectors kept."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_STEPS):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
