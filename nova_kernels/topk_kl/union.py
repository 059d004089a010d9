"""Kept logits z_nk = h_n . w_id(n,k) and their gradients, where blocks of tokens share the rows of W they need.

For a block of n tokens, U = the ids its tokens keep, ascending, each once, W_U [|U|, H] those rows of the weight:

    Z = h W_U^T [n, |U|]          z_nk = Z[n, place of id(n,k) in U]
    G [n, |U|] = dL/dz at these places, 0 elsewhere          dh = G W_U          dW_U += G^T h

so matrix products run at their full rate on |U| instead of V columns. Neighbours in a text share ids: of K = 500 out of
32,000, 64 tokens need some 2,300 rows and 512 tokens 3,800, for a small model (benchmarks/topk_union.py).

U is ascending and none of its rows is there twice, so adding to dW has one order, that of the blocks: the same bits
every time. Z and G hold at most lm_head's CHUNK_ELEMENTS, W_U is gathered (and upcast) in pieces of as many; blocks are
halved until |U| <= min(V, n K) cannot break that. Sums are float32, or float64 if an input is. On CUDA 16-bit factors
stay so, and G is rounded to bfloat16 beside bfloat16 ones (what its rows' sums lose is put right:
lm_head.arithmetic.lost_in_rounding); beside float16, where it could vanish, it stays float32.
The host waits once per call on CUDA, for the sizes of all unions, and one int32 [V] per block is held until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.lm_head.arithmetic import gradient_dtype, lost_in_rounding

BLOCK_TOKENS = {"cpu": 64}  # the fewest for which a product outweighs the gather of its rows, by device type
BLOCK_TOKENS_ELSEWHERE = 1024
_ALIGNED = 16  # columns; rows of a tile start where vector loads can


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive tokens and the vocabulary rows they need."""

    part: slice  # of the tokens
    rows: Tensor  # int64 [|U|], ascending
    places: Tensor  # int64 [n, K] into rows; |U| where the id is -1

    @property
    def width(self) -> int:
        """Columns of a tile: |U|, one that unused slots read and write, and padding."""
        return -(-(len(self.rows) + 1) // _ALIGNED) * _ALIGNED


def block_tokens(vocabulary: int, kept: int, device: torch.device) -> int:
    """Tokens of a block whose tile cannot outgrow CHUNK_ELEMENTS."""
    bound = lm_head.chunk_elements(device)
    tokens = BLOCK_TOKENS.get(device.type, BLOCK_TOKENS_ELSEWHERE)
    while tokens > 1 and tokens * min(vocabulary, tokens * kept) > bound:
        tokens //= 2
    return tokens


def blocks(ids: Tensor, vocabulary: int) -> Iterator[Block]:
    """The blocks of ids int32 [N, K], in order."""
    parts = list(lm_head.chunks(len(ids), block_tokens(vocabulary, ids.shape[1], ids.device)))
    together = 1 if ids.device.type == "cpu" else max(1, len(parts))
    for start in range(0, len(parts), together):
        group = parts[start : start + together]
        found = [_membership(ids[part], vocabulary) for part in group]
        sizes = torch.stack([table[-1] for _, table in found]).tolist()
        for part, (present, table), size in zip(group, found, sizes, strict=True):
            table[0] = size + 1
            rows = torch.nonzero_static(present[1:], size=size).squeeze(1)
            places = table.index_select(0, ids[part].flatten() + 1).long().sub_(1)
            yield Block(part, rows, places.view(ids[part].shape))


def _membership(ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Whether v is among ids, bool [1 + V] at 1 + v, and how many ids up to v are, int32 [1 + V]."""
    present = torch.zeros(1 + vocabulary, dtype=torch.bool, device=ids.device)
    present.index_fill_(0, ids.flatten().long() + 1, True)
    present[0] = False
    return present, present.cumsum(0, dtype=torch.int32)


def _pieces(block: Block, weight: Tensor) -> Iterator[slice]:
    """Slices of the block's rows that may be gathered at once."""
    return lm_head.chunks(len(block.rows), lm_head.chunk_rows(weight.shape[1], weight.device))


def _gathered(weight: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
    """Those rows of the weight; on CUDA in the hidden states' dtype, which under autocast is not the weight's."""
    gathered = weight.index_select(0, rows)
    return gathered.to(hidden.dtype) if hidden.is_cuda else gathered


def kept_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The logits of hidden [N, H] under weight [V, H] at ids int32 [N, K]: h_n . w_id, 0 where the id is -1.

    Returns:
        float32 [N, K] (float64 if an input is). Ids are unique within a row and below V.
    """
    kept = hidden.new_empty(ids.shape, dtype=lm_head.arithmetic_dtype(hidden, weight))
    for block in blocks(ids, len(weight)):
        part = hidden[block.part]
        tile = kept.new_empty(len(part), block.width)
        tile[:, len(block.rows) :] = 0
        for piece in _pieces(block, weight):
            lm_head.product(part, _gathered(weight, block.rows[piece], part).t(), out=tile[:, piece])
        torch.gather(tile, 1, block.places, out=kept[block.part])
    return kept


def backward(
    hidden: Tensor, weight: Tensor, ids: Tensor, by_kept: Tensor, *, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by hidden and weight, given those by the kept logits [N, K]; slots whose id is -1 count for nothing.

    Returns:
        dhidden float32 [N, H] (float64 if an input is) and dweight [V, H] in the weight's dtype, added up in float32
        and rounded once; None where not needed.
    """
    dtype = lm_head.arithmetic_dtype(hidden, weight)
    dhidden = hidden.new_zeros(hidden.shape, dtype=dtype) if needs_hidden else None
    dweight = weight.new_zeros(weight.shape, dtype=dtype) if needs_weight else None
    factors = gradient_dtype(hidden.dtype, dtype)
    for block in blocks(ids, len(weight)) if needs_hidden or needs_weight else ():
        part = hidden[block.part]
        tile = hidden.new_zeros(len(part), block.width, dtype=factors)
        tile.scatter_(1, block.places, by_kept[block.part].to(factors))
        lost = lost_in_rounding(by_kept[block.part], ids[block.part], factors)
        for piece in _pieces(block, weight):
            gradient, rows = tile[:, piece], block.rows[piece]
            if dhidden is not None:
                gathered = _gathered(weight, rows, part)
                dhidden[block.part] += lm_head.product(gradient, gathered)
                if lost is not None:
                    dhidden[block.part] += lost * (gathered.sum(dim=0, dtype=dtype) / len(block.rows))
            if dweight is not None:
                dweight.index_add_(0, rows, lm_head.product(gradient.t(), part))
    return dhidden, None if dweight is None else dweight.to(weight.dtype)
