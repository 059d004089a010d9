"""Group-relative advantages (GRPO) from the scores of n answers to the same prompt.

    group_mean       A_i = s_i - mean_j s_j                       shrinks the score gradient to (n - 1) / n
    leave_one_out    A_i = s_i - mean_{j != i} s_j                unbiased

then divided by (spread + eps): the group's standard deviation (unbiased), the batch's, or nothing. The KL never enters
these statistics; it is added per token afterwards (`nova_train.kl`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def group_advantages(
    scores: Tensor,
    *,
    baseline: str = "group_mean",
    scale_rewards: str = "group",
    eps: float = 1e-4,
    spread_floor: float = 0.0,
) -> Tensor:
    """Scores fp32 [prompts, n] -> advantages [prompts, n]; groups whose scores are all equal give exactly 0.

    Args:
        baseline: "group_mean" or "leave_one_out".
        scale_rewards: "group", "batch" or "none": whose standard deviation divides.
        eps: added to the standard deviation.
        spread_floor: the least standard deviation that divides, in units of the score, so that the noise of a learned
            score is not blown up to full strength where a group's scores hardly differ.

    Raises:
        ValueError: fewer than two answers per prompt, or an unknown baseline or scale.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"group_advantages: expected scores [prompts, n >= 2], got {list(scores.shape)}")
    n = scores.shape[1]
    centred = scores - scores.mean(dim=1, keepdim=True)
    equal = (scores == scores[:, :1]).all(dim=1, keepdim=True)
    centred = torch.where(equal, torch.zeros_like(centred), centred)
    if baseline == "leave_one_out":
        centred = centred * (n / (n - 1))
    elif baseline != "group_mean":
        raise ValueError(f"group_advantages: baseline must be group_mean or leave_one_out, got {baseline!r}")
    if scale_rewards == "none":
        return centred
    if scale_rewards == "group":
        spread = scores.std(dim=1, keepdim=True)
    elif scale_rewards == "batch":
        spread = scores.std()
    else:
        raise ValueError(f"group_advantages: scale_rewards must be group, batch or none, got {scale_rewards!r}")
    return centred / (spread.clamp(min=spread_floor) + eps)


class RunningMoments:
    """Mean and standard deviation of every score seen so far: Chan's parallel update, in float64."""

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self._m2 = 0.0

    def update(self, values: Tensor) -> None:
        """Take in a batch of scores of any shape; NaN (not scored) is passed over."""
        known = values[~torch.isnan(values)].double()
        n = float(known.numel())
        if n == 0:
            return
        mean, m2 = float(known.mean()), float((known - known.mean()).square().sum())
        total, delta = self.count + n, mean - self.mean
        self._m2 += m2 + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 before two scores."""
        return float((self._m2 / (self.count - 1)) ** 0.5) if self.count > 1 else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self._m2 = state["count"], state["mean"], state["m2"]
