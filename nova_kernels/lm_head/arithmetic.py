"""Matrix products with float32 sums, blocks of bounded size, and rows that do not count.

Factors keep 16 bits where the device multiplies them into float32 (CUDA); elsewhere they are turned into float32.
Either way the products are exact and added up in float32: 16-bit factors lose nothing, 16-bit sums would.
float64 where one of the inputs is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**22}  # elements of a block of logits, by device type
CHUNK_ELEMENTS_ELSEWHERE = 2**27
NARROWEST = 1024  # columns of a block in the backward, where the vocabulary has as many


def chunk_elements(device: torch.device) -> int:
    """The bound on the elements of a block."""
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ELSEWHERE)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of a chunk [rows, vocabulary]: as many as the bound allows, at least one."""
    return max(1, chunk_elements(device) // max(1, vocabulary))


def chunks(num_rows: int, rows_per_chunk: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows_per_chunk` that cover `num_rows`."""
    for start in range(0, num_rows, max(1, rows_per_chunk)):
        yield slice(start, min(start + rows_per_chunk, num_rows))


def tile_shape(num_rows: int, vocabulary: int, width: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block of the backward: all rows, unless it were narrower than NARROWEST.

    Within the bound on a CPU. Elsewhere a second block holds the gradient in 16 bits and a third [columns, width] some
    rows of dW in float32: there neither that nor the block has more than half of the bound.
    """
    elements = chunk_elements(device)
    if device.type != "cpu":
        elements //= 2
        vocabulary = min(vocabulary, max(elements // max(1, width), NARROWEST))
    columns = min(vocabulary, max(elements // max(1, num_rows), min(NARROWEST, elements)))
    return max(1, min(num_rows, elements // max(1, columns))), columns


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def factor_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the factors of h W^T are turned into: the 16-bit type of both (or of autocast) on CUDA, else float32."""
    if torch.float64 in (hidden.dtype, weight.dtype) or hidden.device.type != "cuda":
        return arithmetic_dtype(hidden, weight)
    dtype = weight.dtype if weight.dtype == hidden.dtype else torch.float32
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside it, matrix products stay in the dtype they are given."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _multiplies_into_float32(a: Tensor, b: Tensor) -> bool:
    return a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b [n, m] of matrices in float32 (float64 if one of them is)."""
    with without_autocast(a.device):
        if _multiplies_into_float32(a, b):
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        dtype = arithmetic_dtype(a, b)
        return torch.mm(a.to(dtype), b.to(dtype), out=out)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b, for a total in float32 (float64 if a factor is)."""
    with without_autocast(a.device):
        if _multiplies_into_float32(a, b):
            return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def plain_memory(tensor: Tensor) -> Tensor:
    """Contiguous, on a 64-byte boundary: matrix products pick their kernel by alignment too."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def kept_rows(keep: Tensor | None) -> Tensor | None:
    """Indices int64 [n] of the True rows of `keep` [N]; None for all of them: if it is None, or on the CPU.

    Waits for an accelerator to know how many there are, unless `keep` is None.
    """
    if keep is None or (keep.device.type == "cpu" and bool(keep.all())):
        return None
    return keep.nonzero().squeeze(1)


def take(values: Tensor, rows: Tensor | None) -> Tensor:
    """What `rows` (None: all) leaves of `values` [N, ...]."""
    return values if rows is None else values.index_select(0, rows)


def spread(values: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """Inverse of `take`: [n, ...] back to [num_rows, ...], 0 where no row was taken."""
    if rows is None:
        return values
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, rows, values)


def joined(parts: Sequence[Any]) -> Any:
    """The rows of all parts, or None where they are None."""
    return None if parts[0] is None else torch.cat(list(parts))


def gradient_dtype(factors: torch.dtype, sums: torch.dtype) -> torch.dtype:
    """The dtype in which dL/d(products) is multiplied: bfloat16 beside bfloat16 factors of float32 sums, else `sums`.

    Not float16, whose range small probabilities leave.
    """
    return factors if (factors, sums) == (torch.bfloat16, torch.float32) else sums


def lost_in_rounding(by_kept: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What the sum over each row's kept entries loses when they are rounded to `dtype`, [n, 1]; None if nothing.

    A row of dKL/dz sums to 0, so that what all rows of W have in common has no part in dh. Rounded entries sum to the
    rounding, and a large common part then shows: it is put right by this times a mean row of W.
    """
    if dtype == by_kept.dtype:
        return None
    entries = by_kept.masked_fill(ids < 0, 0.0)
    return (entries - entries.to(dtype).to(by_kept.dtype)).sum(dim=1, keepdim=True)
