"""GRPO end to end on a tiny model: exact ratio and KL, gradients that do not depend on the cut, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from nova_train import loop
from nova_train.chat import Chat
from nova_train.config import ConfigError
from nova_train.datasets import read_rows
from nova_train.experience import Experience, ExperienceOptions, PTXBatch, RolloutBatch, token_weights
from nova_train.loader import PackedLoader, ShuffledLoader
from nova_train.metrics import Window, read_metrics
from nova_train.model import load_causal_lm, load_tokenizer
from nova_train.rewards import RewardError
from nova_train.rollout import Completion
from nova_train.samples import Prompt, prompts, sft_samples
from nova_train.stages import grpo

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
REWARDS = """
def length(prompts, completions, **columns):
    return [float(len(c[0]['content'])) for c in completions]

def low_ids(prompts, completions, completion_ids, **columns):
    return [sum(i < 100 for i in ids) / len(ids) for ids in completion_ids]

def short_list(prompts, completions, **columns):
    return [1.0]

def text(prompts, completions, **columns):
    return ["good"] * len(prompts)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    tiny.save_model(folder / "model")
    tiny.save_model(folder / "other", seed=5)
    tiny.prompt_file(folder / "prompts.jsonl")
    tiny.sft_file(folder / "sft.jsonl")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def config(folder: Path, **options: Any) -> grpo.GRPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": [str(folder / "prompts.jsonl")],
        "reward_funcs": [f"{folder / 'rewards.py'}:length"],
        "max_length": 128,
        "max_completion_length": 6,
        "kl_top_k": 32,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "disable_progress": True,
    }
    return grpo.GRPOConfig(**{**defaults, **options})


def fixed_experience(
    folder: Path, c: grpo.GRPOConfig, ref: torch.nn.Module, per_micro_batch: int, **options: Any
) -> Experience:
    """Eight prompts with answers and scores that depend on the prompt and the answer's number alone."""
    chat = Chat(load_tokenizer(folder / "model"))
    asked = prompts(read_rows([str(folder / "prompts.jsonl")], kind="prompt"), chat, 128)[:8]
    samples = sft_samples(read_rows([str(folder / "sft.jsonl")], kind="sft"), chat, 128)[:8]

    def sample(some: Sequence[Prompt], places: Sequence[tuple[int, int]]) -> list[Completion]:
        answers = []
        for number, prompt in enumerate(some):
            generator = torch.Generator().manual_seed(int(prompt.key[:8], 16) + number % 3)
            length = int(torch.randint(1, 7, (1,), generator=generator))
            answers.append(Completion(torch.randint(8, 300, (length,), generator=generator).tolist(), length < 6))
        return answers

    def score(some: Sequence[Prompt], answers: Sequence[Completion]) -> tuple[torch.Tensor, dict[str, Any]]:
        return torch.tensor([float(sum(a.ids) % 17) for a in answers]), {}

    kept = {name: getattr(c, name) for name in ExperienceOptions.__slots__}
    return Experience(
        ShuffledLoader(asked, per_step=8, per_micro_batch=per_micro_batch, epochs=1, seed=0),
        PackedLoader(samples, capacity=128, packs_per_step=1, packs_per_micro_batch=1, epochs=None, seed=0),
        ref,
        sample,
        score,
        ExperienceOptions(**{**kept, **options}),
    )


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_gradients_do_not_depend_on_the_cut(folder: Path, loss_type: str) -> None:
    c = config(folder, dtype="float64", beta=0.3, ptx_kl_weight=0.2, ptx_dataset_name=["-"], loss_type=loss_type)
    policy, ref = load_causal_lm(folder / "model", c), load_causal_lm(folder / "other", c, frozen=True)
    objective = grpo.PolicyObjective(policy, c, {"policy": 1.0, "kl": c.beta, "ptx": c.ptx_kl_weight})
    seen = {}
    for batch, accumulation in CUTS:
        batches = fixed_experience(folder, c, ref, batch).next_step()
        assert sum(isinstance(b, RolloutBatch) for b in batches) == accumulation
        policy.zero_grad()
        loop.accumulate_gradients(objective, batches, Window())
        seen[batch, accumulation] = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    whole = seen[8, 1]
    assert all(float(grad.abs().max()) > 0 for grad in whole.values())
    for cut in CUTS[1:]:
        for name, grad in whole.items():
            assert (seen[cut][name] - grad).abs().max() <= 1e-10 * max(1.0, float(grad.abs().max())), (cut, name)


def test_the_first_inner_step_has_ratio_one_and_no_kl(folder: Path) -> None:
    c = config(folder, kl_top_k=500, num_iterations=2)
    policy, ref = load_causal_lm(folder / "model", c), load_causal_lm(folder / "model", c, frozen=True)
    experience = fixed_experience(folder, c, ref, 4)
    objective = grpo.PolicyObjective(policy, c, {"policy": 1.0, "kl": c.beta, "ptx": 0.0})
    batches = experience.next_step()
    for batch in batches:
        terms = objective.terms(batch)
        if isinstance(batch, PTXBatch):
            assert terms.sums["ptx"].item() == 0.0
        else:
            assert terms.sums["kl"].item() == 0.0
            assert float(terms.maxima["ratio/max_deviation"]) == 0.0
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(1.5)
    again = [b for b in experience.next_step() if isinstance(b, RolloutBatch)]
    assert [id(b) for b in again] == [id(b) for b in batches if isinstance(b, RolloutBatch)], "one rollout, two steps"
    terms = objective.terms(again[0])
    assert float(terms.maxima["ratio/max_deviation"]) > 0 and terms.sums["kl"].item() > 0


