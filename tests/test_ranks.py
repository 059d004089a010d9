"""Several ranks train as one does: the same weights after a few steps, however data and rows are spread over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tiny
from nova_train.metrics import read_metrics
from rank_cases import on_ranks, run_cases

REWARDS = """
def ids(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 17) for ids in completion_ids]
"""
# (dp, sp) -> how a step of six packs, pairs or prompts is cut: micro-batch, accumulation
CUTS = {
    (1, 1): [(6, 1)],
    (2, 1): [(3, 1), (1, 3), (2, 3)],  # the last: three micro-batches on two ranks, one of them repeats one
    (1, 2): [(6, 1), (2, 3)],
    (2, 2): [(1, 3), (2, 3)],
}
MUON = {"optim": "muon", "muon_learning_rate": 0.02}


def cases(dp: int, sp: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of the output folder -> stage and options; what stands in front of a blank is what it must equal."""
    found = {}
    for stage in ("sft", "reward", "grpo"):
        for size, accumulation in CUTS[dp, sp]:
            cut = {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": accumulation,
                "global_batch_size": 6,
                "sequence_parallel_size": sp,
            }
            name = f"{dp}-{sp}-{size}-{accumulation}"
            found[f"{stage} {name}"] = (stage, cut)
            if stage == "sft" and (size, accumulation) == CUTS[dp, sp][0]:
                found[f"sft {name} segments"] = (stage, {**cut, "segments": 1})
                found[f"muon {name}"] = (stage, {**cut, **MUON})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny.save_model(folder / "model", dtype="float64")
    tiny.sft_file(folder / "sft.jsonl")
    tiny.pair_file(folder / "pairs.jsonl")
    tiny.prompt_file(folder / "prompts.jsonl")
    (folder / "rewards.py").write_text(REWARDS)
    run_cases(cases(1, 1), folder)
    return folder


def difference(folder: Path, one: str, other: str) -> float:
    a, b = (load_file(folder / name / "model.safetensors") for name in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(("dp", "sp"), [(2, 1), (1, 2), (2, 2)])
def test_the_weights_are_those_of_one_rank(folder: Path, dp: int, sp: int) -> None:
    on_ranks(dp * sp, run_cases, cases(dp, sp), folder)
    for name in cases(dp, sp):
        expected = f"{name.split()[0]} 1-1-6-1"
        assert difference(folder, expected, name) < 1e-10, name
        for line, wanted in zip(read_metrics(folder / name), read_metrics(folder / expected), strict=True):
            for values in (line, wanted):
                values.pop("ratio/max_deviation", None)  # the mean over micro-batches of their largest
            assert line == pytest.approx(wanted, rel=1e-7, abs=1e-9), name
