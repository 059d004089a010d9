"""Train a prompt augmentation model (PAS): fine-tuning on (prompt -> complement) in the report's prompt format.

Rows have `prompt` (text or messages), `complement` (text) and, for the retrieval variant, `keywords` (a list of texts).
Each becomes one user turn (`nova_train.augment.pas_prompt`) and the complement as the answer; only the complement is
trained. Report, section 4.6: two epochs, 4096 tokens, complements of about 30 words. `PromptAugmenter` serves the result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nova_train.augment import PASSettings, count_words, pas_prompt
from nova_train.chat import Chat
from nova_train.config import ConfigError
from nova_train.datasets import DataError
from nova_train.samples import sft_samples
from nova_train.stages import sft

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PASConfig(sft.SFTConfig):
    """Keys of `nova-train pas`: those of `sft`, and the form of prompts and complements."""

    max_length: int = 4096  # tokens per sample, and per pack
    num_train_epochs: float = 2.0
    prompt_style: Literal["report", "short"] = "report"  # short: without the background text (small models)
    max_words: int = 30  # words of a complement; an ideograph counts as one
    max_completion_length: int = 128  # tokens of a complement when it is generated
    prompt_column: str = "prompt"
    complement_column: str = "complement"

    def __post_init__(self) -> None:
        sft.SFTConfig.__post_init__(self)
        for key in ("max_words", "max_completion_length"):
            if (value := getattr(self, key)) <= 0:
                raise ConfigError(f"{key} must be positive, got {value}")


def run(config: PASConfig) -> Path:
    """Train on prompt-complement rows; returns the folder of the model, with pas.json beside it."""
    settings = PASSettings(
        prompt_style=config.prompt_style,
        max_words=config.max_words,
        max_completion_length=config.max_completion_length,
    )

    def make_samples(rows: Sequence[Any], chat: Chat) -> list[sft.Sample]:
        settings.save(config.output_dir)  # the folder is this run's own by now
        conversations = [conversation_of(row, settings, config) for row in rows]
        _report_lengths([row[config.complement_column] for row in rows], settings)
        return list(sft_samples(conversations, chat, config.max_length, config.overlong))

    return sft.run(config, make_samples=make_samples, stage="pas")
