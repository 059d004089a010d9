"""A packed row in parts: what every rank of a group holds of a batch.

    per token     input_ids, labels, position_ids, ... [1, T], [T, ...] or [n, 1, T]  ->  tokens start to end
    whole         cu_seqlens, max_seqlen, and what was declared to be about samples   ->  as it is, on every rank
    unknown       refused: a field that one rank reads whole and another in part is a wrong result, not an error

Labels are shifted before they are cut: the label of the last token of a shard is on the next rank.
"""

# Shape suffixes: t = tokens of this rank, T = tokens of all, S = sequences.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nova_kernels.packing import IGNORE_INDEX, PackedBatch
from nova_kernels.ulysses.plan import TokenPlan
from nova_kernels.varlen import check_cu_seqlens

PER_TOKEN = frozenset({"input_ids", "inputs_embeds", "labels", "position_ids", "shift_labels"})
WHOLE = frozenset({"cu_seqlens", "max_seqlen", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}) | {
    "padding",
    "use_cache",
}


def shift_labels(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """For every token the label of the next one of its sequence; -100 at the last of each.

    Args:
        labels: integers [T] or [1, T], unshifted, of the whole row.
        cu_seqlens: int32 [S + 1] on the CPU, the boundaries of the whole row.

    Returns:
        A new tensor of the same shape.

    Raises:
        ValueError: another shape, or boundaries that do not end at T.
    """
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and labels.shape[0] != 1):
        raise ValueError(f"shift_labels: expected labels [T] or [1, T] of one packed row, got {list(labels.shape)}")
    check_cu_seqlens(cu_seqlens, labels.shape[-1])
    shifted = torch.roll(labels, -1, dims=-1)
    last = cu_seqlens[1:][cu_seqlens.diff() > 0].long() - 1
    shifted[..., last.to(labels.device)] = IGNORE_INDEX
    return shifted


@dataclass(frozen=True, slots=True)
class SequenceShards:
    """One rank's part of packed batches: every per-token field is cut at the same places, or the batch is refused."""

    token_plan: TokenPlan
    rank: int  # in the group that shares the row
    per_token: frozenset[str] = frozenset()  # names of further fields that are cut
    whole: frozenset[str] = frozenset()  # names of further fields that every rank gets as they are

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.token_plan.world_size:
            raise ValueError(
                f"SequenceShards: rank must be from 0 to {self.token_plan.world_size - 1}, got {self.rank}; it is "
                "dist.get_rank(group)"
            )
        object.__setattr__(self, "per_token", frozenset(self.per_token))
        object.__setattr__(self, "whole", frozenset(self.whole))
        if both := sorted((self.per_token | PER_TOKEN) & (self.whole | WHOLE)):
            raise ValueError(f"SequenceShards: {both} cannot be both per token and whole; declare each once")

    def shard(self, batch: PackedBatch | Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch, by field.

        Args:
            batch: a PackedBatch, whose `extra` fields are per token, or a mapping with "cu_seqlens" (or
                "cu_seq_lens_q") and fields whose names are known or declared. Every rank passes the same batch.

        Returns:
            Per-token fields are views of tokens start to end; "labels" become "shift_labels" (`shift_labels`, then
            cut), for losses that do not shift. The others are as they were.

        Raises:
            ValueError: a field that is neither known nor declared, a per-token field that does not have the T tokens
                of the plan, labels without boundaries, or labels beside shift_labels.
        """
        fields, per_token = _fields(batch)
        per_token = per_token | PER_TOKEN | self.per_token
        if unknown := sorted(fields.keys() - per_token - self.whole - WHOLE):
            raise ValueError(
                f"SequenceShards: nothing says whether {unknown} are per token; name each of them in per_token (to be "
                "cut) or in whole (every rank gets all of it), or drop them from the batch"
            )
        if "labels" in fields:
            fields = self._shifted(fields)
        return {name: self._cut(name, value) if name in per_token else value for name, value in fields.items()}

    def gather(self, values: Tensor, group: dist.ProcessGroup, *, dim: int = 0) -> Tensor:
        """Per-token results of all ranks in the order of the row, on every rank; for logs and tests, no gradient.

        Args:
            values: [..., t, ...], this rank's tokens along `dim`; equal in the other dimensions on all ranks.
            group: the ranks that share the row.

        Returns:
            [..., T, ...].

        Raises:
            ValueError: not this rank's number of tokens, or a group that the plan is not for.
        """
        start, end = self.token_plan.bounds(self.rank)
        if dist.get_world_size(group) != self.token_plan.world_size or dist.get_rank(group) != self.rank:
            raise ValueError(
                f"SequenceShards.gather: made for rank {self.rank} of {self.token_plan.world_size}, in the group it is "
                f"rank {dist.get_rank(group)} of {dist.get_world_size(group)}"
            )
        if values.shape[dim] != end - start:
            raise ValueError(
                f"SequenceShards.gather: rank {self.rank} holds {end - start} tokens, got {values.shape[dim]} along "
                f"dimension {dim} of {list(values.shape)}"
            )
        rows = values.detach().movedim(dim, 0)
        padded = rows.new_zeros(max(self.token_plan.sizes), *rows.shape[1:])  # gathers want equal shapes
        padded[: end - start] = rows
        parts = [torch.empty_like(padded) for _ in self.token_plan.sizes]
        dist.all_gather(parts, padded, group)
        whole = torch.cat([part[:size] for part, size in zip(parts, self.token_plan.sizes, strict=True)])
        return whole.movedim(0, dim)

    def _shifted(self, fields: dict[str, Any]) -> dict[str, Any]:
        boundaries = fields.get("cu_seqlens", fields.get("cu_seq_lens_q"))
        if boundaries is None:
            raise ValueError("SequenceShards: labels are shifted within sequences; the batch needs cu_seqlens")
        if "shift_labels" in fields:
            raise ValueError("SequenceShards: the batch has labels and shift_labels; drop one of them")
        self._token_dim("labels", fields["labels"])  # says what is wrong before shift_labels does
        labels = shift_labels(fields["labels"], boundaries)
        return {**{name: value for name, value in fields.items() if name != "labels"}, "shift_labels": labels}

    def _cut(self, name: str, value: Any) -> Tensor:
        dim, (start, end) = self._token_dim(name, value), self.token_plan.bounds(self.rank)
        part: Tensor = value.narrow(dim, start, end - start)
        return part

    def _token_dim(self, name: str, value: Any) -> int:
        """Where the T tokens of a field are: [1, T, ...], [T, ...], or [n, 1, T] (positions of several axes)."""
        tokens, shape = self.token_plan.num_tokens, tuple(value.shape) if isinstance(value, Tensor) else ()
        if shape[:1] == (1,) and shape[1:2] == (tokens,):
            return 1
        if shape[:1] == (tokens,):
            return 0
        if name == "position_ids" and len(shape) == 3 and shape[1:] == (1, tokens):
            return 2
        got = list(shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"SequenceShards: {name} is per token, the token plan expects [1, {tokens}, ...] or [{tokens}, ...], got "
            f"{got}; shard the whole row, or name {name} in whole if it is about samples"
        )


def _fields(batch: PackedBatch | Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """All fields of a batch, and the names of those it says are per token."""
    if not isinstance(batch, PackedBatch):
        return dict(batch), frozenset()
    named = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "padding": batch.padding,
    }
    return {**named, **batch.extra}, frozenset(batch.extra)
