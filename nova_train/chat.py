"""Conversations -> token ids with a loss mask, and token ids -> text.

ChatML is built segment by segment, so the mask holds by construction and content never becomes a special token:

    <|im_start|> system \\n     content <|im_end|> \\n        context
    <|im_start|> user \\n       content <|im_end|> \\n        context
    <|im_start|> assistant \\n  content <|im_end|>           trained: content and <|im_end|>, not the header

A sample ends with its last end of turn, and

    encode(prompt + [reply]).ids == encode_prompts(prompt) + text_ids(reply) + [end_of_turn_id]

so what the trainer sees is what generation continues. Tokenizers with another template: nova_train/templates.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nova_train.config import ConfigError
from nova_train.templates import ChatError, ForeignTemplate, render

Message = dict[str, str]  # {"role": ..., "content": ...}
Conversation = Sequence[Mapping[str, str]]
Encoded = tuple[np.ndarray, np.ndarray]  # ids int64 [T], mask bool [T], True = trained

START, END = "<|im_start|>", "<|im_end|>"
BATCH = 256  # texts per call of the tokenizer; its results are large objects, and few of them stay in the cache

CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# A template that renders these as ChatML is ChatML: no default system turn, no trimming, no dropped history.
_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": " a\n"}],
    [
        {"role": "system", "content": " s\n"},
        {"role": "user", "content": " b\n"},
        {"role": "assistant", "content": "<think>\n\nt\n</think>\n\n c\n"},
        {"role": "user", "content": " d\n"},
    ],
)


class Chat:
    """A tokenizer's way of writing conversations: ChatML, or the template it came with."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a Hugging Face tokenizer; it is read, never changed.

        Raises:
            ConfigError: the tokenizer is not one of the `tokenizers` library, or neither knows ChatML's two tokens
                nor has a template whose assistant turns can be found.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"tokenizer: expected one of the tokenizers library (a tokenizer.json), got "
                f"{type(tokenizer).__name__}; save it with a fast tokenizer class"
            )
        special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        special |= {text: i for text in (START, END) if (i := backend.token_to_id(text)) is not None}
        self.tokenizer = tokenizer
        self._text = PlainText(backend, special, keep=tokenizer.unk_token_id)
        self._template: ForeignTemplate | None = None
        if _writes_chatml(tokenizer, special):
            self.end_of_turn_id: int = special[END]
            self._start: int = special[START]
            self._between = self._text.ids(["\n"])[0]
            self._headers: dict[str, list[int]] = {}
        else:
            self._template = ForeignTemplate(tokenizer, special)
            self.end_of_turn_id = self._template.end_of_turn_id
        self._bos = _leading_bos(tokenizer, backend)

    @property
    def route(self) -> str:
        """How masks are found: "chatml" (by construction), "markers" or "prefix" (foreign templates)."""
        return "chatml" if self._template is None else self._template.route

    def encode(
        self, conversations: Sequence[Conversation], *, first_trained: Sequence[int] | None = None
    ) -> list[Encoded]:
        """Ids and mask of whole conversations.

        Args:
            first_trained: for each conversation, the number of its first message that may be trained (the messages
                before it are the prompt, whoever speaks); None: every assistant turn is trained.

        Raises:
            ChatError: a conversation that a foreign template cannot write unambiguously; never with ChatML.
        """
        first = [0] * len(conversations) if first_trained is None else list(first_trained)
        if self._template is not None:
            return self._template.encode(conversations, first)
        contents = iter(self._text.ids([message["content"] for conv in conversations for message in conv]))
        return [self._encode_one(conv, contents, start) for conv, start in zip(conversations, first, strict=True)]

    def encode_prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Ids of conversations that wait for an answer: each ends with the assistant's header.

        Raises:
            ChatError: as in `encode`.
        """
        if self._template is not None:
            return self._template.encode_prompts(conversations)
        contents = iter(self._text.ids([message["content"] for conv in conversations for message in conv]))
        prompts = []
        for conv in conversations:
            ids: list[int] = []
            for message in conv:
                ids += self._opening(message["role"], first=not ids)
                ids += next(contents)
                ids.append(self.end_of_turn_id)
            prompts.append(ids + self._opening("assistant", first=not ids))
        return prompts

    def encode_texts(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Encoded]:
        """Plain text without a template: prompt, completion, end of turn; completion and end of turn are trained."""
        heads, tails = self.encode_text_prompts(prompts), self._text.ids(completions)
        return [
            (
                np.array([*head, *tail, self.end_of_turn_id], dtype=np.int64),
                np.arange(len(head) + len(tail) + 1) >= len(head),
            )
            for head, tail in zip(heads, tails, strict=True)
        ]

    def encode_text_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Plain text that waits to be continued; opens with the tokenizer's own start token, if it adds one."""
        return [self._bos + ids for ids in self._text.ids(prompts)]

    def text_ids(self, text: str) -> list[int]:
        """Ids of content alone; what looks like a special token in it stays text."""
        return self._text.ids([text])[0]

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of token ids, special tokens left out unless asked for."""
        return self._text.decode(ids, keep_special=keep_special)

    def _encode_one(self, conv: Conversation, contents: Any, first_trained: int) -> Encoded:
        ids: list[int] = []
        mask = bytearray()
        for number, message in enumerate(conv):
            ids += self._opening(message["role"], first=number == 0)
            mask += bytes(len(ids) - len(mask))
            ids += next(contents)
            ids.append(self.end_of_turn_id)
            trained = message["role"] == "assistant" and number >= first_trained
            mask += (b"\1" if trained else b"\0") * (len(ids) - len(mask))
        return np.array(ids, dtype=np.int64), np.frombuffer(mask, dtype=np.bool_)

    def _opening(self, role: str, *, first: bool) -> list[int]:
        """Header of a turn, with the line break that ends the turn before it."""
        if role not in self._headers:
            self._headers[role] = [self._start, *self._text.ids([role + "\n"])[0]]
        return self._headers[role] if first else self._between + self._headers[role]


class PlainText:
    """Text <-> ids where nothing in the text is read as a special token."""

    def __init__(self, backend: Tokenizer, special: Mapping[str, int], *, keep: int | None) -> None:
        """`special`: text -> id of the tokens that content may not become; `keep`: the unknown token, which it may."""
        self._engine = Tokenizer.from_str(backend.to_str())
        self._engine.no_padding()
        self._engine.no_truncation()
        self._engine.encode_special_tokens = True
        self._special = frozenset(special.values()) - {keep}
        texts = sorted((text for text in special if len(text) > 1), key=len, reverse=True)
        self._look_alike = re.compile("|".join(map(re.escape, texts))) if texts else None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, the same list object for the same text: copy before changing one."""
        unique = list(dict.fromkeys(texts))
        known: dict[str, list[int]] = {}
        for text, encoding in zip(unique, self._encode(unique), strict=True):
            known[text] = encoding if self._special.isdisjoint(encoding) else self._broken_up(text)
        return [known[text] for text in texts]

    def decode(self, ids: Iterable[int], *, keep_special: bool) -> str:
        """Text of `ids`."""
        kept = [int(i) for i in ids if keep_special or int(i) not in self._special]
        text: str = self._engine.decode(kept, skip_special_tokens=False)
        return text

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for first in range(0, len(texts), BATCH):
            batch = self._engine.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False)
            ids += [encoding.ids for encoding in batch]
        return ids

    def _broken_up(self, text: str) -> list[int]:
        """Some vocabularies hold special tokens as ordinary words: look-alikes are tokenised in two halves."""
        pieces, last = [], 0
        for match in self._look_alike.finditer(text) if self._look_alike else ():
            pieces += [text[last : match.start()], match[0][:1], match[0][1:]]
            last = match.end()
        ids = list(chain.from_iterable(self._encode([*pieces, text[last:]])))
        if not self._special.isdisjoint(ids):
            raise ValueError(
                f"the tokenizer reads a special token in the plain text {text[:80]!r}; remove it from the data"
            )
        return ids


