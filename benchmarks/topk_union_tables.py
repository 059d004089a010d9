"""The tables of topk_union: how many rows of the weight a block of text needs, and how much probability they hold."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.records import Record, names, select, table
from benchmarks.way_columns import blocks_of

DEVICES = ("cpu",)
KEPT = 500
TEXTS = ("mixed", "english", "code", "chinese")


def union_table(record: Record) -> str:
    """Mean |U| by size of the block."""
    rows = select(record["rows"], case="union", k=KEPT)
    sizes = names(rows, "block")

    def line(name: str, **facts: object) -> list[str]:
        found = select(rows, **facts)
        return [name, *(f"{int(row['mean']):,}" for size in sizes for row in select(found, block=size)[:1])]

    trained = sorted({row["trained"] for row in rows})
    lines = [line(f"{text}, consecutive", text=text, order="consecutive", trained=1.0) for text in TEXTS]
    orders = [order for order in names(rows, "order") if order != "consecutive"]
    lines += [line(f"mixed, by {order}", text="mixed", order=order, trained=1.0) for order in orders]
    lines += [
        line(f"mixed, after {share:.0%} of the training", text="mixed", order="consecutive", trained=share)
        for share in trained[:-1]
    ]
    model = record["model"]
    parameters, seen = (f"{model[name] / 1e6:.1f} M" for name in ("parameters", "tokens_seen"))
    return (
        f"Rows of the weight that a block of tokens needs (mean), K = {KEPT} of V = {model['vocabulary']:,}:\n"
        f"a model of {parameters} parameters that saw {seen} tokens.\n\n"
        + table(["tokens of a block", *map(str, sizes)], lines)
    )


def coverage_table(record: Record) -> str:
    """The reference's mass in its top K."""
    rows = select(record["rows"], case="coverage", trained=1.0)
    kept = names(rows, "k")
    lines = [
        [
            text,
            *(
                f"{row['mean']:.3f} ({row['worst_5_percent']:.2f})"
                for k in kept
                for row in select(rows, text=text, k=k)
            ),
        ]
        for text in TEXTS
    ]
    losses = ", ".join(f"{text} {row['loss']:.2f}" for text in TEXTS for row in select(rows, text=text)[:1])
    return (
        "The reference's probability of its K most likely tokens: mean, and of the worst twentieth of the tokens.\n"
        f"The same model; its losses are {losses} nats; a better one has more.\n\n"
        + table(["K", *map(str, kept)], lines)
    )


BLOCKS: dict[str, Callable[[Record], str]] = {
    "topk_union-rows-{device}": union_table,
    "topk_union-coverage-{device}": coverage_table,
}
DRAWINGS: dict[str, object] = {}


def blocks(name: str, record: Record) -> dict[str, Callable[[], str]]:
    """The blocks of the documentation that this record fills."""
    return blocks_of(name, record, BLOCKS)
