"""The tables and pictures that a record of the top-K KL draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.records import Record, Row, cell, names, select, time_of
from benchmarks.way_columns import (
    Column,
    against_ours,
    bars,
    blocks_of,
    by_size,
    error_of,
    left_out,
    main_size,
    memory_of,
    of_ways,
    same_size,
    share_of,
    size_of,
    written,
)

DEVICES = ("cpu", "cuda")


def select_table(record: Record) -> str:
    rows = select(record["rows"], case="select", logits="narrow")
    main = main_size(rows)
    same_dtype = select(rows, dtype=main["dtype"])
    columns = {
        **by_size(same_dtype),
        "slower than ours": against_ours(**main),
        "of the copy rate": written(share_of, **main),
        "extra memory": written(memory_of, **main),
    }
    return (
        f"Selecting the 500 largest of V normal logits in N rows (N x V, {main['dtype']}): time; the three columns on\n"
        f"the right are for {size_of(rows[0])}. Ours gives ids in order, ties to the lowest, and the log-sum-exp.\n"
        f"\n{of_ways(same_dtype, columns)}{left_out(record, 'select')}"
    )


def logits_table(record: Record) -> str:
    every = select(record["rows"], case="select")
    main = main_size(every)
    rows = select(every, n=main["n"], v=main["v"])
    dtypes = names(rows, "dtype")

    def times(kind: str) -> Column:
        return lambda found, way: " / ".join(
            text for dtype in dtypes if (text := cell(found, time_of, impl=way, logits=kind, dtype=dtype))
        )

    return f"The same at {size_of(rows[0])} by distribution of the logits, {' / '.join(dtypes)}.\n\n" + of_ways(
        rows, {kind: times(kind) for kind in names(rows, "logits")}
    )


def kl_table(record: Record) -> str:
    return _from_logits(record, "kl", "sparse", "KL and gradients from logits, the reference's top K given")


def selected_table(record: Record) -> str:
    return _from_logits(
        record, "kl, selected inside", "forward", "The same from the logits of both, selection included"
    )


_NAMES = {"sparse": "forward with its sparse gradient", "forward": "forward"}


def _from_logits(record: Record, case: str, step: str, title: str) -> str:
    rows = select(record["rows"], case=case)
    main = main_size(rows)
    columns: dict[str, Column] = {
        "forward": written(time_of, step="forward", **main),
        "with its sparse gradient": written(time_of, step="sparse", **main),
        "with a dense gradient": written(time_of, step="dense", **main),
        "slower than ours": against_ours(step="dense", **main),
        "of the copy rate": written(share_of, step="dense", **main),
        "extra memory": written(memory_of, step="dense", **main),
        "error": written(error_of, step="dense", **main),
    }
    same_dtype = select(rows, dtype=main["dtype"])
    return (
        f"{title}: {size_of(rows[0])}, {main['dtype']}. The columns from `slower`\non are for the dense gradient.\n"
        f"\n{of_ways(rows, columns)}{left_out(record, case)}\nThe {_NAMES[step]}, by size:\n\n"
        + of_ways(same_dtype, by_size(same_dtype, step=step))
    )


def linear_table(record: Record) -> str:
    rows = select(record["rows"], case="linear kl")
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
        f"KL from hidden states, {size_of(rows[0])} (N x V x H), {main['dtype']}, K = 500. The ids of 512 rows\n"
        f"come to {100 * rows[0].get('union_share', 0):.0f} % of the vocabulary.\n\n{of_ways(rows, columns)}"
        + left_out(record, "linear kl")
    )


def linear_sizes_table(record: Record) -> str:
    rows = select(record["rows"], case="linear kl")
    both, frozen = (select(rows, step=step) for step in ("both", "frozen"))
    return (
        f"KL from hidden states, forward + backward, by N x V x H:\n\n{of_ways(both, by_size(both))}\n"
        f"With a frozen head:\n\n{of_ways(frozen, by_size(frozen))}\n"
        f"Extra memory of the first table:\n\n{of_ways(both, by_size(both, memory_of))}"
    )


BLOCKS: dict[str, Callable[[Record], str]] = {
    "topk_kl-select-{device}": select_table,
    "topk_kl-logits-{device}": logits_table,
    "topk_kl-kl-{device}": kl_table,
    "topk_kl-selected-{device}": selected_table,
    "topk_kl-linear-{device}": linear_table,
    "topk_kl-linear-sizes-{device}": linear_sizes_table,
}


def blocks(name: str, record: Record) -> dict[str, Callable[[], str]]:
    return blocks_of(name, record, BLOCKS)


def draw_select(axes: Any, record: Record) -> None:
    every = select(record["rows"], case="select")
    rows = select(every, **main_size(every))
    groups = {kind: select(rows, logits=kind) for kind in names(rows, "logits")}
    bars(axes, rows, groups, f"ms to select 500 of each row, {size_of(rows[0])}, {rows[0]['dtype']}")


def draw_linear(axes: Any, record: Record) -> None:
    rows = select(record["rows"], case="linear kl", step="both")
    sizes: dict[str, dict[str, Any]] = {size_of(row): same_size(row) for row in rows}
    groups: dict[str, list[Row]] = {name: select(rows, **same) for name, same in sizes.items()}
    bars(axes, rows, groups, "ms for the KL from hidden states, forward + backward (N x V x H)")


DRAWINGS: dict[str, tuple[Callable[[Any, Record], None], tuple[float, float]]] = {
    "docs/kernels/topk_kl-select-{device}.svg": (draw_select, (8.0, 4.0)),
    "docs/kernels/topk_kl-linear-{device}.svg": (draw_linear, (8.0, 5.0)),
}
