"""Train a prompt augmentation model (PAS): fine-tuning on (prompt -> complement) in the report's prompt format.

Rows have `prompt` (text or messages), `complement` (text) and, for the retrieval variant, `keywords` (a list of texts).
Each becomes one user turn (`nova_train.augment.pas_prompt`) and the complement as the answer, which alone is trained.
Report, section 4.6: two epochs, 4096 tokens, complements of about 30 words. `PromptAugmenter` serves the result.
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
from nova_train.datafiles import BadRows, DataError, Row, shown
from nova_train.rowformats import canonical_row, is_text
from nova_train.samples import sft_samples
from nova_train.stages import sft

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PASConfig(sft.SFTConfig):
    """Keys of `nova-train pas`: those of `sft`, and the form of prompts and complements."""

    max_length: int = 4096  # tokens per sample, and per pack
    num_train_epochs: float = 2.0
    prompt_style: Literal["report", "short"] = "report"  # short: without the background text
    max_words: int = 30  # words of a complement; an ideograph counts as one
    max_completion_length: int = 128  # tokens of a complement when it is generated

    def __post_init__(self) -> None:
        sft.SFTConfig.__post_init__(self)
        for key in ("max_words", "max_completion_length"):
            if (value := getattr(self, key)) <= 0:
                raise ConfigError(f"{key} must be positive, got {value}")

    def settings(self) -> PASSettings:
        return PASSettings(
            prompt_style=self.prompt_style,
            max_words=self.max_words,
            max_completion_length=self.max_completion_length,
        )


def run(config: PASConfig) -> Path:
    """Train on prompt-complement rows; returns the folder of the model, with pas.json beside it."""
    settings = config.settings()

    def make_samples(rows: Sequence[Row], chat: Chat) -> list[sft.Sample]:
        talks = conversations(rows, settings, config.on_bad_row)
        samples = sft_samples(talks, chat, config.max_length, config.overlong, on_bad_row=config.on_bad_row)
        settings.save(config.output_dir)  # the folder is this run's own by now
        return list(samples)

    return sft.run(config, make_samples=make_samples, stage="pas")


def conversations(rows: Sequence[Row], settings: PASSettings, on_bad_row: Literal["error", "skip"]) -> list[Row]:
    """Rows of prompt, complement and keywords as rows of prompt and completion (messages).

    Raises:
        DataError: a row without a prompt or a complement, or with keywords that are no list of texts, by place.
    """
    bad = BadRows(on_bad_row)
    found = []
    for row in rows:
        try:
            found.append(_conversation(row, settings))
        except DataError as error:
            bad.add(error)
    bad.report(len(found))
    if longer := sum(count_words(row["complement"]) > settings.max_words for row in found):
        log.warning(
            "%d of %d complements are longer than max_words (%d); what the model generates is cut there",
            longer, len(found), settings.max_words,
        )  # fmt: skip
    return found


def _conversation(row: Row, settings: PASSettings) -> Row:
    prompt: Any = canonical_row(row, "prompt")["prompt"]
    complement = row.get("complement")
    if not is_text(complement) or not complement.strip():
        raise DataError(
            f"{row.place}: field 'complement': expected text, got {shown(complement)}; "
            "name the column with dataset_columns, such as {complement: supplement}"
        )
    keywords = row.get("keywords") or []
    if not isinstance(keywords, list) or not all(is_text(word) for word in keywords):
        raise DataError(f"{row.place}: field 'keywords': expected a list of texts, got {shown(keywords)}")
    question = {"role": "user", "content": pas_prompt(prompt, settings, keywords)}
    answer = {"role": "assistant", "content": complement.strip()}
    return row.with_columns({**row, "prompt": [question], "completion": [answer]})