def test_the_reward_placement_puts_no_kl_in_the_loss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    c = config(folder, kl_placement="reward")
    assert "drops the KL's own gradient" in caplog.text
    policy, ref = load_causal_lm(folder / "model", c), load_causal_lm(folder / "other", c, frozen=True)
    objective = grpo.PolicyObjective(policy, c, {"policy": 1.0, "kl": c.beta, "ptx": 0.0})
    batch = fixed_experience(folder, c, ref, 8).next_step()[0]
    assert set(objective.terms(batch).sums) == {"policy"}


def test_a_truncated_answer_can_be_left_out(folder: Path) -> None:
    c = config(folder)
    ref = load_causal_lm(folder / "other", c, frozen=True)
    kept = fixed_experience(folder, c, ref, 8).next_step()[0]
    masked = fixed_experience(folder, c, ref, 8, mask_truncated_completions=True).next_step()[0]
    assert isinstance(kept, RolloutBatch) and isinstance(masked, RolloutBatch)
    long = kept.lengths == 6
    assert long.any() and (masked.lengths[long] == 0).all() and torch.equal(masked.lengths[~long], kept.lengths[~long])
    assert masked.count == kept.count - 6 * int(long.sum())


def test_token_weights_of_each_loss_type() -> None:
    lengths = torch.tensor([2, 0, 1])
    assert token_weights(lengths, "dapo", 4)[1] == 3
    weights, count = token_weights(lengths, "grpo", 4)
    assert weights.tolist() == [0.5, 0.5, 1.0] and count == 2
    assert token_weights(lengths, "dr_grpo", 4)[1] == 8
    with pytest.raises(ValueError, match="loss_type must be dapo, grpo or dr_grpo, got 'sum'"):
        token_weights(lengths, "sum", 4)


def test_a_run_writes_rewards_and_raises_them(folder: Path, tmp_path: Path) -> None:
    c = config(
        folder,
        output_dir=str(tmp_path),
        reward_funcs=[f"{folder / 'rewards.py'}:low_ids"],
        max_steps=25,
        learning_rate=1e-2,
        num_train_epochs=99,
    )
    lines = read_metrics(grpo.run(c))
    assert {"reward", "reward_std", "frac_reward_zero_std", "rewards/low_ids/mean", "kl", "entropy"} <= lines[0].keys()
    assert lines[0]["kl"] == 0.0 and lines[0]["ratio/max_deviation"] == 0.0
    first, last = (sum(line["reward"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    assert last > first + 0.1, "what is rewarded becomes more frequent"


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no reward: give reward_model, reward_funcs or both"):
        config(folder, reward_funcs=[])
    with pytest.raises(ConfigError, match=r"reward_weights has 3 values for 1 rewards"):
        config(folder, reward_weights=[1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="num_generations must be at least 2"):
        config(folder, num_generations=1)
    with pytest.raises(ConfigError, match="ptx_dataset_name names no data set"):
        config(folder, ptx_kl_weight=0.1)
    with pytest.raises(ConfigError, match=r"kl_top_k must lie in \[2, \d+\] .* got 100000"):
        grpo.run(config(folder, output_dir=str(tmp_path / "a"), kl_top_k=100_000))
    rewards = folder / "rewards.py"
    with pytest.raises(RewardError, match="short_list: expected 12 scores, one per answer, got 1"):
        grpo.run(config(folder, output_dir=str(tmp_path / "b"), reward_funcs=[f"{rewards}:short_list"]))
    with pytest.raises(RewardError, match="text: score 0 must be a finite number"):
        grpo.run(config(folder, output_dir=str(tmp_path / "c"), reward_funcs=[f"{rewards}:text"]))


def test_a_step_whose_answers_are_all_cut_off_updates_nothing_and_goes_on(folder: Path, tmp_path: Path) -> None:
    out = grpo.run(
        config(folder, output_dir=str(tmp_path), mask_truncated_completions=True, max_completion_length=1, max_steps=2)
    )
    assert read_metrics(out)[-1]["completions/clipped_ratio"] > 0.9


def test_autocast_keeps_the_kl_of_a_model_with_itself_at_zero(folder: Path, tmp_path: Path) -> None:
    line = read_metrics(grpo.run(config(folder, output_dir=str(tmp_path), bf16=True, max_steps=1)))[0]
    assert line["kl"] == 0.0 and line["ratio/max_deviation"] == 0.0


def test_max_steps_counts_optimiser_steps(folder: Path, tmp_path: Path) -> None:
    lines = read_metrics(grpo.run(config(folder, output_dir=str(tmp_path), max_steps=3, num_iterations=2)))
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_logged_terms_are_means_over_their_own_items(folder: Path, tmp_path: Path) -> None:
    sft = [str(folder / "sft.jsonl")]
    c = config(folder, output_dir=str(tmp_path), ptx_dataset_name=sft, ptx_kl_weight=0.5, learning_rate=1e-2)
    last = read_metrics(grpo.run(c))[-1]
    assert last["loss/ptx"] == pytest.approx(last["ptx/kl"]) and last["loss/ptx"] > 0
    assert last["loss/kl"] == pytest.approx(last["kl"])


def test_a_causal_lm_is_no_reward_model(folder: Path, tmp_path: Path) -> None:
    c = config(folder, output_dir=str(tmp_path), reward_model=str(folder / "other"), reward_funcs=[])
    with pytest.raises(ConfigError, match=r"reward_model .*other: score.weight is not saved there"):
        grpo.run(c)
