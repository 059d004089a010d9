"""What a block of logits gives row by row, and the gradient by its entries, in PyTorch.

With y a block [n, V] of products h W^T, z = softcap(y + b) and temperature T:

    row_stats      m = max z/T    s = sum exp(z/T - m)    w = sum exp(z/T - m) (z/T - m)    z/T at a target, y at ids
    row_gradient   dL/dy = slope (scale exp(z/T - m) + [v = target] by_target) + [v in ids] by_kept

    log-sum-exp = m + log s       entropy = log s - w / s       slope = 1 - (z/c)^2 under a softcap c, else 1

m, s and w of two parts of a vocabulary give those of the whole (`nova_kernels.lm_head.parallel`), so a target or an id
may lie outside the block: it then gives 0 and takes no gradient. nova_kernels.lm_head.triton has the same functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nova_kernels.lm_head.head import Head, softcap_slope


class RowStats(NamedTuple):
    """Of each row of a block."""

    maximum: Tensor  # m [n], -inf where there is no entry above it
    total: Tensor  # s [n]
    weighted: Tensor  # w [n]; left at 0 where it was not asked for
    target: Tensor | None  # [n], z/T
    kept: Tensor | None  # [n, K], y


def log_sum_exp(stats: RowStats) -> Tensor:
    """m + log s [n]."""
    return stats.maximum + stats.total.log()


class RowTerms(NamedTuple):
    """What the gradient of each row is made of; see the equations above."""

    maximum: Tensor | None  # [n], finite
    scale: Tensor | None  # [n]; None: the softmax has no part in it, and no logits are needed
    by_target: Tensor | None  # [n]
    targets: Tensor | None  # int64 [n]
    by_kept: Tensor | None  # [n, K]
    ids: Tensor | None  # int32 [n, K]

    def part(self, rows: slice) -> RowTerms:
        """Those of some rows."""
        return RowTerms(*(None if term is None else term[rows] for term in self))

    def columns(self, start: int) -> RowTerms:
        """With targets and ids counted from a block's first column."""
        targets, ids = (None if x is None else x - start for x in (self.targets, self.ids))
        return self if start == 0 else self._replace(targets=targets, ids=ids)


def _all_inside(columns: Tensor, width: int) -> bool:
    """Whether all columns int [n, K] are in [0, width), if the host can know without waiting."""
    if columns.device.type != "cpu" or columns.numel() == 0:
        return False
    lowest, highest = columns.aminmax()
    return int(lowest) >= 0 and int(highest) < width


def gather_inside(values: Tensor, columns: Tensor) -> Tensor:
    """values [n, V] at columns int [n, K], 0 at columns outside it."""
    if values.shape[1] == 0:
        return values.new_zeros(columns.shape)
    if _all_inside(columns, values.shape[1]):
        return values.gather(1, columns.long())
    inside = (columns >= 0) & (columns < values.shape[1])
    return values.gather(1, columns.where(inside, 0).long()).where(inside, 0.0)


def scatter_inside_(values: Tensor, columns: Tensor, added: Tensor) -> Tensor:
    """Add `added` [n, K] to values [n, V] at columns int [n, K], unless they are outside it."""
    if values.shape[1] == 0:
        return values
    if _all_inside(columns, values.shape[1]):
        return values.scatter_add_(1, columns.long(), added)
    inside = (columns >= 0) & (columns < values.shape[1])
    return values.scatter_add_(1, columns.where(inside, 0).long(), added.where(inside, 0.0))


def row_stats(
    products: Tensor,
    head: Head,
    temperature: float,
    targets: Tensor | None,
    ids: Tensor | None,
    *,
    entropy: bool,
    exponentials: Tensor,
) -> RowStats:
    """Overwrites products [n, V] and fills `exponentials` [n, V] with exp(z/T - m). `entropy`: whether w is wanted."""
    kept = None if ids is None else gather_inside(products, ids)
    logits = head.logits_(products)
    if temperature != 1.0:
        logits.div_(temperature)
    target = None if targets is None else gather_inside(logits, targets.unsqueeze(1)).squeeze(1)
    if logits.shape[1] == 0:
        nothing = logits.new_zeros(len(logits))
        return RowStats(torch.full_like(nothing, -torch.inf), nothing, nothing, target, kept)
    maximum = logits.amax(dim=-1)
    torch.exp(logits.sub_(finite(maximum).unsqueeze(1)), out=exponentials)
    total = exponentials.sum(dim=-1)
    if not entropy:
        return RowStats(maximum, total, torch.zeros_like(total), target, kept)
    logits.clamp_(min=torch.finfo(logits.dtype).min)  # 0 * -inf is not 0
    return RowStats(maximum, total, logits.mul_(exponentials).sum(dim=-1), target, kept)


def row_gradient(products: Tensor, head: Head, temperature: float, terms: RowTerms) -> Tensor:
    """dL/d(h W^T) [n, V] in the memory of `products`; targets and ids are counted from the block's first column."""
    if terms.scale is None or terms.maximum is None:
        return add_entries_(products.zero_(), None, terms)
    out = head.logits_(products)
    slope = None if head.softcap is None else softcap_slope(out, head.softcap)
    if temperature != 1.0:
        out.div_(temperature)
    out.sub_(terms.maximum.unsqueeze(1)).exp_().mul_(terms.scale.unsqueeze(1))
    return add_entries_(out, slope, terms)


def add_entries_(out: Tensor, slope: Tensor | None, terms: RowTerms) -> Tensor:
    """scale exp(z/T - m) [n, V] completed by its target and kept entries, in its memory."""
    if terms.by_target is not None and terms.targets is not None:
        scatter_inside_(out, terms.targets.unsqueeze(1), terms.by_target.unsqueeze(1))
    if slope is not None:
        out.mul_(slope)
    if terms.by_kept is not None and terms.ids is not None:
        scatter_inside_(out, terms.ids, terms.by_kept)
    return out


def finite(maximum: Tensor) -> Tensor:
    """The maximum [n], but 0 where a row has no entry above -inf: -inf - -inf is not a number."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)
