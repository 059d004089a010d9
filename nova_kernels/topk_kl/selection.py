"""Selection from logits that are already there, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.topk_kl.entries import TopK

Select = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # logits [n, V], k -> ids int32 and values [n, K]


@torch.no_grad()
def select_blocks(logits: Tensor, k: int, *, temperature: float, select: Select) -> TopK:
    """Top-K of [..., V] in float32 (float64 for float64), without a second copy of all of it."""
    *rows, vocabulary = logits.shape
    flat = logits.reshape(-1, vocabulary)
    dtype = lm_head.arithmetic_dtype(logits)
    ids = torch.empty(len(flat), k, dtype=torch.int32, device=flat.device)
    values = torch.empty(len(flat), k, dtype=dtype, device=flat.device)
    lse = torch.empty(len(flat), dtype=dtype, device=flat.device)
    for part in lm_head.chunks(len(flat), lm_head.chunk_rows(vocabulary, flat.device)):
        block = flat[part].to(dtype)
        ids[part], values[part] = select(block, k)
        lse[part] = (block / temperature).logsumexp(dim=-1)
    return TopK(ids=ids, values=values, lse=lse, temperature=temperature).reshape(*rows)
