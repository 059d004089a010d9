"""Reward functions are called as TRL calls them; a learned score is read at the last token, whatever surrounds it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

import tiny
from nova_train.chat import Chat
from nova_train.config import ConfigError, TrainConfig
from nova_train.model import load_reward_model, load_tokenizer
from nova_train.rewards import (
    REWARD_MODEL,
    Judge,
    NamedReward,
    RewardError,
    call_reward_functions,
    check_same_tokens,
    columns_of,
    load_reward_functions,
    score_sequences,
    source_hashes,
    total_rewards,
)
from nova_train.rollout import Completion
from nova_train.samples import Prompt

PAD = EOS = 2


def prompt(text: str | list[dict[str, str]], **columns: Any) -> Prompt:
    return Prompt(ids=[4, 5], prompt=text, columns=columns, category="all", key=str(text))


def call(function: Any, prompts: list[Prompt], texts: list[str]) -> Tensor:
    ids = [[7] * len(text) for text in texts]
    return call_reward_functions([NamedReward("judge", function)], prompts, texts, ids)["judge"]


def reward_model(num_labels: int = 1) -> Any:
    config = Qwen2Config(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, initializer_range=0.4, num_labels=num_labels, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    return Qwen2ForSequenceClassification(config).double()


def test_functions_from_a_file_and_a_module(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def shortness(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n")
    loaded = load_reward_functions([f"{path}:shortness", "nova_train.world.reward:score"])
    assert [reward.name for reward in loaded] == ["shortness", "score"]
    scores = call_reward_functions(loaded, [prompt("a", answer="7", format="plain")] * 2, ["7", "no"], [[1], [1, 2]])
    assert scores["shortness"].tolist() == [-1.0, -2.0]
    assert scores["score"].tolist() == [1.0, 0.3]


def test_functions_are_known_by_the_files_they_are_in(tmp_path: Path) -> None:
    hashes = []
    for text in ("def f(prompts): return 1", "def f(prompts): return 2", "def f(prompts): return 1"):
        (tmp_path / "f.py").write_text(text)
        hashes.append(source_hashes(load_reward_functions([f"{tmp_path / 'f.py'}:f"])))
    assert hashes[0] == hashes[2] != hashes[1] and hashes[0]["f"]
    assert source_hashes([NamedReward("built-in", len), NamedReward("object", partial(len))])["built-in"] == ""


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("score", "expected 'package.module:function' or 'file.py:function', got 'score'"),
        (":score", "got ':score'"),
        ("no/such.py:score", "no such file /.*no/such.py"),
        ("nova_train.no_such:score", "No module named 'nova_train.no_such'"),
        ("nova_train.world.reward:scores", "no function 'scores'; did you mean 'score'"),
        ("nova_train.world.reward:CONTENT_WEIGHT", "no function 'CONTENT_WEIGHT'; it has grade, score, content"),
    ],
)
def test_functions_that_cannot_be_loaded(spec: str, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        load_reward_functions([spec])


def test_two_functions_of_one_name() -> None:
    with pytest.raises(RewardError, match="the name 'score' is taken twice"):
        load_reward_functions(["nova_train.world.reward:score", "nova_train.world.reward:score"])


def test_arguments_are_trls() -> None:
    seen: dict[str, Any] = {}

    def judge(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [0.5, None]

    talk = [{"role": "user", "content": "hi"}]
    scores = call(judge, [prompt("hi", level=3), prompt(talk, topic="x", completion="hidden")], ["yes", "no"])
    assert scores.dtype == torch.float64
    assert scores[0] == 0.5
    assert math.isnan(scores[1])
    assert seen["prompts"] == ["hi", talk]
    assert seen["completions"] == ["yes", [{"role": "assistant", "content": "no"}]]
    assert seen["completion_ids"] == [[7, 7, 7], [7, 7]]
    assert seen["columns"] == {"level": [3, None], "topic": [None, "x"]}


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([1.0], "judge: expected 2 scores, one per answer, got 1"),
        ([1.0, 2.0, 3.0], "got 3"),
        (1.0, "expected a list of 2 scores, got float"),
        ("ab", "expected a list of 2 scores, got str"),
        ([1.0, "good"], r"score 1 must be a finite number, or None for 'not scored', got 'good' \(str\)"),
        ([math.nan, 1.0], r"score 0 must be a finite number.*got nan"),
        ([math.inf, 1.0], "got inf"),
    ],
)
def test_values_that_are_no_scores(returned: Any, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        call(lambda prompts, completions, **columns: returned, [prompt("a"), prompt("b")], ["x", "y"])


def test_numbers_of_any_kind() -> None:
    for returned in (
        [True, np.float32(0.25)],
        np.array([1.0, 0.25]),
        torch.tensor([1.0, 0.25]),
        (1, torch.tensor(0.25)),
    ):
        scores = call(lambda prompts, completions, value=returned, **rest: value, [prompt("a")] * 2, ["x", "y"])
        assert scores.tolist() == [1.0, 0.25]


def test_a_function_that_takes_no_columns() -> None:
    with pytest.raises(RewardError, match=r"cannot be called with .*level.*take the columns it needs by name"):
        call(lambda prompts, completions, completion_ids: [1.0], [prompt("a", level=3)], ["x"])


def test_no_answers() -> None:
    assert call(lambda **_: 1 / 0, [], []).shape == (0,)
    assert columns_of([]) == {}


def test_total_is_the_weighted_sum_of_what_is_scored() -> None:
    nan = math.nan
    scores = {"a": torch.tensor([1.0, nan, 2.0]), "b": torch.tensor([10.0, 20.0, nan])}
    assert total_rewards(scores).tolist() == [11.0, 20.0, 2.0]
    assert total_rewards(scores, [2.0, 0.5]).tolist() == [7.0, 10.0, 4.0]
    with pytest.raises(RewardError, match="a, b: no reward for 1 of 3 answers, the first is number 1"):
        total_rewards(scores, [1.0, 0.0])


@pytest.mark.parametrize("tokens_per_batch", [1, 12, 1000])
def test_score_is_the_same_alone_padded_and_packed(tokens_per_batch: int) -> None:
    """Also with padding that is the end token, and that token inside and at the end of a sequence."""
    model = reward_model().train()
    sequences = [[3, 4, EOS, 6, 7, EOS], [9], [EOS], list(range(3, 20)), [3, 4, EOS, 6, 7]]
    packed = score_sequences(model, sequences, tokens_per_batch=tokens_per_batch)
    assert packed.dtype == torch.float32
    assert model.training
    longest = max(map(len, sequences))
    rows = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    with torch.no_grad():
        hidden = model.eval().model(input_ids=rows, attention_mask=mask).last_hidden_state
        padded = torch.stack([model.score(hidden[i, len(ids) - 1])[0] for i, ids in enumerate(sequences)])
        alone = [model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]) for ids in sequences]
    torch.testing.assert_close(packed, padded.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(packed, torch.cat(alone).float(), rtol=0, atol=1e-6)
    assert packed.unique().numel() == len(sequences)


def test_nothing_to_score() -> None:
    assert score_sequences(reward_model(), []).shape == (0,)


def test_models_that_are_no_reward_models() -> None:
    with pytest.raises(RewardError, match="Qwen2ForSequenceClassification with 3 outputs"):
        score_sequences(reward_model(num_labels=3), [[1]])
    causal = Qwen2ForCausalLM(reward_model().config)
    with pytest.raises(RewardError, match="Qwen2ForCausalLM with no such head"):
        score_sequences(causal, [[1]])


def test_judge_weighs_model_and_functions(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    config = TrainConfig(output_dir="unused", dataset_name=["unused"], max_length=64, learning_rate=1.0)
    load_reward_model(folder, config).save_pretrained(folder)
    chat = Chat(tokenizer)
    functions = ["nova_train.world.reward:score"]
    judge = Judge.load(str(folder), functions, [0.5, 2.0], config, chat)
    asked = [prompt([{"role": "user", "content": "3 + 4"}], answer="7", format="plain")] * 2
    completions = [Completion([*chat.text_ids(text), chat.end_of_turn_id], finished=True) for text in ("7", "12")]
    each = judge.each(asked, completions)
    assert list(each) == [REWARD_MODEL, "score"]
    assert each["score"].tolist() == [1.0, 0.3]
    assert judge.model is not None
    learned = score_sequences(judge.model, [[4, 5, *completion.ids] for completion in completions])
    assert torch.equal(each[REWARD_MODEL], learned.double())
    total, metrics = judge.score(asked, completions)
    torch.testing.assert_close(total, 0.5 * learned + 2.0 * torch.tensor([1.0, 0.3]))
    assert metrics["rewards/score/mean"] == (1.3, 2.0)
    assert metrics[f"rewards/{REWARD_MODEL}/mean"] == (pytest.approx(float(learned.sum())), 2.0)


def test_tokenizers_must_agree() -> None:
    class Tokenizer:
        def __init__(self, **vocabulary: int) -> None:
            self.get_vocab = lambda: vocabulary

    check_same_tokens(Tokenizer(a=0, b=1), Tokenizer(a=0, b=1, pad=2), "rm")
    with pytest.raises(ConfigError, match="reward_model rm: its tokenizer has 'b' at 2, the policy's at 1"):
        check_same_tokens(Tokenizer(a=0, b=1), Tokenizer(a=0, b=2), "rm")
