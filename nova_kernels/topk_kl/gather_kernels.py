"""Triton kernels of gather.py, and their launches: a sampled dense-dense product and its two gradients.

    _kept             a program per token and block of slots: walks H, K_BLOCK rows of W side by side
    _hidden_gradient  a program per token and block of H: walks the K slots
    _weight_gradient  a program per vocabulary row and block of H: walks the row's pairs (n, k), sorted by token

Rows are read coalesced, H_BLOCK neighbours at a time, and upcast on load; sums are float32, float64 if an input is.
Every output element belongs to one program and is written once: no atomics, the same bits every time.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.lm_head import arithmetic_dtype

K_BLOCK = 16  # rows of W, or pairs, that a program has in flight
H_BLOCK = 256
NUM_WARPS = 4


@triton.jit
def _kept(
    hidden_ptr,
    weight_ptr,
    ids_ptr,
    kept_ptr,
    K,
    H,
    hidden_stride,
    weight_stride,
    SUM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * K_BLOCK + tl.arange(0, K_BLOCK)
    ids = tl.load(ids_ptr + token * K + slots, mask=slots < K, other=-1)
    rows = weight_ptr + ids.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros([K_BLOCK, H_BLOCK], dtype=SUM)
    for start in range(0, H, H_BLOCK):
        columns = start + tl.arange(0, H_BLOCK)
        inside = columns < H
        hidden = tl.load(hidden_ptr + token * hidden_stride + columns, mask=inside, other=0.0).to(SUM)
        weight = tl.load(rows + columns[None, :], mask=(ids >= 0)[:, None] & inside[None, :], other=0.0).to(SUM)
        total += weight * hidden[None, :]
    tl.store(kept_ptr + token * K + slots, tl.sum(total, axis=1), mask=slots < K)


@triton.jit
def _hidden_gradient(
    weight_ptr,
    ids_ptr,
    by_kept_ptr,
    dhidden_ptr,
    K,
    H,
    weight_stride,
    SUM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    inside = columns < H
    total = tl.zeros([K_BLOCK, H_BLOCK], dtype=SUM)
    for start in range(0, K, K_BLOCK):
        slots = start + tl.arange(0, K_BLOCK)
        ids = tl.load(ids_ptr + token * K + slots, mask=slots < K, other=-1)
        by_kept = tl.load(by_kept_ptr + token * K + slots, mask=ids >= 0, other=0.0).to(SUM)
        rows = weight_ptr + ids.to(tl.int64)[:, None] * weight_stride + columns[None, :]
        weight = tl.load(rows, mask=(ids >= 0)[:, None] & inside[None, :], other=0.0).to(SUM)
        total += by_kept[:, None] * weight
    tl.store(dhidden_ptr + token * H + columns, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _weight_gradient(
    hidden_ptr,
    by_kept_ptr,
    order_ptr,
    starts_ptr,
    dweight_ptr,
    K,
    H,
    hidden_stride,
    SUM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    inside = columns < H
    place = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1)
    total = tl.zeros([K_BLOCK, H_BLOCK], dtype=SUM)
    while place < end:
        pairs = place + tl.arange(0, K_BLOCK)
        flat = tl.load(order_ptr + pairs, mask=pairs < end, other=0)
        by_kept = tl.load(by_kept_ptr + flat, mask=pairs < end, other=0.0).to(SUM)
        tokens = hidden_ptr + (flat // K)[:, None] * hidden_stride + columns[None, :]
        hidden = tl.load(tokens, mask=(pairs < end)[:, None] & inside[None, :], other=0.0).to(SUM)
        total += by_kept[:, None] * hidden
        place += K_BLOCK
    summed = tl.sum(total, axis=0).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + row * H + columns, summed, mask=inside)


def kept_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """As gather.kept_logits."""
    dtype = arithmetic_dtype(hidden, weight)
    hidden, weight, ids = _unit_rows(hidden), _unit_rows(weight), ids.contiguous()
    kept = hidden.new_empty(ids.shape, dtype=dtype)
    (num_tokens, num_slots), width = ids.shape, weight.shape[1]
    if kept.numel():
        blocks = _blocks(num_slots, width)
        grid = (num_tokens, triton.cdiv(num_slots, blocks["K_BLOCK"]))
        strides = hidden.stride(0), weight.stride(0)
        _kept[grid](hidden, weight, ids, kept, num_slots, width, *strides, SUM=_triton(dtype), **blocks)
    return kept


def hidden_gradient(hidden: Tensor, weight: Tensor, ids: Tensor, by_kept: Tensor) -> Tensor:
    """dhidden of gather.backward."""
    dtype = arithmetic_dtype(hidden, weight)
    weight, ids, by_kept = _unit_rows(weight), ids.contiguous(), by_kept.contiguous()
    (num_tokens, num_slots), width = ids.shape, weight.shape[1]
    dhidden = hidden.new_empty(num_tokens, width, dtype=dtype)
    if dhidden.numel():
        blocks = _blocks(num_slots, width)
        grid = (num_tokens, triton.cdiv(width, blocks["H_BLOCK"]))
        args = (weight, ids, by_kept, dhidden, num_slots, width, weight.stride(0))
        _hidden_gradient[grid](*args, SUM=_triton(dtype), **blocks)
    return dhidden


def weight_gradient(hidden: Tensor, weight: Tensor, by_kept: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """dweight of gather.backward, from by_kept [N, K] and gather.sorted_pairs."""
    hidden, by_kept = _unit_rows(hidden), by_kept.contiguous()
    dweight = weight.new_empty(weight.shape)
    vocabulary, width = weight.shape
    if dweight.numel():
        blocks = _blocks(by_kept.numel(), width)
        grid = (vocabulary, triton.cdiv(width, blocks["H_BLOCK"]))
        args = (hidden, by_kept, order, starts, dweight, max(1, by_kept.shape[1]), width, hidden.stride(0))
        _weight_gradient[grid](*args, SUM=_triton(arithmetic_dtype(hidden, weight)), **blocks)
    return dweight


def _unit_rows(matrix: Tensor) -> Tensor:
    """Neighbours of a row next to each other in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _triton(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _blocks(rows: int, width: int) -> dict[str, int]:
    """Sizes of a launch: not larger than the rows and columns there are."""
    return {
        "K_BLOCK": min(K_BLOCK, triton.next_power_of_2(max(1, rows))),
        "H_BLOCK": min(H_BLOCK, triton.next_power_of_2(width)),
        "num_warps": NUM_WARPS,
    }
