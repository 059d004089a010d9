"""Stages and commands by name. Modules are imported when one is used, so that `nova-train --help` answers at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nova_train.config import ConfigError, unknown_name


@dataclass(frozen=True, slots=True)
class Kind:
    """Where a stage or command lives."""

    module: str
    config_class: str  # a frozen dataclass; its fields are the keys
    summary: str

    def load(self) -> tuple[type[Any], Callable[[Any], Any]]:
        """Import the module; returns its config class and its `run(config)`."""
        module = importlib.import_module(self.module)
        return getattr(module, self.config_class), module.run


# Stages write their results into `output_dir` and return it; they can stand in a pipeline.
STAGES = {
    "world": Kind("nova_train.stages.world", "WorldConfig", "write the embedded world: data and an untrained model"),
    "sft": Kind("nova_train.stages.sft", "SFTConfig", "supervised fine-tuning on conversations"),
    "annotate": Kind("nova_train.stages.annotate", "AnnotateConfig", "preference pairs from a model's own answers"),
    "reward": Kind("nova_train.stages.reward", "RewardConfig", "train a reward model on preference pairs"),
    "grpo": Kind("nova_train.stages.grpo", "GRPOConfig", "reinforcement learning with GRPO"),
    "merge": Kind("nova_train.stages.merge", "MergeConfig", "merge saved models into one"),
    "cache-reference": Kind(
        "nova_train.stages.cache_reference", "CacheReferenceConfig", "write the reference's top-K of supervised data"
    ),
    "pas": Kind("nova_train.stages.pas", "PASConfig", "train a prompt augmentation model"),
    "eval": Kind("nova_train.stages.eval", "EvalConfig", "score models on held-out prompts and write the report"),
    "inspect-data": Kind("nova_train.stages.inspect_data", "InspectDataConfig", "counts, lengths and masks of data"),
}

# Commands have no folder of their own.
COMMANDS = {
    "augment": Kind("nova_train.stages.augment", "AugmentConfig", "put a trained PAS model in front of prompts"),
    "plan-memory": Kind(
        "nova_train.stages.plan_memory", "PlanMemoryConfig", "memory and number of GPUs of checkpointing plans"
    ),
}


def stage_named(name: object, where: str) -> Kind:
    """The stage called `name`, or a ConfigError with a suggestion."""
    if not isinstance(name, str) or name not in STAGES:
        raise ConfigError(f"{where}: {unknown_name('stage', str(name), list(STAGES))}")
    return STAGES[name]
