"""The reward model: equation (1) with missing scores, and one score per text however it is batched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from nova_kernels.packing import pack_samples
from nova_train.chat import Chat
from nova_train.config import ConfigError
from nova_train.datasets import read_rows
from nova_train.loop import accumulate_gradients
from nova_train.metrics import Window, read_metrics
from nova_train.model import hidden_states, load_reward_model, load_tokenizer
from nova_train.rewards import last_token_rewards, score_sequences
from nova_train.samples import Pair, preference_pairs
from nova_train.stages import reward


def config(folder: Path, **options: Any) -> reward.RewardConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": [str(folder / "pairs.jsonl")],
        "max_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "num_train_epochs": 9,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "disable_progress": True,
    }
    return reward.RewardConfig(**{**defaults, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    tiny.save_model(folder / "model")
    tiny.pair_file(folder / "pairs.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tiny.save_model(folder / "pad_is_eos")
    tokenizer.save_pretrained(folder / "pad_is_eos")
    return folder


def pair(chosen_score: float | None, rejected_score: float | None) -> Pair:
    ids = np.array([1, 20, 30, 40, 2], dtype=np.int64)
    return Pair(
        chosen=ids,
        rejected=ids[[0, 1, 3, 4]],
        chosen_score=chosen_score,
        rejected_score=rejected_score,
        prompt_length=2,
        source="s",
        category="all",
    )


@pytest.mark.parametrize("model", ["model", "pad_is_eos"])
def test_a_text_has_one_score_alone_padded_and_packed(folder: Path, tmp_path: Path, model: str) -> None:
    out = reward.run(config(folder, output_dir=str(tmp_path / "rm"), model_name_or_path=str(folder / model)))
    tokenizer = AutoTokenizer.from_pretrained(out)
    theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    chat = Chat(load_tokenizer(out))
    pairs = preference_pairs(read_rows([str(folder / "pairs.jsonl")], kind="preference"), chat, 128)
    sequences = [p.chosen.tolist() for p in pairs] + [[*pairs[0].chosen.tolist(), 2, 30, 2]]  # an end inside the text
    assert len({len(s) for s in sequences}) > 3
    with torch.no_grad():
        alone = torch.cat([theirs(input_ids=torch.tensor([s]), use_cache=False).logits[:, 0] for s in sequences])
        padded = {}
        for side in ("right", "left"):
            tokenizer.padding_side = side
            batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
            padded[side] = theirs(**batch, use_cache=False).logits[:, 0]
    ours = load_reward_model(out, config(folder), frozen=True)
    packed = score_sequences(ours, sequences)
    for scores in (*padded.values(), packed):
        assert torch.allclose(scores, alone, atol=1e-5)
    assert alone.std() > 1e-3, "scores that are all equal would prove nothing"


def test_reading_the_score_one_token_early_would_fail_that_test(folder: Path) -> None:
    model = load_reward_model(folder / "model", config(folder)).eval()
    packed = pack_samples([{"input_ids": [1, 20, 30, 2]}, {"input_ids": [1, 40, 2]}])
    with torch.no_grad():
        hidden = hidden_states(model, packed)
        right = last_token_rewards(model, hidden, packed)
        early = model.score(hidden[packed.cu_seqlens[1:].long() - 2])[:, 0]
    assert (right - early).abs().min() > 1e-3


def terms(folder: Path, pairs: list[Pair], alpha: float = 0.7) -> tuple[float, dict[str, torch.Tensor]]:
    model = load_reward_model(folder / "model", config(folder, dtype="float64"))
    torch.manual_seed(3)
    model.score.weight.data.normal_()
    objective = reward.PairwiseAndAbsolute(model, None, {"bt": 1.0, "score": alpha, "lm": 0.0})
    window = Window()
    accumulate_gradients(objective, [reward.collate_pairs(pairs, {})], window)
    figures = window.figures()
    assert "loss/bt" in figures and "loss/lm" not in figures, "a term of weight 0 is not computed"
    return figures["loss"], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_the_loss_is_equation_one(folder: Path) -> None:
    model = load_reward_model(folder / "model", config(folder, dtype="float64"))
    torch.manual_seed(3)
    model.score.weight.data.normal_()
    one = pair(0.3, -0.2)
    with torch.no_grad():
        chosen, rejected = (
            float(model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits)
            for ids in (one.chosen, one.rejected)
        )
    expected = np.log1p(np.exp(rejected - chosen)) + 0.7 * ((chosen - 0.3) ** 2 + (rejected + 0.2) ** 2)
    assert terms(folder, [one])[0] == pytest.approx(expected, rel=1e-6)
    assert terms(folder, [one, one])[0] == pytest.approx(expected, rel=1e-6)


def test_pairs_without_scores_leave_the_absolute_term_alone(folder: Path) -> None:
    scored, half, plain = pair(0.3, -0.2), pair(0.3, None), pair(None, None)
    bt = terms(folder, [plain], alpha=0.0)[0]
    absolute = terms(folder, [scored])[0] - bt
    assert terms(folder, [scored, plain])[0] == pytest.approx(bt + absolute, rel=1e-9), "separate denominators"
    chosen_only = terms(folder, [half])[0] - bt
    both = terms(folder, [scored, half])[0] - bt
    assert both == pytest.approx((absolute + chosen_only / 2) * 2 / 3, rel=1e-9), "per scored answer, not per pair"


def test_no_scores_anywhere_is_the_bitwise_bradley_terry_run(folder: Path) -> None:
    with_alpha, without = terms(folder, [pair(None, None)], 5.0), terms(folder, [pair(None, None)], 0.0)
    assert with_alpha[0] == without[0]
    for name, grad in without[1].items():
        assert torch.equal(with_alpha[1][name], grad), name


def test_scores_are_normalised_per_source_and_saved(folder: Path, tmp_path: Path) -> None:
    pairs = [pair(10.0, 20.0), pair(30.0, None), pair(None, None)]
    scale = reward.score_scales(pairs)["s"]
    assert (scale.mean, scale.count) == (20.0, 3) and scale.std == pytest.approx(np.std([10, 20, 30]))
    assert scale.normalize(30.0) == pytest.approx(10 / scale.std) and np.isnan(scale.normalize(None))
    assert reward.score_scales([pair(None, None)])["s"].std == 1.0
    out = reward.run(config(folder, output_dir=str(tmp_path)))
    saved = json.loads((out / "reward_config.json").read_text())
    assert saved["reward_position"] == "last token" and saved["score_scales"]["pairs"]["count"] > 0
    line = read_metrics(out)[0]
    assert {"accuracy", "margin", "mean_reward", "score_mae", "scored_fraction", "loss/bt", "loss/score"} <= line.keys()


def test_training_learns_the_pairs(folder: Path, tmp_path: Path) -> None:
    options = {
        "max_steps": 60,
        "lm_loss_weight": 0.1,
        "num_train_epochs": 99,
        "eval_dataset_name": [str(folder / "pairs.jsonl")],
    }
    out = reward.run(config(folder, output_dir=str(tmp_path), learning_rate=1e-2, **options))
    assert read_metrics(out)[-1]["eval_accuracy"] == 1.0


def test_refusals(folder: Path) -> None:
    with pytest.raises(ConfigError, match="score_loss_weight must be at least 0, got -1"):
        config(folder, score_loss_weight=-1)
    with pytest.raises(ConfigError, match="model_name_or_path is missing"):
        config(folder, model_name_or_path=None)
