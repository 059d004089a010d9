"""Top-K selection without sorting: find each row's K-th largest value t, then keep by comparison.

    1. t by partial sorting (numpy's partition on the CPU, torch.topk elsewhere); only its value is used.
    2. keep z >= t. If that is K entries in every row, none of them NaN or -inf, their positions in row-major order are
       the ids, ascending.
    3. Otherwise a tie crosses the threshold, or entries are missing: keep z > t, and of those equal to t (unless t is
       -inf) the first K - #(z > t). Rows with NaN go to the definition.

Exact: step 2 takes the same set as a stable sort because no row has a choice to make; step 3 makes the sort's choice.
-0 and +0 compare equal, as they must.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nova_kernels.topk_kl import reference


def topk_select(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids int32 [n, K] ascending (-1 unused) and values [n, K] of logits float32 or float64 [n, V]; see reference."""
    threshold = _kth_largest(logits, k)
    ids = _positions(logits >= threshold, k)
    if ids is not None and bool((threshold > -torch.inf).all()):
        return ids.int(), logits.gather(1, ids)
    keep = _with_ties(logits, threshold, k)
    ids = logits.new_full((len(logits), k), -1, dtype=torch.int32)
    row, column = keep.nonzero(as_tuple=True)
    ids[row, (keep.cumsum(dim=1, dtype=torch.int32) - 1)[row, column].long()] = column.int()
    values = reference.kept_logits(logits, ids)
    not_a_number = logits.isnan().any(dim=1)
    if bool(not_a_number.any()):
        ids[not_a_number], values[not_a_number] = reference.topk_select(logits[not_a_number], k)
    return ids, values


def _kth_largest(logits: Tensor, k: int) -> Tensor:
    """[n, 1]; NaN counts as the largest."""
    if logits.device.type != "cpu":
        return logits.topk(k, dim=-1).values[:, -1:]
    place = logits.shape[1] - k
    return torch.from_numpy(np.partition(logits.numpy(), place, axis=-1)[:, place : place + 1])


def _positions(keep: Tensor, k: int) -> Tensor | None:
    """Columns int64 [n, K] of the True entries of [n, V], if each row has exactly K of them, else None."""
    num_rows, vocabulary = keep.shape
    if keep.device.type == "cpu":
        flat = torch.from_numpy(np.flatnonzero(keep.numpy()))
    else:
        flat = keep.reshape(-1).nonzero().squeeze(1)
    if flat.numel() != num_rows * k:
        return None
    columns = flat.view(num_rows, k).sub_(torch.arange(num_rows, device=keep.device).unsqueeze(1) * vocabulary)
    whole = (columns[:, 0] >= 0).all() & (columns[:, -1] < vocabulary).all()
    return columns if bool(whole) else None


def _with_ties(logits: Tensor, threshold: Tensor, k: int) -> Tensor:
    above = logits > threshold
    missing = k - above.sum(dim=1, keepdim=True)
    tied = (logits == threshold) & (threshold > -torch.inf)
    return above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= missing))
