"""inspect-data: the statistics are right, and what is coloured is what is trained."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import tiny
from nova_kernels.packing import PackedBatch
from nova_train.__main__ import main
from nova_train.chat import CHATML_TEMPLATE, Chat
from nova_train.config import ConfigError
from nova_train.stages import inspect_data
from nova_train.stages.inspect_data import InspectDataConfig, coloured, run, statistics_text, token_statistics
from small_tokenizers import byte_level

USER, REPLY = {"role": "user", "content": "What is [two]?"}, {"role": "assistant", "content": "日本語 naïve"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(CHATML_TEMPLATE).save_pretrained(folder)
    return str(folder)


def inspected(tokenizer: str, path: Path, rows: list[dict[str, Any]], **keys: Any) -> tuple[str, dict[str, Any]]:
    """What is printed, and statistics.json."""
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = StringIO()
    config = InspectDataConfig(
        model_name_or_path=tokenizer, dataset_name=[str(path / "data.jsonl")], output_dir=str(path / "out"), **keys
    )
    folder = run(config, console=Console(file=out, width=100, color_system=None))
    assert (folder / "finished.json").exists()
    return out.getvalue(), json.loads((folder / "statistics.json").read_text(encoding="utf-8"))


def test_statistics_of_known_lengths() -> None:
    found = token_statistics([*range(1, 101), 300], max_length=100, trained=1000)
    assert (found.samples, found.tokens, found.shortest, found.longest, found.overlong) == (101, 5350, 1, 300, 1)
    assert found.mean == pytest.approx(5350 / 101) and found.trained_share == pytest.approx(1000 / 5350)
    assert found.percentiles == {"5": 6, "25": 26, "50": 51, "75": 76, "95": 96, "99": 100}
    assert found.packs == 51 and found.utilization == pytest.approx(5050 / 5100)
    assert token_statistics([5], max_length=4, packing=False).packs is None
    with pytest.raises(ValueError, match="at least one sample"):
        token_statistics([], max_length=4)


def test_colours_follow_the_mask(tokenizer: str) -> None:
    chat = Chat(byte_level())
    conversation = [USER, REPLY, USER, {"role": "assistant", "content": "four"}]
    ids, mask = chat.encode([conversation])[0]
    text = coloured(chat, ids, mask, 10_000)
    assert text.plain == chat.decode(ids, keep_special=True)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green == chat.decode(ids[mask], keep_special=True) == "日本語 naïve<|im_end|>four<|im_end|>"
    assert "\ufffd" not in text.plain
    neighbours = [str(span.style) for span in text.spans]
    assert all(a != b for a, b in pairwise(neighbours))
    short = coloured(chat, ids, mask, 3)
    assert short.plain == chat.decode(ids[:3], keep_special=True) + f" ... {len(ids) - 3} more tokens"
    assert coloured(chat, np.empty(0, dtype=np.int64), np.empty(0, dtype=bool), 5).plain == ""


def test_supervised_rows(tokenizer: str, tmp_path: Path) -> None:
    rows = [{"messages": [USER, REPLY]}, {"messages": [USER, REPLY, USER, REPLY], "category": "two"}]
    chat = Chat(byte_level())
    (one, mask), (two, _) = chat.encode([row["messages"] for row in rows])
    printed, facts = inspected(tokenizer, tmp_path, rows, max_length=len(one), rows_shown=1)
    assert facts["samples"]["tokens"] == len(one) + len(two)
    assert facts["samples"]["overlong"] == facts["samples"]["packs"] == 1 and facts["samples"]["utilization"] == 1
    assert facts["samples"]["trained_share"] == pytest.approx(3 * mask.sum() / (len(one) + len(two)))
    assert facts["rows"] == {"count": 2, "source": {"data": 2}, "category": {"all": 1, "two": 1}}
    assert "What is [two]?" in printed and "sample 0" in printed and "sample 1" not in printed
    assert "masks: chatml" in printed


def test_preference_rows(tokenizer: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY], "chosen_score": 1.0},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [USER, REPLY], "chosen_score": 2.0},
    ]
    printed, facts = inspected(tokenizer, tmp_path, rows, kind="preference")
    assert "chosen: 2 of 2 have a score, mean 1.500" in printed and "rejected: 0 of 2 have a score" in printed
    assert "pairs with the same text twice: 1" in printed
    assert facts["chosen"]["samples"] == 2 and facts["rejected"]["longest"] > facts["chosen"]["longest"]


def test_prompt_rows(tokenizer: str, tmp_path: Path) -> None:
    rows = [{"question": "two?", "answer": 4}, {"question": "two?", "answer": 5}]
    printed, facts = inspected(tokenizer, tmp_path, rows, kind="prompt", dataset_columns={"user": "question"})
    assert "different prompts: 1" in printed and "columns for reward functions: answer, category" in printed
    assert facts["prompts"]["samples"] == 2 and facts["prompts"]["packs"] is None


def test_text_for_a_dry_run(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [USER, REPLY]}) + "\n", encoding="utf-8")
    text = statistics_text(InspectDataConfig(model_name_or_path=tokenizer, dataset_name=str(path)))  # type: ignore[arg-type]
    assert "packs per epoch, utilisation" in text and "What is" not in text and "\x1b" not in text
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


FILES = {"sft": tiny.sft_file, "preference": tiny.pair_file, "prompt": tiny.prompt_file}


@pytest.mark.parametrize("kind", FILES)
def test_the_trainer_keeps_packed_samples_apart(kind: Any, model: Path, tmp_path: Path) -> None:
    data, out = FILES[kind](tmp_path / "rows.jsonl"), StringIO()
    config = InspectDataConfig(
        model_name_or_path=str(model),
        dataset_name=[str(data)],
        kind=kind,
        check_packing=True,
        output_dir=str(tmp_path / "out"),
        max_length=256,
    )
    run(config, console=Console(file=out, width=120, color_system=None))
    found = json.loads((tmp_path / "out" / "statistics.json").read_text(encoding="utf-8"))["check_packing"]
    assert found["samples"] == 4 and found["tokens"] <= 256
    assert found["trainer"] < 1e-5 * found["largest_logit"] < 0.01 * found["own_attention"]
    trainer, own = out.getvalue().splitlines()[-2:]
    assert trainer.startswith("  the trainer") and trainer.endswith("apart")
    assert own.startswith("  its own attention") and own.endswith("LEAK"), "a cache reaches it by default"


@pytest.mark.parametrize("broken", ["leak", "not a number"])
def test_a_leak_is_an_error(
    broken: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if broken == "leak":  # nobody says where samples begin
        monkeypatch.setattr(PackedBatch, "attention_kwargs", lambda _: {"use_cache": False})
    else:
        monkeypatch.setattr(inspect_data, "check_packing", lambda *_: float("nan"))
    data = tiny.sft_file(tmp_path / "rows.jsonl")
    words = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(["inspect-data", *words, "--check_packing", "--attention_backend", "reference"]) == 2
    said = capsys.readouterr()
    assert said.out.count("LEAK") == 2 and "apart\n" not in said.out
    assert "packed samples see each other" in said.err and "choose another attention_backend" in said.err
    assert not (tmp_path / "out" / "finished.json").exists()


def test_packing_cannot_be_checked_without_weights_or_with_one_sample(
    tokenizer: str, model: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"dataset_name": [str(tiny.sft_file(tmp_path / "rows.jsonl"))], "check_packing": True}
    with pytest.raises(ConfigError, match="check_packing needs a causal LM with its weights: .*"):
        run(InspectDataConfig(model_name_or_path=tokenizer, **keys))
    config_only = tmp_path / "config_only"
    shutil.copytree(model, config_only)
    (config_only / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="needs a causal LM with its weights: .*it has no model that opens"):
        run(InspectDataConfig(model_name_or_path=str(config_only), **keys))
    with pytest.raises(ConfigError, match="no two of 24 samples fit into max_length 8 together"):
        run(InspectDataConfig(model_name_or_path=str(model), max_length=8, **keys))


def test_refusals() -> None:
    keys: dict[str, Any] = {"model_name_or_path": "m", "dataset_name": ["d"]}
    with pytest.raises(ConfigError, match="max_length must be at least 1 token, got 0"):
        InspectDataConfig(**keys, max_length=0)
    with pytest.raises(ConfigError, match="rows_shown must be at least 0, got -1"):
        InspectDataConfig(**keys, rows_shown=-1)
