"""Chat templates that are not ChatML: ids exactly as the tokenizer's own template gives them, and a mask beside them.

Where the assistant speaks is found by the first of

    markers   the template's {% generation %} blocks
    prefix    rendering: prompt_i = the messages before turn i with the assistant's header, text_i = the messages up to
              and with turn i; if every prompt_i starts text_i and every text_i starts the whole, turn i is what lies
              between. Templates that rewrite earlier turns fail this test.

and a template that offers neither is refused. The end-of-turn token after an assistant's turn is trained, the header is
not. Because these templates are tokenised as one text, content that spells a special token is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from nova_train.config import ConfigError

_PROBE = [
    {"role": "user", "content": "nova asks"},
    {"role": "assistant", "content": "nova replies"},
    {"role": "user", "content": "nova asks again"},
    {"role": "assistant", "content": "nova ends"},
]


class ChatError(ValueError):
    """Conversations that cannot be written; `problems` maps their numbers to the reasons."""

    def __init__(self, problems: Mapping[int, str]) -> None:
        first = min(problems)
        super().__init__(f"conversation {first}: {problems[first]}")
        self.problems = dict(problems)


def render(tokenizer: Any, conversation: Sequence[Mapping[str, str]], *, open_turn: bool) -> str | None:
    """The template's text, with the assistant's header at the end if `open_turn`; None where the template refuses."""
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in conversation], tokenize=False, add_generation_prompt=open_turn
        )
    except TemplateError:
        return None
    return text


class ForeignTemplate:
    """Ids and masks for one tokenizer's own template."""

    def __init__(self, tokenizer: Any, special: Mapping[str, int]) -> None:
        """`special`: text -> id of the special tokens.

        Raises:
            ConfigError: assistant turns cannot be found, or no special token ends them.
        """
        self._tokenizer = tokenizer
        self._engine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._engine.no_padding()
        self._engine.no_truncation()
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.end_of_turn_id = self._find_end_of_turn(frozenset(special.values()))
        self.route = self._find_route()

    def encode(self, conversations: Sequence[Sequence[Mapping[str, str]]], first: Sequence[int]) -> list[Any]:
        """(ids int64 [T], mask bool [T]) of each conversation; messages before number `first` are not trained."""
        results: list[tuple[np.ndarray, np.ndarray]] = []
        problems: dict[int, str] = {}
        for number, conversation in enumerate(conversations):
            try:
                ids, mask = self._by_markers(conversation) if self.route == "markers" else self._by_prefix(conversation)
                if first[number] > 0:
                    mask[: len(self._prompt_ids(conversation[: first[number]]))] = False
                results.append(self._finish(ids, mask))
            except _ProblemError as problem:
                problems[number] = str(problem)
        if problems:
            raise ChatError(problems)
        return results

    def encode_prompts(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[list[int]]:
        """Ids of each conversation with the assistant's header at the end."""
        results: list[list[int]] = []
        problems: dict[int, str] = {}
        for number, conversation in enumerate(conversations):
            try:
                results.append(self._prompt_ids(conversation))
            except _ProblemError as problem:
                problems[number] = str(problem)
        if problems:
            raise ChatError(problems)
        return results

    def _prompt_ids(self, conversation: Sequence[Mapping[str, str]]) -> list[int]:
        ids: list[int] = self._engine.encode(self._render(conversation, open_turn=True), add_special_tokens=False).ids
        return ids

    def _by_markers(self, conversation: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        self._render(conversation, open_turn=False)
        out = self._tokenizer.apply_chat_template(
            [dict(message) for message in conversation],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = np.array(out["input_ids"], dtype=np.int64), np.array(out["assistant_masks"], dtype=np.bool_)
        closes = np.flatnonzero((ids[1:] == self.end_of_turn_id) & mask[:-1] & (ids[:-1] != self.end_of_turn_id)) + 1
        mask[closes] = True
        return ids, mask

    def _by_prefix(self, conversation: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        text = self._render(conversation, open_turn=False)
        encoding = self._engine.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        mask = np.zeros(ids.size, dtype=np.bool_)
        for number, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            opening = self._render(conversation[:number], open_turn=True)
            closing = self._render(conversation[: number + 1], open_turn=False)
            if not (closing.startswith(opening) and text.startswith(closing)):
                raise _ProblemError(
                    f"the chat template rewrites the text before or in turn {number}, so what to train is ambiguous; "
                    "use a template with {% generation %} markers"
                )
            turn = np.flatnonzero((starts >= len(opening)) & (ends > len(opening)) & (starts < len(closing)))
            finals = np.flatnonzero(ids[turn] == self.end_of_turn_id)
            mask[turn[: finals[0] + 1] if finals.size else turn] = True
        return ids, mask

    def _finish(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut what follows the last end of turn."""
        finals = np.flatnonzero(ids == self.end_of_turn_id)
        length = int(finals[-1]) + 1 if finals.size else ids.size
        return ids[:length], mask[:length]

    def _render(self, conversation: Sequence[Mapping[str, str]], *, open_turn: bool) -> str:
        for number, message in enumerate(conversation):
            if found := self._special.search(message["content"]):
                raise _ProblemError(
                    f"message {number} holds the special token {found[0]!r} as text, which this tokenizer's chat "
                    "template would make a real one; remove it or use a ChatML tokenizer"
                )
        text = render(self._tokenizer, conversation, open_turn=open_turn)
        if text is None:
            roles = [message["role"] for message in conversation]
            raise _ProblemError(f"the chat template refuses a conversation with the roles {roles}")
        return text

    def _find_end_of_turn(self, special_ids: frozenset[int]) -> int:
        text = render(self._tokenizer, _PROBE[:2], open_turn=False)
        reply = _PROBE[1]["content"]
        if text is not None and reply in text:
            tail = text[text.rindex(reply) + len(reply) :]
            for token in self._engine.encode(tail, add_special_tokens=False).ids:
                if token in special_ids:
                    return int(token)
        raise ConfigError(
            f"tokenizer {self._tokenizer.name_or_path!r}: its chat template ends an assistant's turn with no special "
            "token, so generation would not know where to stop; use a template that does, such as "
            "nova_train.chat.CHATML_TEMPLATE with its two tokens"
        )

    def _find_route(self) -> str:
        template = self._tokenizer.get_chat_template()
        for route in ("markers", "prefix"):
            if route == "markers" and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
                continue
            try:
                _, mask = self._by_markers(_PROBE) if route == "markers" else self._by_prefix(_PROBE)
            except _ProblemError:
                continue
            turns = int(mask[0]) + int((mask[1:] & ~mask[:-1]).sum())
            if turns == 2:
                return route
        raise ConfigError(
            f"tokenizer {self._tokenizer.name_or_path!r}: cannot tell which tokens of its chat template are the "
            "assistant's; put {% generation %} and {% endgeneration %} around them in the template, or set "
            "tokenizer.chat_template = nova_train.chat.CHATML_TEMPLATE and add its two tokens"
        )


class _ProblemError(ValueError):
    """Why one conversation cannot be written."""
