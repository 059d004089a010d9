"""Columns of tables whose lines are the ways of doing one piece of work, and pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.records import Record, Row, cell, device_of, failure, names, origin, select, size, table, time_of

OURS = "nova_kernels"

Column = Callable[[Sequence[Row], str], str]  # rows, way -> cell


def size_of(row: Row) -> str:
    """N x V, or N x V x H."""
    return " x ".join(f"{row[fact]:,}" for fact in ("n", "v", "h") if fact in row)


def same_size(row: Row) -> dict[str, Any]:
    return {fact: row.get(fact) for fact in ("n", "v", "h", "dtype")}


def written(write: Callable[[Row], str], **facts: Any) -> Column:
    return lambda rows, way: cell(rows, write, impl=way, **facts)


def against_ours(**facts: Any) -> Column:
    """How many times as long as our automatic choice, by the medians."""

    def column(rows: Sequence[Row], way: str) -> str:
        mine, theirs = (select(rows, impl=name, **facts) for name in (OURS, way))
        if way.startswith(OURS) or not mine or not theirs or failure(mine[0]) or failure(theirs[0]):
            return ""
        ratio = theirs[0]["seconds_median"] / mine[0]["seconds_median"]
        return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2f}x"

    return column


def memory_of(row: Row) -> str:
    return size(row["extra_bytes"]) if "extra_bytes" in row else ""


def share_of(row: Row) -> str:
    """Of the hardware limit, in per cent."""
    return f"{100 * row['limit_share']:.0f} %" if "limit_share" in row else ""


def error_of(row: Row) -> str:
    return f"{row['error']:.0e}" if "error" in row else ""


def of_ways(rows: Sequence[Row], columns: Mapping[str, Column]) -> str:
    """A line for every way that has anything to say."""
    lines = [[way, *(write(rows, way) for write in columns.values())] for way in names(rows, "impl")]
    return table(["", *columns], [line for line in lines if any(line[1:])])


def by_size(rows: Sequence[Row], write: Callable[[Row], str] = time_of, **facts: Any) -> dict[str, Column]:
    """A column for every size: of times, or what else."""
    sizes = {size_of(row): same_size(row) for row in select(rows, **facts)}
    return {name: written(write, **facts, **same) for name, same in sizes.items()}


def main_size(rows: Sequence[Row]) -> dict[str, Any]:
    """The size that everything was measured at: the first."""
    return same_size(rows[0])


def left_out(record: Record, case: str) -> str:
    """What the machine could not run, in one line; the record says why."""
    found = [name.removeprefix(f"{case}: ") for name in record.get("left_out", {}) if name.startswith(f"{case}: ")]
    return f"\nNot run here: {'; '.join(found)}.\n" if found else ""


def blocks_of(name: str, record: Record, blocks: Mapping[str, Callable[[Record], str]]) -> dict[str, Callable[[], str]]:
    """What may stand in the documentation, from this record, with its origin."""
    return {
        block.format(device=device_of(record)): lambda write=write: f"{write(record)}\n{origin(name, record)}"  # type: ignore[misc]
        for block, write in blocks.items()
    }


def bars(axes: Any, rows: Sequence[Row], groups: Mapping[str, Sequence[Row]], xlabel: str) -> None:
    """Seconds of every way, one bar per group, on a logarithmic axis."""
    ways = names(rows, "impl")
    height = 0.8 / max(1, len(groups))
    for number, (group, members) in enumerate(groups.items()):
        timed = [row for row in members if "seconds_median" in row]
        places = [ways.index(row["impl"]) + (number + 0.5) * height - 0.4 for row in timed]
        axes.barh(places, [1000 * row["seconds_median"] for row in timed], height, label=group)
    axes.set_yticks(range(len(ways)), ways, fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=xlabel)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
