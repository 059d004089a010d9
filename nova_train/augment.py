"""Prompt augmentation (PAS): a small model adds about 30 words of requirements to a prompt, any model answers it.

The report's section 4.6 gives the prompt format, section 2.3 the retrieval variant: the keywords of a search enter the
prompt as further constraints. The complement is appended to the user's words, never put in their place, and an empty
complement leaves the prompt as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nova_train.chat import Chat
from nova_train.config import ConfigError
from nova_train.model import load_tokenizer
from nova_train.rollout import generate

SETTINGS_FILE = "pas.json"

Prompt = TypeVar("Prompt", str, list[dict[str, str]])

_BACKGROUND = """## Background
You are an expert in enhancing user prompts, proficient in providing detailed supplements.
When identifying areas in user prompts needing further elaboration, you offer precise additions to help the user \
understand the core intent of their question more deeply. Focus on providing general methods and strategies, not \
specific details.
Note: Only supplement user prompts, do not directly answer them; keep supplementary content to around {words} words, \
and try not to exceed {words} words.{scope}

## Task
"""
_SCOPE = " Keep the supplementary content within the scope of the search keywords."
_SYLLABLE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"  # ideographs, kana, hangul
_WORD = re.compile(rf"[{_SYLLABLE}]|[^\s{_SYLLABLE}]+")
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|[。！？；]")


@dataclass(frozen=True, kw_only=True, slots=True)
class PASSettings:
    """How a model was trained to see a prompt; saved beside it as pas.json."""

    prompt_style: Literal["report", "short"] = "report"  # short: without the background text
    max_words: int = 30  # words of a complement; an ideograph counts as one
    max_completion_length: int = 128  # tokens of a complement

    def save(self, folder: str | Path) -> None:
        (Path(folder) / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> PASSettings:
        path = Path(folder) / SETTINGS_FILE
        if not path.is_file():
            raise ConfigError(f"{folder}: expected a model trained by `nova-train pas`, found no {SETTINGS_FILE}")
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def pas_prompt(prompt: str | Sequence[Mapping[str, str]], settings: PASSettings, keywords: Sequence[str] = ()) -> str:
    """The text that the PAS model completes: the report's format around `prompt` and the search keywords."""
    background = ""
    if settings.prompt_style == "report":
        background = _BACKGROUND.format(words=settings.max_words, scope=_SCOPE if keywords else "")
    searched = f"<Search keywords>\n{', '.join(keywords)}\n" if keywords else ""
    return f"{background}<User prompt>\n{_text_of(prompt)}\n{searched}<Complementary information>"


def count_words(text: str) -> int:
    """Words between spaces; an ideograph, kana or hangul syllable is a word of its own."""
    return len(_words(text))


def cut_to_words(text: str, max_words: int) -> str:
    """At most `max_words` words of `text`: whole sentences where they keep at least half of that, else a hard cut."""
    text = text.strip()
    words = _words(text)
    if len(words) <= max_words:
        return text
    kept = text[: words[max_words].start()].rstrip()
    ends = [match.end() for match in _SENTENCE_END.finditer(kept)]
    whole = kept[: ends[-1]] if ends else ""
    return whole if 2 * count_words(whole) >= max_words else kept


def append_complement(prompt: Prompt, complement: str) -> Prompt:
    """`prompt`, a newline and the complement; of a conversation, the last message grows. Empty: `prompt` itself."""
    if not complement:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n{complement}"
    last = {**prompt[-1], "content": f"{prompt[-1]['content']}\n{complement}"}
    return [*prompt[:-1], last]


class PromptAugmenter:
    """A trained PAS model in front of any other model.

    >>> augmenter = PromptAugmenter.load("runs/pas")                    # doctest: +SKIP
    >>> augmenter.augment(["Write about the sea"])                      # doctest: +SKIP
    ['Write about the sea\\nDescribe ... in two short paragraphs.']
    """

    def __init__(self, model: nn.Module, tokenizer: Any, settings: PASSettings, *, batch_size: int = 64) -> None:
        self.model = model.eval()
        self.chat = Chat(tokenizer)
        self.tokenizer = tokenizer
        self.settings = settings
        self.batch_size = batch_size  # prompts generated at once; results do not depend on it

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", batch_size: int = 64) -> PromptAugmenter:
        """Open a folder written by `nova-train pas`.

        Raises:
            ConfigError: the folder has no pas.json.
        """
        settings = PASSettings.load(path)
        model = AutoModelForCausalLM.from_pretrained(path).to(device)
        return cls(model, load_tokenizer(path), settings, batch_size=batch_size)

    def augment(self, prompts: Sequence[Prompt], keywords: Sequence[Sequence[str]] | None = None) -> list[Prompt]:
        """Each prompt with its complement on a new line; texts give texts, conversations give conversations."""
        complements = self.complement(prompts, keywords)
        return [append_complement(p, complement) for p, complement in zip(prompts, complements, strict=True)]

    @torch.no_grad()
    def complement(
        self, prompts: Sequence[str | list[dict[str, str]]], keywords: Sequence[Sequence[str]] | None = None
    ) -> list[str]:
        """The complements alone, greedy, cut to the model's `max_words`; "" where the model has nothing to add.

        Args:
            keywords: for each prompt the keywords of a search that the complement must stay within, or None.

        Raises:
            ValueError: the number of keyword lists is not the number of prompts.
        """
        if keywords is not None and len(keywords) != len(prompts):
            raise ValueError(f"augment: expected one keyword list per prompt, got {len(keywords)} for {len(prompts)}")
        if not prompts:
            return []
        searched: Sequence[Sequence[str]] = keywords if keywords is not None else [()] * len(prompts)
        texts = [pas_prompt(p, self.settings, words) for p, words in zip(prompts, searched, strict=True)]
        completions = generate(
            self.model,
            self.chat.encode_prompts([[{"role": "user", "content": text}] for text in texts]),
            seeds=[0] * len(texts),
            end_ids=[self.chat.end_of_turn_id],
            pad_id=self.chat.end_of_turn_id,
            max_new_tokens=self.settings.max_completion_length,
            temperature=0.0,
            batch_size=self.batch_size,
        )
        return [cut_to_words(self.chat.decode(c.ids), self.settings.max_words) for c in completions]


def _words(text: str) -> list[re.Match[str]]:
    return [match for match in _WORD.finditer(text) if any(c.isalnum() for c in match.group())]


def _text_of(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A single question as it is; a longer conversation with its roles, one message per line."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
