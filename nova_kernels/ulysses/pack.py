"""Heads on their way to other ranks, in plain PyTorch: gathered into one buffer, and put together again.

A buffer holds one block per HeadBlock b, in their order, and nothing between them. On the way to attention a block is
rows, so that what arrives is what attention reads; on the way back it is three parts, as attention's backward has them:

    packed      [t, w_b, D] = q[:, q_start:q_end] | k[:, kv_start:kv_end] | v[:, kv_start:kv_end],  w_b = hq_b + 2 hkv_b
    joined      q [t, hq_b, D], then k [t, hkv_b, D], then v [t, hkv_b, D]

Every query head is in exactly one block; a key head is in one or more, and those are its copies. But for the order in a
block, unpacking is the adjoint of packing: a query head is put back where it was, the copies of a key head are summed.

With cos and sin [t, D], q and k (never v) are rotated by the token's position on the way in, x = [a, b] halves:

    y = x cos + [-b, a] sin          the adjoint: x = y cos + [d, -c],  with [c, d] = y sin in halves

The rotation and the sums are in float32 (float64 for float64), rounded once. Without k, v (the attention output, on
its way back) pass tensors of 0 heads and blocks of 0 key heads; packed and joined are then the same. kernels.py has
pack_heads and unpack_heads in Triton.
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
    """The send buffer, packed.

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
    parts = _parts(buffer, [block.width for block in blocks], tokens, width)
    for block, part in zip(blocks, parts, strict=True):
        keys = slice(block.kv_start, block.kv_end)
        torch.cat([q[:, block.q_start : block.q_end], k[:, keys], v[:, keys]], dim=1, out=part)
    return buffer


def join_heads(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The send buffer of the way back, joined: for each rank its tokens of the first tensor, of the second, ...

    Args:
        tensors: [T, heads, D] each, tokens in the order of the ranks that hold them.
        sizes: tokens of each rank.

    Returns:
        [T * all heads * D]; a single tensor is what it is, with no copy.
    """
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    of_ranks = zip(*(x.split(list(sizes)) for x in tensors), strict=True)
    return torch.cat([part.flatten() for parts in of_ranks for part in parts])


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
    """What the blocks of a joined buffer add up to.

    Args:
        buffer: [t * W * D], contiguous.
        blocks: as for `pack_heads`; together they have every query head once.
        num_tokens, num_heads, num_kv_heads, head_dim: t, Hq, Hkv, D; Hkv may be 0.
        cos, sin: as for `pack_heads`; the rotation is undone (transposed).

    Returns:
        q [t, Hq, D], k [t, Hkv, D], v [t, Hkv, D], contiguous, in the dtype of the buffer.
    """
    heads = [many for block in blocks for many in (block.heads, block.kv_heads, block.kv_heads)]
    parts = _parts(buffer, heads, num_tokens, head_dim)
    keys = [block.kv_start for block in blocks]
    q = _side_by_side(parts[0::3], [block.q_start for block in blocks])
    k, v = (_add_up(each, keys, num_kv_heads) for each in (parts[1::3], parts[2::3]))
    if cos is not None and sin is not None:
        q, k = rotate_back(q, cos, sin), rotate_back(k, cos, sin)
    return q, k.to(buffer.dtype), v.to(buffer.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[t, H, D] rotated by cos, sin [t, D]; in the dtype of x."""
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    wide_x, cos, sin = x.to(wide), cos.to(wide)[:, None], sin.to(wide)[:, None]
    y = wide_x * cos
    y[..., :half].addcmul_(wide_x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(wide_x[..., :half], sin[..., half:])
    return y.to(x.dtype)


def rotate_back(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The adjoint of `rotate`: the other way round, by the angles of the other half."""
    return rotate(y, cos, -sin.roll(sin.shape[-1] // 2, dims=-1))


def _side_by_side(parts: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """[t, H, D] of parts [t, h, D] that begin at these heads."""
    order = sorted(range(len(parts)), key=starts.__getitem__)
    return torch.cat([parts[index] for index in order], dim=1)


def _add_up(parts: Sequence[Tensor], starts: Sequence[int], heads: int) -> Tensor:
    """The same where heads may have copies: [t, H, D], their sums."""
    if sum(part.shape[1] for part in parts) == heads:
        return _side_by_side(parts, starts)
    copies: list[list[Tensor]] = [[] for _ in range(heads)]
    for start, part in zip(starts, parts, strict=True):
        for head, copy in enumerate(part.unbind(1), start):
            copies[head].append(copy)
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    return torch.stack([sum(rest, first.to(wide)) for first, *rest in copies], dim=1)


def _parts(buffer: Tensor, heads: Sequence[int], tokens: int, width: int) -> list[Tensor]:
    """Views of a buffer one after the other, each [t, h, D]."""
    parts = buffer.split([tokens * many * width for many in heads])
    return [part.view(tokens, many, width) for many, part in zip(heads, parts, strict=True)]
