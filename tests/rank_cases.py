"""Runs of the stages that are the same on any number of ranks, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import tiny
from nova_train.rollout import Completion
from nova_train.samples import Prompt
from nova_train.stages import grpo, reward, sft

STAGES = {
    "sft": (sft.SFTConfig, sft.run, "sft.jsonl"),
    "reward": (reward.RewardConfig, reward.run, "pairs.jsonl"),
    "grpo": (grpo.GRPOConfig, grpo.run, "prompts.jsonl"),
}
SHARED = {
    "dtype": "float64",
    "max_length": 128,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "disable_progress": True,
}
OWN: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward": {"lm_loss_weight": 0.3},
    "grpo": {"max_completion_length": 6, "kl_top_k": 32, "beta": 0.1, "num_iterations": 2, "ptx_kl_weight": 0.2},
}


REWARDS = """
def ids(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 17) for ids in completion_ids]
"""


def save_inputs(folder: Path) -> Path:
    """What the stages start from: a model in float64, rows, a reward function."""
    tiny.save_model(folder / "model", dtype="float64")
    tiny.sft_file(folder / "sft.jsonl")
    tiny.pair_file(folder / "pairs.jsonl")
    tiny.prompt_file(folder / "prompts.jsonl")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def run_stage(stage: str, folder: Path, output_dir: Path, **options: Any) -> Path:
    """A few steps of a stage in float64; answers of GRPO depend on the prompt and the answer's number alone."""
    kind, run, data = STAGES[stage]
    keys: dict[str, Any] = {**SHARED, **OWN[stage], "dataset_name": [str(folder / data)], **options}
    if stage == "grpo":
        keys |= {"reward_funcs": [f"{folder / 'rewards.py'}:ids"], "ptx_dataset_name": [str(folder / "sft.jsonl")]}
    config = kind(output_dir=str(output_dir), model_name_or_path=str(folder / "model"), **keys)
    with mock.patch.object(grpo, "_answers", _fixed_answers):
        return run(config)


def run_cases(cases: Mapping[str, tuple[str, dict[str, Any]]], folder: Path) -> None:
    """Several runs one after the other: {name of the output folder: (stage, options)}."""
    for name, (stage, options) in cases.items():
        run_stage(stage, folder, folder / name, **options)


def _fixed_answers(
    policy: Any,
    chat: Any,
    config: Any,
    asked: Sequence[Prompt],
    places: Sequence[tuple[int, int]],
    temperature: float,
) -> list[Completion]:
    answers = []
    for prompt, (rollout, number) in zip(asked, places, strict=True):
        generator = torch.Generator().manual_seed(int(prompt.key[:8], 16) + 97 * rollout + number)
        length = int(torch.randint(1, 7, (1,), generator=generator))
        answers.append(Completion(torch.randint(8, 300, (length,), generator=generator).tolist(), length < 6))
    return answers
