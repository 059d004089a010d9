"""Answer formats: how an answer is written, how it is read back, and how a prompt asks for it.

    plain    x                   never asked for: it is the format of a prompt that asks for nothing
    bracket  [x]
    json     {"answer": "x"}
    quote    "x"
    label    Answer: x

A response is in a format only if the whole string, without surrounding blanks, is one answer written that way.
A format is asked for by a short phrase, or by one long sentence of 25 to 30 words (opening x wish x closing): the
family of sentences that prompt augmentation writes as complements (cues.py).
"""

from __future__ import annotations

import re
from random import Random

PLAIN = "plain"
_SURROUNDINGS = {
    PLAIN: ("", ""),
    "bracket": ("[", "]"),
    "json": ('{"answer": "', '"}'),
    "quote": ('"', '"'),
    "label": ("Answer: ", ""),
}
FORMATS = tuple(_SURROUNDINGS)
REQUESTED = FORMATS[1:]

SHORT_REQUESTS: dict[str, tuple[str, ...]] = {
    "bracket": (
        "Put the answer in square brackets.",
        "Use square brackets.",
        "Write it like [x].",
        "Reply with [ and ] around the answer.",
    ),
    "json": (
        "Answer in JSON.",
        "Reply as a JSON object with the key answer.",
        'Write it like {"answer": "x"}.',
        "Use JSON for the answer.",
    ),
    "quote": (
        "Put the answer in double quotes.",
        "Use double quotes.",
        'Write it like "x".',
        'Reply with " around the answer.',
    ),
    "label": (
        "Start the reply with Answer and a colon.",
        "Use the label Answer.",
        "Write it like Answer: x.",
        "Put Answer: in front.",
    ),
}

OPENINGS = (
    "Please give the final result so that it can be used directly:",
    "The reply should be short and exact, and its form matters too:",
    "Take care that the person who asked can use the reply at once:",
)
WISHES: dict[str, tuple[str, ...]] = {
    "bracket": ("write it inside one pair of square brackets,", "put square brackets around the whole answer,"),
    "json": ("write it as a JSON object with the key answer,", "return one JSON object that holds the answer,"),
    "quote": ("write it between one pair of double quotes,", "put double quotes around the whole answer,"),
    "label": ("write the label Answer and a colon in front,", "let the line begin with Answer and a colon,"),
}
CLOSINGS = (
    "with nothing else before or after it.",
    "and add no other words to it.",
    "and leave out every kind of explanation.",
)


def wrap(answer: str, form: str) -> str:
    """The answer written in a format. KeyError for an unknown format."""
    before, after = _SURROUNDINGS[form]
    return f"{before}{answer}{after}"


def unwrap(response: str, form: str) -> str | None:
    """The answer inside a response, or None if the whole response is not one answer in this format."""
    before, after = _SURROUNDINGS[form]
    found = re.fullmatch(f"{re.escape(before)}([A-Za-z0-9]+){re.escape(after)}", response.strip())
    return found.group(1) if found else None


def long_requests(form: str) -> list[str]:
    """Every long sentence that asks for a format, each of 25 to 30 words."""
    return [f"{a} {b} {c}" for a in OPENINGS for b in WISHES[form] for c in CLOSINGS]


def draw_long_request(form: str, rng: Random) -> str:
    return f"{rng.choice(OPENINGS)} {rng.choice(WISHES[form])} {rng.choice(CLOSINGS)}"
