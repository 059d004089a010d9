"""KL from logits in PyTorch: K logits of each row are gathered, and the gradient kept is theirs, [n, K].

Rows that are masked out get equal logits on both sides, whose KL and gradient are exactly 0: nothing waits for the
device to learn how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nova_kernels.lm_head import arithmetic_dtype
from nova_kernels.lm_head.rows import gather_inside, scatter_inside_
from nova_kernels.topk_kl.kept import kept_kl


def topk_kl_div(
    policy_logits: Tensor,
    ids: Tensor,
    values: Tensor,
    temperature: float,
    direction: str,
    mask: Tensor | None,
    *,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """KL [n] of logits [n, V] from a reference's ids int32 and values [n, K], and its derivative by the kept logits."""
    kept = gather_inside(policy_logits, ids).to(arithmetic_dtype(policy_logits))
    if mask is not None:
        kept, values = (x.masked_fill(~mask.unsqueeze(1), 0.0) for x in (kept, values))
    found = kept_kl(
        kept,
        values,
        temperature,
        direction,
        softcap=None,
        lse=None,
        log_mass=False,
        gradient=gradient,
        in_triton=False,
    )
    return found.kl, found.by_kept


def scatter_kept(by_kept: Tensor, upstream: Tensor, ids: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """dL/dlogits [n, V]: upstream [n] times by_kept [n, K] at ids, 0 elsewhere."""
    dense = torch.zeros(len(ids), vocabulary, dtype=dtype, device=by_kept.device)
    return scatter_inside_(dense, ids, (by_kept * upstream.unsqueeze(1)).to(dtype))
