"""Reward functions for word problems, with TRL's signature: an example to copy.

    reward_funcs: [recipes/real/rewards.py:exact_answer, recipes/real/rewards.py:answer_line]

The data's column `answer` (a number, or a text that ends with one) reaches `exact_answer` by its name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?")  # the 3 in "10-3" is no -3
ANSWER_LINE = re.compile(r"####\s*-?\$?\d[\d,]*(?:\.\d+)?\s*$")


def exact_answer(completions: Sequence[Any], answer: Sequence[Any], **columns: object) -> list[float | None]:
    """1 where the last number of the completion is the answer, else 0; None where the row has no answer."""
    scores: list[float | None] = []
    for completion, truth in zip(completions, answer, strict=True):
        wanted, given = last_number(str(truth)), last_number(text_of(completion))
        scores.append(None if wanted is None else float(given is not None and abs(given - wanted) < 1e-6))
    return scores


def answer_line(completions: Sequence[Any], **columns: object) -> list[float]:
    """1 where the completion ends with "#### number", right or wrong: partial credit for the form alone."""
    return [float(ANSWER_LINE.search(text_of(completion)) is not None) for completion in completions]


def last_number(text: str) -> float | None:
    """The last number in a text ("1,050.5" is one), None without any."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def text_of(completion: Any) -> str:
    """The text of a completion: a string, or messages for conversational prompts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
