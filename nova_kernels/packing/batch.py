"""Samples laid side by side in one row: pack_samples and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nova_kernels.packing import reference
from nova_kernels.varlen import cu_seqlens_from_lengths

IGNORE_INDEX = -100  # a label that is not trained, as in Hugging Face models
RESERVED = ("position_ids", "attention_mask", "cu_seqlens", "max_seqlen")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One packed row of T tokens holding S segments; a padding segment, if there is one, is the last."""

    input_ids: Tensor  # int64 [1, T]
    labels: Tensor  # int64 [1, T], unshifted; -100 = not trained
    position_ids: Tensor  # int64 [1, T], 0 at each segment's first token
    cu_seqlens: Tensor  # int32 [S + 1], stays on the CPU
    max_seqlen: int  # tokens of the longest segment
    padding: int = 0  # tokens of the padding segment, 0 = there is none
    extra: dict[str, Tensor] = field(default_factory=dict)  # further per-token fields, each [1, T]

    @property
    def num_tokens(self) -> int:
        """Tokens in the row, T, with the padding."""
        return self.input_ids.shape[1]

    @property
    def num_samples(self) -> int:
        """Samples in the row, without the padding segment."""
        return self.cu_seqlens.numel() - 1 - (1 if self.padding else 0)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its per-token fields on `device`; cu_seqlens stays on the CPU."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            extra={name: values.to(device) for name, values in self.extra.items()},
        )

    def attention_kwargs(self) -> dict[str, Any]:
        """What a Hugging Face model needs beside input_ids to keep the samples apart."""
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
            "use_cache": False,
        }


def pack_samples(samples: Sequence[Mapping[str, Any]], *, pad_to: int | None = None) -> PackedBatch:
    """Lay samples side by side in one row, in the order given.

    Args:
        samples: each a mapping with "input_ids" [l] and optionally "labels" [l] (unshifted, -100 = not trained;
            missing = a copy of input_ids) and any further per-token fields [l]; lists, NumPy arrays or CPU tensors.
            All samples have the same fields.
        pad_to: length of the row, tokens; what is left over becomes one segment of its own with id 0, label -100
            and zeros in every further field. None = no padding.

    Returns:
        PackedBatch. The label of each sample's first token is -100, so that no sample predicts the next one's
        first token. Integer fields come out as int64, other dtypes are kept.

    Raises:
        ValueError: a field that is missing, has another length than input_ids, or is computed here
            (position_ids, attention_mask, ...); a sample without tokens; more tokens than `pad_to`.
    """
    names = _field_names(samples)
    columns = {name: [_column(samples, name, index) for index in range(len(samples))] for name in names}
    lengths = [ids.size for ids in columns["input_ids"]]
    for name, arrays in columns.items():
        for index, array in enumerate(arrays):
            if array.size != lengths[index]:
                raise ValueError(
                    f"pack_samples: sample {index}: expected {name} [{lengths[index]}] as long as input_ids, "
                    f"got [{array.size}]"
                )
    if 0 in lengths:
        raise ValueError(f"pack_samples: sample {lengths.index(0)} has no tokens; leave empty samples out")
    used = sum(lengths)
    total = used if pad_to is None else pad_to
    if total < used:
        raise ValueError(
            f"pack_samples: {used} tokens do not fit in pad_to={pad_to}; plan the packs with that capacity"
        )
    segments = lengths + ([total - used] if total > used else [])
    cu_seqlens = cu_seqlens_from_lengths(segments)
    rows = {
        name: torch.from_numpy(reference.concatenate(arrays, total, IGNORE_INDEX if name == "labels" else 0))
        for name, arrays in columns.items()
    }
    input_ids = rows.pop("input_ids")
    labels = rows.pop("labels") if "labels" in rows else input_ids.clone()
    labels[0, used:] = IGNORE_INDEX
    labels[0, cu_seqlens[: len(lengths)].long()] = IGNORE_INDEX
    return PackedBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=_positions(segments, total),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(segments, default=0),
        padding=total - used,
        extra=rows,
    )


def _positions(segments: Sequence[int], total: int) -> Tensor:
    starts = np.cumsum([0, *segments], dtype=np.int64)[:-1]
    return torch.from_numpy((np.arange(total, dtype=np.int64) - np.repeat(starts, segments))[None])


def _field_names(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields that all samples share, input_ids first."""
    if not samples:
        return ["input_ids"]
    names = list(samples[0])
    for name in RESERVED:
        if name in names:
            raise ValueError(f"pack_samples: {name} is computed from the lengths; remove it from the samples")
    for index, sample in enumerate(samples):
        if "input_ids" not in sample:
            raise ValueError(f"pack_samples: sample {index} has no input_ids, only {sorted(sample)}")
        if sample.keys() != samples[0].keys():
            raise ValueError(
                f"pack_samples: sample {index} has the fields {sorted(sample)}, sample 0 has {sorted(samples[0])}; "
                "all samples need the same fields"
            )
    return ["input_ids", *(name for name in names if name != "input_ids")]


def _column(samples: Sequence[Mapping[str, Any]], name: str, index: int) -> np.ndarray:
    array = np.asarray(samples[index][name])
    if array.ndim != 1:
        raise ValueError(f"pack_samples: sample {index}: expected {name} of shape [l], got {list(array.shape)}")
    if array.size == 0 or array.dtype.kind in "iu":
        return array.astype(np.int64, copy=False)
    if name in ("input_ids", "labels"):
        raise ValueError(f"pack_samples: sample {index}: expected integer {name}, got {array.dtype}")
    return array
