"""pack.py in Triton: every head is read once and written to all its places, or read from all of them and written once.

A head (of q, k or v) has a place in each block that holds it: one for a query head, as many as there are copies for a
key or value head. Two small int32 tables, made once per plan, say where:

    bounds[h], bounds[h + 1]     rows of `places` that belong to head h, counted through q, k and v
    places[c] = (first, j, w)    heads of all parts before this one, place in the part, heads of the part

A part is [t, w, D]: a whole block where blocks are packed, q, k or v of one where they are joined.

    buffer[t first D + (i w + j) D + d]  <->  head h of token i, element d

pack_heads      x from q, k or v, any strides; rotated if there are angles; written to each place
unpack_heads    sum over the places in float32, in the order of the blocks; rotated back; rounded once

Both are bound by memory. Bytes, with e bytes per element, W = sum of the blocks' widths:

    t D e (Hq + 2 Hkv + W)       + 2 t D e' for cos and sin of e' bytes

    bfloat16, D = 128, Hq = 64, Hkv = 8, T = 16,384, at the 4.3 TB/s of an H200:
    P = 2     t = 8192    336 MB   0.078 ms
    P = 8     t = 2048     84 MB   0.020 ms
    P = 16    t = 1024     46 MB   0.011 ms     two copies of each key head: W = 96 instead of 80

A program has HEADS heads of TOKENS tokens, 16 KB: its loads and stores are 16 bytes a thread where D is a multiple of
16 and strides are, and the angles are read once for its heads. A head is two tiles, one for each half of D, since that
is how a rotation pairs elements; packing without one copies them as they are. Neighbouring programs have
neighbouring heads of the same tokens, so that what is read at a time lies together. Not yet measured on a GPU.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.ulysses.plan import HeadBlock

HEADS = 4  # of a program
TILE_BYTES = 2048  # half a head's elements of a program's tokens: 16 for each thread
NUM_WARPS = 4


@triton.jit
def head_rows(
    q, k, v, head, q_heads, kv_heads, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head,
):  # fmt: skip
    """Where head number `head` of the tokens begins: [TOKENS, 1]."""
    if head < q_heads:
        rows = q + (head.to(tl.int64) * q_head + tokens * q_token)
    elif head < q_heads + kv_heads:
        rows = k + ((head - q_heads).to(tl.int64) * k_head + tokens * k_token)
    else:
        rows = v + ((head - q_heads - kv_heads).to(tl.int64) * v_head + tokens * v_token)
    return rows


@triton.jit
def part_rows(buffer, places, copy, num_tokens, tokens, D: tl.constexpr):
    """Where a head's place in the buffer begins, for the tokens: [TOKENS, 1]."""
    first = tl.load(places + 3 * copy).to(tl.int64)
    place = tl.load(places + 3 * copy + 1)
    width = tl.load(places + 3 * copy + 2)
    return buffer + (first * num_tokens + place + tokens * width) * D


@triton.jit
def halves(rows, lower, upper, HALF: tl.constexpr):
    """The tiles of both halves; 0 where nothing is."""
    return tl.load(rows, mask=lower, other=0.0), tl.load(rows + HALF, mask=upper, other=0.0)


@triton.jit
def store_halves(rows, a, b, lower, upper, HALF: tl.constexpr):
    """Write both, rounded to what is there."""
    tl.store(rows, a.to(rows.dtype.element_ty), mask=lower)
    tl.store(rows + HALF, b.to(rows.dtype.element_ty), mask=upper)


