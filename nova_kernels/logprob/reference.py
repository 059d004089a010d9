"""Log-probability of a given token and the entropy, as defined.

log p(t) = z_t - log sum_v exp z_v            entropy = - sum_v p(v) log p(v)
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of `targets` int64 [N] under logits [N, V] (over the temperature), and entropies [N]."""
    log_p = torch.log_softmax(logits, dim=-1)
    logprobs = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(dim=-1)
    return logprobs, entropy
