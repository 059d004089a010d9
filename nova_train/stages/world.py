"""Write the embedded world: data sets, an untrained model and its tokenizer. Pure in `seed`; nothing is downloaded.

    output_dir/
        model/                    untrained Llama and the tokenizer; opens with AutoModelForCausalLM, AutoTokenizer
        sft.jsonl                 conversations; the answers carry the noise that the rates below set
        sft_first.jsonl           80 % add, compare, sort, upper; for the first specialist
        sft_second.jsonl          80 % sub, count, reverse, weekday; for the second specialist
        annotate_prompts.jsonl    training prompts whose sampled answers become preference pairs
        prompts.jsonl             training prompts for reinforcement learning
        pas.jsonl                 underspecified prompt -> complement, some with search keywords
        heldout.jsonl             evaluation prompts
        annotate_heldout.jsonl    held-out prompts for the reward model's pair accuracy
        pas_heldout.jsonl         underspecified prompts with held-out cues, rubric in columns

Which questions may stand in which file: nova_train.world.data.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from nova_train.config import ConfigError, fingerprint, identity
from nova_train.state import claim_folder, finished_fingerprint, mark_finished
from nova_train.world import data
from nova_train.world.model import ModelSize, untrained_model
from nova_train.world.prompts import Rates
from nova_train.world.tasks import HALVES
from nova_train.world.tokenizer import build_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """Keys of the world stage."""

    output_dir: str
    seed: int = 0

    sft_rows: int = 24_000  # conversations
    specialist_rows: int = 8_000  # conversations in each of the two specialist files
    annotate_prompts: int = 6_000
    rollout_prompts: int = 6_000  # prompts.jsonl
    pas_rows: int = 4_000
    heldout_prompts: int = 1_600
    annotate_heldout_prompts: int = 800
    pas_heldout_prompts: int = 960

    format_request_rate: float = 0.8  # of prompts; the others want a plain answer
    long_request_rate: float = 0.25  # of requests: one sentence of 25 to 30 words instead of a short phrase
    remark_rate: float = 0.08  # of prompts: a remark that does not matter
    wrong_answer_rate: float = 0.04  # of SFT answers
    format_obedience_rate: float = 0.25  # of SFT answers to prompts that request a format; the others are plain

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 320
    max_position_embeddings: int = 512  # tokens
    initializer_range: float = 0.05  # standard deviation of the random weights

    num_threads: int = 1  # accepted as in every stage; nothing here runs in parallel
    disable_progress: bool = False

    def __post_init__(self) -> None:
        for key in self.__dataclass_fields__:
            value = getattr(self, key)
            if key.endswith("_rate") and not 0 <= value <= 1:
                raise ConfigError(f"{key} must lie in [0, 1], got {value}")
            if key.endswith(("_rows", "_prompts")) and value < 0:
                raise ConfigError(f"{key} must be at least 0, got {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )

    def rates(self) -> Rates:
        return Rates(
            format_request=self.format_request_rate,
            long_request=self.long_request_rate,
            remark=self.remark_rate,
            wrong_answer=self.wrong_answer_rate,
            format_obedience=self.format_obedience_rate,
        )

    def model_size(self) -> ModelSize:
        return ModelSize(
            hidden=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            intermediate=self.intermediate_size,
            context=self.max_position_embeddings,
            initializer_range=self.initializer_range,
        )


def run(config: WorldConfig) -> Path:
    """Write every file of the world; returns the folder. A finished world is left as it is."""
    folder = Path(config.output_dir)
    claim_folder(config, "world")
    if finished_fingerprint(folder) is not None:
        log.info("%s: already written", folder)
        return folder
    tokenizer = build_tokenizer(config.max_position_embeddings)
    model = untrained_model(tokenizer, config.model_size(), config.seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    counts = {name: _write_rows(folder / name, rows) for name, rows in _files(config)}
    log.info("%s: %s", folder, ", ".join(f"{count} rows in {name}" for name, count in counts.items()))
    mark_finished(folder, fingerprint(identity(config)), rows=counts, parameters=model.num_parameters())
    return folder


def _files(config: WorldConfig) -> Iterator[tuple[str, Iterator[data.Row]]]:
    """File names with their rows; each file has a generator of its own, so that one size does not change another."""
    rates = config.rates()

    def rng(name: str) -> Random:
        return Random(f"world/{config.seed}/{name}")

    yield "sft.jsonl", data.sft_rows(config.sft_rows, rates, rng("sft"))
    for name, half in HALVES.items():
        yield f"sft_{name}.jsonl", data.specialist_rows(half, config.specialist_rows, rates, rng(name))
    for name, part, count in (
        ("annotate_prompts", data.ANNOTATE, config.annotate_prompts),
        ("prompts", data.ROLLOUT, config.rollout_prompts),
        ("heldout", data.HELDOUT, config.heldout_prompts),
        ("annotate_heldout", data.PAIRS, config.annotate_heldout_prompts),
    ):
        yield f"{name}.jsonl", data.prompt_rows(part, count, rates, rng(name))
    yield "pas.jsonl", data.augmentation_rows(config.pas_rows, rng("pas"))
    yield "pas_heldout.jsonl", data.cued_prompt_rows(config.pas_heldout_prompts, rng("pas_heldout"))


def _write_rows(path: Path, rows: Iterable[data.Row]) -> int:
    """Write JSON Lines beside `path` and rename when complete; returns the number of rows."""
    count = 0
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    os.replace(partial, path)
    return count
