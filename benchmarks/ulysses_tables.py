"""The tables and the picture that a record of Ulysses draws; and one without a record: a model of links."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import ulysses_links
from benchmarks.records import Record, Row, device_of, duration, failure, names, select, size, table, time_of
from benchmarks.way_columns import (
    Column,
    against_ours,
    bars,
    blocks_of,
    error_of,
    memory_of,
    of_ways,
    share_of,
    written,
)

DEVICES = ("cpu", "cuda")
PARTS = ("pack", "exchange", "unpack", "gradients")


def shape_of(row: Row) -> str:
    return f"{row['tokens']:,} tokens, {row['heads']} heads of width {row['width']}, {row['dtype']}"


def main_of(record: Record) -> dict[str, Any]:
    """The case that everything was measured at: the first emulated one."""
    first = select(record["rows"], case="emulated")[0]
    return {fact: first[fact] for fact in ("case", "ranks", "heads")}


def parts_table(record: Record) -> str:
    main = main_of(record)
    rows = select(record["rows"], **main)
    columns: dict[str, Column] = {}
    for rotated, label in (("no", ""), ("yes", ", rotated")):
        facts = {**main, "rotated": rotated}
        for step in ("pack", "gradients") if rotated == "yes" else PARTS:
            columns[step + label] = written(time_of, step=step, **facts)
            columns["of a copy" + " " * len(columns)] = written(share_of, step=step, **facts)
    return (
        f"What a rank does, P = {main['ranks']}: {shape_of(rows[0])}.\n"
        "The exchange, of q, k, v, is a copy on the device. `of a copy`: the least bytes at the rate of a copy from\n"
        f"memory, over the time; above 100 % caches helped.\n\n{of_ways(rows, columns)}"
    )


def layer_table(record: Record) -> str:
    """Forward + backward by the number of ranks."""
    main = main_of(record)
    rows = select(record["rows"], case="emulated", step="both", heads=main["heads"])
    columns: dict[str, Column] = {}
    for ranks in sorted(names(rows, "ranks")):
        facts = {"step": "both", "ranks": ranks, "rotated": "no"}
        columns[f"P = {ranks}"] = written(time_of, **facts)
        columns["slower than ours" + " " * len(columns)] = against_ours(**facts)
    facts = {"step": "both", "ranks": main["ranks"]}
    columns[f"P = {main['ranks']}, rotated"] = written(time_of, rotated="yes", **facts)
    columns["slower than ours" + " " * len(columns)] = against_ours(rotated="yes", **facts)
    columns["collectives"] = written(lambda row: str(row["collectives"]), rotated="no", **facts)
    columns["sent by a rank"] = written(lambda row: size(row["sent_bytes"]), rotated="no", **facts)
    columns["extra memory"] = written(memory_of, rotated="no", **facts)
    columns["error"] = written(error_of, rotated="yes", **facts)
    return (
        f"Forward + backward of a layer without its attention: {shape_of(rows[0])}.\n"
        "Emulated: one rank of P computes, an all-to-all is a copy on the device. The columns from `collectives` on\n"
        f"are for P = {main['ranks']}; the error is relative to float64.\n\n{of_ways(rows, columns)}"
    )


def gloo_table(record: Record) -> str:
    """Two processes of one machine."""
    rows = select(record["rows"], case="gloo")
    if not rows:
        return f"Processes of one machine exchange over gloo on a CPU only, not on {device_of(record)}.\n"
    columns: dict[str, Column] = {}
    for heads in names(rows, "heads"):
        for step, label in (("exchange", "exchange"), ("both", "forward + backward")):
            columns[f"{label}, {heads} heads"] = written(time_of, step=step, heads=heads)
            columns["slower than ours" + " " * len(columns)] = against_ours(step=step, heads=heads)
    return (
        f"{rows[0]['ranks']} processes over gloo, {rows[0]['tokens']:,} tokens, width {rows[0]['width']}, "
        f"{rows[0]['dtype']}. The exchange is that of q, k, v.\n\n{of_ways(rows, columns)}"
    )


def links_table(record: Record) -> str:
    """The same whatever was measured."""
    layer = ulysses_links.LAYER
    lines = []
    for ranks in ulysses_links.RANKS:
        near = ulysses_links.traffic(layer, ranks, node=ranks)
        far = ulysses_links.traffic(layer, ranks)
        lines.append(
            [
                f"P = {ranks}",
                size(near.sent_bytes),
                size(near.all_gather_bytes),
                duration(near.seconds),
                duration(near.permutes_seconds),
                duration(far.seconds),
                duration(far.permutes_seconds),
            ]
        )
    header = [
        "",
        "sent by a rank",
        "all-gather of k, v",
        "NVLink, 2 + 2 collectives",
        "4 + 4",
        f"nodes of {ulysses_links.NODE}, 2 + 2",
        "4 + 4 ",
    ]
    latencies = ulysses_links.LATENCY
    return (
        f"**Simulated, not measured.** The exchanges of one layer of {layer.name}, forward + backward, "
        f"{layer.tokens:,} tokens in\nbf16: bytes over {ulysses_links.NVLINK / 1e9:.0f} GB/s (NVLink) or "
        f"{ulysses_links.NETWORK / 1e9:.0f} GB/s (between nodes), and {duration(latencies['nvlink'])} or "
        f"{duration(latencies['network'])} a collective,\nassumed. Nothing is hidden behind computing.\n\n"
        f"{table(header, lines)}"
    )


BLOCKS: dict[str, Callable[[Record], str]] = {
    "ulysses-parts-{device}": parts_table,
    "ulysses-layer-{device}": layer_table,
    "ulysses-gloo-{device}": gloo_table,
    "ulysses-links-{device}": links_table,
}


def blocks(name: str, record: Record) -> dict[str, Callable[[], str]]:
    """The model does not come from the record, and does not say so."""
    model = f"{links_table(record)}\nBy `benchmarks/ulysses_links.py`.\n"
    return blocks_of(name, record, BLOCKS) | {f"ulysses-links-{device_of(record)}": lambda: model}


def draw(axes: Any, record: Record) -> None:
    main = main_of(record)
    rows = [row for row in select(record["rows"], **main, rotated="no") if not failure(row)]
    bars(axes, rows, {step: select(rows, step=step) for step in (*PARTS, "both")}, f"ms, a rank of {main['ranks']}")


DRAWINGS: dict[str, tuple[Callable[[Any, Record], None], tuple[float, float]]] = {
    "docs/kernels/ulysses-{device}.svg": (draw, (6.0, 3.5)),
}
