"""The tables and pictures that a record of the log-probabilities draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.records import Record, names, select, time_of
from benchmarks.way_columns import (
    OURS,
    Column,
    against_ours,
    blocks_of,
    by_size,
    error_of,
    left_out,
    main_size,
    memory_of,
    of_ways,
    share_of,
    size_of,
    written,
)

DEVICES = ("cpu", "cuda")
TITLES = {
    "cross-entropy": "Cross-entropy",
    "logprobs": "Log-probabilities and entropy",
    "logprobs + kl": "Log-probabilities, entropy and top-500 KL in one pass",
}


def work_table(record: Record, work: str) -> str:
    rows = select(record["rows"], case=work)
    main = main_size(rows)
    columns: dict[str, Column] = {
        "forward": written(time_of, step="forward", **main),
        "forward + backward, frozen head": written(time_of, step="frozen", **main),
        "forward + backward": written(time_of, step="both", **main),
        "slower than ours": against_ours(step="both", **main),
        "of the products' limit": written(share_of, step="both", **main),
        "extra memory": written(memory_of, step="both", **main),
        "error": written(error_of, step="both", **main),
    }
    return (
        f"{TITLES[work]}, {size_of(rows[0])} (N x V x H), {main['dtype']}. The columns from `slower`\n"
        f"on are for forward + backward; the error is the largest of results and gradients, relative to float64.\n"
        f"\n{of_ways(rows, columns)}" + left_out(record, work)
    )


def sizes_table(record: Record) -> str:
    text = "Forward + backward by N x V x H: time, then extra memory.\n"
    for work in ("cross-entropy", "logprobs + kl"):
        rows = select(record["rows"], case=work, step="both")
        many = [way for way in names(rows, "impl") if len(select(rows, impl=way)) > 1]
        rows = [row for row in rows if row["impl"] in many]
        text += f"\n{TITLES[work]}:\n\n{of_ways(rows, by_size(rows))}\n{of_ways(rows, by_size(rows, memory_of))}"
    return text


def summary_table(record: Record) -> str:
    """Forward + backward of the two works that training does, for the front page."""
    rows = select(record["rows"], step="both")
    works = ("cross-entropy", "logprobs + kl")
    columns: dict[str, Column] = {}
    for work in works:
        main = main_size(select(rows, case=work))
        columns[f"{work}: time"] = written(time_of, case=work, **main)
        columns["extra memory" + " " * works.index(work)] = written(memory_of, case=work, **main)
    kept = [row for row in rows if row["impl"] == OURS or not row["impl"].startswith(OURS)]
    return f"Forward + backward, {size_of(rows[0])} (N x V x H), {rows[0]['dtype']}.\n\n{of_ways(kept, columns)}"


BLOCKS: dict[str, Callable[[Record], str]] = {
    "logprob-cross-entropy-{device}": lambda record: work_table(record, "cross-entropy"),
    "logprob-logprobs-{device}": lambda record: work_table(record, "logprobs"),
    "logprob-kl-{device}": lambda record: work_table(record, "logprobs + kl"),
    "logprob-sizes-{device}": sizes_table,
    "logprob-summary-{device}": summary_table,
}


def blocks(name: str, record: Record) -> dict[str, Callable[[], str]]:
    return blocks_of(name, record, BLOCKS)


def draw(axes: Any, record: Record) -> None:
    """Time against memory: the way to be is down and to the left."""
    for work, marker in (("cross-entropy", "o"), ("logprobs + kl", "^")):
        every = select(record["rows"], case=work, step="both")
        measured = [row for row in select(every, **main_size(every)) if {"extra_bytes", "seconds_median"} <= set(row)]
        rows = [row for row in measured if row["impl"] == OURS or not row["impl"].startswith(OURS)]
        for row in rows:
            place = (1000 * row["seconds_median"], max(1.0, row["extra_bytes"] / 1e6))
            ours = row["impl"] == OURS
            axes.plot(*place, marker=marker, color="black" if ours else "#dd8452", linestyle="none")
            axes.annotate(row["impl"], place, fontsize=6, xytext=(4, 3), textcoords="offset points")
        axes.plot([], [], marker=marker, color="gray", linestyle="none", label=f"{work}, {size_of(every[0])}")
    axes.set(yscale="log", xlabel="ms, forward + backward", ylabel="extra memory, MB")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


DRAWINGS: dict[str, tuple[Callable[[Any, Record], None], tuple[float, float]]] = {
    "docs/kernels/logprob-{device}.svg": (draw, (8.0, 5.0)),
}
