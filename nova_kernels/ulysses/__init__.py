"""Ulysses sequence parallelism: the ranks of a group share one packed row, and attention still sees all of it.

    ulysses_attention            varlen_attention for local shards: two all-to-alls forward, two backward
    scatter_heads, gather_heads  the two all-to-alls, for those who bring their own attention
    HeadPlan, TokenPlan          which heads a rank computes, which tokens it holds; nothing has to divide
    comm_bytes                   what a rank sends; allgather_kv_bytes, for comparison
    SequenceShards               every per-token field of a batch, cut at the same places, or refused

The group is always an argument, nothing of it is remembered between calls. Formulas, examples: docs/kernels/ulysses.md.
"""

from nova_kernels.ulysses.attention import gather_heads, scatter_heads, ulysses_attention
from nova_kernels.ulysses.plan import CommBytes, HeadBlock, HeadPlan, TokenPlan, allgather_kv_bytes, comm_bytes
from nova_kernels.ulysses.shards import SequenceShards, shift_labels

__all__ = [
    "CommBytes",
    "HeadBlock",
    "HeadPlan",
    "SequenceShards",
    "TokenPlan",
    "allgather_kv_bytes",
    "comm_bytes",
    "gather_heads",
    "scatter_heads",
    "shift_labels",
    "ulysses_attention",
]
