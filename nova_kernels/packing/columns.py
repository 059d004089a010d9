"""Per-token fields of many samples: where they lie, and how they are read.

A column is one field of some samples, a list of arrays. A Ragged is one field of many samples in one flat array, as
Arrow and memory-mapped files hold it; taking samples from it copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nova_kernels.packing import native

Columns = dict[str, list[np.ndarray]]  # input_ids first, labels second if there are any
Types = dict[str, torch.dtype]  # of the fields whose arrays hold only bits

COMPUTED = ("position_ids", "attention_mask", "cu_seqlens", "max_seqlen")
# Types that NumPy lacks, and those of the same size that carry their bits.
BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


class Ragged:
    """One per-token field of N samples in one array: sample i is values[offsets[i] : offsets[i + 1]]."""

    def __init__(self, values: Any, offsets: Any) -> None:
        """Take the arrays as they are.

        Args:
            values: [T, ...], NumPy array, memory map or CPU tensor.
            offsets: integers [N + 1], not decreasing, within 0 ... T.

        Raises:
            ValueError: offsets of another shape or type, decreasing, or outside of `values`.
        """
        self.values, self.offsets = np.asarray(values), np.asarray(offsets)
        if self.offsets.ndim != 1 or self.offsets.size == 0 or self.offsets.dtype.kind not in "iu":
            raise ValueError(
                f"Ragged: expected integer offsets [N + 1], got {self.offsets.dtype} {list(self.offsets.shape)}"
            )
        self.offsets = self.offsets.astype(np.int64, copy=False)
        self.lengths = np.diff(self.offsets)  # int64 [N]
        if self.values.ndim == 0 or self.offsets[0] < 0 or self.offsets[-1] > len(self.values):
            raise ValueError(
                f"Ragged: offsets go from {self.offsets[0]} to {self.offsets[-1]}, values are {list(self.values.shape)}"
            )
        if self.lengths.size and self.lengths.min() < 0:
            raise ValueError(
                f"Ragged: offsets must not decrease, sample {int(self.lengths.argmin())} ends before it starts"
            )

    @classmethod
    def from_arrow(cls, array: Any) -> Ragged:
        """The column of an Arrow table; one chunk is read where it lies, several are copied into one.

        Args:
            array: pyarrow ListArray, LargeListArray, or ChunkedArray of them, without missing values.

        Raises:
            ValueError: an array of another kind, or values are missing.
        """
        if not str(array.type).startswith(("list<", "large_list<")):
            raise ValueError(f"Ragged.from_arrow: expected a list or large_list array, got {array.type}")
        if hasattr(array, "num_chunks"):
            array = array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()
        offsets = array.offsets.to_numpy()
        values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
        if missing := array.null_count + values.null_count:
            raise ValueError(f"Ragged.from_arrow: {missing} values are missing")
        return cls(values.to_numpy(zero_copy_only=False), offsets - offsets[0])

    def __len__(self) -> int:
        return self.lengths.size

    def take(self, samples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The values of these samples, each a view [l, ...].

        Raises:
            IndexError: a number that is no sample; negative ones do not count from the end.
        """
        numbers = sample_numbers(samples, len(self))
        bounds = zip(self.offsets[numbers].tolist(), self.offsets[numbers + 1].tolist(), strict=True)
        return [self.values[start:end] for start, end in bounds]


