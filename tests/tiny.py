"""A very small model on the world's tokenizer, and rows of the world, for tests of the trainer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from nova_train.world import data
from nova_train.world.model import ModelSize, untrained_model
from nova_train.world.prompts import Rates
from nova_train.world.tokenizer import build_tokenizer

SIZE = ModelSize(hidden=16, layers=2, heads=2, intermediate=24, context=512, initializer_range=0.3)


def save_model(folder: Path, seed: int = 0, dtype: str = "float32") -> Path:
    """An untrained model and its tokenizer, as Hugging Face saves them."""
    tokenizer = build_tokenizer(512)
    model = untrained_model(tokenizer, SIZE, seed)
    model.to(getattr(__import__("torch"), dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sft_file(path: Path, count: int = 24) -> Path:
    return write_rows(path, data.sft_rows(count, Rates(), Random("sft")))


def prompt_file(path: Path, count: int = 16) -> Path:
    return write_rows(path, data.prompt_rows(data.ROLLOUT, count, Rates(), Random("prompts")))


def pair_file(path: Path, count: int = 12) -> Path:
    """Pairs of different lengths; a third has both scores, a third one, a third none."""
    rows = []
    for number, row in enumerate(data.sft_rows(count, Rates(), Random("pairs"))):
        prompt, reply = row["messages"]
        rejected = {"role": "assistant", "content": "no" + " no" * (number % 4)}
        pair: dict[str, Any] = {"prompt": [prompt], "chosen": [reply], "rejected": [rejected]}
        if number % 3 < 2:
            pair["chosen_score"] = 0.5 + number / 20
        if number % 3 == 0:
            pair["rejected_score"] = 0.1
        rows.append(pair)
    return write_rows(path, rows)


def pas_file(path: Path, count: int = 12) -> Path:
    return write_rows(path, data.augmentation_rows(count, Random("pas")))
