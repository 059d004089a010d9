"""Conversations as ids and masks: ChatML by construction, foreign templates by markers or prefixes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_train.chat import CHATML_TEMPLATE, Chat, ChatError
from nova_train.config import ConfigError
from small_tokenizers import byte_level, whole_words

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


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(byte_level())


def test_golden_ids_and_mask() -> None:
    tokenizer = whole_words()
    chat = Chat(tokenizer)
    ids, mask = chat.encode([turns("two?", "four.", "?", "", system="user")])[0]
    words = [tokenizer.convert_ids_to_tokens(int(i)) for i in ids]
    # A star marks a trained token; the word list has no "system".
    expected = (
        "<|im_start|> <unk> <unk> <unk> <unk> <unk> <unk> \n user <|im_end|> \n"
        " <|im_start|> user \n two ? <|im_end|> \n <|im_start|> assistant \n four* .* <|im_end|>* \n"
        " <|im_start|> user \n ? <|im_end|> \n <|im_start|> assistant \n <|im_end|>*"
    )
    assert " ".join(word + "*" * bool(trained) for word, trained in zip(words, mask, strict=True)) == expected
    assert ids.dtype == "int64" and mask.dtype == bool


def test_ids_and_mask_are_those_of_the_saved_template(chat: Chat) -> None:
    """CHATML_TEMPLATE, read by transformers, agrees with the segments: other trainers see the same sample."""
    tokenizer = byte_level(CHATML_TEMPLATE)
    conversation = turns("What is two?", "The answer\nis four.", "日本語の文", "naïve", system="  indented")
    out = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = Chat(tokenizer).encode([conversation])[0]
    assert Chat(tokenizer).route == "chatml"
    assert ids.tolist() == out["input_ids"][:-1]  # all but the line break behind the last turn
    assert mask.tolist() == [bool(x) for x in out["assistant_masks"][:-1]]
    prompt = tokenizer.apply_chat_template(conversation[:-1], add_generation_prompt=True, return_dict=True)
    assert chat.encode_prompts([conversation[:-1]])[0] == prompt["input_ids"]


CONTENT = st.text(max_size=12) | st.sampled_from(
    ["<|im_end|>", "a<|im_start|>assistant\nb", "<|im_<|im_end|>end|>", "</s>", "\n"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(CONTENT.filter(lambda text: text.isprintable() or "\n" in text), min_size=2, max_size=6))
def test_a_prompt_and_its_reply_are_the_conversation(contents: list[str]) -> None:
    contents = contents[: len(contents) // 2 * 2]
    for chat in CHATS:
        conversation = turns(*contents)
        ids, mask = chat.encode([conversation])[0]
        reply = chat.text_ids(contents[-1])
        assert ids.tolist() == [*chat.encode_prompts([conversation[:-1]])[0], *reply, chat.end_of_turn_id]
        # Content never becomes a special token: one start and one end per turn, one trained end per reply.
        starts = (ids == chat.tokenizer.convert_tokens_to_ids("<|im_start|>")).sum()
        assert starts == (ids == chat.end_of_turn_id).sum() == len(contents)
        assert (ids[mask] == chat.end_of_turn_id).sum() == len(contents) // 2
        assert chat.tokenizer.convert_tokens_to_ids("</s>") not in ids


CHATS = (Chat(byte_level()), Chat(whole_words()))


def test_content_survives_the_round_trip(chat: Chat) -> None:
    for text in ("", " two  words ", "日本語の文\u2028x", "<|im_end|> is text here", "tab\tand\r\nline"):
        ids, mask = chat.encode([turns("q", text)])[0]
        assert chat.decode(ids[mask]) == text


def test_messages_of_the_prompt_are_not_trained(chat: Chat) -> None:
    conversation = turns("q", "first", "q", "second")
    all_turns, last_only, none = chat.encode([conversation] * 3, first_trained=[0, 2, 4])
    assert trained_text(chat, all_turns) == "first<|im_end|>second<|im_end|>"
    assert trained_text(chat, last_only) == "second<|im_end|>"
    assert not none[1].any()


def test_plain_text_has_no_template(chat: Chat) -> None:
    (ids, mask), (empty, _) = chat.encode_texts(["2 and 2", ""], [" is 4", ""])
    assert chat.decode(ids, keep_special=True) == "2 and 2 is 4<|im_end|>"
    assert chat.decode(ids[mask], keep_special=True) == " is 4<|im_end|>"
    assert empty.tolist() == [chat.end_of_turn_id]
    with_start = Chat(byte_level(bos=True))
    assert with_start.encode_text_prompts(["2", ""]) == [[3, *chat.text_ids("2")], [3]]


def test_no_conversations(chat: Chat) -> None:
    assert chat.encode([]) == chat.encode_prompts([]) == chat.encode_texts([], []) == []


def test_the_tokenizer_is_left_alone() -> None:
    tokenizer = byte_level()
    tokenizer("a", padding="max_length", max_length=8, truncation=True)  # leaves padding switched on
    before = tokenizer.backend_tokenizer.to_str()
    ids = Chat(tokenizer).encode([turns("q", "<|im_end|>")])[0][0]
    assert tokenizer.backend_tokenizer.to_str() == before and not tokenizer.backend_tokenizer.encode_special_tokens
    assert 0 not in ids and ids.size > 8


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


def test_no_template_and_no_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    )
    with pytest.raises(ConfigError, match=r"expected a chat template or the tokens <\|im_start\|> .*add_tokens"):
        Chat(bare)
    bare.chat_template = CHATML_TEMPLATE
    with pytest.raises(ConfigError, match="found neither"):
        Chat(bare)
