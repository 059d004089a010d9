"""What the two entries of FlashAttention, torch's own and the flash-attn package's, have in common."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_WIDTH = 256


def why_not(q: Tensor, v: Tensor) -> str | None:
    """Why FlashAttention cannot run on q [T, Hq, D] and v [T, Hkv, Dv], whatever the device; None if it can."""
    tokens, _, width = q.shape
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if width % 8 or width > MAX_WIDTH:
        return f"it takes heads of width 8, 16, ..., {MAX_WIDTH}, not {width}"
    if v.shape[2] != width:
        return f"it takes values as wide as the queries, not Dv = {v.shape[2]} with D = {width}"
    return "there are no tokens" if tokens == 0 else None


def window_size(causal: bool, window: int | None) -> tuple[int, int]:
    """Tokens that are seen to the left and to the right of oneself, which does not count; -1 = all."""
    around = -1 if window is None else window - 1
    return around, 0 if causal else around


def longest(max_seqlen: int) -> int:
    """The bound on lengths that the kernel is told.

    Where it is 1, the kernels take a path for decoding, which wants exactly one token per sequence.
    """
    return max(max_seqlen, 2)


def readable(x: Tensor) -> Tensor:
    """The tensor with neighbouring elements of a head side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()
