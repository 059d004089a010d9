"""Questions become prompts: perhaps a remark that does not matter, perhaps a request for an answer format.

    [remark] question [request]      in varying order; the request is short, or the long sentence of formats.py

A prompt that requests nothing has the format `plain`. Cues (cues.py) never occur here: what they stand for is known to
prompt augmentation only. Their nouns do occur, in remarks that say nothing about the format.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random

from nova_train.world.cues import HELDOUT_NOUNS, NEUTRAL_NOUNS, NOUNS
from nova_train.world.formats import PLAIN, REQUESTED, SHORT_REQUESTS, draw_long_request
from nova_train.world.tasks import Question

REMARKS = (
    "I am on the train.",
    "My coffee is cold.",
    "It rains again.",
    "This is my first day here.",
    "We had a long meeting.",
    "I will call you later.",
    "My phone is almost empty.",
    "There is no hurry.",
    "Thank you for the help.",
    "Good morning.",
)
NOUN_REMARKS = (
    "I talked about {noun} today.",
    "We saw {noun} last week.",
    "Yesterday I thought of {noun}.",
)
REMARK_NOUNS = tuple(noun for group in (*NOUNS.values(), NEUTRAL_NOUNS, *HELDOUT_NOUNS.values()) for noun in group)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Shares of prompts or answers, each in [0, 1]."""

    format_request: float = 0.8  # of prompts
    long_request: float = 0.25  # of the requests
    remark: float = 0.08  # of prompts
    wrong_answer: float = 0.04  # of SFT answers
    format_obedience: float = 0.25  # of SFT answers to prompts that request a format; the others are plain

    def __post_init__(self) -> None:
        for each in fields(self):
            if not 0 <= (value := getattr(self, each.name)) <= 1:
                raise ValueError(f"world: rate {each.name} must lie in [0, 1], got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A question as it is asked: the prompt, and the format that the checker expects."""

    question: Question
    prompt: str
    form: str


def pose(question: Question, rates: Rates, rng: Random) -> Task:
    """Ask a question, with remark and request drawn at the given rates."""
    parts = [question.text]
    if rng.random() < rates.remark:
        parts.insert(rng.randrange(2), _remark(rng))
    body = " ".join(parts)
    if rng.random() >= rates.format_request:
        return Task(question=question, prompt=body, form=PLAIN)
    form = rng.choice(REQUESTED)
    if rng.random() < rates.long_request:
        request, separator, before = draw_long_request(form, rng), rng.choice("\n\n "), rng.random() < 0.2
    else:
        request, separator, before = rng.choice(SHORT_REQUESTS[form]), " ", rng.random() < 0.5
    prompt = f"{request}{separator}{body}" if before else f"{body}{separator}{request}"
    return Task(question=question, prompt=prompt, form=form)


def pose_with_cue(question: Question, cue: str, form: str, rng: Random) -> Task:
    """Ask a question with a cue instead of a request; the format is hidden from the reader of the prompt."""
    parts = [question.text, cue]
    if rng.random() < 0.5:
        parts.reverse()
    return Task(question=question, prompt=" ".join(parts), form=form)


def _remark(rng: Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(REMARKS)
    return rng.choice(NOUN_REMARKS).format(noun=rng.choice(REMARK_NOUNS))
