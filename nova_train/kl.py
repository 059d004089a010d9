"""Where the KL penalty of eq. (2) goes: the token-level reward, the loss, or both.

The report keeps the KL inside the token-level reward:  r_{i,t} = A_i [t = T_i] - beta KL_{i,t}. An exact KL over the
vocabulary at step t is a function of the prefix only. As a detached reward credited to the token drawn at t it is a
constant under the expectation: its own gradient is lost. The gradient of E[sum_t KL_t] has two parts,

    d/dtheta E[sum_t KL_t] = E[ sum_t dKL_t/dtheta  +  sum_t (sum_{u > t} KL_u) d log pi(a_t)/dtheta ]

    split    loss gets beta KL_t (differentiable); the advantage gets -beta sum_{u > t} KL_u (detached)      exact
    reward   the advantage gets -beta sum_{u >= t} KL_u (detached), the loss nothing             the literal reading
    loss     the loss gets beta KL_t, the advantage nothing

tests/test_kl.py enumerates a tabular policy and compares each with the true gradient.
"""

from __future__ import annotations

from torch import Tensor

PLACEMENTS = ("split", "reward", "loss")


def kl_to_go(kl: Tensor, lengths: Tensor, *, include_present: bool) -> Tensor:
    """Sum of the KL at later tokens of the same answer; kl [T] of answers laid end to end, lengths int64 [S].

    `include_present` adds the token's own KL (u >= t instead of u > t). Detached; same dtype as `kl`.
    """
    fixed = kl.detach()
    if fixed.numel() == 0:
        return fixed
    total = fixed.double().cumsum(0)  # double: the sum of a whole row is subtracted again
    through_end = total[lengths.cumsum(0) - 1].repeat_interleave(lengths)
    later = (through_end - total).to(fixed.dtype)
    return later + fixed if include_present else later


def token_advantages(advantages: Tensor, kl: Tensor, lengths: Tensor, *, beta: float, placement: str) -> Tensor:
    """Advantage of every response token: the answer's advantage [S] spread over its tokens, less beta times KL-to-go.

    Args:
        advantages: [S], one per answer.
        kl: [T] exact KL at each response token, answers laid end to end.
        lengths: int64 [S], response tokens of each answer; sums to T.
        beta: weight of the KL penalty of eq. (2).
        placement: "split", "reward" or "loss" (see the head of this file).
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"kl_placement must be one of {PLACEMENTS}, got {placement!r}")
    lengths = lengths.to(kl.device)
    spread = advantages.to(kl).repeat_interleave(lengths)
    if placement == "loss" or beta == 0.0:
        return spread
    return spread - beta * kl_to_go(kl, lengths, include_present=placement == "reward")


def kl_in_loss(placement: str) -> bool:
    """Whether the present token's KL enters the loss as a differentiable term."""
    if placement not in PLACEMENTS:
        raise ValueError(f"kl_placement must be one of {PLACEMENTS}, got {placement!r}")
    return placement != "reward"
