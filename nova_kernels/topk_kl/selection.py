"""Selection by whichever backend, a block of rows at a time, and over the ranks that share a vocabulary.

Over ranks: each selects from its own columns; the P K candidates of a row, laid out by rising first column, are a row
of logits themselves, so selecting from them is exact and gives ties to the lowest id as before.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nova_kernels.backend import fastest_first, why_not_triton
from nova_kernels.lm_head import Head, arithmetic_dtype, chunk_rows, chunks, kept_logits, parallel, walk
from nova_kernels.lm_head.arithmetic import joined
from nova_kernels.lm_head.rows import RowStats, gather_inside, log_sum_exp
from nova_kernels.topk_kl import cuda, reference, threshold, triton

Selected = tuple[Tensor, Tensor, Tensor]  # ids int32 [n, K], values [n, K], lse [n]


def backends(logits: Tensor, k: int) -> dict[str, str | None]:
    """Backends for the top k of such logits, fastest first, each with the reason it cannot run."""
    double = "it has no float64" if logits.dtype == torch.float64 else None
    compiled = {
        "cuda": cuda.why_not(logits.device, logits.dtype, k),
        "triton": why_not_triton(logits.device) or double or triton.why_not(logits.shape[-1], k),
    }
    return fastest_first(logits.device, compiled, {"threshold": None, "reference": None})


def fastest(logits: Tensor, k: int) -> str:
    """The first backend that can run."""
    return next(name for name, reason in backends(logits, k).items() if reason is None)


def select(logits: Tensor, k: int, temperature: float, backend: str) -> Selected:
    """Top-K of logits [n, V] in float32 (float64 for float64), without a second copy of all of them."""
    if k == 0:  # a rank without a part of the vocabulary
        values = logits.new_empty(len(logits), 0, dtype=arithmetic_dtype(logits))
        return values.int(), values, values.new_full((len(logits),), -torch.inf)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if backend == "cuda":
        return cuda.topk_select(logits, k, temperature)
    if backend == "triton":
        return triton.topk_select(logits, k, temperature)
    num_rows, dtype = len(logits), arithmetic_dtype(logits)
    ids = torch.empty(num_rows, k, dtype=torch.int32, device=logits.device)
    values, lse = logits.new_empty(num_rows, k, dtype=dtype), logits.new_empty(num_rows, dtype=dtype)
    run = threshold.topk_select if backend == "threshold" else reference.topk_select
    for part in chunks(num_rows, chunk_rows(logits.shape[1], logits.device)):
        block = logits[part].to(dtype)
        ids[part], values[part] = run(block, k)
        lse[part] = (block / temperature).logsumexp(dim=-1)
    return ids, values, lse


def select_from_head(
    hidden: Tensor,
    head: Head,
    k: int,
    temperature: float,
    *,
    in_triton: bool,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Selected:
    """Top-K of the head's logits of hidden [n, H]: the very products, and lse, that the other ops see."""
    own = k if group is None else min(k, head.vocabulary)
    ids = torch.empty(len(hidden), own, dtype=torch.int32, device=hidden.device)
    values, found = hidden.new_empty(len(hidden), own, dtype=head.sums), []
    buffer = head.buffer(len(hidden))
    scratch = torch.empty_like(buffer)
    plain, backend = head.bias is None and head.softcap is None, fastest(buffer, own)
    for part in chunks(len(hidden), len(buffer)) if len(hidden) else [slice(0, 0)]:
        products = head.products(hidden[part], buffer)
        logits = products if plain else head.logits_(scratch[: len(products)].copy_(products))
        thresholds = backend == "threshold" and own > 0  # without the log-sum-exp, which comes from the products
        ids[part] = threshold.topk_select(logits, own)[0] if thresholds else select(logits, own, 1.0, backend)[0]
        at_ids = kept_logits(gather_inside(products, ids[part]), ids[part], head.bias, head.softcap)
        values[part] = at_ids.masked_fill_(ids[part] < 0, -torch.inf)
        found.append(walk.block_stats(products, head, temperature, in_triton=in_triton, exponentials=scratch))
    stats = parallel.merged(RowStats(*(joined(parts) for parts in zip(*found, strict=True))), group)
    if group is not None:
        ids, values = merged(ids, values, k, vocab_start, group)
    return ids, values, log_sum_exp(stats)


def merged(ids: Tensor, values: Tensor, k: int, vocab_start: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """ids and values [n, K] of the whole vocabulary from each rank's top min(K, V) of its own."""
    missing = (0, k - ids.shape[1])
    ids = torch.nn.functional.pad(ids.where(ids < 0, ids + vocab_start), missing, value=-1)
    values = torch.nn.functional.pad(values, missing, value=-torch.inf)
    starts = parallel.gather(torch.full((1,), vocab_start, device=ids.device), group).squeeze(1)
    order = starts.argsort(stable=True)
    all_ids, all_values = (parallel.gather(x, group)[order].transpose(0, 1).flatten(1) for x in (ids, values))
    places, values, _ = select(all_values, k, 1.0, fastest(all_values, k))
    return all_ids.gather(1, places.clamp(min=0).long()).masked_fill_(places < 0, -1), values
