"""Kept logits by multiplying out all of the vocabulary, a block at a time (see nova_kernels.lm_head.walk).

The gradient by a block's products is K numbers of each row in a block of zeros, so that no logits are computed again.
"""

from __future__ import annotations

from torch import Tensor

from nova_kernels.backend import runs_triton
from nova_kernels.lm_head import Head, RowTerms, walk
from nova_kernels.lm_head.arithmetic import gradient_dtype, lost_in_rounding


def kept_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """h W^T [n, K] at ids int32 [n, K], 0 where an id is outside the weight's rows."""
    head = Head.prepare(weight, None, None, len(weight), hidden.dtype)
    return walk.kept_products(hidden, head, ids)


def backward(
    hidden: Tensor, weight: Tensor, ids: Tensor, by_kept: Tensor, *, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dhidden [n, H] in float32 and dL/dweight [V, H] in its dtype, from dL/d(kept logits) [n, K]."""
    head = Head.prepare(weight, None, None, len(weight), hidden.dtype)
    terms = RowTerms(maximum=None, scale=None, by_target=None, targets=None, by_kept=by_kept, ids=ids)
    found = walk.backward(
        *(hidden, head, 1.0, terms),
        weight=weight,
        bias=None,
        needed=(needs_hidden, needs_weight, False),
        in_triton=runs_triton(hidden.device, hidden.dtype),
    )
    lost = lost_in_rounding(by_kept, ids, gradient_dtype(hidden.dtype, head.sums))
    if found.hidden is not None and lost is not None and len(weight) > 0:
        found.hidden.add_(lost * weight.mean(dim=0, dtype=lost.dtype))
    return found.hidden, found.weight
