"""Data files -> rows that know where they came from.

    name.jsonl, name.jsonl.gz    one JSON object per line, UTF-8; lines end with "\\n" only (strings may hold U+2028)
    name.parquet                 needs the extra [data]
    owner/name, owner/name:split a Hugging Face data set (extra [data]); split is "train" unless named

Any other file name is read as JSON Lines, compressed if it ends with .gz. Blank lines are passed over.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import reprlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

SKIPS_SHOWN = 5  # reasons logged per data set; the rest are counted

# What cannot be a Hugging Face name: it would be a file.
_FILE_LIKE = re.compile(r"^[./~]|\.(jsonl?|ndjson|gz|parquet|csv|tsv|txt)$|/.*/|\\|\s")


class DataError(ValueError):
    """Data that cannot be used; the message names file, line and field, and the way out."""


class Row(dict[str, Any]):
    """The columns of one row, and its place."""

    __slots__ = ("place",)

    def __init__(self, columns: Mapping[str, Any], place: str) -> None:
        super().__init__(columns)
        self.place = place  # "file:line", for messages

    def with_columns(self, columns: Mapping[str, Any]) -> Row:
        """Other columns at the same place."""
        return Row(columns, self.place)


class BadRows:
    """What happens to a row that cannot be used: "error" raises, "skip" counts it and logs the first few."""

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        if policy not in ("error", "skip"):
            raise ValueError(f"on_bad_row: expected error or skip, got {policy!r}")
        self.count = 0
        self._policy = policy

    def add(self, error: DataError) -> None:
        """Report one bad row.

        Raises:
            DataError: `error` itself, where the policy says so.
        """
        if self._policy == "error":
            raise error
        self.count += 1
        if self.count <= SKIPS_SHOWN:
            log.warning("skipped: %s", error)

    def report(self, kept: int) -> None:
        """Log how many rows were skipped, if any."""
        if self.count:
            log.warning("skipped %d bad rows, kept %d (on_bad_row: skip)", self.count, kept)


def shown(value: object) -> str:
    """A value as it stands in a message: short, with its type."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def iterate_rows(name: str, bad: BadRows) -> Iterator[Row]:
    """The rows of one data set, each with `source` (default: the file's name) and `category` (default: "all").

    Raises:
        DataError: the file is missing, unreadable or a folder; and, as `bad` decides, a row that is no JSON object.
    """
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    path = Path(name)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.is_file())[:5]
        raise DataError(
            f"{name}: expected a data file, got a folder; name a file in it: {', '.join(inside) or 'empty'}"
        )
    if path.is_file():
        rows = _parquet_rows(name) if name.endswith(".parquet") else _json_rows(name, bad)
        source = re.sub(r"\.(jsonl?|ndjson|parquet)$", "", path.name.removesuffix(".gz"))
    elif _FILE_LIKE.search(name):
        raise DataError(f"{name}: no such file (looked in {Path.cwd()}); check dataset_name")
    else:
        rows, source = _hub_rows(name), name
    for place, columns in rows:
        yield Row(
            {**columns, "source": _label(columns, "source", source), "category": _label(columns, "category", "all")},
            place,
        )


def _label(columns: Mapping[str, Any], field: str, default: str) -> str:
    value = columns.get(field)
    return default if value is None or value == "" else str(value)


def _json_rows(name: str, bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as file:
            for number, raw in enumerate(file, start=1):
                place = f"{name}:{number}"
                try:
                    columns = _parse(raw, place, first=number == 1)
                except DataError as error:
                    bad.add(error)
                    continue
                if columns is not None:
                    yield place, columns
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{name}:{number + 1}: expected a readable {'gzip ' if name.endswith('.gz') else ''}file: {error}; "
            "fetch or write the file again"
        ) from error


def _parse(raw: bytes, place: str, *, first: bool) -> dict[str, Any] | None:
    """One line as a mapping, None for a blank one."""
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8").rstrip()
        if not text:
            return None
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: expected UTF-8, got byte 0x{raw[error.start]:02x} at {error.start}; convert the file"
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        what = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        )
        hint = "a JSON array is not JSON Lines: write one row per line" if first and text.lstrip()[:1] == "[" else None
        raise DataError(
            f"{place}: malformed JSON row: {what}, in {reprlib.repr(text)}; "
            f"{hint or 'fix the line or set on_bad_row: skip'}"
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: expected a JSON object with named columns, got {shown(value)}; one row per line, "
            "or set on_bad_row: skip"
        )
    return value


def _parquet_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{name}: reading Parquet needs pyarrow; pip install 'nova-kernels[data]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1024):
                for columns in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", columns
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{name}:{number + 1}: expected a Parquet file: {error}; fetch or write the file again"
        ) from error


def _hub_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name}: no such file (looked in {Path.cwd()}), and to look it up as a Hugging Face data set the "
            "package datasets is needed; check dataset_name or pip install 'nova-kernels[data]'"
        ) from error
    path, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: no such file (looked in {Path.cwd()}), and no Hugging Face data set could be opened: {error}"
        ) from error
    for number, columns in enumerate(rows, start=1):
        yield f"{name}:{number}", dict(columns)
