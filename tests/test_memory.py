"""Planned memory: what is predicted is measured, a budget is kept, and no plan changes a result."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from nova_kernels.lm_head import arithmetic
from nova_train import memory, share
from nova_train.config import ConfigError
from nova_train.stages import grpo, reward, sft
from nova_train.world.model import ModelSize, untrained_model
from nova_train.world.tokenizer import build_tokenizer

LAYERS = 6
# Wide enough for the layers, and not the head, to decide where the peak is.
SIZE = ModelSize(hidden=48, layers=LAYERS, heads=4, intermediate=160, context=512, initializer_range=0.1)
TOKENS = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of which all tokens but the first are trained; packed, they fill whole rows."""
    folder = tmp_path_factory.mktemp("memory")
    tokenizer = build_tokenizer(512)
    untrained_model(tokenizer, SIZE, 0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = [str(number) for number in range(10)] * 30
    rows = [{"prompt": "1", "completion": "".join(words[start : start + 58])} for start in range(16)]
    tiny.write_rows(folder / "sft.jsonl", rows)
    tiny.pair_file(folder / "pairs.jsonl")
    tiny.prompt_file(folder / "prompts.jsonl")
    return folder


def keys(folder: Path, data: str = "sft.jsonl", **values: Any) -> dict[str, Any]:
    base = {
        "output_dir": str(folder / "unused"),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": [str(folder / data)],
        "max_length": TOKENS,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "disable_progress": True,
    }
    return base | values


def config(folder: Path, **values: Any) -> sft.SFTConfig:
    return sft.SFTConfig(**keys(folder, **values))


def measured(out: Path) -> tuple[float, float]:
    """(predicted, measured) bytes of the first row, which alone is measured."""
    lines = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    assert [("activation_bytes" in line) for line in lines] == [True] + [False] * (len(lines) - 1)
    return lines[0]["predicted_activation_bytes"], lines[0]["activation_bytes"]


def budget(folder: Path, share: float) -> int:
    """Bytes that leave `share` of what keeping everything takes for activations."""
    plan = memory.plan_memory(config(folder))
    return memory.resident_bytes(plan.parts) + int(share * plan.activations.predicted_peak_bytes)


@pytest.mark.parametrize(
    ("segments", "arithmetic"),
    [(1, {}), (4, {}), ([3, 2, 1], {}), ([1, 2, 3], {"bf16": True}), ([3, 2, 1], {"dtype": "bfloat16"})],
)
def test_the_predicted_peak_is_the_measured_one(folder: Path, tmp_path: Path, segments: Any, arithmetic: Any) -> None:
    predicted, found = measured(sft.run(config(folder, output_dir=str(tmp_path), segments=segments, **arithmetic)))
    assert predicted == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_a_plan_keeps_its_budget_and_no_more_is_computed_twice_than_needed(
    folder: Path, tmp_path: Path, share: float
) -> None:
    limit = budget(folder, share)
    auto = config(folder, output_dir=str(tmp_path), segments="auto", memory_budget=limit)
    plan = memory.plan_memory(auto)
    assert plan.num_bytes <= limit == plan.budget
    predicted, found = measured(sft.run(auto))
    assert predicted == pytest.approx(found, rel=0.03) and predicted <= plan.activations.predicted_peak_bytes
    actions = set(plan.activations.actions)
    assert actions == {"keep"} if share == 1.0 else actions >= {"segment"} and "offload" not in actions
    each = memory.plan_memory(config(folder, segments=1)).activations
    assert plan.activations.predicted_recompute < each.predicted_recompute


def test_every_stage_is_measured(folder: Path, tmp_path: Path) -> None:
    pairs = reward.RewardConfig(**keys(folder, "pairs.jsonl", output_dir=str(tmp_path / "reward"), segments=2))
    predicted, found = measured(reward.run(pairs))
    assert predicted == pytest.approx(found, rel=0.03)
    asked = {"reward_funcs": ["nova_train.world.reward:score"], "max_completion_length": 8, "kl_top_k": 20}
    answers = grpo.GRPOConfig(
        **keys(folder, "prompts.jsonl", output_dir=str(tmp_path / "grpo"), segments=2, max_length=128, **asked)
    )
    predicted, found = measured(grpo.run(answers))
    assert predicted == pytest.approx(found, rel=0.03)


def test_no_plan_changes_a_result(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two runs, equal weights and metrics; and a run may go on with another plan."""
    caplog.set_level(logging.INFO)
    plain = sft.run(config(folder, output_dir=str(tmp_path / "plain"), max_steps=4, save_steps=2))
    assert "activation_bytes" not in (plain / "timing.jsonl").read_text()
    planned = {"segments": "auto", "memory_budget": budget(folder, 0.3)}
    changed = config(folder, output_dir=str(tmp_path / "changed"), max_steps=4, save_steps=2, **planned)
    sft.run(changed)
    assert "activations of a row of 256 tokens: predicted" in caplog.text
    (tmp_path / "plain" / "finished.json").unlink()
    resumed = sft.run(config(folder, output_dir=str(plain), max_steps=4, save_steps=2, **planned))
    for name in ("model.safetensors", "metrics.jsonl"):
        expected = (tmp_path / "changed" / name).read_bytes()
        assert (resumed / name).read_bytes() == expected, name
    elsewhere = config(
        folder,
        output_dir=str(tmp_path / "elsewhere"),
        max_steps=4,
        save_steps=2,
        segments=[2, 4],
        resume_from_checkpoint=str(plain / "checkpoint-2"),
    )
    assert (sft.run(elsewhere) / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_gradients_are_moved_bit_for_bit_and_unused_parameters_keep_none() -> None:
    used, unused = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    with memory._counted(torch.nn.ParameterList([used, unused])) as tracker:
        (used * -0.0).sum().backward()
    assert tracker.peak > 0
    assert used.grad is not None and torch.signbit(used.grad).all(), "a copy: 0 + -0 would be 0"
    assert unused.grad is None


def test_segments_that_do_not_fit_are_refused_by_key(folder: Path, tmp_path: Path) -> None:
    says = r"segments: .*sizes \[3, 2\] must .* sum to the 6 layers; they sum to 5: change them, or give one number"
    with pytest.raises(ConfigError, match=says):
        sft.run(config(folder, output_dir=str(tmp_path), segments=[3, 2]))


def test_logits_count_once(folder: Path) -> None:
    """A profile has the loss in it, chunk of logits and all; the line of the estimate is for models without one."""
    estimate, plan = memory.estimate_memory(config(folder)), memory.plan_memory(config(folder))
    names, planned = [part.name for part in estimate], [part.name for part in plan.parts]
    assert names == ["weights", "gradients", "AdamW", "logits chunk"] and planned == names[:-1]
    assert plan.chain_of(TOKENS).loss >= 4 * TOKENS * 512


def test_logits_that_an_operator_keeps_to_itself_belong_to_the_loss(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows beyond a chunk: neither fake tensors nor the tracker see the chunk, so it is added."""
    plain = memory.plan_memory(config(folder)).chain_of(TOKENS).loss
    monkeypatch.setattr(arithmetic, "chunk_elements", lambda device: 16 * 512)
    chunked = memory.plan_memory(config(folder)).chain_of(TOKENS).loss
    assert 8 * 16 * 512 < chunked < plain


def test_a_budget_below_the_floor_names_the_floor(folder: Path) -> None:
    auto = config(folder, segments="auto", memory_budget="1KiB")
    with pytest.raises(
        ConfigError, match=r"memory_budget 1.0 KiB: weights, .* take 3.. MiB and a row of 256 "
    ) as error:
        memory.plan_memory(auto)
    floor = int(str(error.value).split("give at least ")[1].split(" bytes")[0])
    plan = memory.plan_memory(config(folder, segments="auto", memory_budget=floor))
    assert plan.num_bytes == floor
    with pytest.raises(ConfigError, match="give at least"):
        memory.plan_memory(config(folder, segments="auto", memory_budget=floor - 1))


def test_what_cannot_be_profiled_trains_without_a_plan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(memory, "profile_layers", refuse)
    with pytest.raises(ConfigError, match=r"cannot be predicted \(data-dependent\); give segments as a number"):
        sft.run(config(folder, output_dir=str(tmp_path / "auto"), segments="auto"))
    out = sft.run(config(folder, output_dir=str(tmp_path / "sizes"), segments=2))
    assert "cannot be predicted" in caplog.text and "activation_bytes" not in (out / "timing.jsonl").read_text()


def test_the_longest_row_of_each_stage() -> None:
    base: dict[str, Any] = {"output_dir": "o", "model_name_or_path": "m", "dataset_name": ["d"]}
    base |= {"max_length": 100, "per_device_train_batch_size": 2}
    assert sft.SFTConfig(**base).row_tokens() == 200
    assert reward.RewardConfig(**base).row_tokens() == 400, "chosen and rejected"
    answers = {**base, "reward_funcs": ["a:b"], "num_generations": 3, "max_completion_length": 50, "kl_top_k": 2}
    assert grpo.GRPOConfig(**answers).row_tokens() == 900
    ptx = {"ptx_dataset_name": ["d"], "ptx_kl_weight": 0.1, "ptx_batch_size": 10}
    assert grpo.GRPOConfig(**answers, **ptx).row_tokens() == 1000


def test_the_budget_is_a_share_of_the_device_where_none_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = config(folder, segments="auto")
    monkeypatch.setattr(share.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert share.device_budget(auto) == 4096 * 500
    monkeypatch.setattr(share, "pick_device", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80_000))
    assert share.device_budget(auto) == 72_000
    assert share.device_budget(config(folder, segments="auto", memory_budget="2KB")) == 2000


def test_on_a_gpu_the_peak_between_two_lines_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    peaks = [3 * 2**30, 2**30]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peaks.pop(0))
    model: Any = SimpleNamespace(device=torch.device("cuda"))
    meter = memory.MemoryMeter(model, memory.plan_memory(config(folder, segments=1)))
    with meter.row(100):
        pass
    assert meter.figures() == {"peak_memory_bytes": 3 * 2**30}
    assert meter.figures() == {"peak_memory_bytes": 2**30} and peaks == []
    assert caplog.text.count("measured 3.0 GiB") == 1 and "measured 1.0 GiB" not in caplog.text
