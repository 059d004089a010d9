"""The tables and pictures that a record of packing draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.records import Record, Row, cell, names, origin, select, table, time_of

DEVICES = ("cpu",)
OURS = "nova_kernels"
SIZES = (10_000, 100_000, 1_000_000)
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3")


def over_bound(row: Row) -> str:
    return f"{row['packs'] - row['lower_bound']:,}"


def packs_of(row: Row) -> str:
    return f"{row['packs']:,}"


def percent(row: Row, digits: int = 2) -> str:
    """A utilisation in per cent, never rounded up."""
    scale = 10**digits
    return f"{int(row['utilization'] * 100 * scale + 1e-6) / scale:.{digits}f}"


def share(row: Row, digits: int = 2) -> str:
    return f"{percent(row, digits)} %"


def times_ours(rows: Sequence[Row], row: Row, *same: str) -> str:
    """How many times as long as ours on the same input, by the medians."""
    ours = select(rows, packer=OURS, **{name: row[name] for name in same})
    if not ours or row["packer"].startswith(OURS):
        return ""
    ratio = row["seconds_median"] / ours[0]["seconds_median"]
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def plan_table(record: Record) -> str:
    rows = select(record["rows"], case="plan", list="chat")
    bounds = {row["samples"]: row["lower_bound"] for row in select(rows, capacity=8192)}
    header = ["", *(f"{size:,}" for size in SIZES), "slower than ours", "packs above the bound", "utilisation"]
    lines = []
    for packer in names(rows, "packer"):
        main = select(rows, packer=packer, capacity=8192)
        largest = main[-1]
        times = [cell(main, time_of, samples=size) for size in SIZES]
        ratio = times_ours(rows, largest, "samples", "capacity")
        lines.append([packer, *times, ratio, over_bound(largest), share(largest, 3)])
    return (
        "Time for a plan of chat lengths at capacity 8192, by number of samples; the three columns on the right are\n"
        f"for the largest plan of the line. Lower bounds: {' / '.join(f'{n:,}' for n in bounds.values())} packs.\n\n"
        + table(header, lines)
    )


def capacities_table(record: Record) -> str:
    rows = select(record["rows"], case="plan", list="chat", samples=100_000)
    title = "100,000 chat samples: time and packs (their lower bound), by capacity.\n\n"
    return title + _by_column(rows, "capacity", sorted(names(rows, "capacity")), (time_of, packs_of))


def clustered_table(record: Record) -> str:
    rows = select(record["rows"], case="plan", list="clustered")
    title = "100,000 clustered samples: time, packs (their lower bound) and utilisation, by capacity.\n\n"
    return title + _by_column(rows, "capacity", sorted(names(rows, "capacity")), (time_of, packs_of, share))


def real_table(record: Record) -> str:
    rows = select(record["rows"], case="plan", capacity=8192)
    lists = [name for name in names(rows, "list") if name not in ("chat", "clustered")]
    title = "Real lengths at capacity 8192: time and packs (their lower bound).\n\n"
    return title + _by_column(rows, "list", lists, (time_of, packs_of))


def _by_column(rows: Sequence[Row], fact: str, values: Sequence[Any], write: Sequence[Callable[[Row], str]]) -> str:
    """A line per packer, and the columns of `write` for each value of a fact."""
    header = [""]
    for value in values:
        one = select(rows, **{fact: value})[0]
        name = f"{value}, {one['samples']:,} samples" if fact == "list" else str(value)
        second = f"packs ({one['lower_bound']:,})"
        header += [name, second, "utilisation"][: len(write)]
    lines = []
    for packer in names(rows, "packer"):
        line = [cell(rows, fill, packer=packer, **{fact: value}) for value in values for fill in write]
        if any(line):
            lines.append([packer, *line])
    return table(header, lines)


def utilization_table(record: Record) -> str:
    rows = select(record["rows"], case="utilization")
    lists = names(rows, "list")
    counts = {name: select(rows, list=name)[0]["samples"] for name in lists}
    lines = []
    for method in names(rows, "method"):
        pairs = [
            " / ".join(cell(rows, percent, method=method, list=name, capacity=capacity) for capacity in (4096, 8192))
            for name in lists
        ]
        lines.append([method, *pairs])
    title = "Utilisation in per cent, at capacity 4096 / 8192, by list of lengths and number of samples.\n\n"
    return title + table(["", *(f"{name}, {counts[name]:,}" for name in lists)], lines)


def collate_table(record: Record) -> str:
    rows = select(record["rows"], case="collate")
    kinds = names(rows, "kind")

    def compared(row: Row) -> str:
        return f"{time_of(row)} {times_ours(rows, row, 'kind')}".strip()

    lines = []
    for packer in names(rows, "packer"):
        shares = [row["limit_share"] for row in select(rows, packer=packer) if "limit_share" in row]
        best = f"{100 * max(shares):.1f} %" if shares else ""
        lines.append([packer, *(cell(rows, compared, packer=packer, kind=kind) for kind in kinds), best])
    title = (
        f"{rows[0]['samples']} chat samples of {rows[0]['tokens']:,} tokens into one row, by the type of the samples,\n"
        "how many times slower than `nova_kernels`, and bytes moved per second as a share of a copy in main memory.\n\n"
    )
    return title + table(["", *kinds, "of the copy rate"], lines)


def stream_table(record: Record) -> str:
    rows = select(record["rows"], case="stream")
    cases = list(dict.fromkeys((row["list"], row["capacity"]) for row in rows))
    lines = []
    for window in names(rows, "window"):
        found = [select(rows, window=window, list=name, capacity=capacity)[0] for name, capacity in cases]
        chat = max(found, key=lambda row: row["samples"])
        rate = f"{chat['samples'] / chat['seconds_median'] / 1e6:.1f} M/s"
        lines.append([str(window), rate, *map(share, found)])
    title = (
        "A stream with W samples waiting: chat samples planned per second, and utilisation by list and capacity.\n\n"
    )
    return title + table(["W", "speed", *(f"{name}, {capacity}" for name, capacity in cases)], lines)


def summary_table(record: Record) -> str:
    """What the README says: ours, and the way most trainers take today."""
    rows = record["rows"]

    def pair(write: Callable[[Row], str], other: str, **facts: Any) -> list[str]:
        theirs = [
            f"{write(row)} ({row['seconds_median'] / ours['seconds_median']:,.0f}x, {other})"
            for ours in select(rows, packer=OURS, **facts)
            for row in select(rows, packer=other, **facts)
        ]
        return [cell(rows, write, packer=OURS, **facts), *(theirs or [""])]

    def plan_of(row: Row) -> str:
        return f"{time_of(row)}, {over_bound(row)} packs above the bound"

    def shared(method: str) -> str:
        return cell(rows, share, case="utilization", list="chat", capacity=8192, method=method)

    most = max(names(select(rows, case="plan", list="chat", packer=OURS), "samples"))
    clustered = {"case": "plan", "list": "clustered", "capacity": 16384}
    lines = [
        [
            f"plan of {most:,} chat samples, 8192 tokens a pack",
            *pair(plan_of, "TRL pack_dataset", case="plan", samples=most, capacity=8192),
        ],
        ["share filled, 100,000 lengths near a quarter of 16384 tokens", *pair(share, "TRL pack_dataset", **clustered)],
        [
            "64 chat samples (NumPy) into one row",
            *pair(time_of, "transformers DataCollatorWithFlattening", case="collate", kind="numpy int32"),
        ],
        [
            "share of real tokens, chat, 8192 tokens",
            f"{shared('packed, 256 samples waiting')} (256 samples waiting)",
            f"{shared('padded to the longest of 64')} (64 samples padded to the longest)",
        ],
    ]
    return table(["", "nova_kernels", "elsewhere"], lines)


BLOCKS: dict[str, Callable[[Record], str]] = {
    "packing-summary": summary_table,
    "packing-plan": plan_table,
    "packing-capacities": capacities_table,
    "packing-clustered": clustered_table,
    "packing-real": real_table,
    "packing-utilization": utilization_table,
    "packing-collate": collate_table,
    "packing-stream": stream_table,
}


def blocks(name: str, record: Record) -> dict[str, Callable[[], str]]:
    """What may stand in the documentation, from this record, with its origin."""
    return {
        block: lambda write=write: f"{write(record)}\n{origin(name, record)}"  # type: ignore[misc]
        for block, write in BLOCKS.items()
    }


def draw_plan(axes: Any, record: Record) -> None:
    rows = select(record["rows"], case="plan", list="chat", capacity=8192)
    for packer in names(rows, "packer"):
        mine = select(rows, packer=packer)
        ours = packer == OURS
        axes.plot(
            [row["samples"] for row in mine],
            [row["seconds_median"] for row in mine],
            marker="o",
            linewidth=2.5 if ours else 1.0,
            color="black" if ours else None,
            label=packer,
            zorder=3 if ours else 2,
        )
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="seconds for a plan, capacity 8192")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def draw_utilization(axes: Any, record: Record) -> None:
    rows = select(record["rows"], case="utilization", capacity=8192)
    methods, lists = names(rows, "method"), names(rows, "list")
    height = 0.8 / len(lists)
    for number, name in enumerate(lists):
        mine = select(rows, list=name)
        places = [methods.index(row["method"]) + (number + 0.5) * height - 0.4 for row in mine]
        axes.barh(places, [100 * row["utilization"] for row in mine], height, label=name, color=COLORS[number])
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="tokens that are real, % of those computed, capacity 8192")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(lists), frameon=False)


DRAWINGS: dict[str, tuple[Callable[[Any, Record], None], tuple[float, float]]] = {
    "docs/kernels/packing-plan.svg": (draw_plan, (8.0, 4.0)),
    "docs/kernels/packing-utilization.svg": (draw_utilization, (8.0, 5.0)),
}
