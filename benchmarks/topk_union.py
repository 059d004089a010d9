"""How many vocabulary rows a block of tokens needs for its top K, and how much probability they hold.

    |U|(T_b, K)   size of the union of the reference's top-K ids over T_b tokens: the rows that backend="union" gathers
    ref_mass(K)   the reference's probability of its K most likely tokens

    NOVA_DATA=... python -m benchmarks.topk_union [--minutes 10] [--ids FILE]

trains a tokenizer and a small decoder on conversations of NOVA_DATA (topk_text.py), one thread, and counts on held-out
packed rows. Orders of the tokens before they are cut into blocks:

    consecutive    as packed
    input, target, argmax   stably sorted by the token read, the one to predict, the most likely one
    tree           hidden states halved again and again along their principal direction: near ones end up together

--ids keeps the ids of the last measurement for topk_paths; the record holds numbers only.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records, topk_text
from benchmarks.topk_text import LENGTH, SEED, Decoder
from nova_kernels.topk_kl import topk_select

TOKENS = 8192
BLOCKS = (1, 8, 32, 128, 512, 2048, TOKENS)
KEPT = (50, 100, 200, 500, 1000)
SHARES = (0.1, 0.3, 1.0)  # of the training, after which is measured


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers; no host name."""
    import cpuinfo

    from benchmarks.conftest import commit

    return {
        "commit": commit(),
        "device": "cpu",
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.processor()),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def union_sizes(ids: Tensor, block: int, vocabulary: int) -> Tensor:
    """|U| of every whole block of `block` rows of ids [N, K]: int64 [N // block]."""
    parts = ids.split(block)[: len(ids) // block]
    return torch.stack([torch.bincount(part.flatten(), minlength=vocabulary).count_nonzero() for part in parts])


def tree_order(hidden: Tensor, leaf: int = 32) -> Tensor:
    """An order of the rows of hidden [N, H] in which near ones are near: halves along the principal direction."""

    def halve(rows: Tensor) -> list[Tensor]:
        if len(rows) <= leaf:
            return [rows]
        centred = hidden[rows] - hidden[rows].mean(dim=0)
        direction = centred.new_ones(hidden.shape[1])
        for _ in range(8):
            direction = torch.nn.functional.normalize(centred.t() @ (centred @ direction), dim=0)
        rows = rows[(centred @ direction).argsort(stable=True)]
        return halve(rows[: len(rows) // 2]) + halve(rows[len(rows) // 2 :])

    return torch.cat(halve(torch.arange(len(hidden))))


def coverage(values: Tensor, lse: Tensor) -> list[dict[str, Any]]:
    """Mass of the K largest of values [N, max(KEPT)] for each K of KEPT."""
    masses = (values.sort(dim=1, descending=True).values - lse.unsqueeze(1)).exp().cumsum(dim=1)
    rows = []
    for kept in KEPT:
        mass = masses[:, kept - 1].clamp(max=1.0)
        low, median = (mass.quantile(q).item() for q in (0.05, 0.5))
        rows.append({"k": kept, "mean": mass.mean().item(), "median": median, "worst_5_percent": low})
    return rows


@torch.no_grad()
def measure(decoder: Decoder, rows: Tensor, facts: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor]:
    """Records of the held-out rows [n, LENGTH + 1], and the ids [N, 500]."""
    decoder.body.eval()
    inputs, targets = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    hidden = torch.cat([decoder.hidden(part[:, :-1]) for part in rows.split(4)])
    tops = [topk_select(part @ decoder.weight.t(), max(KEPT)) for part in hidden.split(512)]
    decoder.body.train()
    ids, values, lse = (torch.cat([getattr(top, name) for top in tops]) for name in ("ids", "values", "lse"))
    vocabulary = len(decoder.weight)
    losses = lse - (hidden * decoder.weight[targets]).sum(-1)
    facts = {**facts, "tokens": len(ids), "loss": losses.mean().item()}
    found = [{"case": "coverage", **facts, **row} for row in coverage(values, lse)]
    by_value = ids.gather(1, values.argsort(dim=1, descending=True, stable=True))
    most_likely = by_value[:, 0]
    orders = {
        "consecutive": torch.arange(len(ids)),
        "input": inputs.argsort(stable=True),
        "target": targets.argsort(stable=True),
        "argmax": most_likely.argsort(stable=True),
        "tree": tree_order(hidden),
    }
    for kept in KEPT:
        for name, order in orders.items() if kept == 500 else [("consecutive", orders["consecutive"])]:
            for block in BLOCKS:
                if block <= len(ids):
                    sizes = union_sizes(by_value[order, :kept], block, vocabulary).double()
                    row = {"case": "union", **facts, "k": kept, "order": name, "block": block}
                    found.append(row | {"mean": sizes.mean().item(), "max": int(sizes.max())})
    return found, by_value[:, :500].sort(dim=1).values


def held_out_rows(tokenizer: Any, held: dict[str, list[str]]) -> dict[str, Tensor]:
    """TOKENS tokens of each kind of text, and of all of them mixed."""
    kinds = {"mixed": [text for texts in held.values() for text in texts], **held}
    packed = {kind: topk_text.packed_rows(tokenizer, texts, SEED + 1) for kind, texts in kinds.items()}
    return {kind: rows[: TOKENS // LENGTH] for kind, rows in packed.items()}


def run(folder: Path, minutes: float, vocabulary: int, ids_file: Path | None) -> dict[str, Any]:
    """Train, measure, and make the record."""
    begin = time.process_time()
    where = machine()
    train, held = topk_text.split(folder)
    tokenizer = topk_text.train_tokenizer([text for texts in train.values() for text in texts], vocabulary)
    rows = topk_text.packed_rows(tokenizer, [text for texts in train.values() for text in texts], SEED)
    held_rows = held_out_rows(tokenizer, held)
    prepared = time.process_time() - begin
    decoder = Decoder(tokenizer.get_vocab_size())
    found: list[dict[str, Any]] = []
    kept: dict[str, Tensor] = {}

    def stop(share: float) -> None:
        for kind, part in held_rows.items() if share == 1.0 else [("mixed", held_rows["mixed"])]:
            facts = {"text": kind, "trained": share, "tokens_seen": decoder.tokens_seen}
            measured, kept[kind] = measure(decoder, part, facts)
            found.extend(measured)
            loss = measured[0]["loss"]
            sys.stdout.write(
                f"{kind}, {decoder.tokens_seen} tokens seen: loss {loss:.3f}, perplexity {math.exp(loss):.1f}\n"
            )
            sys.stdout.flush()

    decoder.train(rows, minutes, {share: lambda share=share: stop(share) for share in SHARES})
    if ids_file is not None:
        torch.save(kept, ids_file)
    model = topk_text.MODEL | {
        "parameters": decoder.parameters,
        "vocabulary": len(decoder.weight),
        "training_tokens": rows[:, 1:].numel(),
        "tokens_seen": decoder.tokens_seen,
        "tokens_per_step": topk_text.ROWS_PER_STEP * LENGTH,
        "learning_rate": topk_text.LEARNING_RATE,
        "cpu_minutes": minutes,
        "seed": SEED,
        "seconds_of_preparation": round(prepared, 1),
    }
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    rounded = [{name: round(v, 5) if isinstance(v, float) else v for name, v in row.items()} for row in found]
    return {"op": "topk_union", "date": now, "machine": where, "model": model, "rows": rounded}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, CPU time of one thread")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--ids", type=Path, help="keep the ids here, for topk_paths (outside the repository)")
    parser.add_argument("--quick", action="store_true", help="nothing is saved")
    given = parser.parse_args(arguments)
    if not os.environ.get("NOVA_DATA"):
        sys.exit("benchmarks: set NOVA_DATA to the folder of real data sets")
    torch.set_num_threads(1)
    record = run(Path(os.environ["NOVA_DATA"]), given.minutes, given.vocabulary, given.ids)
    if not given.quick:
        sys.stdout.write(f"{records.save(record, records.ROOT / records.RESULTS)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
