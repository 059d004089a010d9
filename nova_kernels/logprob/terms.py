"""What the ops of this package are asked for, and what they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.topk_kl.dense import KLOptions


class LogprobTerms(NamedTuple):
    """Each [N], 0 where the target is ignored."""

    logprobs: Tensor
    entropy: Tensor  # nats, no gradient
    kl: Tensor | None  # None without a reference
    policy_mass: Tensor | None  # no gradient; None without a reference


class Terms(NamedTuple):
    """LogprobTerms, each None where it was not asked for."""

    logprobs: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    policy_mass: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is asked for, beside the tensors that take gradients."""

    targets: Tensor  # int64 [n], of the rows that count
    rows: Tensor | None  # int64 [n], the rows that count; None: all
    temperature: float
    entropy: bool
    kl: KLOptions | None  # for the same rows
    gradient: bool  # keep what the backward needs


def kept_targets(
    where: str, hidden: Tensor, targets: Tensor, vocabulary: int, ignore_index: int
) -> tuple[Tensor | None, Tensor]:
    """Rows int64 [n] whose target is not ignored (None: all) and their targets; refuses targets that do not fit."""
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{where}: expected targets int64 [N] = [{hidden.shape[0]}], got {targets.dtype} {list(targets.shape)}"
        )
    rows = lm_head.kept_rows(targets != ignore_index)
    kept = lm_head.take(targets, rows, slice(None))
    if kept.numel() == 0:
        return rows, kept
    lowest, highest = kept.aminmax()
    if kept.device.type != "cpu":
        inside = (lowest >= 0) & (highest < vocabulary)
        torch._assert_async(inside, f"{where}: a target is outside the vocabulary and is not {ignore_index}")
    elif int(lowest) < 0 or int(highest) >= vocabulary:
        wrong = int(lowest) if int(lowest) < 0 else int(highest)
        raise ValueError(
            f"{where}: target {wrong} is outside the vocabulary of {vocabulary}; rows to skip bear {ignore_index}"
        )
    return rows, kept
