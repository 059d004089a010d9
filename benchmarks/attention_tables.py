"""The tables and pictures that a record of attention draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.records import Record, Row, failure, names, select, time_of
from benchmarks.way_columns import (
    Column,
    against_ours,
    bars,
    blocks_of,
    error_of,
    left_out,
    memory_of,
    of_ways,
    share_of,
    written,
)

DEVICES = ("cpu", "cuda")
DIRECT = {
    "nova_kernels, flash": "flash_attn_varlen_func, called directly",
    "nova_kernels, torch_varlen": "torch varlen_attn, called directly",
}


def shape_of(row: Row) -> str:
    return f"{row['tokens']:,} tokens, {row['heads']} heads of width {row['width']}, {row['dtype']}"


def heads_of(record: Record) -> str:
    """Of most cases: the first."""
    heads: str = record["rows"][0]["heads"]
    return heads


def main_table(record: Record) -> str:
    main = {"case": "mixed", "heads": heads_of(record)}
    rows = select(record["rows"], **main)
    columns: dict[str, Column] = {
        "forward": written(time_of, step="forward", **main),
        "forward + backward": written(time_of, step="both", **main),
        "slower than ours": against_ours(step="both", **main),
        "of 790 TFLOP/s": written(share_of, step="both", **main),
        "extra memory": written(memory_of, step="both", **main),
        "error": written(error_of, step="both", **main),
    }
    if not any("limit_share" in row for row in rows):
        del columns["of 790 TFLOP/s"]
    return (
        f"{rows[0]['samples']} samples of mixed lengths: {shape_of(rows[0])}. The columns from `slower` on are for\n"
        f"forward + backward; the error is the largest of output and gradients, relative to float64.\n"
        f"\n{of_ways(rows, columns)}{beside_the_kernels(record)}" + left_out(record, "mixed")
    )


def beside_the_kernels(record: Record) -> str:
    """Our entry over the kernel it calls, in per cent of the time of forward + backward, by what the row holds."""
    lines = []
    for ours, kernel in DIRECT.items():
        found = []
        for row in select(record["rows"], impl=ours, step="both", heads=heads_of(record)):
            direct = select(record["rows"], impl=kernel, step="both", heads=row["heads"], case=row["case"])
            if direct and not failure(row) and not failure(direct[0]):
                more = 100 * (row["seconds_median"] / direct[0]["seconds_median"] - 1)
                found.append(f"{row['case']} {more:+.1f} %")
        if found:
            lines.append(f"\n{ours} over the kernel called directly: {', '.join(found)}.\n")
    return "".join(lines)


def rows_table(record: Record) -> str:
    """Forward + backward by what the row holds."""
    rows = select(record["rows"], step="both")
    columns: dict[str, Column] = {}
    for case in names(rows, "case"):
        for heads in names(select(rows, case=case), "heads"):
            label = case if heads == heads_of(record) else f"{case}, {heads} heads"
            columns[label] = written(time_of, case=case, heads=heads)
            columns["slower than ours" + " " * len(columns)] = against_ours(case=case, heads=heads)
    return f"Forward + backward by what the row holds, {shape_of(rows[0])}.\n\n{of_ways(rows, columns)}"


BLOCKS: dict[str, Callable[[Record], str]] = {
    "attention-{device}": main_table,
    "attention-rows-{device}": rows_table,
}


def blocks(name: str, record: Record) -> dict[str, Callable[[], str]]:
    return blocks_of(name, record, BLOCKS)


def draw(axes: Any, record: Record) -> None:
    rows = select(record["rows"], step="both", heads=heads_of(record))
    bars(axes, rows, {case: select(rows, case=case) for case in names(rows, "case")}, "ms, forward + backward")


DRAWINGS: dict[str, tuple[Callable[[Any, Record], None], tuple[float, float]]] = {
    "docs/kernels/attention-{device}.svg": (draw, (6.0, 4.0)),
}
