"""The tables and pictures that a record of checkpointing draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.checkpoint_ways import DECREASING, NONE, PER_LAYER
from benchmarks.records import Record, Row, device_of, failure, names, select, size, table, time_of
from benchmarks.way_columns import blocks_of

DEVICES = ("cpu", "cuda")
COLORS = {
    "nova-kernels": ("#4c72b0", "nova_kernels"),
    "transformers": ("#dd8452", "Hugging Face"),
    "torch": ("#55a868", "PyTorch"),
}


def steps_table(record: Record) -> str:
    """A table for every length."""
    rows = select(record["rows"], case="step")
    parts = []
    for tokens in names(rows, "tokens"):
        part = select(rows, tokens=tokens)
        parts.append(
            f"{tokens:,} tokens through {part[0]['layers']} Llama layers of width {part[0]['h']:,}, {part[0]['dtype']}."
            f"\n\n{way_table(part)}"
        )
    return (
        "Peak: bytes alive above weights, gradients and token ids. Computed again: in forward passes through the\n"
        "layers. Budgets are shares of the peak without checkpointing; time is relative to it.\n\n" + "\n".join(parts)
    )


def way_table(rows: Sequence[Row]) -> str:
    whole = select(rows, impl=NONE.name)
    base = whole[0] if whole and not failure(whole[0]) else {}
    lines = []
    for row in rows:
        if why := failure(row):
            lines.append([row["impl"], why, "", "", "", ""])
            continue
        seconds = base.get("seconds_median")
        lines.append(
            [
                row["impl"],
                size(row["peak_bytes"]),
                f"{row['peak_bytes'] / base['peak_bytes']:.1%}".replace("%", " %") if base else "",
                f"{row['predicted_bytes'] / row['peak_bytes']:.4f}" if "predicted_bytes" in row else "",
                f"{row['recomputed']:.2f}",
                f"{row['seconds_median'] / seconds:.2f}x" if seconds else time_of(row),
            ]
        )
    return table(["", "peak", "of none", "predicted / measured", "computed again", "time"], lines)


def blocks_table(record: Record) -> str:
    rows = select(record["rows"], case="blocks")
    uniform = [row for row in rows if " k = " in row["impl"] and not failure(row)]
    best = min(uniform, key=lambda row: row["peak_bytes"])
    saved = ""
    for row in select(rows, impl=DECREASING.name):
        if not failure(row):
            percent = 100 * (1 - row["peak_bytes"] / best["peak_bytes"])
            saved = f" The plan takes {percent:.0f} % less than the best k ({best['impl'].split('k = ')[1]})."
    return f"{rows[0]['layers']} MLP blocks that keep n = 3 times their input.{saved}\n\n{way_table(rows)}"


def longest_table(record: Record) -> str:
    rows = select(record["rows"], case="longest")
    base = select(rows, impl=PER_LAYER.name)
    lines = []
    for row in rows:
        if why := failure(row):
            lines.append([row["impl"], why, "", "", ""])
            continue
        known = bool(base) and not failure(base[0])
        times = f"{row['tokens'] / base[0]['tokens']:.2f}x" if known else ""
        lines.append([row["impl"], f"{row['tokens']:,}", f"{row['too_many']:,}", times, time_of(row)])
    header = ["", "tokens that fit", "too many", "of Hugging Face", "one step"]
    return (
        f"The longest sequence that trains within {size(rows[0]['budget_bytes'])} for weights, gradients and\n"
        f"activations: {rows[0]['layers']} Llama layers of width {rows[0]['h']:,}, {rows[0]['dtype']}. Measured,\n"
        f"not predicted.\n\n{table(header, lines)}"
    )


BLOCKS: dict[str, Callable[[Record], str]] = {
    "checkpoint-steps-{device}": steps_table,
    "checkpoint-blocks-{device}": blocks_table,
    "checkpoint-longest-{device}": longest_table,
}


def blocks(name: str, record: Record) -> dict[str, Callable[[], str]]:
    return blocks_of(name, record, BLOCKS)


def measured_steps(record: Record) -> list[Row]:
    """Of the greatest length."""
    rows = select(record["rows"], case="step")
    return [row for row in select(rows, tokens=names(rows, "tokens")[-1]) if not failure(row)]


def unit_of(record: Record) -> tuple[float, str]:
    return (1e9, "GB") if device_of(record) == "cuda" else (1e6, "MB")


def label_of(row: Row) -> str:
    """Ours are known by their color."""
    label: str = row["impl"]
    return label.removeprefix("nova_kernels, ")


def ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def draw_memory(axes: Any, record: Record) -> None:
    """Peak over plan: dots are measured, marks are predicted."""
    rows, (scale, unit) = measured_steps(record), unit_of(record)
    for place, row in enumerate(rows):
        axes.plot(row["peak_bytes"] / scale, place, "o", color=COLORS[row["package"]][0])
    marks = [(row["predicted_bytes"] / scale, place) for place, row in enumerate(rows) if "predicted_bytes" in row]
    axes.plot(*zip(*marks, strict=True), "|", color="black", markersize=16, linestyle="none", label="predicted")
    for color, package in COLORS.values():
        axes.plot([], [], "o", color=color, label=package)
    axes.set_yticks(range(len(rows)), [label_of(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=f"{unit} at the worst moment, measured; {rows[0]['tokens']:,} tokens")
    ticks(axes.xaxis)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def draw_time(axes: Any, record: Record) -> None:
    """Time over memory: the way to be is down and to the left."""
    rows, (scale, unit) = measured_steps(record), unit_of(record)
    fastest = min(row["seconds_median"] for row in rows)
    for row in rows:
        place = (row["peak_bytes"] / scale, row["seconds_median"] / fastest)
        axes.plot(*place, marker="o", color=COLORS[row["package"]][0], linestyle="none")
        axes.annotate(label_of(row), place, fontsize=6, xytext=(4, 3), textcoords="offset points")
    for color, package in COLORS.values():
        axes.plot([], [], marker="o", color=color, linestyle="none", label=package)
    axes.set(xscale="log", xlabel=f"{unit} at the worst moment", ylabel="time of a step, relative to the fastest")
    ticks(axes.xaxis)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


DRAWINGS: dict[str, tuple[Callable[[Any, Record], None], tuple[float, float]]] = {
    "docs/kernels/checkpoint-memory-{device}.svg": (draw_memory, (7.0, 4.0)),
    "docs/kernels/checkpoint-time-{device}.svg": (draw_time, (7.0, 4.5)),
}
