"""Targets: which rows count, and that they are in the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from nova_kernels.lm_head import kept_rows


def check_shape(where: str, hidden: Tensor, targets: Tensor) -> None:
    """Refuse targets that are not int64 [N]."""
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{where}: expected targets int64 [N] = [{hidden.shape[0]}], got {targets.dtype} {list(targets.shape)}"
        )


def counted_rows(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """Rows int64 [n] whose target is not `ignore_index` (None: all, as where nothing is to be ignored)."""
    return None if ignore_index is None else kept_rows(targets != ignore_index)


def check_targets(targets: Tensor, end: int | Tensor, ignore_index: int | None) -> None:
    """Targets [n] of rows that count, outside the vocabulary: an error on the CPU, an asynchronous one elsewhere."""
    if targets.numel() == 0:
        return
    lowest, highest = targets.aminmax()
    if targets.device.type != "cpu":
        inside = (lowest >= 0) & (highest < end)
        torch._assert_async(inside, f"linear_logprobs: a target is outside the vocabulary and is not {ignore_index}")
    elif int(lowest) < 0 or int(highest) >= int(end):
        wrong = int(lowest) if int(lowest) < 0 else int(highest)
        skipped = "" if ignore_index is None else f"; rows to skip bear {ignore_index}"
        raise ValueError(f"linear_logprobs: target {wrong} is outside the vocabulary of {int(end)}{skipped}")
