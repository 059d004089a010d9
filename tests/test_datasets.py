"""Files -> rows: lines, compression, dirt, and errors that name file and line."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from nova_train.datafiles import DataError
from nova_train.datasets import read_rows

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = {"messages": [USER, REPLY]}


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return str(path)


def test_rows_know_their_source_category_and_place(tmp_path: Path) -> None:
    a = write(tmp_path / "a.b.jsonl", CHAT, "", {**CHAT, "source": "mine", "category": "maths", "n": 3})
    rows = read_rows([a], kind="sft")
    assert [(row["source"], row["category"]) for row in rows] == [("a.b", "all"), ("mine", "maths")]
    assert [row.place for row in rows] == [f"{a}:1", f"{a}:3"]
    assert rows[1]["n"] == 3


def test_lines_end_with_newline_only(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive\x1c"
    path = write(tmp_path / "u.jsonl", {"prompt": text, "completion": "c"})
    assert read_rows([path], kind="sft")[0]["prompt"] == text
    windows = tmp_path / "w.jsonl"
    windows.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(CHAT).encode() for _ in range(2)) + b"\r\n\r\n")
    assert len(read_rows([str(windows)], kind="sft")) == 2


def test_gzip_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": [USER], "chosen": [REPLY], "rejected": [USER, REPLY], "chosen_score": score} for score in (1.5, None)
    ]
    plain = write(tmp_path / "p.jsonl", *rows)
    zipped, table = tmp_path / "p.jsonl.gz", tmp_path / "p.parquet"
    zipped.write_bytes(gzip.compress(Path(plain).read_bytes()))
    parquet.write_table(pa.Table.from_pylist(rows), table)
    expected = [dict(row) for row in read_rows([plain], kind="preference")]
    assert [dict(row) for row in read_rows([str(zipped)], kind="preference")] == expected
    assert [dict(row) for row in read_rows([str(table)], kind="preference")] == expected


BAD = [
    pytest.param('{"prompt": "p"', r":1: malformed JSON row: .* at column 15, in .*on_bad_row: skip", id="malformed"),
    pytest.param('[{"prompt": "p"}', r":1: malformed JSON row: .* a JSON array is not JSON Lines", id="JSON-array"),
    pytest.param('"text"', r":1: expected a JSON object with named columns, got 'text' \(str\)", id="not-an-object"),
    pytest.param("[" * 100_000, r":1: malformed JSON row: nested too deeply", id="bomb"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_an_error_or_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: str, message: str
) -> None:
    with pytest.raises(DataError, match=r"one\.jsonl" + message):
        read_rows([write(tmp_path / "one.jsonl", row, {"prompt": "p"})], kind="prompt")
    path = write(tmp_path / "two.jsonl", row, {"prompt": "p"}, row, {"prompt": "p"})
    with caplog.at_level(logging.WARNING):
        rows = read_rows([path], kind="prompt", on_bad_row="skip")
    assert [row.place for row in rows] == [f"{path}:2", f"{path}:4"]
    assert "skipped 2 bad rows, kept 2" in caplog.text and f"skipped: {path}:3: " in caplog.text


def test_many_bad_rows_are_counted_not_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.jsonl", *["{"] * 40, CHAT)
    assert len(read_rows([path], kind="sft", on_bad_row="skip")) == 1
    assert len(caplog.records) == 6 and "skipped 40 bad rows, kept 1" in caplog.text


def test_bad_bytes(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: expected UTF-8, got byte 0xe9 at 15"):
        read_rows([str(path)], kind="sft")
    whole = gzip.compress("".join(json.dumps({**CHAT, "n": i}) + "\n" for i in range(3000)).encode())
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d+: expected a readable gzip file.*fetch or write"):
        read_rows([str(path)], kind="sft", on_bad_row="skip")
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"expected a readable gzip file"):
        read_rows([str(path)], kind="sft")


def test_no_such_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "./train", "a/b/c", "x.parquet"):
        with pytest.raises(DataError, match=rf"{name}: no such file \(looked in {tmp_path}\); check dataset_name"):
            read_rows([name], kind="sft")
    with pytest.raises(DataError, match=r"expected a data file, got a folder; name a file in it: one\.jsonl"):
        write(tmp_path / "one.jsonl", CHAT)
        read_rows([str(tmp_path)], kind="sft")


def test_a_hub_name_needs_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"owner/name: no such file .*nova-kernels\[data\]"):
        read_rows(["owner/name"], kind="sft")


def test_a_hub_name_with_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    asked = []

    def load_dataset(path: str, split: str) -> list[dict[str, Any]]:
        asked.append((path, split))
        if path == "owner/gone":
            raise FileNotFoundError("not on the Hub")
        return [CHAT]

    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = read_rows(["owner/name", "owner/name:test"], kind="sft")
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    assert rows[1].place == "owner/name:test:1" and rows[1]["source"] == "owner/name:test"
    with pytest.raises(DataError, match="no Hugging Face data set could be opened: not on the Hub"):
        read_rows(["owner/gone"], kind="sft")


def test_empty_data_sets(tmp_path: Path) -> None:
    empty, bad = write(tmp_path / "e.jsonl", "", "  "), write(tmp_path / "b.jsonl", "{", "3")
    with pytest.raises(DataError, match=r"e\.jsonl: empty data set: no usable row; check the file"):
        read_rows([empty], kind="sft")
    with pytest.raises(DataError, match=r"b\.jsonl: empty data set: no usable row \(2 skipped\)"):
        read_rows([bad], kind="sft", on_bad_row="skip")
    with pytest.raises(DataError, match="no data set is named"):
        read_rows([], kind="sft")


def test_the_policy_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_bad_row: expected error or skip, got 'ignore'"):
        read_rows([write(tmp_path / "a.jsonl", CHAT)], kind="sft", on_bad_row="ignore")  # type: ignore[arg-type]


REAL = [
    ("sft/alpaca_zh_demo.jsonl.gz", "sft", None, 1000),
    ("sft/codealpaca_new.jsonl.gz", "sft", None, 4535),
    ("sft/gsm8k_train.jsonl.gz", "sft", {"user": "question", "completion": "answer"}, 7473),
    ("tools/glaive_toolcall_zh_demo.jsonl.gz", "sft", None, 300),
    ("preference/hh_harmless_dev.jsonl.gz", "preference", None, 1703),
    ("preference/dpo_en_demo.jsonl.gz", "preference", None, 300),
    ("preference/llmbar_natural.jsonl.gz", "preference", None, 100),
    (
        "preference/alpaca_eval_vicuna-7b_dev.jsonl.gz",
        "preference",
        {"user": "instruction", "chosen": "output_1", "rejected": "output_2"},
        424,
    ),
    (
        "reasoning/svamp.jsonl.gz",
        "prompt",
        {"user": "{Body}. {Question}", "answer": "Answer", "category": "Type"},
        1000,
    ),
    ("if_eval/ifeval_input_data.jsonl.gz", "prompt", None, 541),
]


@pytest.mark.parametrize(("name", "kind", "columns", "count"), REAL)
def test_real_data(name: str, kind: Any, columns: dict[str, str] | None, count: int) -> None:
    folder = os.environ.get("NOVA_DATA")
    if not folder:
        pytest.skip("NOVA_DATA is not set: it names a folder with real data sets")
    rows = read_rows([f"{folder}/{name}"], kind=kind, columns=columns, on_bad_row="skip")
    assert len(rows) >= 0.99 * count