def sample_numbers(index: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """int64 [N], each one of `count` samples.

    Raises:
        ValueError: not integers; a mask is no list of numbers.
        IndexError: a number that is no sample; negative ones do not count from the end.
    """
    numbers = np.asarray(index)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ValueError(f"pack_samples: expected sample numbers [N], got {numbers.dtype} {list(numbers.shape)}")
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise IndexError(f"pack_samples: {wrong} is not one of the {count} samples")
    return numbers.astype(np.int64, copy=False)


def read_samples(samples: Sequence[Mapping[str, Any]], use_native: bool) -> tuple[Columns, Types]:
    """The fields of the samples, checked; see `pack_samples`."""
    if not samples:
        return {"input_ids": []}, {}
    names = _ordered(samples[0], "sample 0 has")
    read = native.read_rows(samples, names) if use_native else None
    if read is not None:
        return _checked(dict(zip(names, read, strict=True)), use_native), {}
    for number, sample in enumerate(samples):
        if sample.keys() != samples[0].keys():
            raise ValueError(
                f"pack_samples: sample {number} has the fields {sorted(sample)}, sample 0 has {sorted(samples[0])}; "
                "all samples need the same fields"
            )
    return _read_lists({name: [sample[name] for sample in samples] for name in names}, use_native)


def read_fields(
    fields: Mapping[str, Any], index: Sequence[int] | np.ndarray | None, use_native: bool
) -> tuple[Columns, Types]:
    """The fields of the samples with these numbers (None = all), checked; see `pack_samples`."""
    names = _ordered(fields, "there are")
    columns: dict[str, list[Any]] = {}
    for name in names:
        field = fields[name]
        if getattr(field, "num_chunks", 1) > 1:
            raise ValueError(
                f"pack_samples: {name} is an Arrow column of {field.num_chunks} chunks, which would be joined for "
                "every row; join them once with Ragged.from_arrow"
            )
        if not isinstance(field, Ragged | list | tuple):
            field = Ragged.from_arrow(field)
        numbers = np.arange(len(field)) if index is None else sample_numbers(index, len(field))
        columns[name] = field.take(numbers) if isinstance(field, Ragged) else [field[i] for i in numbers.tolist()]
    if len({len(arrays) for arrays in columns.values()}) > 1:
        counts = {name: len(arrays) for name, arrays in columns.items()}
        raise ValueError(f"pack_samples: fields of different numbers of samples: {counts}")
    if all(isinstance(fields[name], Ragged) for name in names):
        return _checked(columns, use_native), {}
    return _read_lists(columns, use_native)


def _read_lists(columns: Mapping[str, Sequence[Any]], use_native: bool) -> tuple[Columns, Types]:
    """Values of any kind as arrays, and the types of those fields that NumPy can only carry as bits."""
    types: Types = {}
    for name, values in columns.items():
        special = [value.dtype for value in values if isinstance(value, Tensor) and value.dtype in BITS]
        if not special:
            continue
        if len(special) < len(values) or len(set(special)) > 1:
            raise ValueError(f"pack_samples: {name} mixes tensors of {special[0]} with other types; convert them")
        if name in ("input_ids", "labels"):
            raise ValueError(f"pack_samples: expected integer {name}, got {special[0]}")
        types[name] = special[0]
    arrays = {name: [_as_array(value, name, i) for i, value in enumerate(values)] for name, values in columns.items()}
    return _checked(arrays, use_native), types


def as_bits(tensor: Tensor) -> Tensor:
    """The tensor as NumPy can read it: itself, or the bits of a type that NumPy lacks."""
    return tensor.view(BITS[tensor.dtype]) if tensor.dtype in BITS else tensor


def _ordered(names: Iterable[str], where: str) -> list[str]:
    """input_ids and labels first."""
    if "input_ids" not in names:
        raise ValueError(f"pack_samples: {where} no input_ids, only {sorted(names)}")
    for name in COMPUTED:
        if name in names:
            raise ValueError(f"pack_samples: {name} is computed from the lengths; remove it from the samples")
    first = [name for name in ("input_ids", "labels") if name in names]
    return first + [name for name in names if name not in first]


def _as_array(value: Any, name: str, number: int) -> np.ndarray:
    if isinstance(value, Tensor):
        value = as_bits(value.detach())
    array = np.asarray(value)
    if array.dtype.kind not in "iufcb":
        raise ValueError(f"pack_samples: sample {number}: expected numbers in {name}, got {array.dtype}")
    if array.size == 0 and isinstance(value, list):
        return array.astype(np.int64)
    native_order = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.require(native_order, requirements=["C", "A"]) if array.ndim else array


def _checked(columns: Columns, use_native: bool) -> Columns:
    """The same columns, such that the row can be written; an error says what is wrong and where."""
    token_columns = 2 if "labels" in columns else 1
    if use_native and native.are_regular(list(columns.values()), token_columns):
        return columns
    lengths = [len(ids) if ids.ndim else 0 for ids in columns["input_ids"]]
    for name, arrays in columns.items():
        is_tokens = name in ("input_ids", "labels")
        for number, array in enumerate(arrays):
            where = f"pack_samples: sample {number}:"
            if array.ndim == 0 or (is_tokens and array.ndim != 1):
                raise ValueError(f"{where} expected {name} of shape [l], got {list(array.shape)}")
            if len(array) != lengths[number]:
                raise ValueError(
                    f"{where} expected {name} [{lengths[number]}] as long as input_ids, got [{len(array)}]"
                )
            if array.dtype.kind not in "iufcb":
                raise ValueError(f"{where} expected numbers in {name}, got {array.dtype}")
            if is_tokens and array.size and (array.dtype.kind not in "iu" or array.dtype == np.uint64):
                raise ValueError(f"{where} expected integer {name}, got {array.dtype}")
            if array.shape[1:] != arrays[0].shape[1:]:
                raise ValueError(
                    f"{where} {name} is {list(array.shape[1:])} per token, in sample 0 {list(arrays[0].shape[1:])}"
                )
    if 0 in lengths:
        raise ValueError(f"pack_samples: sample {lengths.index(0)} has no tokens; leave empty samples out")
    return {
        name: [np.require(array, np.result_type(*arrays).newbyteorder("="), ["C", "A"]) for array in arrays]
        if arrays
        else []
        for name, arrays in columns.items()
    }
