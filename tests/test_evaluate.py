"""Intervals are the textbook's, pairing and seeding hold, and a reward model is measured as its users would."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2ForSequenceClassification

import tiny
from nova_train.chat import Chat
from nova_train.datasets import read_rows
from nova_train.evaluate import (
    Z95,
    Estimate,
    Evaluation,
    calibration,
    category_estimates,
    classifier_scores,
    estimate,
    evaluate_model,
    mean_rewards,
    rank_correlation,
    sampling_label,
    score_pairs,
    temperature_name,
)
from nova_train.model import give_own_pad_token, load_tokenizer
from nova_train.rewards import NamedReward, RewardError, score_sequences
from nova_train.samples import Pair, Prompt, preference_pairs, prompts


def test_interval_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.25, 0.5]
    found = estimate(values)
    assert found.count == 5
    assert found.mean == pytest.approx(0.55)
    assert found.half_width == pytest.approx(1.96 * np.std(values, ddof=1) / math.sqrt(5), rel=1e-4)


def test_interval_of_the_mean_over_categories() -> None:
    """Every category weighs the same, and adds the variance of its own mean over the number of categories squared."""
    values = np.array([1.0, 0.0, 1.0, 0.5, 0.25, 0.75, 0.75])
    strata = ["a", "b", "a", "b", "b", "a", "b"]
    parts = [values[[0, 2, 5]], values[[1, 3, 4, 6]]]
    variance = sum(part.var(ddof=1) / len(part) for part in parts) / 4
    found = estimate(values, strata=strata)
    assert found.mean == pytest.approx(sum(part.mean() for part in parts) / 2)
    assert found.half_width == pytest.approx(Z95 * math.sqrt(variance))
    each = category_estimates(values, strata)
    assert list(each) == ["a", "b"]
    assert [one.mean for one in each.values()] == pytest.approx([part.mean() for part in parts])


@pytest.mark.parametrize("strata", [False, True])
def test_repeated_measurements_are_no_new_evidence(strata: bool) -> None:
    """Three copies of every measurement give the interval of one; taken as independent they would shrink it."""
    values = np.random.default_rng(0).random(40)
    names = [f"category {i % 3}" for i in range(40)]
    keys = [f"prompt {i}" for i in range(40)]
    once = estimate(values, strata=names if strata else None)
    thrice = estimate(np.tile(values, 3), strata=names * 3 if strata else None, clusters=keys * 3)
    assert thrice.mean == pytest.approx(once.mean)
    assert thrice.half_width == pytest.approx(once.half_width)
    assert estimate(np.tile(values, 3), strata=names * 3 if strata else None).half_width < 0.6 * once.half_width


def test_intervals_cover() -> None:
    """95 % of the intervals hold the truth: categories of other sizes and levels, two correlated runs per prompt."""
    rng = np.random.default_rng(1)
    sizes, levels = (30, 60, 110), np.array([0.2, 0.5, 0.9])
    category = np.repeat(np.arange(3), sizes)
    hits = 0
    for _ in range(400):
        prompt = rng.normal(levels[category], 0.5)
        runs = prompt + rng.normal(0, 0.3, (2, len(category)))
        found = estimate(runs.ravel(), strata=[*category, *category], clusters=[*range(200), *range(200)])
        hits += abs(found.mean - levels.mean()) <= found.half_width
    assert 0.92 <= hits / 400 <= 0.98


def test_pairing_takes_out_what_prompts_share() -> None:
    rng = np.random.default_rng(2)
    prompt = rng.normal(0, 1, 300)
    old, new = prompt + rng.normal(0, 0.1, 300), prompt + 0.05 + rng.normal(0, 0.1, 300)
    paired = estimate(new - old)
    assert paired.excludes_zero
    assert paired.half_width < 0.2 * estimate(new).half_width


def test_too_few_to_tell() -> None:
    assert math.isnan(estimate([0.5]).half_width)
    assert math.isnan(estimate([0.5, 0.2, 0.1], strata=["a", "a", "b"]).half_width)
    assert not estimate([0.5]).excludes_zero
    assert estimate([0.5, 0.5]) == Estimate(0.5, 0.0, 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"values": []}, r"at least one, got 0 in \[0\]"),
        ({"values": [1.0, math.nan]}, "expected a list of finite values"),
        ({"values": [1.0, 2.0], "strata": ["a"]}, "2 values, 1 strata, 2 clusters"),
    ],
)
def test_estimates_that_cannot_be_made(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        estimate(**arguments)


def test_rank_correlation() -> None:
    assert rank_correlation([1, 5, 2, 9], [10, 30, 20, 1000]).mean == pytest.approx(1.0)
    assert rank_correlation([1, 5, 2, 9], [3, 1, 2, 0]).mean == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 1, 1], [3, 1, 2, 0]).mean == 0.0
    # Ranks 0.5 0.5 2 3 4 against 0 2 2 2 4 (ties share their mean rank); Pearson's formula on these.
    a, b = np.array([0.5, 0.5, 2, 3, 4]), np.array([0.0, 2, 2, 2, 4])
    found = rank_correlation([1, 1, 2, 3, 4], [1, 2, 2, 2, 3])
    assert found.mean == pytest.approx(np.corrcoef(a, b)[0, 1])
    values = np.random.default_rng(0).random((2, 1003))
    assert rank_correlation(*values).half_width == pytest.approx(1.96 / math.sqrt(1000), rel=5e-3)
    with pytest.raises(ValueError, match="two lists of one length, at least 2, got 3 and 2"):
        rank_correlation([1, 2, 3], [1, 2])


def test_calibration_of_a_calibrated_model() -> None:
    rng = np.random.default_rng(3)
    margins = rng.normal(0, 2, 40_000)
    margins *= np.where(rng.random(40_000) < 1 / (1 + np.exp(-np.abs(margins))), 1, -1) * np.sign(margins)
    bins = calibration(margins)
    assert [count for *_, count in bins] == [4000] * 10
    assert all(abs(predicted - observed) < 0.03 for predicted, observed, _ in bins)
    assert max(abs(predicted - observed) for predicted, observed, _ in calibration(3 * margins)) > 0.1
    assert calibration([]) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def chat(folder: Path) -> Chat:
    return Chat(load_tokenizer(folder))


@pytest.fixture
def asked(tmp_path: Path, chat: Chat) -> list[Prompt]:
    rows = read_rows([str(tiny.prompt_file(tmp_path / "prompts.jsonl", 20))], kind="prompt")
    return prompts(rows, chat, 512)


def length_score(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [sum(ids) / 100 for ids in completion_ids]


def evaluated(folder: Path, chat: Chat, asked: list[Prompt], **options: Any) -> Evaluation:
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    settings: dict[str, Any] = {"temperatures": [1.0, 0.0], "max_completion_length": 5, "seed": 3}
    functions = [NamedReward("length", length_score), NamedReward("second", lambda prompts, **_: [1.0] * len(prompts))]
    return evaluate_model(model, chat, asked, functions, **(settings | options))


def test_scores_do_not_depend_on_batches_or_order(folder: Path, chat: Chat, asked: list[Prompt]) -> None:
    found = evaluated(folder, chat, asked)
    assert list(found.scores) == ["1", "0"]
    assert len(set(found.scores["1"])) > 10
    assert evaluated(folder, chat, asked, batch_size=3) == found
    backwards = evaluated(folder, chat, asked[::-1])
    assert backwards.scores["1"][::-1] == found.scores["1"]
    assert backwards.answers["0"][::-1] == found.answers["0"]
    assert evaluated(folder, chat, asked, temperatures=[1.0]).scores["1"] == found.scores["1"]
    assert evaluated(folder, chat, asked, seed=4).scores["1"] != found.scores["1"]
    assert evaluated(folder, chat, asked, seed=4).scores["0"] == found.scores["0"]


def test_score_is_the_sum_of_the_functions(folder: Path, chat: Chat, asked: list[Prompt]) -> None:
    found = evaluated(folder, chat, asked)
    for name in ("1", "0"):
        assert found.by_function[name]["second"] == 1.0
        assert np.mean(found.scores[name]) == pytest.approx(found.by_function[name]["length"] + 1.0, abs=1e-5)
    assert 0 < found.tokens["1"] <= 5
    assert 0 <= found.finished["1"] <= 1


def test_several_samples_are_averaged(folder: Path, chat: Chat, asked: list[Prompt]) -> None:
    """Sample 0 is the one that is drawn alone; greedy has no second."""
    one, four = evaluated(folder, chat, asked), evaluated(folder, chat, asked, samples_per_prompt=4)
    assert four.scores["0"] == one.scores["0"]
    assert four.answers == one.answers
    assert len(four.scores["1"]) == len(asked)
    assert np.std(four.scores["1"]) < np.std(one.scores["1"])


def test_an_answer_without_a_score(folder: Path, chat: Chat, asked: list[Prompt]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    function = NamedReward("picky", lambda prompts, **_: [None] * len(prompts))
    with pytest.raises(RewardError, match="picky: no reward for 20 of 20 answers"):
        evaluate_model(model, chat, asked, [function], temperatures=[0.0], max_completion_length=2, seed=0)


def test_metrics_per_category() -> None:
    asked = [Prompt(ids=[1], prompt="p", columns={}, category=name, key="k") for name in ("a", "b", "a")]
    metrics = mean_rewards(asked, {"score": torch.tensor([1.0, 0.5, math.nan])})
    assert metrics == {
        "eval_rewards/score/mean": 0.75,
        "eval_rewards/score/a": 1.0,
        "eval_rewards/score/b": 0.5,
    }
    assert list(mean_rewards(asked[:1], {"score": torch.ones(1)})) == ["eval_rewards/score/mean"]


def reward_model(folder: Path, chat: Chat) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    give_own_pad_token(model, chat.tokenizer, chat.end_of_turn_id)
    return model.eval()


def test_pairs_are_scored_as_users_would(tmp_path: Path, folder: Path, chat: Chat) -> None:
    """Through from_pretrained and the model's own forward; the packed scorer gives the same."""
    model = reward_model(folder, chat)
    model.save_pretrained(tmp_path / "rm")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    rows = read_rows([str(tiny.pair_file(tmp_path / "pairs.jsonl", 12))], kind="preference")
    pairs = preference_pairs(rows, chat, 512)
    found = score_pairs(loaded, pairs, batch_size=5)
    packed = score_sequences(loaded, [pair.chosen for pair in pairs])
    np.testing.assert_allclose(found.chosen, packed.double().numpy(), atol=1e-5)
    with torch.no_grad():
        alone = [float(loaded(input_ids=torch.tensor(pair.rejected)[None]).logits) for pair in pairs]
    np.testing.assert_allclose(found.rejected, alone, atol=1e-5)
    assert found.accuracy.mean == np.mean(found.chosen > found.rejected)
    assert found.correlation is not None
    scored = sum((pair.chosen_score is not None) + (pair.rejected_score is not None) for pair in pairs)
    assert found.correlation.count == scored == 12


def test_equal_scores_are_half_right(folder: Path, chat: Chat) -> None:
    ids = np.array([3, 4, 5])
    pair = Pair(
        chosen=ids, rejected=ids, chosen_score=None, rejected_score=None, prompt_length=1, source="s", category="all"
    )
    found = score_pairs(reward_model(folder, chat), [pair, pair])
    assert found.accuracy.mean == 0.5
    assert found.correlation is None


def test_padding_must_not_end_a_sequence(folder: Path, chat: Chat) -> None:
    model: Qwen2ForSequenceClassification = reward_model(folder, chat)
    model.config.pad_token_id = chat.end_of_turn_id
    with pytest.raises(ValueError, match=f"pad_token_id is {chat.end_of_turn_id}, expected a token that ends no"):
        classifier_scores(model, [[4, 5, chat.end_of_turn_id]])


def test_names_of_temperatures() -> None:
    assert [temperature_name(t) for t in (1.0, 0.7, 0.0)] == ["1", "0.7", "0"]
    assert [sampling_label(name) for name in ("1", "0.7", "0")] == ["T = 1", "T = 0.7", "greedy"]
