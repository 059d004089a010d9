"""python -m benchmarks <op>: measure and save a record; python -m benchmarks tables: write the documentation's tables.

    python -m benchmarks packing [--device cpu|cuda] [--quick]     --quick: small sizes, nothing is saved
                         [--output FOLDER] [--commit NAME]         --commit: where git does not know it
    python -m benchmarks.topk_union | topk_paths                   scripts of their own; each file says what it does
    python -m benchmarks tables [--check]                          --check: fail where one is not up to date

Real length lists are read from the folder NOVA_DATA; peers that are not installed are skipped by name. A record is
saved even where a case of ours failed, but then the exit status is not 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import records

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
ONE_THREAD = dict.fromkeys((*THREADS, "TORCHINDUCTOR_COMPILE_THREADS"), "1")


def ops() -> list[str]:
    """The ops that have a benchmark."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def recorded() -> list[str]:
    """Whatever has tables: the ops, and measurements that are scripts of their own."""
    return sorted(path.name.removesuffix("_tables.py") for path in Path(__file__).parent.glob("*_tables.py"))


def measure(op: str, device: str, *, quick: bool, output: Path, commit: str | None) -> int:
    """Run bench_<op>.py in a process of its own; 0 if every case was right."""
    if find_spec("pytest_benchmark") is None:
        sys.exit("benchmarks: pytest-benchmark is missing; install it, e.g. with pip install pytest-benchmark")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{op}.py", "--benchmark-only", "-q"]
        command += [f"--benchmark-json={raw}", f"--device={device}", *(["--quick"] if quick else [])]
        command += ["--benchmark-quiet"]  # its table knows nothing of CUDA events
        command += [f"--commit={commit}"] if commit else []
        environment = os.environ | ONE_THREAD | {"HF_HUB_OFFLINE": "1"}
        failed = subprocess.run(command, cwd=records.ROOT, env=environment, check=False).returncode
        if not raw.exists():
            return failed
        record = records.trim(json.loads(raw.read_text(encoding="utf-8")), op, {})
    record["versions"] = versions({row["package"] for row in record["rows"] if "package" in row})
    sys.stdout.writelines(f"{line}\n" for line in records.lines(record))
    if not quick:
        sys.stdout.write(f"{records.save(record, output)}\n")
    return failed


def versions(packages: set[str]) -> dict[str, str]:
    """The versions of what was compared, by distribution."""
    found = {}
    for package in sorted(packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def stale(root: Path, *, write: bool) -> Iterator[str]:
    """The pages and pictures that are not what the newest records say; written anew if `write`."""
    blocks: dict[str, Callable[[], str]] = {}
    for op in recorded():
        tables = import_module(f"benchmarks.{op}_tables")
        for device in tables.DEVICES:
            found = records.newest(op, root / records.RESULTS, device)
            blocks |= tables.blocks(*found) if found else unmeasured(op, tables, device)
            if found:
                yield from stale_drawings(root, tables, *found, write=write)
    for path in records.pages(root):
        old = path.read_text(encoding="utf-8")
        try:
            new = records.fill(old, blocks)
        except ValueError as error:
            sys.exit(f"benchmarks: {path.relative_to(root)}: {error}")
        if new != old:
            yield path.relative_to(root).as_posix()
            if write:
                path.write_text(new, encoding="utf-8")


def unmeasured(op: str, tables: Any, device: str) -> dict[str, Callable[[], str]]:
    """What stands in the place of the tables of a device that the op has not been measured on."""
    text = f"Not yet measured. `python -m benchmarks {op} --device {device}` does it.\n"
    return {name.format(device=device): lambda: text for name in tables.BLOCKS}


def stale_drawings(root: Path, tables: Any, name: str, record: records.Record, *, write: bool) -> Iterator[str]:
    """A picture is up to date if it names the record it was drawn from."""
    for template, (draw, size) in tables.DRAWINGS.items():
        file = template.format(device=records.device_of(record))
        path = root / file
        title = f"{path.name} from {name}, {record['date']}"
        if path.exists() and title in path.read_text(encoding="utf-8"):
            continue
        yield file
        if write:
            save_drawing(path, title, size, lambda axes, draw=draw: draw(axes, record))


def save_drawing(path: Path, title: str, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """The same bytes for the same record."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "nova", "svg.fonttype": "none", "axes.spines.top": False}):
        figure, axes = plt.subplots(figsize=size)
        axes.spines["right"].set_visible(False)
        axes.grid(True, linewidth=0.4, alpha=0.5)
        axes.set_axisbelow(True)
        draw(axes)
        metadata = {"Title": title, "Date": None, "Creator": None}
        figure.savefig(path, format="svg", metadata=metadata, bbox_inches="tight")
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for op in ops():
        command = commands.add_parser(op, help=f"run bench_{op}.py")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--quick", action="store_true", help="small sizes, nothing is saved")
        command.add_argument(
            "--output", type=Path, default=records.ROOT / records.RESULTS, help="where the record goes"
        )
        command.add_argument("--commit", help="the commit that is measured, where git does not know")
    tables = commands.add_parser("tables", help="write the tables and pictures of the documentation")
    tables.add_argument("--check", action="store_true", help="write nothing, fail where something is not up to date")
    given = parser.parse_args(arguments)
    if given.command != "tables":
        return measure(
            given.command, given.device, quick=given.quick, output=given.output.resolve(), commit=given.commit
        )
    changed = list(stale(records.ROOT, write=not given.check))
    verb = "not up to date" if given.check else "written"
    sys.stdout.write("".join(f"{verb}: {path}\n" for path in changed))
    return int(given.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
