"""Heads on their way to other ranks, in plain PyTorch: gathered into one buffer, and put back.

A buffer holds one block per HeadBlock b, in their order, and nothing between them:

    block b: [t, w_b, D] = q[:, q_start:q_end] | k[:, kv_start:kv_end] | v[:, kv_start:kv_end],  w_b = hq_b + 2 hkv_b

Every query head is in exactly one block; a key head is in one or more, and those are its copies. Unpacking is the
adjoint of packing: a query head is put back where it was, the copies of a key head are summed.

With cos and sin [t, D], q and k (never v) are rotated by the token's position on the way in, x = [a, b] halves:

    y = x cos + [-b, a] sin          the adjoint: x = y cos + [d, -c],  with [c, d] = y sin in halves

The rotation and the sums are in float32 (float64 for float64), rounded once. Without k, v (the attention output, on
its way back) pass tensors of 0 heads and blocks of 0 key heads. kernels.py has the same two functions in Triton.
"""

# Shape suffixes: t = tokens of this rank, Hq and Hkv = heads of the whole model, D = head width, W = sum of w_b.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nova_kernels.ulysses.plan import HeadBlock


def pack_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[HeadBlock],
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """The send buffer.

    Args:
        q: [t, Hq, D] of any strides.
        k, v: [t, Hkv, D] of any strides, in the dtype of q; Hkv may be 0.
        blocks: which heads each block holds.
        cos, sin: [t, D] of any float dtype, both or neither; D is even.

    Returns:
        [t * W * D], in the dtype of q.
    """
    tokens, _, width = q.shape
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    buffer = q.new_empty(tokens * width * sum(block.width for block in blocks))
    for block, part in zip(blocks, _parts(buffer, blocks, tokens, width), strict=True):
        keys = slice(block.kv_start, block.kv_end)
        torch.cat([q[:, block.q_start : block.q_end], k[:, keys], v[:, keys]], dim=1, out=part)
    return buffer


def unpack_heads(
    buffer: Tensor,
    blocks: Sequence[HeadBlock],
    *,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the blocks of a buffer add up to: the adjoint of `pack_heads`.

    Args:
        buffer: [t * W * D], contiguous.
        blocks: as for `pack_heads`; together they have every query head once.
        num_tokens, num_heads, num_kv_heads, head_dim: t, Hq, Hkv, D; Hkv may be 0.
        cos, sin: as for `pack_heads`; the rotation is undone (transposed).

    Returns:
        q [t, Hq, D], k [t, Hkv, D], v [t, Hkv, D], contiguous, in the dtype of the buffer.
    """
    copied = sum(block.kv_heads for block in blocks) > num_kv_heads
    wide = torch.promote_types(buffer.dtype, torch.float32) if copied else buffer.dtype
    q = buffer.new_empty(num_tokens, num_heads, head_dim)
    k, v = (buffer.new_zeros((num_tokens, num_kv_heads, head_dim), dtype=wide) for _ in range(2))
    for block, part in zip(blocks, _parts(buffer, blocks, num_tokens, head_dim), strict=True):
        from_q, from_k, from_v = part.split([block.heads, block.kv_heads, block.kv_heads], dim=1)
        q[:, block.q_start : block.q_end] = from_q
        if copied:
            k[:, block.kv_start : block.kv_end] += from_k
            v[:, block.kv_start : block.kv_end] += from_v
        elif block.kv_heads:
            k[:, block.kv_start : block.kv_end] = from_k
            v[:, block.kv_start : block.kv_end] = from_v
    if cos is not None and sin is not None:
        q, k = rotate_back(q, cos, sin), rotate_back(k, cos, sin)
    return q, k.to(buffer.dtype), v.to(buffer.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[t, H, D] rotated by cos, sin [t, D]; in the dtype of x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide_x, cos, sin = x.to(wide), cos.to(wide)[:, None], sin.to(wide)[:, None]
    first, second = wide_x.chunk(2, dim=-1)
    return (wide_x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def rotate_back(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The adjoint of `rotate`."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    wide_y, cos, sin = y.to(wide), cos.to(wide)[:, None], sin.to(wide)[:, None]
    first, second = (wide_y * sin).chunk(2, dim=-1)
    return (wide_y * cos + torch.cat([second, -first], dim=-1)).to(y.dtype)


def _parts(buffer: Tensor, blocks: Sequence[HeadBlock], tokens: int, width: int) -> list[Tensor]:
    """The blocks of a buffer, each [t, w_b, D], as views."""
    sizes = [tokens * block.width * width for block in blocks]
    return [part.view(tokens, block.width, width) for block, part in zip(blocks, buffer.split(sizes), strict=True)]