def _writes_chatml(tokenizer: Any, special: Mapping[str, int]) -> bool:
    """Whether segments can be built directly.

    Raises:
        ConfigError: there is no template and ChatML's tokens are missing.
    """
    template = tokenizer.chat_template
    has_tokens = START in special and END in special
    if template is None or template == CHATML_TEMPLATE:
        if not has_tokens:
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path!r}: expected a chat template or the tokens {START} and {END}, "
                f"found neither; add them with tokenizer.add_tokens(['{START}', '{END}'], special_tokens=True), "
                "grow the model's embeddings, and save both"
            )
        return True
    if not has_tokens:
        return False
    return all(
        render(tokenizer, probe, open_turn=open_turn) == _as_chatml(probe, open_turn=open_turn)
        for probe in _PROBES
        for open_turn in (False, True)
    )


def _as_chatml(conversation: Conversation, *, open_turn: bool) -> str:
    turns = "".join(f"{START}{message['role']}\n{message['content']}{END}\n" for message in conversation)
    return turns + (f"{START}assistant\n" if open_turn else "")


def _leading_bos(tokenizer: Any, backend: Tokenizer) -> list[int]:
    """The start token, if the tokenizer puts one in front of plain text."""
    ids = backend.encode("", add_special_tokens=True).ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


__all__ = ["CHATML_TEMPLATE", "Chat", "ChatError", "Conversation", "Encoded", "Message"]
