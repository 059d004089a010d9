"""Split data files into NAME_train.jsonl and NAME_heldout.jsonl, the last rows being held out.

python recipes/real/hold_out.py --rows 200 --output_dir runs/real/data data/reasoning/svamp.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path, help="JSON Lines, .jsonl or .jsonl.gz")
    parser.add_argument("--rows", type=int, default=200, help="held out of each file")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for path in arguments.files:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = [line for line in data.split(b"\n") if line.strip()]
        if not 0 < arguments.rows < len(lines):
            parser.error(f"--rows must lie between 0 and {len(lines)} (the rows of {path}), got {arguments.rows}")
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        for part, some in (("train", lines[: -arguments.rows]), ("heldout", lines[-arguments.rows :])):
            (arguments.output_dir / f"{name}_{part}.jsonl").write_bytes(b"\n".join(some) + b"\n")
            sys.stdout.write(f"{arguments.output_dir / name}_{part}.jsonl: {len(some)} rows\n")


if __name__ == "__main__":
    main()
