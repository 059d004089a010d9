"""Which way to the kept logits of hidden states, and back, is the fastest: dense, union or gather.

    dense    blocks of all V logits, gathered; backward scatters into the block (nova_kernels/topk_kl/dense.py)
    union    blocks of tokens share the gathered rows of the union of their ids (nova_kernels/topk_kl/union.py)
    gather   each token its own rows (nova_kernels/topk_kl/gather.py)

    python -m benchmarks.topk_paths [--ids FILE] [--quick]

times forward, and forward + backward with and without the weight's gradient, in one thread, K = 500. Ids are those of
text (FILE from topk_union, V = 32,000) and drawn ones: K of V without replacement, odds of rank r as 1 / (r + 10). A
round calls every way once, so that a busy moment hits all alike; medians count. All ways agree, or nothing is saved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.topk_union import machine, union_sizes
from nova_kernels.topk_kl import dense, gather, union

KEPT = 500
SEED = 1234
SIZES = [(32_000, 256), (151_936, 128), (32_000, 1024)]
TOKENS = (16, 64, 256, 1024, 4096)
DRAWN = (16, 256, 1024)
SLOPE = 1.0  # of the odds
DENSE_LIMIT = 6e10  # multiplications and additions of a call of the dense way that are worth the wait


WAYS: dict[str, ModuleType] = {"dense": dense, "union": union, "gather": gather}


def drawn_ids(num: int, vocabulary: int, slope: float) -> Tensor:
    """int32 [num, KEPT], ascending."""
    generator = torch.Generator().manual_seed(SEED)
    odds = torch.arange(10, vocabulary + 10).float().pow(-slope)
    rows = [torch.multinomial(odds, KEPT, generator=generator) for _ in range(num)]
    return torch.stack(rows).sort(dim=1).values.int()


def calls(way: Any, hidden: Tensor, weight: Tensor, ids: Tensor, by_kept: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; each returns its results."""

    def both(needs_weight: bool) -> Callable[[], Any]:
        return lambda: (
            way.kept_logits(hidden, weight, ids),
            *way.backward(hidden, weight, ids, by_kept, needs_hidden=True, needs_weight=needs_weight),
        )

    return {"forward": lambda: way.kept_logits(hidden, weight, ids), "frozen": both(False), "all": both(True)}


def agree(results: list[Any]) -> None:
    """The ways' results are those of the first, to rounding."""
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            error = (found - expected).norm() / expected.norm()
            assert error < 1e-5, f"the ways differ by {error:.1e}"


def measure(ids: Tensor, vocabulary: int, width: int, facts: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Rows of the record for one list of ids [N, KEPT]."""
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(len(ids), width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    by_kept = torch.randn(ids.shape, generator=generator)
    operations = 6 * len(ids) * vocabulary * width
    ways = {name: way for name, way in WAYS.items() if name != "dense" or operations < DENSE_LIMIT}
    timed = {name: calls(way, hidden, weight, ids, by_kept) for name, way in ways.items()}
    agree([case["all"]() for case in timed.values()])
    block = min(len(ids), union.block_tokens(vocabulary, KEPT, ids.device))
    facts = facts | {"tokens": len(ids), "vocabulary": vocabulary, "hidden": width, "k": KEPT, "block": block}
    facts["union"] = round(union_sizes(ids, block, vocabulary).double().mean().item(), 1)
    rows = []
    for what in ("forward", "frozen", "all"):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds if operations < DENSE_LIMIT / 4 else 2):
            for name, case in timed.items():
                begin = time.perf_counter()
                case[what]()
                seconds[name].append(time.perf_counter() - begin)
        medians = {f"seconds_{name}": float(f"{statistics.median(found):.4g}") for name, found in seconds.items()}
        rows.append({"case": what, **facts, **medians})
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    return rows


def run(ids_file: Path | None, quick: bool) -> dict[str, Any]:
    """Measure every case, and make the record."""
    rows: list[dict[str, Any]] = []
    tokens, drawn = (TOKENS[:2], DRAWN[:1]) if quick else (TOKENS, DRAWN)
    for vocabulary, width in SIZES:
        lists = {"drawn": drawn_ids(max(drawn), vocabulary, SLOPE)}
        if ids_file is not None and vocabulary == 32_000:
            lists["text"] = torch.load(ids_file)["mixed"]
        for name, ids in lists.items():
            for num in drawn if name == "drawn" else tokens:
                rows += measure(ids[:num], vocabulary, width, {"ids": name}, rounds=3)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"op": "topk_paths", "date": now, "machine": machine(), "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=Path, help="ids of real text, kept by topk_union --ids")
    parser.add_argument("--quick", action="store_true", help="few tokens, nothing is saved")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = run(given.ids, given.quick)
    if not given.quick:
        sys.stdout.write(f"{records.save(record, records.ROOT / records.RESULTS)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
