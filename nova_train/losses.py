"""The losses of the report, as pure functions of tensors: per item, never reduced.

Reward model, eq. (1):   -log sigmoid(r_w - r_l) + alpha [(r_w - s_w)^2 + (r_l - s_l)^2]
Policy (GRPO, PPO):      -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A),   rho = exp(log pi - log pi_old)

Whoever calls them sums, and the loop divides each sum by its global count: nothing here takes a mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nova_kernels.packing import IGNORE_INDEX

# exp(20) is far outside any clip range: the clamp only keeps an overflow from becoming inf * 0 = nan.
_MAX_LOG_RATIO = 20.0


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l) per pair; scores [pairs] -> [pairs]. Equation (1), first term."""
    return F.softplus(rejected - chosen)


def score_error(rewards: Tensor, scores: Tensor) -> Tensor:
    """(r - s)^2 per response, 0 (and no gradient) where the absolute score s is NaN, i.e. absent; [n] -> [n]."""
    known = ~torch.isnan(scores)
    error = rewards - torch.where(known, scores, torch.zeros_like(scores))
    return torch.where(known, error.square(), torch.zeros_like(error))


def next_token_targets(labels: Tensor) -> Tensor:
    """Unshifted labels [1, T] of a packed row -> what each position predicts, [T]; the last predicts nothing (-100).

    No position predicts the next sample's first token, because that token's label is -100 (`pack_samples`).
    """
    return torch.cat([labels[0, 1:], labels.new_full((1,), IGNORE_INDEX)])


def predicted_tokens(hidden: Tensor, labels: Tensor, own: slice | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states [R, H] of a packed row where they predict a trained token, and those tokens int64 [R].

    Labels [1, T] of a batch stay on the CPU: no GPU is waited for to know how many there are.

    Args:
        hidden: [t, H], of the tokens `own` of the row; None: of all.
        labels: [1, T] of the whole row: the token behind a rank's last one is another rank's.
    """
    targets = next_token_targets(labels)
    targets = targets if own is None else targets[own]
    places = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return hidden.index_select(0, places.to(hidden.device)), targets[places].to(hidden.device)


def own_predictions(labels: Tensor, own: slice) -> slice:
    """Of the R predictions of a whole row [1, T], in order, those that its tokens `own` make."""
    trained = next_token_targets(labels) != IGNORE_INDEX
    first = int(trained[: own.start].sum()) if own.start else 0
    return slice(first, first + int(trained[own].sum()))


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Per-token terms of the clipped policy loss, all [n]."""

    loss: Tensor
    ratio: Tensor  # rho, no gradient
    clipped_low: Tensor  # bool: A < 0 and rho < 1 - eps_low, where the clip removes the gradient
    clipped_high: Tensor  # bool: A > 0 and rho > 1 + eps_high


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None = None
) -> PolicyLoss:
    """-min(rho A, clip(rho) A) per token, all arguments [n]; gradient flows through `logprobs` only."""
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = torch.exp((logprobs - old_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    bounded = ratio.clamp(1 - epsilon, 1 + high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    fixed = ratio.detach()
    return PolicyLoss(
        loss=loss,
        ratio=fixed,
        clipped_low=(fixed < 1 - epsilon) & (advantages < 0),
        clipped_high=(fixed > 1 + high) & (advantages > 0),
    )
