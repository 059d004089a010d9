"""Row kernels over a block of products y = h W^T, in Triton: statistics of softmax rows, and their gradient.

    z = y + b, or c tanh((y + b) / c) under a softcap c        x = z / T

    row_stats       one read of the block: maximum m = max x, total = sum exp(x - m), weighted = sum exp(x - m) (x - m),
                    the target's x, and y at the kept ids
    row_gradient    one read, one write: slope (scale exp(x - maximum) + [v = target] by_target) + scattered by_kept

A row's columns are cut into ranges of COLUMNS, so that few long rows fill a GPU as well as many short ones do, and a
second small kernel merges the ranges. The cut depends on nothing but the vocabulary: a row's results are the same bits
whatever rows it is computed with. `row_gradient` may write over the products: its few special entries are computed
before that, into a buffer [n, K + 1], and put in their places after.

Blocks may be shards of a vocabulary: targets and ids outside [0, V) count for nothing, and RowStats of shards merge to
those of the whole as the ranges do (see triton_kernels).
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nova_kernels.lm_head.rows import RowStats

COLUMNS = 16384  # of a row, for one program of `partial_stats`
TILE, LANES = 4, 1024  # columns at once: with 8 warps, four 16-byte loads per thread in flight
DENSE_BLOCK = 4096  # columns of one program of `dense_gradient`
ENTRIES_BLOCK = 512  # ids at once
WIDE, NARROW = 8, 4  # warps of programs that walk columns, and of those that walk ids


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return importlib.import_module("nova_kernels.lm_head.triton_kernels")


def _check_rows(where: str, name: str, rows: Tensor) -> None:
    if rows.ndim != 2 or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"{where}: expected {name} [n, V] with unit stride in V, got {list(rows.shape)} with strides "
            f"{list(rows.stride())}; call .contiguous()"
        )


def _check_products(where: str, products: Tensor, **rowwise: Tensor | None) -> None:
    """`rowwise` tensors must be contiguous and have the rows of `products`."""
    _check_rows(where, "products", products)
    if products.dtype != torch.float32:
        raise ValueError(f"{where}: expected float32 products, got {products.dtype}")
    for name, tensor in rowwise.items():
        if tensor is not None and (tensor.shape[0] != products.shape[0] or not tensor.is_contiguous()):
            raise ValueError(
                f"{where}: expected {name} contiguous with {products.shape[0]} rows, got {list(tensor.shape)} with "
                f"strides {list(tensor.stride())}"
            )


def row_stats(
    products: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    targets: Tensor | None,
    ids: Tensor | None,
) -> RowStats:
    """Softmax statistics of the rows of a block of logits, without a host sync.

    Args:
        products: float32 [n, V], unit stride in V, any row stride; V = 0 is a block without entries.
        bias: [V], any float dtype; may hold -inf (probability 0). NaN and +inf end in a NaN total.
        softcap: c of c tanh(y / c), or None.
        temperature: divides the logits.
        targets: int64 [n], a column per row, or None.
        ids: int32 [n, K], columns per row, -1 for an unused slot, or None.

    Returns:
        RowStats; target and kept are None where targets and ids are.

    Raises:
        ValueError: products are not float32 rows of unit stride; targets or ids have other rows or are not contiguous.
    """
    _check_products("row_stats", products, targets=targets, ids=ids)
    n, vocabulary = products.shape
    num_kept = 0 if ids is None else ids.shape[1]
    parts = -(-vocabulary // COLUMNS)
    maximum, total, weighted = (products.new_empty(n) for _ in range(3))
    target = None if targets is None else products.new_empty(n)
    kept = None if ids is None else products.new_empty(n, num_kept)
    stats = RowStats(maximum, total, weighted, target, kept)
    if n == 0:
        return stats
    partials = products.new_empty(n, 3, parts)
    block = _block(products, bias, softcap, temperature)
    with torch.cuda.device_of(products):
        if parts:
            _kernels().partial_stats[(n * parts,)](
                **block, partials=partials, COLUMNS=COLUMNS, TILE=TILE, LANES=LANES, num_warps=WIDE
            )
        _kernels().finish_stats[(n,)](
            **block,
            **stats._asdict(),
            partials=partials,
            parts=parts,
            targets=targets,
            ids=ids,
            num_kept=num_kept,
            PARTS=1 << max(0, parts - 1).bit_length(),
            BLOCK=ENTRIES_BLOCK,
            num_warps=NARROW,
        )
    return stats


def _block(products: Tensor, bias: Tensor | None, softcap: float | None, temperature: float) -> dict[str, Any]:
    """Arguments that say what the logits of a block are."""
    return {
        "products": products,
        "row_stride": products.stride(0),
        "vocabulary": products.shape[1],
        # 16-bit loads beside 32-bit ones would be passed between threads through shared memory.
        "bias": None if bias is None else bias.float().contiguous(),
        "softcap": None if softcap is None else float(softcap),
        "inverse_temperature": 1.0 / temperature,
    }


def row_gradient(
    products: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    maximum: Tensor | None,
    scale: Tensor | None,
    by_target: Tensor | None,
    targets: Tensor | None,
    ids: Tensor | None,
    by_kept: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Gradient by the products, rounded once, to the dtype of `out`, without a host sync.

        out_v = slope (scale exp(z_v/T - maximum) + [v = target] by_target) + sum_k [v = id_k] by_kept_k
        slope = 1 - (z/softcap)^2, or 1 without a softcap

    Args:
        products, bias, softcap, temperature: as for `row_stats`.
        maximum: float32 [n], of the whole rows if the block is a shard; None only without a scale.
        scale: float32 [n], or None: zeros but for the target and the ids.
        by_target, targets: float32 [n] and int64 [n]; none of it where one is None.
        ids, by_kept: int32 [n, K], unique within a row but for -1, and float32 [n, K]; none of it where one is None.
        out: float32, bfloat16 or float16 [n, V], unit stride in V, any row stride; may be `products` itself.

    Returns:
        out

    Raises:
        ValueError: tensors of other shapes, strides or dtypes; `out` begins where `products` do but is laid out
            otherwise.
    """
    where = "row_gradient"
    if by_target is None or targets is None:
        by_target = targets = None
    if by_kept is None or ids is None:
        by_kept = ids = None
    _check_products(
        where, products, maximum=maximum, scale=scale, by_target=by_target, targets=targets, ids=ids, by_kept=by_kept
    )
    _check_out(where, products, out)
    n, vocabulary = products.shape
    if products.numel() == 0:
        return out
    block = _block(products, bias, softcap, temperature)
    num_kept = 0 if ids is None else ids.shape[1]
    softmax = {"maximum": maximum, "scale": scale}
    places = {"targets": targets, "ids": ids, "num_kept": num_kept, "BLOCK": ENTRIES_BLOCK, "num_warps": NARROW}
    entries = None if targets is None and num_kept == 0 else products.new_empty(n, num_kept + 1)
    with torch.cuda.device_of(products):
        if entries is not None:
            _kernels().entry_gradients[(n,)](
                **block, **softmax, **places, by_target=by_target, by_kept=by_kept, entries=entries
            )
        if scale is None:
            out.zero_()
        else:
            _kernels().dense_gradient[(n * -(-vocabulary // DENSE_BLOCK),)](
                **block, **softmax, out=out, out_stride=out.stride(0), BLOCK=DENSE_BLOCK, num_warps=WIDE
            )
        if entries is not None:
            _kernels().place_entries[(n,)](
                **places, entries=entries, vocabulary=vocabulary, out=out, out_stride=out.stride(0)
            )
    return out


def _check_out(where: str, products: Tensor, out: Tensor) -> None:
    _check_rows(where, "out", out)
    if out.shape != products.shape or out.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{where}: expected out {list(products.shape)} of float32, bfloat16 or float16, got {list(out.shape)} of "
            f"{out.dtype}"
        )
    same_start = out.numel() > 0 and out.data_ptr() == products.data_ptr()
    if same_start and (out.dtype, out.stride()) != (products.dtype, products.stride()):
        raise ValueError(
            f"{where}: out {out.dtype} of strides {list(out.stride())} begins where products do, which have "
            f"{list(products.stride())}; pass products themselves or other memory"
        )
