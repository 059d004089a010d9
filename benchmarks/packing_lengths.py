"""The lists of lengths, in tokens, that packing is measured on.

    chat        lognormal, sigma 1, mean 400, cut to [1, 8192]: many short samples, a long tail
    clustered   normal(4096, 512), cut to [100, 8192]: few samples fill a pack, short ones are rare
    the rest    data sets below the folder NOVA_DATA, one token for every four bytes of UTF-8, in a seeded order

Only the lengths of the latter are ever used, and no record holds them.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SEED = 1234
REAL = ("AlpacaEval outputs", "GSM8K train", "Alpaca zh")


def chat(count: int, seed: int = SEED) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(math.log(400) - 0.5, 1.0, count)
    return drawn.clip(1, 8192).astype(np.int64)


def clustered(count: int) -> np.ndarray:
    return np.random.default_rng(SEED).normal(4096, 512, count).clip(100, 8192).astype(np.int64)


def real(name: str) -> np.ndarray | None:
    """The lengths of a data set, int64 [n]; None where NOVA_DATA does not have it."""
    folder = os.environ.get("NOVA_DATA")
    files = sorted(Path(folder).glob(_FILES[name])) if folder else []
    if not files:
        return None
    lengths = [max(1, -(-len(text.encode()) // 4)) for text in _texts(name, files)]
    return np.random.default_rng(SEED).permutation(np.array(lengths, dtype=np.int64))


def named(name: str, count: int) -> np.ndarray | None:
    """The list of this name; `count` applies to those that are drawn."""
    return chat(count) if name == "chat" else clustered(count) if name == "clustered" else real(name)


_FILES = {
    "AlpacaEval outputs": "preference/alpaca_eval_*.jsonl.gz",
    "GSM8K train": "sft/gsm8k_train.jsonl.gz",
    "Alpaca zh": "curation/alpaca_zh_20k.jsonl.gz",
}


def _texts(name: str, files: list[Path]) -> Iterator[str]:
    """Question and answer, as one text."""
    for number, file in enumerate(files):
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            for row in map(json.loads, lines):
                if name == "GSM8K train":
                    yield row["question"] + row["answer"]
                elif name == "Alpaca zh":
                    yield row["instruction"] + row["input"] + row["output"]
                else:  # every file has the outputs of one model, and again those of the model it is compared with
                    yield row["instruction"] + row["output_2"]
                    if number == 0:
                        yield row["instruction"] + row["output_1"]
