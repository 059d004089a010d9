"""The kinds of stages by name. Modules are imported when a kind is used, so that `nova-train --help` answers at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_train.config import ConfigError, unknown_key


@dataclass(frozen=True, slots=True)
class Kind:
    """Where a stage lives: `module` has the config class and `run(config) -> Path`."""

    module: str
    config_class: str
    summary: str

    def load(self) -> tuple[type[Any], Callable[[Any], Path]]:
        """Import the module; returns (config class, run)."""
        module = importlib.import_module(self.module)
        return getattr(module, self.config_class), module.run


KINDS = {
    "world": Kind("nova_train.stages.world", "WorldConfig", "write the embedded world: tasks, data and a new model"),
    "sft": Kind("nova_train.stages.sft", "SFTConfig", "supervised fine-tuning on conversations"),
    "annotate": Kind("nova_train.stages.annotate", "AnnotateConfig", "sample responses and score them into pairs"),
    "reward": Kind("nova_train.stages.reward", "RewardConfig", "train a reward model on preference pairs"),
    "grpo": Kind("nova_train.stages.grpo", "GRPOConfig", "reinforcement learning with GRPO"),
    "merge": Kind("nova_train.stages.merge", "MergeConfig", "merge saved models into one"),
    "pas": Kind("nova_train.stages.pas", "PASConfig", "train a prompt augmentation model"),
    "eval": Kind("nova_train.stages.eval", "EvalConfig", "score models on held-out prompts, and report"),
}


def kind_named(name: object, where: str) -> Kind:
    """The kind called `name`, or a ConfigError with a suggestion."""
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"{where}: {unknown_key(str(name), list(KINDS), 'run').replace('key', 'stage kind', 1)}")
    return KINDS[name]
