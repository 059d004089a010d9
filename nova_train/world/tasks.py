"""Questions with one right answer: eight categories, three difficulties, several phrasings.

    draw(category, difficulty, rng)  ->  Question(text, answer, ...)
    wrong_answer(question, rng)      ->  a plausible answer that is not the right one

Every answer is one run of letters or digits. A question says nothing about the form of the answer (formats.py).

    add      a + b                               operands up to 5, 9, 12
    sub      a - b >= 0                          operands up to 5, 9, 12
    count    how often a letter is in a word     words of 3, 4, 5 letters
    compare  the larger of two numbers           up to 20, up to 99, less than 10 apart
    sort     the letters of a word in order      words of 3, 4, 5 letters
    reverse  a word backwards                    words of 3, 4, 5 letters
    upper    a word in capitals                  words of 3, 4, 5 letters
    weekday  n days after a weekday              n in 2-3, 4-5, 6-7

Words are made of twelve letters: enough for thousands of them, few enough for a small model to learn each one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

DIFFICULTIES = (1, 2, 3)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

PHRASINGS: dict[str, tuple[str, ...]] = {
    "add": ("What is {a} + {b}?", "Add {a} and {b}.", "Compute {a} plus {b}.", "{a} + {b} = ?"),
    "sub": ("What is {a} - {b}?", "Take {b} away from {a}.", "Compute {a} minus {b}.", "{a} - {b} = ?"),
    "count": (
        "How many times is {c} in {w}?",
        "Count the letter {c} in {w}.",
        "How often does the letter {c} occur in {w}?",
    ),
    "compare": (
        "Which is larger, {a} or {b}?",
        "Pick the bigger number: {a} or {b}.",
        "Of {a} and {b}, which one is greater?",
    ),
    "sort": ("Sort the letters of {w}.", "Put the letters of {w} in order.", "Order the letters in {w} from a to z."),
    "reverse": ("Reverse {w}.", "Write {w} backwards.", "Spell {w} from the end."),
    "upper": ("Write {w} in capital letters.", "Convert {w} to upper case.", "Make every letter of {w} a capital."),
    "weekday": (
        "Which day comes {n} days after {d}?",
        "What day is it {n} days after {d}?",
        "Today is {d}. Which day is in {n} days?",
        "Name the day {n} days after {d}.",
        "From {d} go {n} days on. Which day is it?",
    ),
}
CATEGORIES = tuple(PHRASINGS)
# What the two specialists are trained on mostly: halves of like difficulty, each with numbers and words.
HALVES = {"first": ("add", "compare", "sort", "upper"), "second": ("sub", "count", "reverse", "weekday")}

_VOWELS = "aeio"
_LETTERS = "abdeilmnorst"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    category: str
    difficulty: int  # 1 (easy) to 3
    text: str
    answer: str
    words: tuple[str, ...] = ()  # the made-up words of question and answer, in lower case


def draw(category: str, difficulty: int, rng: Random) -> Question:
    """One question; equal calls on equal generators give equal questions. KeyError for an unknown category."""
    fields, answer, words = _DRAW[category](difficulty, rng)
    text = rng.choice(PHRASINGS[category]).format(**fields)
    return Question(category=category, difficulty=difficulty, text=text, answer=answer, words=words)


def wrong_answer(question: Question, rng: Random) -> str:
    """An answer of the right kind and the wrong content: what a careless person would write."""
    answer = question.answer
    if answer in WEEKDAYS:
        return rng.choice([day for day in WEEKDAYS if day != answer])
    if answer.isdigit():
        value = int(answer)
        return str(rng.choice([v for v in range(value - 3, value + 4) if v != value and v >= 0]))
    place = rng.randrange(len(answer))
    letters = _LETTERS if answer.islower() else _LETTERS.upper()
    letter = rng.choice([c for c in letters if c != answer[place]])
    return answer[:place] + letter + answer[place + 1 :]


# What a category draws: the fields of its phrasings, the answer, the made-up words.
_Drawn = tuple[dict[str, object], str, tuple[str, ...]]


def _add(difficulty: int, rng: Random) -> _Drawn:
    top = (5, 9, 12)[difficulty - 1]
    a, b = rng.randint(1, top), rng.randint(1, top)
    return {"a": a, "b": b}, str(a + b), ()


def _sub(difficulty: int, rng: Random) -> _Drawn:
    top = (5, 9, 12)[difficulty - 1]
    a, b = sorted((rng.randint(1, top), rng.randint(1, top)), reverse=True)
    return {"a": a, "b": b}, str(a - b), ()


def _count(difficulty: int, rng: Random) -> _Drawn:
    length = 2 + difficulty
    times = rng.randint(0, 3)
    letter = rng.choice(_LETTERS)
    others = [c for c in _pseudo_word(length + 1, rng) if c != letter]
    word = [letter] * times + (others * 2)[: length - times]
    rng.shuffle(word)
    text = "".join(word)
    return {"c": letter, "w": text}, str(text.count(letter)), (text,)


def _compare(difficulty: int, rng: Random) -> _Drawn:
    a = rng.randint(1, 20 if difficulty == 1 else 99)
    if difficulty == 3:
        near = [b for b in range(a - 9, a + 10) if b != a and 1 <= b <= 99]
    else:
        near = [b for b in range(1, 21 if difficulty == 1 else 100) if b != a]
    b = rng.choice(near)
    return {"a": a, "b": b}, str(max(a, b)), ()


def _sort(difficulty: int, rng: Random) -> _Drawn:
    word = _pseudo_word(2 + difficulty, rng)
    answer = "".join(sorted(word))
    return {"w": word}, answer, (word, answer)


def _reverse(difficulty: int, rng: Random) -> _Drawn:
    word = _pseudo_word(2 + difficulty, rng)
    return {"w": word}, word[::-1], (word, word[::-1])


def _upper(difficulty: int, rng: Random) -> _Drawn:
    word = _pseudo_word(2 + difficulty, rng)
    return {"w": word}, word.upper(), (word,)


def _weekday(difficulty: int, rng: Random) -> _Drawn:
    start, days = rng.randrange(7), rng.choice(((2, 3), (4, 5), (6, 7))[difficulty - 1])
    return {"n": days, "d": WEEKDAYS[start]}, WEEKDAYS[(start + days) % 7], ()


def _pseudo_word(length: int, rng: Random) -> str:
    """Letters in no order of any language, two in five of them vowels on average."""
    return "".join(rng.choice(_VOWELS if rng.random() < 0.25 else _LETTERS) for _ in range(length))


_DRAW: dict[str, Callable[[int, Random], _Drawn]] = {
    "add": _add,
    "sub": _sub,
    "count": _count,
    "compare": _compare,
    "sort": _sort,
    "reverse": _reverse,
    "upper": _upper,
    "weekday": _weekday,
}
