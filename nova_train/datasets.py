"""Data sets by name -> checked rows of one kind. Formats: nova_train/rowformats.py; files: nova_train/datafiles.py.

Every row is a dict with its columns, `source` (default: the file's name) and `category` (default: "all"), and knows its
place for messages. An error names file, line and field; `on_bad_row: skip` counts and logs instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

from nova_train.datafiles import BadRows, DataError, Row, iterate_rows
from nova_train.rowformats import Kind, canonical_row, rename_columns

log = logging.getLogger(__name__)


def read_rows(
    names: Sequence[str],
    *,
    kind: Kind,
    on_bad_row: Literal["error", "skip"] = "error",
    columns: Mapping[str, str] | None = None,
) -> list[Row]:
    """The rows of all data sets, in order.

    Args:
        names: JSON Lines (.jsonl, .jsonl.gz), Parquet, or Hugging Face names ("owner/name", "owner/name:split").
        kind: what the rows are for, and so which columns they need: "sft", "preference", "prompt", or "rows" (any).
        on_bad_row: a row that cannot be used is an error, or is skipped, counted and logged.
        columns: the key `dataset_columns`: {our name: their column or a text with {column}}, for rows that have them.

    Raises:
        DataError: a missing or unreadable file, a bad row, no rows at all.
    """
    names = [names] if isinstance(names, str) else list(names)
    bad = BadRows(on_bad_row)
    rows: list[Row] = []
    for name in names:
        before = len(rows)
        for found in iterate_rows(name, bad):
            try:
                rows.append(canonical_row(rename_columns(found, columns) if columns else found, kind))
            except DataError as error:
                bad.add(error)
        if len(rows) == before:
            raise DataError(
                f"{name}: empty data set: no usable row"
                + (f" ({bad.count} skipped)" if bad.count else "")
                + "; check the file, or leave it out of dataset_name"
            )
    if not names:
        raise DataError("empty data set: no data set is named; set dataset_name")
    bad.report(len(rows))
    return rows


__all__ = ["BadRows", "DataError", "Kind", "Row", "read_rows"]
