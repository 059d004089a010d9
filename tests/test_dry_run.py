from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

import tiny
from nova_train.__main__ import main
from nova_train.config import TrainConfig
from nova_train.stages import dry_run
from nova_train.stages.grpo import GRPOConfig
from nova_train.stages.pas import PASConfig
from nova_train.stages.reward import RewardConfig
from nova_train.stages.sft import SFTConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("dry_run"))


def keys(model: Path, data: Path | str = "unread", **values: Any) -> dict[str, Any]:
    base = {"output_dir": "unused", "model_name_or_path": str(model), "dataset_name": [str(data)], "max_length": 64}
    return base | values


def sizes(config: TrainConfig) -> dict[str, int]:
    return {part.name: part.num_bytes for part in dry_run.estimate_memory(config)}


def test_memory_is_counted_in_parameters(model: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(model)
    count, vocabulary = saved.num_parameters(), saved.config.vocab_size
    plain = {"weights": 4 * count, "gradients": 4 * count, "AdamW": 8 * count, "logits chunk": 8 * 64 * vocabulary}
    assert sizes(SFTConfig(**keys(model))) == plain
    assert sizes(SFTConfig(**keys(model, dtype="bfloat16")))["AdamW"] == 4 * count
    assert sizes(SFTConfig(**keys(model, max_length=10**6)))["logits chunk"] <= 8 * 2**22


def test_muon_keeps_one_moment_of_layer_weights(model: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(model)
    layers = sum(p.numel() for p in saved.model.layers.parameters() if p.ndim == 2)
    found = sizes(SFTConfig(**keys(model, optim="muon", muon_learning_rate=0.02)))
    assert found["Muon"] == 4 * layers
    assert found["AdamW"] == 8 * (saved.num_parameters() - layers)


def test_frozen_models_of_reinforcement_learning_count(model: Path) -> None:
    weights = sizes(SFTConfig(**keys(model)))["weights"]
    assert sizes(GRPOConfig(**keys(model, reward_funcs=["a:b"])))["frozen models"] == weights
    cached = {"ptx_dataset_name": ["unread"], "ptx_kl_weight": 0.1, "ptx_reference_cache": "unread"}
    assert sizes(GRPOConfig(**keys(model, reward_funcs=["a:b"], **cached)))["frozen models"] == weights
    assert "frozen models" not in sizes(GRPOConfig(**keys(model, reward_funcs=["a:b"], beta=0.0, **cached)))
    reward = sizes(RewardConfig(**keys(model)))["weights"]
    assert reward != weights
    assert sizes(GRPOConfig(**keys(model, reward_model=str(model))))["frozen models"] == weights + reward


@pytest.mark.parametrize(
    ("stage", "rows", "extra", "shown"),
    [
        ("sft", tiny.sft_file, [], ["trained share of tokens", "packs per epoch"]),
        ("pas", tiny.pas_file, [], ["trained share of tokens", "prompt_style: report"]),
        ("reward", tiny.pair_file, [], ["chosen", "rejected", "have a score"]),
        ("grpo", tiny.prompt_file, ["--reward_funcs", "a:b"], ["different prompts", "frozen models"]),
    ],
)
def test_a_dry_run_shows_keys_data_and_memory(
    stage: str, rows: Any, extra: list[str], shown: list[str], model: Path, tmp_path: Path, capsys: Any
) -> None:
    data = rows(tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    words = ["--output_dir", str(out), "--model_name_or_path", str(model), "--dataset_name", str(data), *extra]
    assert main([stage, *words, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert f"stage: {stage}\noutput_dir: {out}\n" in text
    for word in (*shown, "tokens", "memory", "logits chunk", "activations on top"):
        assert word in text
    assert not out.exists()


def test_the_prompts_of_pas_are_counted_in_their_format(model: Path, tmp_path: Path) -> None:
    data = tiny.pas_file(tmp_path / "rows.jsonl", 4)

    def tokens(style: str) -> int:
        out = io.StringIO()
        dry_run.print_plan(PASConfig(**keys(model, data, prompt_style=style)), console=Console(file=out, width=100))
        line = next(line for line in out.getvalue().splitlines() if line.startswith("│ tokens  "))
        return int(line.split("│")[2].replace(",", ""))

    assert tokens("report") > tokens("short") + 4 * 50


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(1, "1.0 B"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (5000 * 2**30, "4.9 TiB")]
)
def test_sizes_are_readable(num_bytes: int, text: str) -> None:
    assert text in dry_run.memory_text([dry_run.MemoryPart(name="x", num_bytes=num_bytes, formula="f")])
