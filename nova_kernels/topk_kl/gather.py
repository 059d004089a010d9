"""Kept logits z_nk = h_n . w_id(n,k) and their gradients, each token with its own K rows of the weight.

    z_n = W[id_n] h_n          dh_n = sum_k g_nk w_id(n,k)          dw_v = sum over (n, k) with id_nk = v of g_nk h_n

2 N K H operations per product instead of 2 N V H, but K rows are read per token: the time is that of memory. dW groups
the N K pairs by their id with one stable sort, then adds up each vocabulary row on its own, in the order of the
tokens: the same bits every time, written once in the weight's dtype, without a float32 copy of [V, H].

Sums are float32, or float64 if an input is. On CUDA the kernels of gather_kernels run and the host never waits;
elsewhere rows are gathered (and upcast) a few at a time.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from nova_kernels import lm_head

_GATHERED = 2**19  # elements gathered at once: they stay in cache until they are multiplied


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return importlib.import_module("nova_kernels.topk_kl.gather_kernels")


def kept_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The logits of hidden [N, H] under weight [V, H] at ids int32 [N, K]: h_n . w_id, 0 where the id is -1.

    Returns:
        float32 [N, K] (float64 if an input is). Ids are below V.

    Raises:
        ModuleNotFoundError: CUDA tensors without triton (see backend.why_not_triton).
    """
    if hidden.is_cuda:
        with torch.cuda.device_of(hidden):
            kept: Tensor = _kernels().kept_logits(hidden, weight, ids)
        return kept
    dtype = lm_head.arithmetic_dtype(hidden, weight)
    kept = hidden.new_empty(ids.shape, dtype=dtype)
    with lm_head.without_autocast(hidden.device):
        for tokens, slots in _tiles(ids.shape, hidden.shape[1]):
            rows = _rows(weight, ids[tokens, slots], dtype)
            kept[tokens, slots] = torch.bmm(hidden[tokens].to(dtype).unsqueeze(1), rows.transpose(1, 2)).squeeze(1)
    return kept.masked_fill_(ids < 0, 0.0)


def backward(
    hidden: Tensor, weight: Tensor, ids: Tensor, by_kept: Tensor, *, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by hidden and weight, given those by the kept logits [N, K]; slots whose id is -1 count for nothing.

    Returns:
        dhidden float32 [N, H] (float64 if an input is) and dweight [V, H] in the weight's dtype, added up in float32
        and rounded once; None where not needed.

    Raises:
        ModuleNotFoundError: CUDA tensors without triton (see backend.why_not_triton).
    """
    if hidden.is_cuda:
        kernels = _kernels()
        with torch.cuda.device_of(hidden):
            pairs = sorted_pairs(ids, len(weight)) if needs_weight else ()
            return (
                kernels.hidden_gradient(hidden, weight, ids, by_kept) if needs_hidden else None,
                kernels.weight_gradient(hidden, weight, by_kept, *pairs) if needs_weight else None,
            )
    by_kept = by_kept.to(lm_head.arithmetic_dtype(hidden, weight)).masked_fill(ids < 0, 0.0)
    return (
        _hidden_gradient(weight, ids, by_kept) if needs_hidden else None,
        _weight_gradient(hidden, weight, ids, by_kept) if needs_weight else None,
    )


def sorted_pairs(ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The pairs (n, k) grouped by their id, tokens in order within a group.

    Returns:
        order int64 [N K], places in the flattened ids, and starts int64 [V + 1]: those of id v are
        order[starts[v] : starts[v + 1]]; unused slots come before all others.
    """
    found, order = ids.flatten().sort(stable=True)
    bounds = torch.arange(vocabulary + 1, dtype=found.dtype, device=found.device)
    return order, torch.searchsorted(found, bounds)


def _tiles(shape: torch.Size, width: int) -> list[tuple[slice, slice]]:
    """Pieces of [N, K] whose gathered rows [n, k, width] are few enough."""
    num_tokens, num_slots = shape
    slots = max(1, min(num_slots, _GATHERED // width))
    tokens = max(1, _GATHERED // (slots * width))
    return [(n, k) for n in lm_head.chunks(num_tokens, tokens) for k in lm_head.chunks(num_slots, slots)]


def _rows(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [n, k, H] of the weight at ids [n, k]; row 0 in unused slots."""
    return weight.index_select(0, ids.clamp(min=0).flatten()).to(dtype).view(*ids.shape, weight.shape[1])


def _hidden_gradient(weight: Tensor, ids: Tensor, by_kept: Tensor) -> Tensor:
    if weight.dtype == by_kept.dtype and ids.numel():
        return embedding_bag(ids.clamp(min=0), weight, per_sample_weights=by_kept, mode="sum")
    dhidden = by_kept.new_zeros(len(ids), weight.shape[1])
    with lm_head.without_autocast(weight.device):
        for tokens, slots in _tiles(ids.shape, weight.shape[1]):
            rows = _rows(weight, ids[tokens, slots], by_kept.dtype)
            dhidden[tokens].unsqueeze(1).baddbmm_(by_kept[tokens, slots].unsqueeze(1), rows)
    return dhidden


def _weight_gradient(hidden: Tensor, weight: Tensor, ids: Tensor, by_kept: Tensor) -> Tensor:
    """Row v is a bag of hidden states, one for each pair with id v."""
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    order, starts = sorted_pairs(ids, len(weight))
    table, tokens, coefficients = hidden.to(by_kept.dtype), order // max(1, ids.shape[1]), by_kept.flatten()[order]
    for part in lm_head.chunks(len(weight), lm_head.chunk_rows(weight.shape[1], weight.device)):
        bags = starts[part.start : part.stop + 1]
        pairs = slice(int(bags[0]), int(bags[-1]))
        dweight[part] = embedding_bag(
            tokens[pairs],
            table,
            bags - bags[0],
            per_sample_weights=coefficients[pairs],
            mode="sum",
            include_last_offset=True,
        )
    return dweight
