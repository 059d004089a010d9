"""Rows -> tokens: supervised samples, preference pairs, prompts.

A sample never exceeds `max_length` tokens. What is longer is an error that names the row, is dropped, or is truncated:
supervised samples lose their end; pairs and prompts lose their beginning, because a score is read at a response's end
of turn and generation continues a prompt's end. Dropped and truncated rows are counted in the log.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from nova_train.chat import Chat, ChatError, Encoded, Message
from nova_train.datafiles import BadRows, DataError

log = logging.getLogger(__name__)

IGNORE_INDEX = -100  # label of a token that is not trained

Overlong = Literal["error", "truncate", "drop"]
OnBadRow = Literal["error", "skip"]
Rows = Sequence[Mapping[str, Any]]
Sample = dict[str, np.ndarray]  # input_ids int64 [T], labels int64 [T]
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two responses to one prompt, each as the whole sequence of token ids, prompt included."""

    chosen: np.ndarray  # int64 [T]
    rejected: np.ndarray  # int64 [T']
    chosen_score: float | None  # as the row has it, not normalised; None = not scored
    rejected_score: float | None
    prompt_length: int  # tokens of `chosen` that are the prompt, header of the response included
    source: str
    category: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt that waits for a response."""

    ids: list[int]
    prompt: str | list[Message]
    columns: dict[str, Any]  # the row's other columns, for reward functions
    category: str
    key: str  # hash of `prompt`, 16 hexadecimal digits: names it whatever its place in the data


def sft_samples(
    rows: Rows, chat: Chat, max_length: int | None, overlong: Overlong = "error", *, on_bad_row: OnBadRow = "error"
) -> list[Sample]:
    """Supervised samples of rows of kind "sft"; labels are unshifted, -100 where not trained.

    `messages`: every assistant turn is trained; `prompt` + `completion`: the completion alone, plain text closed by the
    end-of-turn token.

    Args:
        max_length: tokens; None = no limit.

    Raises:
        DataError: a row without a trained token, too long, or not writable with the tokenizer's template; no sample.
    """
    fit, bad = _Fit(max_length, overlong), BadRows(on_bad_row)
    encoded = _by_row(rows, lambda some: _encode([_sft_parts(row) for row in some], chat), bad)
    samples = []
    for row, (ids, mask) in encoded:
        if not mask[1:].any():
            bad.add(
                DataError(
                    f"{_place(row)}: no trained token: no assistant text that follows another token; remove the row"
                )
            )
            continue
        kept = fit.tokens(row, ids.size, bad)
        if kept is None:
            continue
        labels = np.where(mask, ids, IGNORE_INDEX)[:kept]
        labels[0] = IGNORE_INDEX
        if (labels == IGNORE_INDEX).all():
            fit.drop_cut()
            continue
        samples.append({"input_ids": ids[:kept], "labels": labels})
    return _done(samples, fit, bad, rows)


def preference_pairs(
    rows: Rows, chat: Chat, max_length: int | None, overlong: Overlong = "error", *, on_bad_row: OnBadRow = "error"
) -> list[Pair]:
    """Pairs of rows of kind "preference"; `max_length` bounds each of the two sequences.

    Raises:
        DataError: as in `sft_samples`.
    """
    fit, bad = _Fit(max_length, overlong), BadRows(on_bad_row)

    def both(some: Rows) -> list[tuple[Encoded, Encoded]]:
        sides = [_encode([_pair_parts(row, side) for row in some], chat) for side in ("chosen", "rejected")]
        return list(zip(*sides, strict=True))

    encoded = _by_row(rows, both, bad)
    pairs = []
    same = 0
    for row, ((chosen, mask), (rejected, _)) in encoded:
        kept = fit.tokens(row, max(chosen.size, rejected.size), bad)
        if kept is None:
            continue
        same += int(np.array_equal(chosen, rejected))
        cut = max(chosen.size - kept, 0)
        pairs.append(
            Pair(
                chosen=chosen[cut:],
                rejected=rejected[max(rejected.size - kept, 0) :],
                chosen_score=row.get("chosen_score"),
                rejected_score=row.get("rejected_score"),
                prompt_length=max(int(mask.argmax()) - cut, 0),
                source=str(row["source"]),
                category=str(row["category"]),
            )
        )
    if same:
        log.warning("%d of %d pairs have the same text as chosen and rejected; they teach nothing", same, len(pairs))
    return _done(pairs, fit, bad, rows)


def prompts(
    rows: Rows, chat: Chat, max_length: int | None, overlong: Overlong = "error", *, on_bad_row: OnBadRow = "error"
) -> list[Prompt]:
    """Prompts of rows of kind "prompt"; a conversation ends with the assistant's header.

    Raises:
        DataError: as in `sft_samples`; a prompt without tokens.
    """
    fit, bad = _Fit(max_length, overlong), BadRows(on_bad_row)
    encoded = _by_row(rows, lambda some: _encode_open([row["prompt"] for row in some], chat), bad)
    found = []
    for row, ids in encoded:
        if not ids:
            bad.add(DataError(f"{_place(row)}: field 'prompt' gives no token; remove the row"))
            continue
        kept = fit.tokens(row, len(ids), bad)
        if kept is None:
            continue
        found.append(
            Prompt(
                ids=ids[max(len(ids) - kept, 0) :],
                prompt=row["prompt"],
                columns={k: v for k, v in row.items() if k not in ("prompt", "completion", "completion_ids")},
                category=str(row["category"]),
                key=prompt_key(row["prompt"]),
            )
        )
    return _done(found, fit, bad, rows)


def prompt_key(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """The first 16 hexadecimal digits of SHA-256 over the prompt as canonical JSON."""
    text = json.dumps(prompt, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def _encode(parts: Sequence[tuple[Any, Any]], chat: Chat) -> list[Encoded]:
    """(prompt, response), each text or messages, in one batch per form; only the response is trained."""
    plain = [i for i, (prompt, _) in enumerate(parts) if isinstance(prompt, str)]
    talks = [i for i, (prompt, _) in enumerate(parts) if not isinstance(prompt, str)]
    texts = chat.encode_texts([parts[i][0] for i in plain], [parts[i][1] for i in plain])
    try:
        turns = chat.encode(
            [[*parts[i][0], *parts[i][1]] for i in talks], first_trained=[len(parts[i][0]) for i in talks]
        )
    except ChatError as error:
        raise ChatError({talks[number]: reason for number, reason in error.problems.items()}) from None
    encoded = dict(zip([*plain, *talks], [*texts, *turns], strict=True))
    return [encoded[i] for i in range(len(parts))]


def _encode_open(asked: Sequence[Any], chat: Chat) -> list[list[int]]:
    """Prompts, each text or messages, in one batch per form."""
    plain = [i for i, prompt in enumerate(asked) if isinstance(prompt, str)]
    talks = [i for i, prompt in enumerate(asked) if not isinstance(prompt, str)]
    texts = chat.encode_text_prompts([asked[i] for i in plain])
    try:
        turns = chat.encode_prompts([asked[i] for i in talks])
    except ChatError as error:
        raise ChatError({talks[number]: reason for number, reason in error.problems.items()}) from None
    encoded = dict(zip([*plain, *talks], [*texts, *turns], strict=True))
    return [encoded[i] for i in range(len(asked))]


def _sft_parts(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return ([], row["messages"]) if row.get("messages") is not None else (row["prompt"], row["completion"])


def _pair_parts(row: Mapping[str, Any], side: str) -> tuple[Any, Any]:
    """(prompt, response); without a prompt column, the prompt is what chosen and rejected both begin with."""
    if row["prompt"] is not None:
        return row["prompt"], row[side]
    shared = _shared_text(row) if isinstance(row[side], str) else _shared_messages(row)
    return row[side][:shared], row[side][shared:]


def _shared_messages(row: Mapping[str, Any]) -> int:
    """Messages that chosen and rejected both begin with, the last of either left out."""
    limit = min(len(row["chosen"]), len(row["rejected"])) - 1
    return next((k for k in range(limit) if row["chosen"][k] != row["rejected"][k]), limit)


def _shared_text(row: Mapping[str, Any]) -> int:
    """Characters that both texts begin with, up to a blank, so that no word is split."""
    chosen, rejected = row["chosen"], row["rejected"]
    limit = min(len(chosen), len(rejected))
    same = next((k for k in range(limit) if chosen[k] != rejected[k]), limit)
    return next((k for k in range(same, 0, -1) if chosen[k - 1].isspace()), 0)


def _by_row(
    rows: Rows, encode: Callable[[Rows], list[ResultT]], bad: BadRows
) -> list[tuple[Mapping[str, Any], ResultT]]:
    """(row, its encoding); rows that the tokenizer's template cannot write go to `bad`."""
    while True:
        try:
            return list(zip(rows, encode(rows), strict=True))
        except ChatError as error:
            problems = error.problems
        for number, reason in sorted(problems.items()):
            bad.add(DataError(f"{_place(rows[number])}: {reason}"))
        rows = [row for number, row in enumerate(rows) if number not in problems]


