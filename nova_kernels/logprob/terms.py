"""What the ops of this package give."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogprobTerms(NamedTuple):
    """Each [N], 0 where the target is ignored."""

    logprobs: Tensor
    entropy: Tensor  # nats, no gradient
    kl: Tensor | None  # None without a reference
    policy_mass: Tensor | None  # no gradient; None without a reference
