"""Records: what a benchmark run leaves behind, and the documentation that is written from it.

A record is one JSON file per (op, machine, commit) in results/: {op, date, machine, versions, left_out, rows}, a row
being the facts of a case, seconds_min, seconds_median and rounds, or why it `failed` instead of times; left_out says
what could not run on the machine, and why. It holds numbers and names only. A page of the documentation has blocks

    <!-- benchmarks: NAME -->
    <!-- /benchmarks -->

whose content is written from the op's newest record of the device that offers NAME (<op>_tables.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
Row = Mapping[str, Any]

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"
BLOCK = re.compile(r"(<!-- benchmarks: ([\w-]+) -->\n)(.*?)(<!-- /benchmarks -->)", re.DOTALL)


def trim(raw: Mapping[str, Any], op: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """The record of pytest-benchmark's JSON; what failed has no times there and so no row."""
    found = [bench["extra_info"] | _times(bench) for bench in raw["benchmarks"]]
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "op": op,
        "date": now,
        "machine": dict(raw["machine_info"]),
        "versions": dict(versions),
        "left_out": {f"{row['case']}: {row['impl']}": row["left_out"] for row in found if "left_out" in row},
        "rows": [row for row in found if "left_out" not in row],
    }


def _times(bench: Mapping[str, Any]) -> dict[str, Any]:
    """The clock's, unless the case brings its own (CUDA events); none of what failed."""
    info, stats = bench["extra_info"], bench["stats"]
    if "failed" in info:
        return {}
    return {
        "seconds_min": _short(info.get("seconds_min", stats["min"])),
        "seconds_median": _short(info.get("seconds_median", stats["median"])),
        "rounds": info.get("rounds", stats["rounds"]),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def lines(record: Record) -> Iterator[str]:
    """What a run says on the terminal: the median of each row and its facts, what failed, what was left out."""
    times = ("seconds_min", "seconds_median", "rounds", "failed", "package")
    for row in record["rows"]:
        facts = ", ".join(f"{name} {value}" for name, value in row.items() if name not in times)
        yield f"{row.get('failed') or duration(row['seconds_median']):>10}  {facts}"
    yield from (f"left out: {name}: {why}" for name, why in record["left_out"].items())


def file_name(record: Record) -> str:
    """<op>-<machine>-<commit>.json"""
    machine = record["machine"]
    kind = machine.get("gpu") or f"{machine['cpu']} {machine['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return f"{record['op']}-{slug}-{machine['commit']}.json"


def save(record: Record, folder: Path) -> Path:
    """Write the record, one line per row."""
    head = {name: value for name, value in record.items() if name != "rows"}
    rows = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    return path


def newest(op: str, folder: Path, device: str = "cpu") -> tuple[str, Record] | None:
    """(file name, record) of the op's last run on a kind of device; None where there is none."""
    found = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob(f"{op}-*.json"))]
    of_device = [item for item in found if device_of(item[1]) == device]
    return max(of_device, key=lambda item: item[1]["date"], default=None)


def device_of(record: Record) -> str:
    """cpu or cuda."""
    return record["machine"].get("device", "cpu")


def select(rows: Sequence[Row], **facts: Any) -> list[Row]:
    """The rows with these facts, in the order of the run."""
    return [row for row in rows if all(row.get(name) == value for name, value in facts.items())]


def names(rows: Sequence[Row], fact: str) -> list[Any]:
    """The values of a fact, in the order of the run."""
    return list(dict.fromkeys(row[fact] for row in rows if fact in row))


def cell(rows: Sequence[Row], write: Callable[[Row], str], **facts: Any) -> str:
    """What `write` says of the row with these facts; nothing where there is none, and why where it failed."""
    found = select(rows, **facts)
    return "" if not found else failure(found[0]) or write(found[0])


def failure(row: Row) -> str:
    """In a word or two; the record has the whole message."""
    failed = row.get("failed", "")
    return failed if failed in ("", "out of memory") else "failed"


def time_of(row: Row) -> str:
    return duration(row["seconds_median"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    raise ValueError(f"duration: {seconds} is not a time")


def size(count: float) -> str:
    """Bytes, three digits and a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            value = count / scale
            return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"
    return f"{count / 1e3:.0f} kB"


def origin(name: str, record: Record) -> str:
    """Where the numbers above are from, in one line."""
    machine = record["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    return f"{where}; torch {machine['torch']}, Python {machine['python']}: `{RESULTS}/{name}`.\n"


def pages(root: Path) -> Iterator[Path]:
    yield root / "README.md"
    yield from sorted((root / "docs").rglob("*.md"))


def fill(page: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """The page with every block written anew."""

    def write(match: re.Match[str]) -> str:
        if match[2] not in blocks:
            raise ValueError(f"no table {match[2]!r} in the records; there are {', '.join(sorted(blocks)) or 'none'}")
        return f"{match[1]}{blocks[match[2]]()}{match[4]}"

    return BLOCK.sub(write, page)
