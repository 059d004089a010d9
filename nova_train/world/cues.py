"""Prompts that leave the format open, and the complements that close it (prompt augmentation).

A cue is a sentence that says where the answer goes: a frame and a noun, both of one family, and each family stands for
one format:

    json     a program reads it         bracket  it goes into a table
    quote    it is quoted in an article label    it is graded in an exam

    "It will be parsed for" + "a web service"  ->  json

Frames and nouns are also paired with neutral ones ("It is for ...", "... our archive"), so that neither alone carries
the whole signal. Held out from training, with words that do occur elsewhere: some pairs of a known frame and a known
noun (`combination`), one whole frame (`frame`) and two whole nouns (`noun`) of each family.

A complement is one long sentence of formats.py; it asks for the format and never contains the answer. With search
keywords (the retrieval variant) it follows the keywords and contains them, whatever the cue says.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

HELDOUT_KINDS = ("combination", "frame", "noun")

FRAMES: dict[str, tuple[str, ...]] = {
    "json": (
        "It will be parsed for {noun}.",
        "The reply is input for {noun}.",
        "It gets loaded for {noun}.",
        "A machine reads it for {noun}.",
    ),
    "bracket": (
        "It goes into a cell of {noun}.",
        "I will fill a column for {noun}.",
        "The row is in {noun}.",
        "I will paste it for {noun}.",
    ),
    "quote": (
        "It will be quoted in {noun}.",
        "I will cite it for {noun}.",
        "An editor prints it in {noun}.",
        "The readers will see it in {noun}.",
    ),
    "label": (
        "It will be marked for {noun}.",
        "I hand it in for {noun}.",
        "The grade counts for {noun}.",
        "A student writes it for {noun}.",
    ),
}
NOUNS: dict[str, tuple[str, ...]] = {
    "json": ("a program", "a small script", "a web service", "the data parser"),
    "bracket": ("a spreadsheet", "the budget sheet", "my sales table", "a price list"),
    "quote": ("an article", "a news story", "the fashion magazine", "a blog post"),
    "label": ("an exam", "a school test", "the math class", "my course teacher"),
}
NEUTRAL_FRAMES = ("It is for {noun}.", "I need it for {noun}.", "Please think of {noun}.")
NEUTRAL_NOUNS = ("the project", "our archive", "a presentation", "the report")

HELDOUT_FRAMES = {
    "json": "A machine parsed the input for {noun}.",
    "bracket": "I will paste it into the column of {noun}.",
    "quote": "The editor will cite it in {noun}.",
    "label": "A student is marked for {noun}.",
}
HELDOUT_NOUNS: dict[str, tuple[str, ...]] = {
    "json": ("a web parser", "the data service"),
    "bracket": ("my budget table", "a sales spreadsheet"),
    "quote": ("a magazine story", "the news article"),
    "label": ("a math exam", "my school course"),
}
# What a search engine would return beside the prompt; every wish for the format contains these words.
KEYWORDS = {
    "json": ("JSON", "object"),
    "bracket": ("square", "brackets"),
    "quote": ("double", "quotes"),
    "label": ("Answer", "colon"),
}
FAMILIES = tuple(FRAMES)
_HELDOUT_SHARE = 5  # one pair in five of known frames and nouns


@dataclass(frozen=True, kw_only=True, slots=True)
class Cue:
    form: str  # the format it stands for
    kind: str  # train, combination, frame or noun
    text: str


def all_cues() -> list[Cue]:
    """Every cue of every family, those of training and those held out."""
    return [cue for family in FAMILIES for cue in _family(family)]


def _family(family: str) -> list[Cue]:
    pairs = [(frame, noun) for frame in FRAMES[family] for noun in (*NOUNS[family], *NEUTRAL_NOUNS)]
    pairs += [(frame, noun) for frame in NEUTRAL_FRAMES for noun in NOUNS[family]]
    known = [_cue(family, frame, noun, _kind_of_pair(frame, noun)) for frame, noun in pairs]
    frames = [_cue(family, HELDOUT_FRAMES[family], noun, "frame") for noun in NOUNS[family]]
    nouns = [_cue(family, frame, noun, "noun") for frame in FRAMES[family] for noun in HELDOUT_NOUNS[family]]
    return known + frames + nouns


def _kind_of_pair(frame: str, noun: str) -> str:
    digest = int(sha256(f"{frame}|{noun}".encode()).hexdigest(), 16)
    return "combination" if digest % _HELDOUT_SHARE == 0 else "train"


def _cue(family: str, frame: str, noun: str, kind: str) -> Cue:
    return Cue(form=family, kind=kind, text=frame.format(noun=noun))
