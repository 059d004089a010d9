"""The two walks over [N, V] in blocks: rows forward, columns backward.

Forward, a block is some rows of h times all of W^T, because a row's maximum and sum need all of its logits. Backward,
with g = dL/d(h W^T), a block is (if it can be) all rows times some columns:

    dh += g W[columns]        dW[columns] = g^T h        db[columns] = sum of g over the rows

so that a row of dW is finished at once: it is added up in float32 inside one product and rounded once, without a
float32 copy of W's size. g is computed from the block's logits, which are multiplied out again, except where all of
[N, V] is within the bound on a block: there the forward's exponentials are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nova_kernels.lm_head import arithmetic, parallel, rows, triton
from nova_kernels.lm_head.head import Head, kept_logits
from nova_kernels.lm_head.rows import RowStats, RowTerms


def keeps_exponentials(num_rows: int, vocabulary: int, softcap: float | None, device: torch.device) -> bool:
    """Whether the forward leaves exp(z/T - m) [N, V] to the backward: only where it is a single block of the CPU."""
    return softcap is None and device.type == "cpu" and num_rows * vocabulary <= arithmetic.chunk_elements(device)


def block_stats(
    products: Tensor,
    head: Head,
    temperature: float,
    targets: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    entropy: bool = False,
    in_triton: bool,
    exponentials: Tensor | None = None,
) -> RowStats:
    """Statistics of a block of products [n, V], which PyTorch's version overwrites (see `rows`)."""
    if in_triton:
        return triton.row_stats(products, head.bias, head.softcap, temperature, targets, ids)
    place = torch.empty_like(products) if exponentials is None else exponentials[: len(products)]
    return rows.row_stats(products, head, temperature, targets, ids, entropy=entropy, exponentials=place)


def forward(
    hidden: Tensor,
    head: Head,
    temperature: float,
    targets: Tensor | None,
    ids: Tensor | None,
    *,
    entropy: bool,
    in_triton: bool,
    exponentials: Tensor | None = None,
) -> RowStats:
    """Statistics of every row of hidden [N, H] (in the dtype of the factors); fills `exponentials` [N, V] if given."""
    buffer = head.buffer(len(hidden))
    scratch = torch.empty_like(buffer) if exponentials is None and not in_triton else exponentials
    found: list[RowStats] = []
    for part in arithmetic.chunks(len(hidden), len(buffer)) if len(hidden) else [slice(0, 0)]:
        wanted = (None if targets is None else targets[part], None if ids is None else ids[part])
        products = head.products(hidden[part], buffer)
        stats = block_stats(
            products, head, temperature, *wanted, entropy=entropy, in_triton=in_triton, exponentials=scratch
        )
        if stats.kept is not None and wanted[1] is not None:
            stats = stats._replace(kept=kept_logits(stats.kept, wanted[1], head.bias, head.softcap))
        found.append(stats)
    return found[0] if len(found) == 1 else RowStats(*(arithmetic.joined(parts) for parts in zip(*found, strict=True)))


