"""Rows -> supervised samples, pairs and prompts: what is trained, what is too long, what is refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from nova_train.chat import Chat
from nova_train.datasets import DataError, Row, read_rows
from nova_train.samples import preference_pairs, prompt_key, prompts, sft_samples
from small_tokenizers import byte_level

IGNORE = -100
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '</s>' }}"
    "{% endgeneration %}{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(byte_level())


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def reply(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def rows(*columns: dict[str, Any]) -> list[Row]:
    return [Row({"source": "s", "category": "all", **row}, f"f.jsonl:{i}") for i, row in enumerate(columns, start=1)]


def trained(chat: Chat, sample: Any) -> str:
    assert ((sample["labels"] == IGNORE) | (sample["labels"] == sample["input_ids"])).all()
    return chat.decode(sample["labels"][sample["labels"] != IGNORE], keep_special=True)


def test_only_answers_are_trained(chat: Chat) -> None:
    history = [user("q"), reply("not this"), user("q")]
    samples = sft_samples(
        rows(
            {"messages": [*history, reply("and this")]},
            {"prompt": "plain ", "completion": "text"},
            {"prompt": history, "completion": [reply("only this")]},
            {"prompt": "", "completion": "no prompt"},
        ),
        chat,
        100,
    )
    texts = [trained(chat, sample) for sample in samples]
    # Without a prompt the first token has nothing to be predicted from.
    first = chat.decode(chat.text_ids("no prompt")[:1])
    assert texts == [
        "not this<|im_end|>and this<|im_end|>",
        "text<|im_end|>",
        "only this<|im_end|>",
        "no prompt<|im_end|>".removeprefix(first),
    ]
    assert all(sample["input_ids"].dtype == sample["labels"].dtype == "int64" for sample in samples)


def test_a_row_without_a_trained_token_is_refused(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    some = rows({"messages": [user("q")]}, {"prompt": "", "completion": ""}, {"messages": [user("q"), reply("")]})
    with pytest.raises(DataError, match=r"f\.jsonl:1: no trained token"):
        sft_samples(some, chat, 100)
    with pytest.raises(DataError, match=r"f\.jsonl:2: no trained token"):
        sft_samples(some[1:], chat, 100)
    with caplog.at_level(logging.WARNING):
        assert len(sft_samples(some, chat, 100, on_bad_row="skip")) == 1  # an empty answer still trains its end
    assert "skipped 2 bad rows, kept 1" in caplog.text


def test_overlong_samples(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    some = rows(
        {"messages": [user("q"), reply("a")]},
        {"messages": [user("q"), reply("a long answer, much too long to be kept")]},
        {"messages": [user("a question so long that no answer fits"), reply("a")]},
    )
    length = len(sft_samples(some[:1], chat, None)[0]["input_ids"])
    limit = length + 5
    with pytest.raises(
        DataError, match=rf"f\.jsonl:2: \d+ tokens, max_length is {limit}; raise max_length or set overlong"
    ):
        sft_samples(some, chat, limit)
    assert len(sft_samples(some, chat, limit, "drop")) == 1
    with caplog.at_level(logging.WARNING):
        kept = sft_samples(some, chat, limit, "truncate")
    assert [len(sample["input_ids"]) for sample in kept] == [length, limit]
    assert trained(chat, kept[1]) == chat.decode(chat.text_ids(some[1]["messages"][1]["content"])[:7])
    assert f"max_length {limit}: dropped 1 rows, truncated 1, kept 2 in all" in caplog.text
    assert len(sft_samples(some[:1], chat, length)) == 1
    with pytest.raises(DataError, match=rf"max_length is {length - 1}"):
        sft_samples(some[:1], chat, length - 1)
    with pytest.raises(
        DataError, match=r"empty data set: none of 1 rows is left \(1 longer than max_length, 0 skipped\)"
    ):
        sft_samples(some[2:], chat, length, "drop")
    with pytest.raises(ValueError, match="overlong: expected error, truncate or drop, got 'cut'"):
        sft_samples(some, chat, limit, "cut")  # type: ignore[arg-type]


HISTORY = [user("q"), reply("x"), user("r")]
PAIRS: list[dict[str, Any]] = [
    {"prompt": [user("q")], "chosen": [reply("good")], "rejected": [reply("bad one")]},
    {"prompt": None, "chosen": [*HISTORY, reply("good")], "rejected": [*HISTORY, reply("bad one")]},
    {"prompt": "the question: ", "chosen": "good", "rejected": "bad one"},
    {"prompt": None, "chosen": "the question: good", "rejected": "the question: gone"},
]


def test_pairs_hold_whole_sequences(chat: Chat) -> None:
    scored = [{**row, "chosen_score": 2.0, "rejected_score": None, "category": "c"} for row in PAIRS]
    pairs = preference_pairs(rows(*scored), chat, 100)
    starts = [chat.decode(pair.chosen[: pair.prompt_length], keep_special=True) for pair in pairs]
    open_turn = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    longer = f"{open_turn}x<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    assert starts == [open_turn, longer, "the question: ", "the question: "]
    for pair in pairs:
        assert chat.decode(pair.chosen[pair.prompt_length :], keep_special=True) == "good<|im_end|>"
        assert pair.chosen[-1] == pair.rejected[-1] == chat.end_of_turn_id
        assert (pair.chosen_score, pair.rejected_score, pair.source, pair.category) == (2.0, None, "s", "c")
    assert chat.decode(pairs[1].rejected, keep_special=True) == longer + "bad one<|im_end|>"


def test_overlong_pairs_lose_their_beginning(chat: Chat) -> None:
    some = rows(*PAIRS)
    whole = preference_pairs(some, chat, None)
    limit = len(whole[0].rejected) - 3
    with pytest.raises(DataError, match=rf"f\.jsonl:1: {limit + 3} tokens, max_length is {limit}"):
        preference_pairs(some, chat, limit)
    cut = preference_pairs(some[:1], chat, limit, "truncate")[0]
    assert cut.rejected.tolist() == whole[0].rejected[3:].tolist()
    gone = max(len(whole[0].chosen) - limit, 0)
    assert cut.chosen.tolist() == whole[0].chosen[gone:].tolist() and cut.prompt_length == whole[0].prompt_length - gone
    tiny = preference_pairs(some[:1], chat, 1, "truncate")[0]
    assert tiny.chosen.tolist() == [chat.end_of_turn_id] and tiny.prompt_length == 0


def test_equal_answers_are_reported(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        preference_pairs(rows({"prompt": "p ", "chosen": "a", "rejected": "a"}, PAIRS[0]), chat, 100)
    assert "1 of 2 pairs have the same text as chosen and rejected" in caplog.text


def test_prompts_keep_their_columns(chat: Chat) -> None:
    some = rows(
        {"prompt": [user("q")], "answer": 4, "completion": "c"},
        {"prompt": "plain"},
        {"prompt": [user("q")], "category": "z"},
    )
    first, second, third = prompts(some, chat, 100)
    assert first.ids == chat.encode_prompts([[user("q")]])[0] and second.ids == chat.text_ids("plain")
    assert first.prompt == [user("q")] and second.prompt == "plain"
    assert first.columns == {"source": "s", "category": "all", "answer": 4}
    assert first.key == third.key != second.key and third.category == "z"
    assert first.key == prompt_key([user("q")]) == "49b16c132664bd36"  # results are seeded by it


def test_overlong_prompts_keep_their_end(chat: Chat) -> None:
    some = rows({"prompt": [user("a somewhat long question")]})
    whole = prompts(some, chat, None)[0].ids
    with pytest.raises(DataError, match=r"f\.jsonl:1: \d+ tokens, max_length is 8"):
        prompts(some, chat, 8)
    assert prompts(some, chat, 8, "truncate")[0].ids == whole[-8:]


def test_a_template_that_cannot_write_a_row_names_it(caplog: pytest.LogCaptureFixture) -> None:
    chat = Chat(byte_level(MARKED))
    some = rows(
        {"prompt": "plain </s>", "completion": "x"},
        {"messages": [user("q"), reply("a")]},
        {"messages": [user("q"), reply("a</s>b")]},
    )
    with pytest.raises(DataError, match=r"f\.jsonl:3: message 1 holds the special token '</s>'"):
        sft_samples(some, chat, 100)
    with caplog.at_level(logging.WARNING):
        kept = sft_samples(some, chat, 100, on_bad_row="skip")
    assert [trained(chat, sample) for sample in kept] == ["x</s>", "a</s>"]
    assert "skipped 1 bad rows, kept 2" in caplog.text
    pair = {"chosen": [user("q"), reply("a")], "rejected": [user("q"), reply("</s>")], "prompt": None}
    with pytest.raises(DataError, match=r"f\.jsonl:1: message 1 holds"):
        preference_pairs(rows(pair), chat, 100)
    with pytest.raises(DataError, match=r"f\.jsonl:1: message 0 holds"):
        prompts(rows({"prompt": [user("</s>")]}), chat, 100)


def test_real_data_reaches_tokens(chat: Chat) -> None:
    folder = os.environ.get("NOVA_DATA")
    if not folder:
        pytest.skip("NOVA_DATA is not set: it names a folder with real data sets")
    root = Path(folder)
    names = [
        str(root / "sft" / name)
        for name in ("alpaca_zh_demo.jsonl.gz", "alpaca_en_demo.jsonl.gz", "identity_demo.jsonl.gz")
    ]
    found = sft_samples(read_rows(names, kind="sft"), chat, 2048, "truncate")
    assert len(found) > 2000 and max(len(sample["input_ids"]) for sample in found) == 2048
    asked = read_rows([str(root / "preference" / "hh_harmless_dev.jsonl.gz")], kind="preference", on_bad_row="skip")
    pairs = preference_pairs(asked, chat, 512, "truncate", on_bad_row="skip")
    assert len(pairs) > 1600
    assert all(pair.chosen[-1] == pair.rejected[-1] == chat.end_of_turn_id for pair in pairs)
    # Text comes back from its tokens, whatever the script.
    for row, sample in list(zip(read_rows(names[:1], kind="sft"), found, strict=False))[:200]:
        if len(sample["input_ids"]) < 2048:
            assert trained(chat, sample) == row["messages"][-1]["content"] + "<|im_end|>"
