"""The one loop: gradients that do not depend on how a step is cut, interruption, and what it writes."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

import tiny
from nova_kernels.packing import pack_samples
from nova_train import loop, state
from nova_train.chat import Chat
from nova_train.config import ConfigError
from nova_train.datasets import read_rows
from nova_train.metrics import Window, read_metrics
from nova_train.model import load_causal_lm, load_reward_model, load_tokenizer
from nova_train.samples import preference_pairs, sft_samples
from nova_train.stages import reward, sft
from nova_train.stages.reward import PairwiseAndAbsolute, collate_pairs, score_scales

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def gradients(model: torch.nn.Module, objective: object, batches: Sequence[object]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loop.accumulate_gradients(objective, batches, Window())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-10 * max(1.0, float(grad.abs().max())), name


def sft_config(folder: Path, **options: object) -> sft.SFTConfig:
    defaults: dict[str, object] = {
        "output_dir": str(folder / "out"),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": [str(folder / "sft.jsonl")],
        "max_length": 128,
        "disable_progress": True,
        "logging_steps": 2,
        "max_steps": 6,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
    }
    return sft.SFTConfig(**{**defaults, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    tiny.save_model(folder / "model")
    tiny.sft_file(folder / "sft.jsonl")
    tiny.pair_file(folder / "pairs.jsonl")
    return folder


def test_sft_gradients_do_not_depend_on_the_cut(folder: Path) -> None:
    config = sft_config(folder, dtype="float64")
    chat = Chat(load_tokenizer(folder / "model"))
    samples = sft_samples(read_rows([str(folder / "sft.jsonl")], kind="sft"), chat, 128)[:8]
    assert len({s["input_ids"].size for s in samples}) > 3, "ragged"
    model = load_causal_lm(folder / "model", config)
    objective = sft.NextToken(model, {"sft": 1.0})
    cut = {
        pair: gradients(
            model, objective, [pack_samples(samples[i * pair[0] : (i + 1) * pair[0]]) for i in range(pair[1])]
        )
        for pair in CUTS
    }
    for pair in CUTS[1:]:
        assert_same(cut[pair], cut[8, 1])


def test_a_mean_of_means_would_fail_that_test(folder: Path) -> None:
    config = sft_config(folder, dtype="float64")
    chat = Chat(load_tokenizer(folder / "model"))
    samples = sft_samples(read_rows([str(folder / "sft.jsonl")], kind="sft"), chat, 128)[:8]
    model = load_causal_lm(folder / "model", config)
    objective = sft.NextToken(model, {"sft": 1.0})
    whole = gradients(model, objective, [pack_samples(samples)])
    parts = [gradients(model, objective, [pack_samples([sample])]) for sample in samples]
    means = {name: torch.stack([part[name] for part in parts]).mean(0) for name in whole}
    with pytest.raises(AssertionError):
        assert_same(means, whole)


def test_reward_gradients_do_not_depend_on_the_cut(folder: Path) -> None:
    config = reward.RewardConfig(
        output_dir="-", model_name_or_path=str(folder / "model"), dataset_name=["-"], dtype="float64"
    )
    chat = Chat(load_tokenizer(folder / "model"))
    pairs = preference_pairs(read_rows([str(folder / "pairs.jsonl")], kind="preference"), chat, 128)[:8]
    scales = score_scales(pairs)
    model = load_reward_model(folder / "model", config)
    objective = PairwiseAndAbsolute(model, None, {"bt": 1.0, "score": 0.7, "lm": 0.3})
    cut = {
        (b, n): gradients(model, objective, [collate_pairs(pairs[i * b : (i + 1) * b], scales) for i in range(n)])
        for b, n in CUTS
    }
    for pair in CUTS[1:]:
        assert_same(cut[pair], cut[8, 1])


def test_training_lowers_the_loss_and_leaves_a_model_that_opens(folder: Path, tmp_path: Path) -> None:
    config = sft_config(folder, output_dir=str(tmp_path / "run"), max_steps=30)
    out = sft.run(config)
    lines = read_metrics(out)
    assert [line["step"] for line in lines] == list(range(2, 31, 2))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert {"grad_norm", "learning_rate", "num_tokens"} <= lines[0].keys()
    assert "step_time" not in lines[0] and (out / "timing.jsonl").exists()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert json.loads((out / "finished.json").read_text())["steps"] == 30
    before = (out / "metrics.jsonl").read_bytes()
    sft.run(config)
    assert (out / "metrics.jsonl").read_bytes() == before, "a finished run is left alone"


def test_ctrl_c_saves_the_step_and_the_same_command_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config(folder, output_dir=str(tmp_path / "run"))
    whole = sft.run(sft_config(folder, output_dir=str(tmp_path / "whole")))
    step = loop.train_step

    def interrupted_step(run: loop.Training) -> int:
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(run)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    with pytest.raises(loop.Interrupted, match=r"interrupted after step 3; saved in .*checkpoint-3; the same command"):
        sft.run(config)
    monkeypatch.setattr(loop, "train_step", step)
    out = sft.run(config)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    config = sft_config(folder, output_dir=str(tmp_path / "run"), learning_rate=1e30, max_grad_norm=None)
    with pytest.raises(loop.DivergenceError, match=r"gradient norm is (nan|inf) at step \d+; lower learning_rate"):
        sft.run(config)
    assert state.finished_fingerprint(tmp_path / "run") is None


def test_activation_checkpoints_change_nothing(folder: Path, tmp_path: Path) -> None:
    plain = sft.run(sft_config(folder, output_dir=str(tmp_path / "plain"), max_steps=3))
    segmented = sft.run(sft_config(folder, output_dir=str(tmp_path / "segmented"), max_steps=3, segments=1))
    assert (plain / "model.safetensors").read_bytes() == (segmented / "model.safetensors").read_bytes()


def test_held_out_loss_counts_each_token_once(folder: Path, tmp_path: Path) -> None:
    config = sft_config(
        folder,
        output_dir=str(tmp_path / "run"),
        eval_dataset_name=[str(folder / "sft.jsonl")],
        eval_steps=3,
        learning_rate=1e-30,
        weight_decay=0.0,
        max_steps=3,
        gradient_accumulation_steps=1000,
    )
    lines = read_metrics(sft.run(config))
    train_loss, held_out = lines[-2]["loss"], lines[-1]["eval_loss"]
    assert held_out == pytest.approx(train_loss, rel=1e-5), "a step over the whole set has the loss of the whole set"


def test_another_runs_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    sft.run(sft_config(folder, output_dir=str(tmp_path / "a"), save_steps=2))
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    other = sft_config(
        folder, output_dir=str(tmp_path / "b"), learning_rate=3e-3, save_steps=2, resume_from_checkpoint=checkpoint
    )
    with pytest.raises(state.StateError, match="checkpoint-4: it belongs to a run with another configuration"):
        sft.run(other)
    same = sft.run(sft_config(folder, output_dir=str(tmp_path / "c"), save_steps=2, resume_from_checkpoint=checkpoint))
    assert (same / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_a_missing_model_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model .*nowhere: no such folder here, and not on the Hub"):
        sft.run(sft_config(folder, output_dir=str(tmp_path), model_name_or_path=str(tmp_path / "nowhere")))


def test_a_run_killed_in_its_closing_evaluation_evaluates_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eval_dataset_name": [str(folder / "sft.jsonl")], "eval_steps": 4}
    whole = sft.run(sft_config(folder, output_dir=str(tmp_path / "whole"), **options))
    monkeypatch.setattr(state, "mark_finished", lambda *args, **facts: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        sft.run(sft_config(folder, output_dir=str(tmp_path / "cut"), **options))
    monkeypatch.undo()
    out = sft.run(sft_config(folder, output_dir=str(tmp_path / "cut"), **options))
    assert [line["step"] for line in read_metrics(out)] == [2, 4, 4, 6, 6]
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
