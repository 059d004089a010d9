"""Samples laid side by side in one row: pack_samples and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nova_kernels.backend import choose
from nova_kernels.packing import native, reference
from nova_kernels.packing.columns import as_bits, read_fields, read_samples, sample_numbers
from nova_kernels.varlen import MAX_TOKENS

IGNORE_INDEX = -100  # a label that is not trained, as in Hugging Face models


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

    def seq_idx(self) -> Tensor:
        """The number of its segment for every token, int32 [1, T], as state-space layers want it."""
        lengths = self.cu_seqlens.diff()
        index = torch.arange(lengths.numel(), dtype=torch.int32).repeat_interleave(lengths)
        return index[None].to(self.input_ids.device)

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


def pack_samples(
    samples: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    index: Sequence[int] | np.ndarray | None = None,
    pad_to: int | None = None,
    pad_to_multiple_of: int | None = None,
    out: Mapping[str, Tensor] | None = None,
    backend: str | None = None,
) -> PackedBatch:
    """Lay samples side by side in one row, in the order given.

    Args:
        samples: samples, each a mapping with "input_ids" [l] and optionally "labels" [l] (unshifted, -100 = not
            trained; missing = a copy of input_ids) and any further per-token fields [l, ...]; lists, NumPy arrays or
            CPU tensors; all samples have the same fields. Or the fields themselves, each a Ragged, an Arrow list array,
            or a list with one array per sample.
        index: numbers of the samples to take, in this order; None = all of them.
        pad_to: length of the row, tokens; what is left over becomes one segment of its own with id 0, label -100
            and zeros in every further field. None = no padding.
        pad_to_multiple_of: the same, up to the next multiple.
        out: where to write: tensors [1, >= T, ...] on the CPU by the name of the row they hold (input_ids, labels,
            position_ids, further fields), in pinned memory for instance; the batch is a view of them. Rows that are not
            named are allocated.
        backend: "native" (C++) or "reference"; None takes the first that can run. Both give the same batch.

    Returns:
        PackedBatch. The label of each sample's first token is -100, so that no sample predicts the next one's first
        token. input_ids, labels and position_ids are int64, further fields keep their type.

    Raises:
        ValueError: a field that is missing, has another length than input_ids, or is computed here (position_ids,
            attention_mask, ...); a sample without tokens; more tokens than `pad_to` or than int32 boundaries can count;
            a buffer of `out` that is too small or of another type.
        IndexError: a number in `index` that is no sample.
        BackendUnavailableError: the named backend cannot run.
    """
    name = choose("pack_samples", backend, {"native": native.why_not(), "reference": None})
    if isinstance(samples, Mapping):
        columns, types = read_fields(samples, index, name == "native")
    else:
        chosen = samples if index is None else [samples[i] for i in sample_numbers(index, len(samples)).tolist()]
        columns, types = read_samples(chosen, name == "native")
    writer = {"native": native, "reference": reference}[name]
    used = sum(map(len, columns["input_ids"]))
    total = _row_length(used, pad_to, pad_to_multiple_of)
    ids, labels = columns.pop("input_ids"), columns.pop("labels", None)
    rows = _Rows(out or {}, total, ["input_ids", "labels", "position_ids", *columns])
    tokens = [rows.take(row, (), torch.int64) for row in ("input_ids", "labels", "position_ids")]
    cu_seqlens = torch.empty(len(ids) + (2 if used < total else 1), dtype=torch.int32)
    longest = writer.lay_out(ids, labels, *(row.numpy()[0] for row in tokens), cu_seqlens.numpy())
    extra = {}
    for field_name, arrays in columns.items() if ids else ():
        dtype = types.get(field_name) or torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
        extra[field_name] = row = rows.take(field_name, arrays[0].shape[1:], dtype)
        writer.concatenate(arrays, as_bits(row).numpy()[0])
    return PackedBatch(
        input_ids=tokens[0],
        labels=tokens[1],
        position_ids=tokens[2],
        cu_seqlens=cu_seqlens,
        max_seqlen=longest,
        padding=total - used,
        extra=extra,
    )


def _row_length(used: int, pad_to: int | None, pad_to_multiple_of: int | None) -> int:
    total = used if pad_to is None else pad_to
    if total < used:
        raise ValueError(
            f"pack_samples: {used} tokens do not fit in pad_to={pad_to}; plan the packs with that capacity"
        )
    if pad_to_multiple_of is not None:
        if pad_to_multiple_of < 1:
            raise ValueError(f"pack_samples: pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        total = -(-total // pad_to_multiple_of) * pad_to_multiple_of
    if total > MAX_TOKENS:
        raise ValueError(
            f"pack_samples: {total} tokens do not fit in int32 boundaries; use rows of at most {MAX_TOKENS} tokens"
        )
    return total


class _Rows:
    """The rows that are written: the caller's, or new ones."""

    def __init__(self, out: Mapping[str, Tensor], total: int, names: Sequence[str]) -> None:
        if unknown := sorted(out.keys() - set(names)):
            raise ValueError(f"pack_samples: out has {unknown}, the batch has only {list(names)}")
        self._out, self._total = out, total

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """[1, T, *shape]"""
        if name not in self._out:
            return torch.empty((1, self._total, *shape), dtype=dtype)
        row = self._out[name]
        fits = row.ndim == 2 + len(shape) and row.shape[0] == 1 and row.shape[2:] == shape and row.is_contiguous()
        if not fits or row.dtype != dtype or row.device.type != "cpu" or row.shape[1] < self._total:
            expected = ", ".join(["1", f">= {self._total}", *map(str, shape)])
            raise ValueError(
                f"pack_samples: expected out[{name!r}] {dtype} [{expected}], contiguous on the CPU, "
                f"got {row.dtype} {list(row.shape)} on {row.device}"
            )
        return row[:, : self._total]