@triton.jit
def here(num_tokens, groups, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """The tokens [TOKENS, 1] and columns [1, BLOCK] of this program, and which of them exist in either half."""
    tokens = ((tl.program_id(0) // groups) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    lower = (tokens < num_tokens) & (columns < HALF)
    return tokens, columns, lower, lower & (columns + HALF < D)


@triton.jit
def turn(a, b, cos_a, cos_b, sin_a, sin_b, SUM: tl.constexpr):
    """[a, b] cos + [-b, a] sin, in SUM."""
    a, b = a.to(SUM), b.to(SUM)
    return a * cos_a.to(SUM) - b * sin_a.to(SUM), b * cos_b.to(SUM) + a * sin_b.to(SUM)


@triton.jit
def _pack(
    q, k, v, q_token, q_head, k_token, k_head, v_token, v_head,
    buffer, bounds, places, num_tokens, q_heads, kv_heads, cos, sin, cos_token, sin_token,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(q_heads + 2 * kv_heads, HEADS)
    tokens, columns, lower, upper = here(num_tokens, groups, D, HALF, BLOCK, TOKENS)
    if cos is not None:
        cos_a, cos_b = halves(cos + (tokens * cos_token + columns), lower, upper, HALF)
        sin_a, sin_b = halves(sin + (tokens * sin_token + columns), lower, upper, HALF)
    for number in tl.static_range(HEADS):
        head = (tl.program_id(0) % groups) * HEADS + number
        if head < q_heads + 2 * kv_heads:
            begin, end = tl.load(bounds + head), tl.load(bounds + head + 1)
            if begin < end:
                x = head_rows(q, k, v, head, q_heads, kv_heads, tokens,
                              q_token, q_head, k_token, k_head, v_token, v_head) + columns  # fmt: skip
                a, b = halves(x, lower, upper, HALF)
                if cos is not None:  # noqa: SIM102  one is known when it is compiled, the other is not
                    if head < q_heads + kv_heads:
                        c, d = turn(a, b, cos_a, cos_b, sin_a, sin_b, SUM)
                        a, b = c.to(a.dtype), d.to(b.dtype)
                for copy in range(begin, end):
                    y = part_rows(buffer, places, copy, num_tokens, tokens, D) + columns
                    store_halves(y, a, b, lower, upper, HALF)


@triton.jit
def _unpack(
    q, k, v, q_token, q_head, k_token, k_head, v_token, v_head,
    buffer, bounds, places, num_tokens, q_heads, kv_heads, cos, sin, cos_token, sin_token,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(q_heads + 2 * kv_heads, HEADS)
    tokens, columns, lower, upper = here(num_tokens, groups, D, HALF, BLOCK, TOKENS)
    if cos is not None:
        cos_a, cos_b = halves(cos + (tokens * cos_token + columns), lower, upper, HALF)
        sin_a, sin_b = halves(sin + (tokens * sin_token + columns), lower, upper, HALF)
    for number in tl.static_range(HEADS):
        head = (tl.program_id(0) % groups) * HEADS + number
        if head < q_heads + 2 * kv_heads:
            a = tl.zeros([TOKENS, BLOCK], dtype=SUM)
            b = tl.zeros([TOKENS, BLOCK], dtype=SUM)
            for copy in range(tl.load(bounds + head), tl.load(bounds + head + 1)):
                y = part_rows(buffer, places, copy, num_tokens, tokens, D) + columns
                more_a, more_b = halves(y, lower, upper, HALF)
                a += more_a.to(SUM)
                b += more_b.to(SUM)
            if cos is not None:  # noqa: SIM102  one is known when it is compiled, the other is not
                if head < q_heads + kv_heads:  # transposed: back, by the sine of the other half
                    a, b = turn(a, b, cos_a, cos_b, -sin_b.to(SUM), -sin_a.to(SUM), SUM)
            x = head_rows(q, k, v, head, q_heads, kv_heads, tokens,
                          q_token, q_head, k_token, k_head, v_token, v_head) + columns  # fmt: skip
            store_halves(x, a, b, lower, upper, HALF)


def pack_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[HeadBlock],
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """As pack.pack_heads. Inputs whose elements of a head are not side by side are copied first.

    Raises:
        ValueError: a rotation of heads of odd width.
    """
    tokens, _, width = q.shape
    buffer = q.new_empty(tokens * width * sum(block.width for block in blocks))
    _launch(_pack, q, k, v, buffer, blocks, cos, sin)
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
    """As pack.unpack_heads.

    Raises:
        ValueError: a rotation of heads of odd width.
    """
    q = buffer.new_empty(num_tokens, num_heads, head_dim)
    k, v = (buffer.new_empty(num_tokens, num_kv_heads, head_dim) for _ in range(2))
    _launch(_unpack, q, k, v, buffer.contiguous(), blocks, cos, sin)
    return q, k, v


def _launch(
    kernel, q: Tensor, k: Tensor, v: Tensor, buffer: Tensor, blocks: Sequence[HeadBlock],
    cos: Tensor | None, sin: Tensor | None,
) -> None:  # fmt: skip
    """Move the heads from q, k, v to the buffer, or back."""
    (tokens, q_heads, width), kv_heads = q.shape, k.shape[1]
    if cos is None or sin is None:
        cos = sin = None
    elif width % 2:
        raise ValueError(f"pack_heads: a rotation pairs the halves of a head, which an odd width {width} does not have")
    else:
        cos, sin = _readable(cos), _readable(sin)
    if tokens * width * (q_heads + kv_heads) == 0:
        return
    q, k, v = (_readable(x) for x in (q, k, v))
    half = -(-width // 2)
    columns = triton.next_power_of_2(half)
    rows = max(1, TILE_BYTES // (columns * q.element_size()))
    rows = min(rows, triton.next_power_of_2(tokens))
    groups = triton.cdiv(q_heads + 2 * kv_heads, HEADS)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    angles = (cos, sin, *(None if x is None else x.stride(0) for x in (cos, sin)))
    with torch.cuda.device_of(q):
        bounds, places = _tables(tuple(blocks), q_heads, kv_heads, q.device, joined=kernel is _unpack)
        kernel[(triton.cdiv(tokens, rows) * groups,)](
            q, k, v, *strides, buffer, bounds, places, tokens, q_heads, kv_heads, *angles,
            D=width, HALF=half, BLOCK=columns, TOKENS=rows, HEADS=HEADS,
            SUM=tl.float64 if q.dtype == torch.float64 else tl.float32, num_warps=NUM_WARPS,
        )  # fmt: skip


@lru_cache(maxsize=256)
def _tables(
    blocks: tuple[HeadBlock, ...], num_heads: int, num_kv_heads: int, device: torch.device, *, joined: bool
) -> tuple[Tensor, Tensor]:
    """bounds int32 [Hq + 2 Hkv + 1] and places int32 [W, 3], as at the top; the copy to the device is made once."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(num_heads + 2 * num_kv_heads)]
    first = 0
    for block in blocks:
        keys = range(num_heads + block.kv_start, num_heads + block.kv_end)
        parts = [[*range(block.q_start, block.q_end)], [*keys], [key + num_kv_heads for key in keys]]
        for part in parts if joined else [[*chain(*parts)]]:
            for place, head in enumerate(part):
                found[head].append((first, place, len(part)))
            first += len(part)
    bounds = [0, *accumulate(map(len, found))]
    places = [place for head in found for place in head]
    return tuple(torch.tensor(table, dtype=torch.int32, device=device) for table in (bounds, places))  # type: ignore


def _readable(x: Tensor) -> Tensor:
    """The elements of a head, or the angles of a token, side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
