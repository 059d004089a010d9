"""Top-K selection without sorting: find each row's K-th largest value t, then keep by comparison.

    1. t by partial sorting (numpy's partition on the CPU, torch.topk elsewhere); only its value is used.
    2. candidates z >= t. If that is K entries in every row, none of them NaN or -inf, their positions in row-major
       order are the ids, ascending.
    3. Otherwise a tie crosses the threshold, or entries are missing: of the candidates keep z > t, and of those equal
       to t (unless t is -inf) the first K - #(z > t). Rows with NaN go to the definition.

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
    threshold, not_a_number = _kth_largest(logits, k)
    candidates = _positions(logits >= threshold)
    ids = _one_choice(candidates, len(logits), logits.shape[1], k)
    if ids is not None and bool((threshold > -torch.inf).all()) and not bool(not_a_number.any()):
        return ids.int(), logits.gather(1, ids)
    ids = _first_ties(logits, threshold.squeeze(1), candidates, k)
    values = reference.kept_logits(logits, ids)
    if bool(not_a_number.any()):
        ids[not_a_number], values[not_a_number] = reference.topk_select(logits[not_a_number], k)
    return ids, values


def _kth_largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[n, 1], NaN counting as the largest, and whether a row has a NaN, bool [n]."""
    if logits.device.type != "cpu":
        largest = logits.topk(k, dim=-1).values
        return largest[:, -1:], largest.isnan().any(dim=1)
    place = logits.shape[1] - k
    largest = torch.from_numpy(np.partition(logits.numpy(), place, axis=-1)[:, place:])
    return largest[:, :1], largest.isnan().any(dim=1)


def _positions(keep: Tensor) -> Tensor:
    """Places int64 of the True entries of [n, V], in row-major order."""
    if keep.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(keep.numpy()))
    return keep.reshape(-1).nonzero().squeeze(1)


def _one_choice(candidates: Tensor, num_rows: int, vocabulary: int, k: int) -> Tensor | None:
    """Columns int64 [n, K] of the candidates, if each row has exactly K of them, else None."""
    if candidates.numel() != num_rows * k:
        return None
    rows = torch.arange(num_rows, device=candidates.device).unsqueeze(1)
    columns = candidates.view(num_rows, k) - rows * vocabulary
    whole = (columns[:, 0] >= 0).all() & (columns[:, -1] < vocabulary).all()
    return columns if bool(whole) else None


def _first_ties(logits: Tensor, threshold: Tensor, candidates: Tensor, k: int) -> Tensor:
    """ids int32 [n, K]: the candidates above the threshold [n], and as many of those equal to it as are missing."""
    num_rows, vocabulary = logits.shape
    row = candidates // vocabulary
    tied = logits.reshape(-1)[candidates] == threshold[row]
    above = torch.bincount(row[~tied], minlength=num_rows)
    wanted = (k - above) * (threshold > -torch.inf)  # ties that are kept; entries of -inf never are
    keep = ~tied | (_rank_in_row(tied, row, num_rows) < wanted[row])
    candidates, row = candidates[keep], row[keep]
    ids = torch.full((num_rows, k), -1, dtype=torch.int32, device=logits.device)
    ids[row, _rank_in_row(torch.ones_like(row), row, num_rows)] = (candidates - row * vocabulary).int()
    return ids


def _rank_in_row(counted: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """How many counted entries come before each one in its row; `row` int64 [m] ascends."""
    before = counted.cumsum(0) - counted.long()
    starts = torch.searchsorted(row, torch.arange(num_rows, device=row.device))
    padded = torch.cat([before, before.new_zeros(1)])  # a row without entries may start past the last one
    return before - padded[starts][row]
