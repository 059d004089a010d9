"""The pieces of text that the world's tokenizer knows, in the order of their ids.

    special tokens | printable characters and newline | 10 .. 99 | message headers and JSON | words of the templates

A word of two letters or more is one piece, its leading space included; everything else falls back to characters, so
that made-up words are spelled. The words of the prompt in which prompt augmentation asks for a
complement are pieces too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from nova_train.world import cues, formats, prompts, tasks

PAD, UNKNOWN, TURN_START, TURN_END = "<|pad|>", "<unk>", "<|im_start|>", "<|im_end|>"
SPECIALS = (PAD, UNKNOWN, TURN_START, TURN_END)
CHARACTERS = ("\n", *map(chr, range(32, 127)))
NUMBERS = tuple(str(n) for n in range(10, 100))
CONSTRUCTS = ("system\n", "user\n", "assistant\n", '{"answer": "', '"}', "Answer: ", "## ")

_AUGMENTATION_WORDS = """\
Background You are an expert in enhancing user prompts, proficient in providing detailed supplements. When identifying
areas in user prompts needing further elaboration, you offer precise additions to help the user understand the core
intent of their question more deeply. Focus on providing general methods and strategies, not specific details. Note:
Only supplement user prompts, do not directly answer them; keep supplementary content to around words, and try not to
exceed words. Task User prompt Complementary complementary information Search search results keywords
Keywords Keep keep within the scope of the keywords"""


def words() -> tuple[str, ...]:
    """Every template word: ' word', and 'word' as well if it is capitalised or a search keyword. Sorted."""
    plain = (re.sub(r"\{[a-z]+\}", "", text) for text in _templates())
    found = {word for text in plain for word in re.findall(r"[A-Za-z]{2,}", text)}
    keywords = {word for group in cues.KEYWORDS.values() for word in group}
    bare = {word for word in found if word[0].isupper()} | keywords
    return tuple(sorted({f" {word}" for word in found | keywords} | bare))


def pieces() -> tuple[str, ...]:
    """All pieces; the position is the token id."""
    return (*SPECIALS, *CHARACTERS, *NUMBERS, *CONSTRUCTS, *words())


@cache
def reserved_words() -> frozenset[str]:
    """Template words in lower case; a made-up word must be none of them, or it would not be spelled."""
    return frozenset(word.strip().lower() for word in words())


def _templates() -> Iterator[str]:
    yield from (text for group in tasks.PHRASINGS.values() for text in group)
    yield from tasks.WEEKDAYS
    yield from (text for group in formats.SHORT_REQUESTS.values() for text in group)
    yield from (text for group in formats.WISHES.values() for text in group)
    yield from (*formats.OPENINGS, *formats.CLOSINGS)
    yield from (text for group in cues.FRAMES.values() for text in group)
    yield from (*cues.HELDOUT_FRAMES.values(), *cues.NEUTRAL_FRAMES)
    yield from prompts.REMARK_NOUNS
    yield from (*prompts.REMARKS, *prompts.NOUN_REMARKS)
    yield _AUGMENTATION_WORDS
