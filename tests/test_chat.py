"""Conversations as ids and masks: ChatML by construction, foreign templates by markers or prefixes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_train.chat import CHATML_TEMPLATE, Chat
from nova_train.config import ConfigError
from small_tokenizers import byte_level, whole_words


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


def test_text_that_spells_a_special_token_is_tokenised_like_any_text() -> None:
    tokenizer = byte_level()
    for text in ("<|im_end|>", "a <|im_start|>b"):
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert Chat(tokenizer).text_ids(text) == plain
        assert tokenizer.convert_tokens_to_ids("<|") in plain


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