def _place(row: Mapping[str, Any]) -> str:
    return getattr(row, "place", f"row of {row.get('source', 'unknown source')}")


class _Fit:
    """The rule for samples longer than `max_length`, and its tally."""

    def __init__(self, max_length: int | None, overlong: Overlong) -> None:
        if overlong not in ("error", "truncate", "drop"):
            raise ValueError(f"overlong: expected error, truncate or drop, got {overlong!r}")
        self._max_length, self._overlong = max_length, overlong
        self.dropped = self.truncated = 0

    def tokens(self, row: Mapping[str, Any], length: int, bad: BadRows) -> int | None:
        """Tokens to keep of `length`; None: leave the row out."""
        if self._max_length is None or length <= self._max_length:
            return length
        if self._overlong == "truncate":
            self.truncated += 1
            return self._max_length
        if self._overlong == "drop":
            self.dropped += 1
        else:
            bad.add(
                DataError(
                    f"{_place(row)}: {length} tokens, max_length is {self._max_length}; raise max_length or set "
                    "overlong: truncate or drop"
                )
            )
        return None

    def drop_cut(self) -> None:
        """A truncated sample that lost every trained token is dropped after all."""
        self.truncated -= 1
        self.dropped += 1

    def report(self, kept: int) -> None:
        if self.dropped or self.truncated:
            log.warning(
                "max_length %s: dropped %d rows, truncated %d, kept %d in all (overlong: %s)",
                self._max_length, self.dropped, self.truncated, kept, self._overlong,
            )  # fmt: skip


def _done(results: list[ResultT], fit: _Fit, bad: BadRows, rows: Rows) -> list[ResultT]:
    fit.report(len(results))
    bad.report(len(results))
    if not results:
        raise DataError(
            f"empty data set: none of {len(rows)} rows is left ({fit.dropped} longer than max_length, {bad.count} "
            "skipped); check dataset_name, max_length and on_bad_row"
        )
    return results
