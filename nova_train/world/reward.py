"""The world's truth: scores a response in [0, 1] for content and format.

    score = 0.7 [content is right] + 0.3 [the whole response is in the requested format]

Content is right if the response, read in any of the formats, is the answer. So the right answer in the wrong form has
0.7, a wrong one in the right form 0.3, and an answer in the middle of other words 0: a program could not read it.

`score`, `content` and `obedience` are reward functions with TRL's signature; name them in a recipe as
`nova_train.world.reward:score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nova_train.world.formats import FORMATS, unwrap

CONTENT_WEIGHT = 0.7
FORMAT_WEIGHT = 0.3

Completion = str | list[dict[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    content: bool
    format: bool

    @property
    def score(self) -> float:
        return CONTENT_WEIGHT * self.content + FORMAT_WEIGHT * self.format


def grade(response: str, *, answer: str, form: str) -> Grade:
    """Judge one response. ValueError for a format that the world does not know."""
    if form not in FORMATS:
        raise ValueError(f"world reward: expected a format out of {list(FORMATS)}, got {form!r}")
    right = any(unwrap(response, known) == answer for known in FORMATS)
    return Grade(content=right, format=unwrap(response, form) is not None)


def score(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    answer: Sequence[str],
    format: Sequence[str],
    **columns: object,
) -> list[float]:
    """Reward function: 0.7 content + 0.3 format of each completion, in [0, 1]."""
    return [each.score for each in _grades(completions, answer, format)]


def content(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    answer: Sequence[str],
    format: Sequence[str],
    **columns: object,
) -> list[float]:
    """Reward function: 1.0 where the content is right, whatever the format."""
    return [float(each.content) for each in _grades(completions, answer, format)]


def obedience(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    answer: Sequence[str],
    format: Sequence[str],
    **columns: object,
) -> list[float]:
    """Reward function: 1.0 where the response is in the requested format, whatever the content."""
    return [float(each.format) for each in _grades(completions, answer, format)]


def _grades(completions: Sequence[Completion], answer: Sequence[str], form: Sequence[str]) -> list[Grade]:
    if not len(completions) == len(answer) == len(form):
        raise ValueError(
            f"world reward: expected one answer and one format per completion, got {len(completions)} completions, "
            f"{len(answer)} answers and {len(form)} formats"
        )
    rows = zip(completions, answer, form, strict=True)
    return [grade(_text(completion), answer=a, form=f) for completion, a, f in rows]


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
