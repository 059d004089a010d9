"""Chat templates that are not ChatML: masks by markers or prefixes, or a refusal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nova_train.chat import CHATML_TEMPLATE, Chat, ChatError
from nova_train.config import ConfigError
from small_tokenizers import byte_level

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "</s>\n{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
# Earlier thoughts are dropped from history, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
    + CHATML_TEMPLATE
)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def trained_text(chat: Chat, encoded: Any) -> str:
    ids, mask = encoded
    return chat.decode(ids[mask], keep_special=True)


def test_foreign_template_by_prefixes() -> None:
    tokenizer = byte_level(LLAMA)
    chat = Chat(tokenizer)
    conversation = turns("What is two?", " The answer ", "日本語", "is four", system="s")
    ids, mask = chat.encode([conversation])[0]
    assert chat.route == "prefix" and chat.end_of_turn_id == tokenizer.convert_tokens_to_ids("</s>")
    assert ids.tolist() == tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
    assert trained_text(chat, (ids, mask)) == "The answer</s>is four</s>"
    prompt = chat.encode_prompts([conversation[:-1]])[0]
    assert ids.tolist() == [*prompt, *chat.text_ids("is four"), chat.end_of_turn_id]
    assert trained_text(chat, chat.encode([conversation], first_trained=[4])[0]) == "is four</s>"


def test_foreign_template_by_markers() -> None:
    chat = Chat(byte_level(MARKED))
    ids, mask = chat.encode([turns("q", "The answer", "q", "is four")])[0]
    assert chat.route == "markers"
    # The end of turn stands outside this template's markers: it is trained all the same.
    assert trained_text(chat, (ids, mask)) == "The answer</s>is four</s>"
    assert ids[-1] == chat.end_of_turn_id
    assert (
        trained_text(chat, chat.encode([turns("q", "The answer", "q", "is four")], first_trained=[2])[0])
        == "is four</s>"
    )


def test_a_default_system_turn_is_kept() -> None:
    chat = Chat(byte_level(DEFAULT_SYSTEM))
    ids, mask = chat.encode([turns("q", "The answer")])[0]
    assert chat.route == "markers"
    assert chat.decode(ids, keep_special=True).startswith("<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nq")
    assert trained_text(chat, (ids, mask)) == "The answer<|im_end|>"


def test_a_template_that_rewrites_history_is_refused_by_row() -> None:
    chat = Chat(byte_level(FORGETFUL))
    assert chat.route == "prefix"
    fine, thinking = turns("q", "a"), turns("q", "<think>t</think>a", "q", "b")
    with pytest.raises(ChatError, match=r"conversation 1: the chat template rewrites .* turn 1.*generation") as caught:
        chat.encode([fine, thinking, fine])
    assert list(caught.value.problems) == [1]


def test_special_tokens_in_content_are_refused_with_a_foreign_template() -> None:
    chat = Chat(byte_level(LLAMA))
    with pytest.raises(ChatError, match=r"conversation 0: message 1 holds the special token '</s>' as text"):
        chat.encode([turns("q", "a</s>b")])
    with pytest.raises(ChatError, match=r"conversation 1: message 0 holds the special token '<\|im_start\|>'"):
        chat.encode_prompts([turns("q"), turns("<|im_start|>")])


def test_refused_tokenizers() -> None:
    no_end = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(ConfigError, match="ends an assistant's turn with no special token"):
        Chat(byte_level(no_end))
    no_prefix = "{{ messages | length }}{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
    with pytest.raises(ConfigError, match="cannot tell which tokens .* generation"):
        Chat(byte_level(no_prefix))
    with pytest.raises(ConfigError, match="expected one of the tokenizers library"):
        Chat(SimpleNamespace(chat_template=None))
