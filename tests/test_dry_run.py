from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

import tiny
from nova_kernels.checkpoint import format_bytes
from nova_train import memory
from nova_train.__main__ import main
from nova_train.config import ConfigError, TrainConfig
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
    return {part.name: part.num_bytes for part in memory.estimate_memory(config)}


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
        ("reward", tiny.pair_file, [], ["chosen", "rejected", "have a score", "a row of 8,192 tokens"]),
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
    for word in (*shown, "tokens", "memory", "gradients", "activations", "needed in backward", "computed again: 0.0%"):
        assert word in text
    assert not out.exists()


def shown(config: TrainConfig) -> str:
    out = io.StringIO()
    dry_run.print_plan(config, console=Console(file=out, width=100))
    return out.getvalue().split(" memory ")[1]


def test_any_segments_are_shown_as_a_table_with_their_peak(model: Path, tmp_path: Path) -> None:
    data = tiny.sft_file(tmp_path / "rows.jsonl", 4)
    kept, one, auto = (
        shown(SFTConfig(**keys(model, data, max_length=512, **values)))
        for values in ({}, {"segments": [1, 1]}, {"segments": "auto", "memory_budget": "1GiB"})
    )
    assert "1 x 2     keep" in kept and "computed again: 0.0%" in kept
    assert "2 x 1     segment" in one and "a row of 512 tokens" in one
    assert "1 x 2     keep" in auto and "of a budget of 1.0 GiB" in auto and "of a budget" not in one
    peaks = [
        plan.activations.predicted_peak_bytes
        for plan in map(
            memory.plan_memory,
            (SFTConfig(**keys(model, max_length=512)), SFTConfig(**keys(model, max_length=512, segments=1))),
        )
    ]
    assert peaks[0] > peaks[1]
    for text, peak in zip((kept, one), peaks, strict=True):
        assert f"peak {format_bytes(peak)}" in text


def test_a_budget_that_cannot_do_is_told_by_a_dry_run(model: Path, tmp_path: Path, capsys: Any) -> None:
    data = tiny.sft_file(tmp_path / "rows.jsonl", 4)
    words = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(model), "--dataset_name", str(data)]
    assert main(["sft", *words, "--segments", "auto", "--memory_budget", "1MB", "--dry_run"]) == 2
    assert "memory_budget 976.6 KiB: weights, gradients and optimiser take" in capsys.readouterr().err


def test_a_model_that_cannot_be_profiled_still_has_an_estimate(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fake implementation\nand more")

    monkeypatch.setattr(memory, "profile_layers", refuse)
    text = shown(SFTConfig(**keys(model, tiny.sft_file(tmp_path / "rows.jsonl", 4))))
    assert "and activations on top" in text and "cannot be predicted (no fake implementation);" in text
    with pytest.raises(ConfigError, match="sizes .3. must be positive and sum to the 2 layers"):
        monkeypatch.undo()
        memory.plan_memory(SFTConfig(**keys(model, segments=[3])))


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
    assert text in memory.memory_text([memory.MemoryPart(name="x", num_bytes=num_bytes, formula="f")])