def kept_products(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """h W^T [N, K] at ids int32 [N, K], 0 where an id is outside the head."""
    kept = hidden.new_empty(ids.shape, dtype=head.sums)
    buffer = head.buffer(len(hidden))
    for part in arithmetic.chunks(len(hidden), len(buffer)):
        kept[part] = rows.gather_inside(head.products(hidden[part], buffer), ids[part])
    return kept


class Gradients(NamedTuple):
    """dL/d(hidden, weight, bias); None where not needed."""

    hidden: Tensor | None  # [N, H], float32 or float64
    weight: Tensor | None  # [V, H], as the weight; 0 in rows that do not count
    bias: Tensor | None  # [V], as the bias


def backward(
    hidden: Tensor,
    head: Head,
    temperature: float,
    terms: RowTerms,
    *,
    weight: Tensor,
    bias: Tensor | None,
    needed: tuple[bool, bool, bool],
    in_triton: bool,
    exponentials: Tensor | None = None,
    whole: bool = True,
) -> Gradients:
    """Gradients of what `terms` describes.

    `weight` and `bias` are the model's, `exponentials` [N, V] the forward's; `whole` says that the head is all of the
    vocabulary, not a rank's part of it. Where g is rounded, what its rows' sums lose is put right by a mean row of W
    (arithmetic.lost_in_rounding says why).
    """
    if terms.maximum is not None:
        terms = terms._replace(maximum=rows.finite(terms.maximum))
    dhidden = torch.zeros_like(hidden, dtype=head.sums) if needed[0] else None
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    dbias = torch.zeros_like(bias, dtype=head.sums) if bias is not None and needed[2] else None
    num_rows, columns = arithmetic.tile_shape(len(hidden), head.vocabulary, hidden.shape[1], hidden.device)
    buffer = head.weight.new_empty(num_rows * columns if exponentials is None else 0, dtype=head.sums)
    lost = hidden.new_zeros(len(hidden), 1, dtype=head.sums)
    for part in arithmetic.chunks(head.vocabulary, columns):
        block_head, block_terms = head.columns(part), terms.columns(part.start)
        row_sums = _RowSums(block_head, None if dweight is None else dweight[part], single=num_rows >= len(hidden))
        for block in arithmetic.chunks(len(hidden), num_rows):
            if exponentials is None:
                memory = buffer[: (block.stop - block.start) * block_head.vocabulary].view(-1, block_head.vocabulary)
                options = {"in_triton": in_triton, "sums_to_zero": head.softcap is None and whole}
                g, gone = _block_gradient(
                    hidden[block], block_head, temperature, block_terms.part(block), memory, **options
                )
                lost[block] += gone
            else:
                scaled = torch.zeros_like(exponentials) if terms.scale is None else exponentials * terms.scale[:, None]
                g = rows.add_entries_(scaled, None, terms)
            if dhidden is not None:
                arithmetic.add_product_(dhidden[block], g, block_head.weight)
            row_sums.add(g, hidden[block])
            if dbias is not None:
                dbias[part] += g.sum(dim=0, dtype=head.sums)
        row_sums.finish()
    if dhidden is not None and terms.scale is not None and head.vocabulary > 0 and _rounds(head):
        arithmetic.add_product_(dhidden, lost, head.weight.mean(dim=0, keepdim=True, dtype=head.sums))
    return Gradients(dhidden, dweight, dbias if dbias is None or bias is None else dbias.to(bias.dtype))


def whole_gradients(
    found: Gradients, hidden: Tensor, weight: Tensor, kept: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What an op returns: of all rows of hidden [N, H] and weight [V, H], in their dtypes; [0] where not needed."""
    dhidden, dweight = found.hidden, found.weight
    if dhidden is not None:
        dhidden = arithmetic.spread(parallel.sum_(dhidden, group).to(hidden.dtype), kept, len(hidden))
    if dweight is not None and len(dweight) < len(weight):
        dweight = torch.nn.functional.pad(dweight, (0, 0, 0, len(weight) - len(dweight)))
    found = Gradients(dhidden, dweight, found.bias)
    dhidden, dweight, dbias = (hidden.new_empty(0) if gradient is None else gradient for gradient in found)
    return dhidden, dweight, dbias


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and types of what `whole_gradients` returns."""
    tensors = zip((hidden, weight, bias), needed, strict=True)
    dhidden, dweight, dbias = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and wanted else hidden.new_empty(0)
        for x, wanted in tensors
    )
    return dhidden, dweight, dbias


def _rounds(head: Head) -> bool:
    """Whether g is rounded before it is multiplied."""
    return arithmetic.gradient_dtype(head.weight.dtype, head.sums) != head.sums


def _block_gradient(
    hidden: Tensor,
    head: Head,
    temperature: float,
    terms: RowTerms,
    memory: Tensor,
    *,
    in_triton: bool,
    sums_to_zero: bool,
) -> tuple[Tensor, Tensor | float]:
    """g [n, V] of a block, in the dtype in which it is multiplied, and what rounding takes from each row's sum [n, 1].

    `sums_to_zero`: the rows of all blocks together sum to 0 before they are rounded.
    """
    products = memory if terms.scale is None else arithmetic.product(hidden, head.weight.t(), out=memory)
    dtype = arithmetic.gradient_dtype(head.weight.dtype, head.sums)
    if not in_triton:
        exact = rows.row_gradient(products, head, temperature, terms)
    elif not _rounds(head) or not (sums_to_zero or terms.scale is None):
        exact = _in_triton(products, head, temperature, terms, products)
    else:
        rounded = _in_triton(products, head, temperature, terms, torch.empty_like(products, dtype=dtype))
        return rounded, 0.0 if terms.scale is None else -rounded.sum(dim=1, keepdim=True, dtype=head.sums)
    if not _rounds(head):
        return exact, 0.0
    rounded = exact.to(dtype)
    return rounded, exact.sum(dim=1, keepdim=True) - rounded.sum(dim=1, keepdim=True, dtype=head.sums)


def _in_triton(products: Tensor, head: Head, temperature: float, terms: RowTerms, out: Tensor) -> Tensor:
    return triton.row_gradient(
        products,
        head.bias,
        head.softcap,
        temperature,
        terms.maximum,
        terms.scale,
        terms.by_target,
        terms.targets,
        terms.ids,
        terms.by_kept,
        out,
    )


class _RowSums:
    """dW of some columns of the vocabulary, added up in float32 over blocks of rows."""

    def __init__(self, head: Head, place: Tensor | None, *, single: bool) -> None:
        self._place, self._total = place, None
        if place is not None and (place.dtype == head.sums or not single):
            self._total = place if place.dtype == head.sums else torch.zeros_like(place, dtype=head.sums)

    def add(self, g: Tensor, hidden: Tensor) -> None:
        """Take in g [n, V] and hidden states [n, H]."""
        if self._total is not None:
            arithmetic.add_product_(self._total, g.t(), hidden)
        elif self._place is not None:
            self._place.copy_(arithmetic.product(g.t(), hidden))

    def finish(self) -> None:
        """Round the sum into its place."""
        if self._place is not None and self._total is not None and self._total is not self._place:
            self._place.copy_(self._total)
