"""Put a trained PAS model in front of any model: prompts in, augmented prompts out, as lines of text.

    nova-train augment --model_name_or_path runs/pas --prompts "Write about the sea" --keywords tides harbours
    nova-train augment --model_name_or_path runs/pas --json < prompts.jsonl

Without `prompts` each line of the standard input is one: plain text, or with `json` an object with `prompt` (text or
messages) and optional `keywords`. `batch_size: 1` answers each line before it reads the next.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from nova_train.augment import PromptAugmenter, append_complement
from nova_train.config import ConfigError
from nova_train.datasets import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Keys of `nova-train augment`."""

    model_name_or_path: str  # folder written by `nova-train pas`
    prompts: list[str] = field(default_factory=list)  # empty: the lines of the standard input
    keywords: list[str] = field(default_factory=list)  # of a search; constraints on every complement
    json: bool = False  # JSON objects in and out instead of plain text
    batch_size: int = 64  # prompts read and augmented at once
    num_threads: int = 1  # CPU threads

    def __post_init__(self) -> None:
        if self.batch_size <= 0:
            raise ConfigError(f"batch_size must be positive, got {self.batch_size}")


def run(config: AugmentConfig) -> None:
    """Write one augmented prompt per request to the standard output, as soon as its batch is done."""
    for line in augmented_lines(config, sys.stdin):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def augmented_lines(config: AugmentConfig, lines: Iterable[str]) -> Iterator[str]:
    """One output text per prompt, in order; `lines` (the standard input) is read only when `prompts` is empty.

    Yields:
        the augmented prompt, or with `json` an object with prompt, complement and augmented.

    Raises:
        DataError: a line that is no JSON object with a prompt, naming its number.
    """
    torch.set_num_threads(config.num_threads)
    augmenter = PromptAugmenter.load(config.model_name_or_path, batch_size=config.batch_size)
    requests = _requests(config, lines)
    while batch := list(islice(requests, config.batch_size)):
        asked = [prompt for prompt, _ in batch]
        complements = augmenter.complement(asked, [keywords for _, keywords in batch])
        for prompt, complement in zip(asked, complements, strict=True):
            augmented = append_complement(prompt, complement)
            if config.json:
                answer = {"prompt": prompt, "complement": complement, "augmented": augmented}
                yield json.dumps(answer, ensure_ascii=False)
            else:
                yield str(augmented)


def _requests(config: AugmentConfig, lines: Iterable[str]) -> Iterator[tuple[Any, list[str]]]:
    """(prompt, keywords) of each request; blank lines are passed over."""
    if config.prompts:
        yield from ((prompt, config.keywords) for prompt in config.prompts)
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        yield _request(line, number, config) if config.json else (line.rstrip("\n"), config.keywords)


def _request(line: str, number: int, config: AugmentConfig) -> tuple[Any, list[str]]:
    where = f"standard input, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    conversation = isinstance(prompt, list) and bool(prompt) and all(_is_message(message) for message in prompt)
    if not isinstance(prompt, str) and not conversation:
        raise DataError(f"{where}: expected an object with 'prompt' (text or messages), got {line.strip()[:80]!r}")
    keywords = row.get("keywords") or []
    if not isinstance(keywords, list) or not all(isinstance(word, str) for word in keywords):
        raise DataError(f"{where}: keywords must be a list of texts, got {keywords!r}")
    return prompt, [*config.keywords, *keywords]


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
