"""Rows of many forms -> TRL's types, and errors that name file, line and field."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from nova_train.datafiles import Row
from nova_train.datasets import DataError, read_rows
from nova_train.rowformats import rename_columns

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = {"messages": [USER, REPLY]}


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return str(path)


def one(tmp_path: Path, row: Any, kind: Any, **options: Any) -> dict[str, Any]:
    return dict(read_rows([write(tmp_path / "one.jsonl", row)], kind=kind, **options)[0])


def refused(tmp_path: Path, row: Any, kind: Any, message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message):
        one(tmp_path, row, kind, **options)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(CHAT, {"messages": [USER, REPLY]}, id="messages"),
        pytest.param({"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}, id="text"),
        pytest.param({"prompt": [USER], "completion": [REPLY]}, {"prompt": [USER], "completion": [REPLY]}, id="turns"),
        pytest.param(
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"messages": [{"role": "system", "content": "s"}, USER, REPLY]},
            id="ShareGPT",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": "a"},
                    {"from": "observation", "value": "o"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            {"messages": [USER, REPLY, {"role": "tool", "content": "o"}, REPLY]},
            id="ShareGPT-with-tools",
        ),
        pytest.param({"instruction": "q", "input": "", "output": "a"}, {"messages": [USER, REPLY]}, id="alpaca"),
        pytest.param(
            {"instruction": "i", "input": "x", "output": "a", "system": "s", "history": [["q", "a"]]},
            {"messages": [{"role": "system", "content": "s"}, USER, REPLY, {"role": "user", "content": "i\nx"}, REPLY]},
            id="alpaca-with-history",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, REPLY]},
            {"messages": [USER, REPLY]},
            id="typed-parts",
        ),
    ],
)
def test_supervised_formats(tmp_path: Path, row: Any, expected: dict[str, Any]) -> None:
    found = one(tmp_path, row, "sft")
    assert {key: found[key] for key in expected} == expected


PAIR = {"prompt": [USER], "chosen": [REPLY], "rejected": [{"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(
            {**PAIR, "chosen_score": 3, "rejected_score": None},
            {**PAIR, "chosen_score": 3.0, "rejected_score": None},
            id="turns",
        ),
        pytest.param(
            {**PAIR, "score_chosen": 3, "score_rejected": 0}, {"chosen_score": 3.0, "rejected_score": 0.0}, id="aliases"
        ),
        pytest.param(
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": None},
            id="text",
        ),
        pytest.param(
            {"chosen": [USER, REPLY], "rejected": [USER, REPLY]},
            {"prompt": None, "chosen": [USER, REPLY]},
            id="implicit",
        ),
        pytest.param({"prompt": [USER], "chosen": "a", "rejected": "b"}, PAIR, id="turns-with-text-replies"),
        pytest.param(
            {"prompt": "q", "chosen": PAIR["chosen"], "rejected": PAIR["rejected"]}, PAIR, id="text-with-turn-replies"
        ),
        pytest.param(
            {"prompt": "q", "chosen": [USER, REPLY], "rejected": [USER, REPLY]},
            {"prompt": None, "chosen": [USER, REPLY]},
            id="prompt-repeated",
        ),
        pytest.param(
            {"prompt": [USER], "chosen": [USER, REPLY], "rejected": [USER, REPLY]},
            {"prompt": None, "chosen": [USER, REPLY]},
            id="turns-repeated",
        ),
        pytest.param(
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            PAIR,
            id="ShareGPT",
        ),
        pytest.param({"input": "q", "output_1": "b", "output_2": "a", "label": 2}, PAIR, id="two-outputs"),
        pytest.param(
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            {"prompt": None, "chosen": [USER, REPLY], "rejected": [USER, *PAIR["rejected"]]},
            id="transcripts",
        ),
    ],
)
def test_preference_formats(tmp_path: Path, row: Any, expected: dict[str, Any]) -> None:
    found = one(tmp_path, row, "preference")
    assert {key: found[key] for key in expected} == expected


def test_prompt_formats(tmp_path: Path) -> None:
    assert one(tmp_path, {"prompt": "p", "answer": 4}, "prompt")["answer"] == 4
    assert one(tmp_path, {"prompt": [USER]}, "prompt")["prompt"] == [USER]
    assert one(tmp_path, {"instruction": "q", "output": "a"}, "prompt")["prompt"] == [USER]


def test_any_columns_through_dataset_columns(tmp_path: Path) -> None:
    row = {"Question": "q", "Body": "b", "Answer": 4.0, "messages": [USER, REPLY], "Type": 7}
    columns = {
        "user": "{Body}: {Question}",
        "system": "Body",
        "completion": "Question",
        "answer": "Answer",
        "category": "Type",
    }
    found = one(tmp_path, row, "sft", columns=columns)
    assert found["prompt"] == [{"role": "system", "content": "b"}, {"role": "user", "content": "b: q"}]
    assert found["completion"] == [{"role": "assistant", "content": "q"}]
    assert found["answer"] == 4.0 and found["category"] == "7" and "messages" not in found
    assert one(tmp_path, row, "prompt", columns={"prompt": "Question"})["prompt"] == "q"
    # Rows without those columns are read as they are, so that sets of several forms can be mixed.
    assert one(tmp_path, CHAT, "sft", columns=columns)["messages"] == [USER, REPLY]


def test_braces_in_a_value_are_not_columns(tmp_path: Path) -> None:
    found = one(tmp_path, {"a": "{b} {x}", "b": "2"}, "prompt", columns={"prompt": "{a}+{b}"})
    assert found["prompt"] == "{b} {x}+2"


BAD = [
    pytest.param(
        {"messages": [USER]},
        "sft",
        r"one\.jsonl:1: field 'messages': no trained token: .* got the roles user",
        id="no-answer",
    ),
    pytest.param(
        {"prompt": [USER], "completion": [USER]},
        "sft",
        r":1: field 'completion': no trained token",
        id="no-answer-in-completion",
    ),
    pytest.param(
        {"question": "q", "answer": "a"},
        "sft",
        r":1: expected the columns messages, or prompt and completion, got question, answer; name them",
        id="unknown-columns",
    ),
    pytest.param(
        {"messages": "hi"},
        "sft",
        r"field 'messages': expected a list of messages .*, got 'hi' \(str\)",
        id="text-for-messages",
    ),
    pytest.param({"messages": []}, "sft", r"field 'messages': expected a list of messages", id="no-messages"),
    pytest.param(
        {"messages": [USER, {"role": "assistant", "content": None}]},
        "sft",
        r"field 'messages\[1\]\.content': expected text, got None",
        id="null-content",
    ),
    pytest.param(
        {"messages": [{"role": "a b", "content": "x"}, REPLY]},
        "sft",
        r"field 'messages\[0\]\.role': expected a role.*'a b'",
        id="bad-role",
    ),
    pytest.param(
        {"messages": [USER, {**REPLY, "tool_calls": [{}]}]}, "sft", r"messages\[1\]\.tool_calls", id="tool-calls"
    ),
    pytest.param(
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]},
        "sft",
        r"content\[0\]': expected a part of type text",
        id="image",
    ),
    pytest.param(
        {"conversations": [{"from": "narrator", "value": "q"}]},
        "sft",
        r"conversations\[0\]\.from': expected one of human, .*'narrator'",
        id="unknown-speaker",
    ),
    pytest.param(
        '{"prompt": "\\ud800", "completion": "c"}', "sft", r"field 'prompt': expected text", id="half-a-surrogate"
    ),
    pytest.param(
        {"prompt": "p", "completion": [REPLY]},
        "sft",
        r"field 'completion': expected of the same form as prompt \(text\)",
        id="mixed-forms",
    ),
    pytest.param(
        {**PAIR, "chosen_score": "7"},
        "preference",
        r"one\.jsonl:1: field 'chosen_score': expected a finite number or null, got '7' \(str\)",
        id="score-as-text",
    ),
    pytest.param(
        {**PAIR, "score_rejected": True},
        "preference",
        r"field 'rejected_score': expected a finite number or null, got True \(bool\)",
        id="score-as-bool",
    ),
    pytest.param(
        {**PAIR, "chosen_score": [1]}, "preference", r"field 'chosen_score'.*\[1\] \(list\)", id="score-as-list"
    ),
    pytest.param(
        '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": NaN}',
        "preference",
        r"field 'chosen_score'.*nan",
        id="score-not-finite",
    ),
    pytest.param(
        {"prompt": "p", "chosen": "a", "rejected": [REPLY]},
        "preference",
        r"field 'rejected': expected of the same form as chosen \(text\)",
        id="mixed-answers",
    ),
    pytest.param(
        {"chosen": [USER], "rejected": [USER]},
        "preference",
        r"field 'chosen' must end with an assistant turn, got 'user'",
        id="ends-with-user",
    ),
    pytest.param(
        {"input": "q", "output_1": "a", "output_2": "b", "label": 0},
        "preference",
        r"field 'label': expected 1 or 2",
        id="tie",
    ),
    pytest.param({"prompt": ""}, "prompt", r"field 'prompt': expected a prompt, got ''", id="empty-prompt"),
    pytest.param(
        {"prompt": [USER, REPLY]}, "prompt", r"field 'prompt' ends with an assistant turn", id="answered-prompt"
    ),
    pytest.param(
        {"prompt": 5}, "prompt", r"field 'prompt': expected text or a list of messages, got 5 \(int\)", id="number"
    ),
]


@pytest.mark.parametrize(("row", "kind", "message"), BAD)
def test_a_bad_row_is_an_error(tmp_path: Path, row: Any, kind: Any, message: str) -> None:
    refused(tmp_path, row, kind, message)


@pytest.mark.parametrize(("row", "kind", "message"), BAD)
def test_a_bad_row_is_skipped_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: Any, kind: Any, message: str
) -> None:
    good = {**CHAT, **(PAIR if kind == "preference" else {"prompt": "p", "completion": "c"})}
    path = write(tmp_path / "one.jsonl", row, good, row, good)
    with caplog.at_level(logging.WARNING):
        rows = read_rows([path], kind=kind, on_bad_row="skip")
    assert [row.place for row in rows] == [f"{path}:2", f"{path}:4"]
    assert "skipped 2 bad rows, kept 2" in caplog.text and f"skipped: {path}:3: " in caplog.text


PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
KINDS = {"`sft`": "sft", "`reward`": "preference", "`grpo`": "prompt", "ShareGPT": "sft", "alpaca": "sft"}
KINDS |= {"two outputs": "preference", "transcripts": "preference"}
EXAMPLES = re.findall(r"^\| ([^|,]+)[^|]* \| `(\{.+?\})` \|", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize(("name", "row"), EXAMPLES)
def test_the_rows_of_the_page_are_read(tmp_path: Path, name: str, row: str) -> None:
    assert len(EXAMPLES) == 10
    assert one(tmp_path, row, KINDS[name])


def test_a_null_in_a_composed_column_is_refused() -> None:
    row = Row({"Body": "b", "Question": None}, place="svamp.jsonl:3")
    with pytest.raises(DataError, match=r"svamp.jsonl:3: field 'Question': expected a value .* got null"):
        rename_columns(row, {"user": "{Body}. {Question}"})
