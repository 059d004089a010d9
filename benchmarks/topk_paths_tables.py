"""The table of topk_paths: dense, union and gather beside each other."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.records import Record, Row, duration, select, table
from benchmarks.way_columns import blocks_of

DEVICES = ("cpu",)
WAYS = ("dense", "union", "gather")


def paths_table(record: Record) -> str:
    """Times of forward, dh and dW, and of forward and dh alone."""
    rows = record["rows"]

    def times(row: Row) -> str:
        found = [row.get(f"seconds_{way}") for way in WAYS]
        return " / ".join("-" if seconds is None else duration(seconds) for seconds in found)

    lines = [
        [
            f"{row['ids']}, {row['tokens']} x {row['vocabulary']:,} x {row['hidden']}",
            f"{row['union']:,.0f}",
            times(row),
            *(times(other) for other in select(rows, **_same(row), case="frozen")),
        ]
        for row in select(rows, case="all")
    ]
    title = (
        "KL from hidden states by dense / union / gather, K = 500, float32: forward with both gradients, and with a\n"
        "frozen weight. Ids of text, or drawn (1 / (rank + 10)); |U| is of a block of 64 tokens; - was not run.\n\n"
    )
    return title + table(["ids, N x V x H", "\\|U\\|", "both gradients", "frozen weight"], lines)


def _same(row: Row) -> dict[str, object]:
    return {name: row[name] for name in ("ids", "tokens", "vocabulary", "hidden")}


BLOCKS: dict[str, Callable[[Record], str]] = {"topk_paths-{device}": paths_table}
DRAWINGS: dict[str, object] = {}


def blocks(name: str, record: Record) -> dict[str, Callable[[], str]]:
    """The blocks of the documentation that this record fills."""
    return blocks_of(name, record, BLOCKS)
