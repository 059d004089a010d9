"""The world's data sets as rows of plain dicts: disjoint by question, balanced over categories, pure in the seed.

A question belongs to one part by the hash of its text, whatever the seed:

    train      90 %   SFT, specialists, prompt augmentation; of these
      rollout  70 %     prompts for reinforcement learning
      annotate 20 %     prompts whose sampled answers become preference pairs
    heldout     5 %   evaluation
    pairs     2.5 %   held-out preference pairs
    cued      2.5 %   evaluation of prompt augmentation

The hash is taken over the question as it is phrased. The same sum in another phrasing can be in another part, so the
categories with few facts (add, sub, weekday) test unseen prompts, not unseen arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import cycle
from random import Random
from typing import Any

from nova_train.world import cues, formats, vocabulary
from nova_train.world.prompts import Rates, Task, pose, pose_with_cue
from nova_train.world.tasks import CATEGORIES, DIFFICULTIES, Question, draw, wrong_answer

Row = dict[str, Any]

HELDOUT, PAIRS, CUED, ANNOTATE, ROLLOUT = "heldout", "pairs", "cued", "annotate", "rollout"
TRAIN = (ANNOTATE, ROLLOUT)
_BOUNDS = ((50, HELDOUT), (75, PAIRS), (100, CUED), (300, ANNOTATE), (1000, ROLLOUT))  # thousandths

# One prompt in so many goes to the specialist of the other half, and comes with search keywords.
_OTHER_HALF = 5
_WITH_KEYWORDS = 5
_PATIENCE = 2_000  # draws without a new prompt before a count is called impossible


def part_of(question: str) -> str:
    """The part a question belongs to: a function of its text alone."""
    place = int.from_bytes(sha256(question.encode()).digest()[:8], "big") % 1000
    return next(part for bound, part in _BOUNDS if place < bound)


def sft_rows(count: int, rates: Rates, rng: Random) -> Iterator[Row]:
    """Conversations on all categories in turn, with the noise of `rates` in the answers."""
    return _conversations(cycle(CATEGORIES), count, rates, rng)


def specialist_rows(half: Sequence[str], count: int, rates: Rates, rng: Random) -> Iterator[Row]:
    """As `sft_rows`, with 80 % of the conversations on one half of the categories and 20 % on the other."""
    other = [category for category in CATEGORIES if category not in half]
    turns = zip(cycle(half), cycle(other), range(count), strict=False)
    order = (theirs if place % _OTHER_HALF == _OTHER_HALF - 1 else ours for ours, theirs, place in turns)
    return _conversations(order, count, rates, rng)


def prompt_rows(part: str, count: int, rates: Rates, rng: Random) -> Iterator[Row]:
    """Prompts of one part, all different, balanced over categories, with the columns that the checker needs."""

    def ask(place: int) -> Task:
        return pose(_question(CATEGORIES[place % len(CATEGORIES)], (part,), rng), rates, rng)

    return map(_prompt_row, _distinct(ask, count))


def augmentation_rows(count: int, rng: Random) -> Iterator[Row]:
    """Prompts with a training cue and the complement that asks for its format; some with search keywords.

    With keywords the complement follows them: the prompt then has no cue, or a cue of any family.
    """
    known = [cue for cue in cues.all_cues() if cue.kind == "train"]
    for category, place in zip(cycle(CATEGORIES), range(count), strict=False):
        question, cue = _question(category, TRAIN, rng), rng.choice(known)
        prompt, form = pose_with_cue(question, cue.text, cue.form, rng).prompt, cue.form
        keywords: tuple[str, ...] = ()
        if place % _WITH_KEYWORDS == 0:
            form = rng.choice(cues.FAMILIES)
            keywords = cues.KEYWORDS[form]
            if rng.random() < 0.5:
                prompt = question.text
        complement = formats.draw_long_request(form, rng)
        row: Row = {"prompt": prompt, "complement": complement, "keywords": list(keywords)}
        yield row | {"category": category, "question": question.text}


def cued_prompt_rows(count: int, rng: Random) -> Iterator[Row]:
    """Prompts with held-out cues, balanced over categories, kinds of hold-out and formats, all different.

    What the cue stands for is hidden in the columns, for the checker; column `cue` names the kind of hold-out.
    """
    kinds = [(kind, form) for kind in cues.HELDOUT_KINDS for form in cues.FAMILIES]
    pools = {key: [cue for cue in cues.all_cues() if (cue.kind, cue.form) == key] for key in kinds}

    def key_of(place: int) -> tuple[str, str]:
        return kinds[place // len(CATEGORIES) % len(kinds)]

    def ask(place: int) -> Task:
        cue = rng.choice(pools[key_of(place)])
        return pose_with_cue(_question(CATEGORIES[place % len(CATEGORIES)], (CUED,), rng), cue.text, cue.form, rng)

    for place, task in enumerate(_distinct(ask, count)):
        yield _prompt_row(task) | {"cue": key_of(place)[0]}


def _conversations(categories: Iterator[str], count: int, rates: Rates, rng: Random) -> Iterator[Row]:
    for category, _ in zip(categories, range(count), strict=False):
        task = pose(_question(category, TRAIN, rng), rates, rng)
        question = task.question
        answer = wrong_answer(question, rng) if rng.random() < rates.wrong_answer else question.answer
        form = task.form if rng.random() < rates.format_obedience else formats.PLAIN
        reply = {"role": "assistant", "content": formats.wrap(answer, form)}
        yield {"messages": [_user(task.prompt), reply], "category": category, "question": question.text}


def _distinct(ask: Callable[[int], Task], count: int) -> Iterator[Task]:
    """`count` tasks with different prompts; `ask(place)` draws a candidate for a place."""
    seen: set[str] = set()
    for place in range(count):
        candidates = (ask(place) for _ in range(_PATIENCE))
        task = next((each for each in candidates if each.prompt not in seen), None)
        if task is None:
            raise ValueError(f"world: expected {count} different prompts, found {place}; ask for fewer")
        seen.add(task.prompt)
        yield task


def _question(category: str, parts: Sequence[str], rng: Random) -> Question:
    """A question of these parts; the difficulty is drawn anew with each try, because small parts may lack one."""
    while True:
        question = draw(category, rng.choice(DIFFICULTIES), rng)
        if part_of(question.text) in parts and vocabulary.reserved_words().isdisjoint(question.words):
            return question


def _prompt_row(task: Task) -> Row:
    question = task.question
    return {
        "prompt": [_user(task.prompt)],
        "answer": question.answer,
        "format": task.form,
        "category": question.category,
        "difficulty": question.difficulty,
        "question": question.text,
    }


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
