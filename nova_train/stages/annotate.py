"""Preference pairs from a model's own answers, judged by reward functions.

For each prompt n answers are sampled; the best and the worst by score become chosen and rejected (prompts whose
answers all score the same give no pair). What the annotator gets wrong or leaves out can be modelled: `flip_rate`
swaps a pair's answers, `score_rate` is the share of pairs whose absolute scores are kept.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from nova_train import state
from nova_train.chat import Chat
from nova_train.config import ConfigError, fingerprint, identity
from nova_train.datasets import read_rows
from nova_train.model import load_plain_causal_lm, load_tokenizer
from nova_train.rewards import call_reward_functions, load_reward_functions, total_rewards
from nova_train.rollout import generate, sampling_seed
from nova_train.samples import Prompt, prompts

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotateConfig:
    """Keys of `nova-train annotate`."""

    output_dir: str  # gets pairs.jsonl
    model_name_or_path: str  # the model whose answers are judged
    dataset_name: list[str]  # prompt rows
    reward_funcs: list[str] = field(default_factory=list)  # their sum is the score
    num_generations: int = 4  # answers per prompt
    temperature: float = 1.0
    max_length: int = 4096  # tokens of a prompt
    max_completion_length: int = 256  # tokens
    batch_size: int = 256  # sequences per generation call
    flip_rate: float = 0.0  # share of pairs with the answers swapped
    score_rate: float = 1.0  # share of pairs that keep their absolute scores
    on_bad_row: Literal["error", "skip"] = "error"
    dataset_columns: dict[str, str] = field(default_factory=dict)  # our column name -> theirs
    seed: int = 0
    num_threads: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):
            object.__setattr__(self, "dataset_name", [self.dataset_name])
        if not self.reward_funcs:
            raise ConfigError("reward_funcs is empty: give at least one module:function that scores answers")
        if self.num_generations < 2:
            raise ConfigError(f"num_generations must be at least 2 (a pair), got {self.num_generations}")
        for key in ("max_length", "max_completion_length", "batch_size", "num_threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("flip_rate", "score_rate"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"{key} must lie in [0, 1], got {getattr(self, key)}")


def run(config: AnnotateConfig) -> Path:
    """Sample, judge and write pairs.jsonl; returns the output folder."""
    folder = Path(config.output_dir)
    state.claim_folder(config, "annotate")
    if state.finished_fingerprint(folder) is not None:
        return folder
    torch.set_num_threads(config.num_threads)
    chat = Chat(load_tokenizer(config.model_name_or_path))
    rows = read_rows(config.dataset_name, kind="prompt", on_bad_row=config.on_bad_row, columns=config.dataset_columns)
    asked = prompts(rows, chat, config.max_length, on_bad_row=config.on_bad_row)
    n = config.num_generations
    repeated = [prompt for prompt in asked for _ in range(n)]
    completions = generate(
        load_plain_causal_lm(config.model_name_or_path),
        [prompt.ids for prompt in repeated],
        seeds=[sampling_seed(config.seed, prompt.key, i % n) for i, prompt in enumerate(repeated)],
        end_ids=[chat.end_of_turn_id],
        pad_id=chat.end_of_turn_id,
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        batch_size=config.batch_size,
    )
    texts = [chat.decode(completion.ids) for completion in completions]
    functions = load_reward_functions(config.reward_funcs)
    by_function = call_reward_functions(functions, repeated, texts, [completion.ids for completion in completions])
    scores = total_rewards(by_function).view(-1, n).tolist()
    pairs = pairs_of(asked, [texts[i : i + n] for i in range(0, len(texts), n)], scores, config)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row in pairs:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not pairs:
        log.warning(
            "annotate: all answers to each prompt score the same: no pair; raise temperature or num_generations"
        )
    log.info("annotate: %d prompts gave %d pairs", len(asked), len(pairs))
    state.mark_finished(folder, fingerprint(identity(config)), pairs=len(pairs))
    return folder


def pairs_of(
    asked: Sequence[Prompt], answers: Sequence[Sequence[str]], scores: Sequence[Sequence[float]], config: AnnotateConfig
) -> list[dict[str, Any]]:
    """Best against worst of each prompt, as preference rows."""
    chance = random.Random(config.seed)
    rows = []
    for prompt, texts, values in zip(asked, answers, scores, strict=True):
        best, worst = max(range(len(values)), key=values.__getitem__), min(range(len(values)), key=values.__getitem__)
        flip, keep_scores = chance.random() < config.flip_rate, chance.random() < config.score_rate
        if values[best] == values[worst]:
            continue
        chosen, rejected = (worst, best) if flip else (best, worst)
        row: dict[str, Any] = {
            "prompt": prompt.prompt,
            "chosen": _as_reply(prompt, texts[chosen]),
            "rejected": _as_reply(prompt, texts[rejected]),
            "category": prompt.category,
        }
        if keep_scores:  # the annotator's scores follow his preference, also where it is wrong
            row |= {"chosen_score": values[best], "rejected_score": values[worst]}
        rows.append(row)
    return rows


def _as_reply(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    return text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
