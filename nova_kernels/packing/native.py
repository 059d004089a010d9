"""Packing in C++ (csrc/packing): the functions of reference.py, with the same results.

Plans in a few nanoseconds a sample and lays rows out at the speed of memory; the GIL is released meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nova_kernels.backend import native_extension, why_not_native

MAX_CAPACITY = 2**24  # tokens; the planner holds a few words per possible length


def why_not(capacity: int = 0) -> str | None:
    """Why packs of `capacity` tokens cannot be planned here; None if they can."""
    return why_not_native() or (f"capacity {capacity} is above {MAX_CAPACITY}" if capacity > MAX_CAPACITY else None)


def plan(lengths: np.ndarray, capacity: int, strategy: str, seed: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """(order, offsets, lower bound), as `reference.plan`; lengths int32 [N]."""
    return native_extension().plan(lengths, capacity, strategy, None if seed is None else seed % 2**64)


def Stream(capacity: int, window: int) -> Any:
    """`reference.Stream`."""
    return native_extension().Stream(capacity, window)


def read_rows(samples: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[np.ndarray]] | None:
    """The samples' fields, one list of arrays per name; None where they are not plain and alike."""
    return native_extension().read_rows(list(samples), list(names), Tensor, Tensor.numpy, np.asarray)


def are_regular(columns: Sequence[Sequence[np.ndarray]], token_columns: int) -> bool:
    """Whether `lay_out` and `concatenate` can take these columns; the first `token_columns` of them are ids, labels."""
    return native_extension().are_regular(columns, token_columns)


def lay_out(
    ids: Sequence[np.ndarray],
    labels: Sequence[np.ndarray] | None,
    input_ids: np.ndarray,
    labels_out: np.ndarray,
    position_ids: np.ndarray,
    cu_seqlens: np.ndarray,
) -> int:
    """Write one row, as `reference.lay_out`."""
    return native_extension().lay_out(ids, labels, input_ids, labels_out, position_ids, cu_seqlens)


def concatenate(arrays: Sequence[np.ndarray], out: np.ndarray) -> None:
    """As `reference.concatenate`; arrays of the type of `out`."""
    native_extension().concatenate(arrays, out)
