"""A head whose vocabulary is split over the ranks of a process group: how partial results become whole ones.

Rank i holds rows [start_i, start_i + V_i) of the weight and sees the same hidden states as the others. With m, s, w as
in `rows`, M = max m_i:

    m = M      s = sum s_i exp(m_i - M)      w = sum exp(m_i - M) (w_i + s_i (m_i - M))

A target's and the kept logits are 0 on every rank but one, so that one sum gives them all: one all-gather of [3, n]
and one all-reduce of [n, K + 1]. In the backward the gradient by the hidden states is summed over the ranks here, so
that every rank gets all of it; those by weight and bias are each rank's own.
Groups go by their name, because ops of torch.library take plain values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nova_kernels.lm_head.rows import RowStats


def name_of(group: dist.ProcessGroup | None) -> str | None:
    """The name under which an op finds a group again."""
    return None if group is None else group.group_name


def named(name: str | None) -> dist.ProcessGroup | None:
    """The group of this name."""
    if name is None:
        return None
    resolve: Any = dist.distributed_c10d._resolve_process_group  # takes a subtype of str in newer versions of torch
    found: dist.ProcessGroup = resolve(name)
    return found


def why_not(group: dist.ProcessGroup | None) -> str | None:
    """Why a reference implementation cannot run: it knows nothing of ranks."""
    return None if group is None else "it has no vocabulary split over a group"


def end_of_vocabulary(
    vocabulary: int, vocab_start: int, group: dist.ProcessGroup | None, device: torch.device
) -> int | Tensor:
    """The first id that no rank has: as a tensor on `device` if ranks have to tell each other."""
    if group is None:
        return vocabulary
    own = vocab_start + vocabulary if vocabulary > 0 else 0  # a rank may hold padding alone
    end = torch.full((), own, device=device)
    dist.all_reduce(end, dist.ReduceOp.MAX, group)
    return end


def local_ids(ids: Tensor, vocabulary: int, vocab_start: int) -> Tensor:
    """Ids counted from this rank's first row of `vocabulary`; -1 where another rank has it, or none."""
    if vocab_start == 0:
        return ids.masked_fill(ids >= vocabulary, -1)
    local = ids - vocab_start
    return local.masked_fill_((local < 0) | (local >= vocabulary), -1)


def gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[P, ...]: the tensor of every rank."""
    everything = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(everything.unbind()), tensor.contiguous(), group)
    return everything


def sum_(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks, in place."""
    if group is not None:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
    return tensor


def merged(stats: RowStats, group: dist.ProcessGroup | None) -> RowStats:
    """Statistics over the whole vocabulary from each rank's over its own."""
    if group is None:
        return stats
    maximum, total, weighted = gather(torch.stack(stats[:3]), group).unbind(1)
    whole = merge_blocks(maximum, total, weighted)
    picked = [x for x in (stats.kept, None if stats.target is None else stats.target.unsqueeze(1)) if x is not None]
    if picked:
        both = sum_(torch.cat(picked, dim=1), group)
        kept = None if stats.kept is None else both[:, : stats.kept.shape[1]]
        return RowStats(*whole, None if stats.target is None else both[:, -1], kept)
    return RowStats(*whole, None, None)


def merge_blocks(maximum: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, s, w [n] of the whole from those of P parts, each [P, n]."""
    highest = maximum.amax(dim=0)
    distance = (maximum - highest).masked_fill(maximum == -torch.inf, 0.0)  # an empty part: its s and w are 0
    share = distance.exp()
    return highest, (total * share).sum(dim=0), (share * (weighted + total * distance)).sum(dim=0)
