"""A run saved on some ranks continues on others, with the batch of a step kept: the same weights at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nova_train import loop, state
from nova_train.metrics import read_metrics
from processes import on_ranks
from rank_cases import run_stage, save_inputs

BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "global_batch_size": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"logging_steps": 4}),  # what was counted before the save belongs to a line behind it
    "muon": ("sft", {"optim": "muon", "muon_learning_rate": 0.01}),
    "reward": ("reward", {}),
    "grpo": ("grpo", {}),  # two steps per rollout: the save after step 3 lies between them
}
SAVED, LAST = 3, 4  # optimiser steps
TOLERANCE = {"muon": 1e-6}  # it works in float32
WAYS = {
    "one-then-two": ["sft", "reward", "grpo"],
    "two-then-one": ["sft", "muon", "reward", "grpo"],
    "split-then-two": ["sft", "grpo"],  # rows split over two ranks, then whole rows on each
}


class Stopped(Exception):
    """What ends a run after its save."""


def train(cases: Mapping[str, tuple[str, dict[str, Any]]], folder: Path, *, stop: bool) -> None:
    """Runs that begin, or continue from what lies in their folders; all the way, or up to the save."""
    own = loop.train_step

    def step(run: loop.Training[Any]) -> int:
        if stop and run.step == SAVED:
            raise Stopped
        return own(run)

    loop.train_step = step
    try:
        for name, (stage, options) in cases.items():
            options = {**BATCH, "max_steps": LAST, "save_steps": SAVED, **options}
            if stop:
                with pytest.raises(Stopped):
                    run_stage(stage, folder, folder / name, **options)
            else:
                run_stage(stage, folder, folder / name, **options)
    finally:
        loop.train_step = own


def runs(way: str, names: Sequence[str], **options: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    return {f"{name}-{way}": (CASES[name][0], {**CASES[name][1], **options}) for name in names}


def on_two_ranks(folder: Path) -> None:
    """Continue what one rank saved; save for one rank; save with rows split, and continue without."""
    train(runs("one-then-two", WAYS["one-then-two"]), folder, stop=False)
    train(runs("two-then-one", WAYS["two-then-one"]), folder, stop=True)
    train(runs("split-then-two", WAYS["split-then-two"], sequence_parallel_size=2), folder, stop=True)
    train(runs("split-then-two", WAYS["split-then-two"]), folder, stop=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_inputs(tmp_path_factory.mktemp("resume"))
    train(runs("whole", list(CASES)), folder, stop=False)
    train(runs("one-then-two", WAYS["one-then-two"]), folder, stop=True)
    on_ranks(2, on_two_ranks, folder)
    train(runs("two-then-one", WAYS["two-then-one"]), folder, stop=False)
    return folder


@pytest.mark.parametrize(("way", "case"), [(way, case) for way, names in WAYS.items() for case in names])
def test_the_end_is_that_of_a_run_on_one_rank(folder: Path, way: str, case: str) -> None:
    found, expected = (load_file(folder / f"{case}-{kind}" / "model.safetensors") for kind in (way, "whole"))
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=TOLERANCE.get(case, 1e-9))
    lines, wanted_lines = read_metrics(folder / f"{case}-{way}"), read_metrics(folder / f"{case}-whole")
    assert [line["step"] for line in lines] == [line["step"] for line in wanted_lines] and lines[-1]["step"] == LAST
    for line, wanted_line in zip(lines, wanted_lines, strict=True):
        assert line == pytest.approx(wanted_line, rel=1e-5 if case in TOLERANCE else 1e-7, abs=1e-9)


def test_several_ranks_save_their_parts(folder: Path) -> None:
    saved = folder / "sft-two-then-one" / f"checkpoint-{SAVED}"
    assert state.has_sharded_weights(saved)
    assert not (saved / "model.safetensors").exists()
    assert state.damage_of(saved) is None
    part = next((saved / state.SHARDED).glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    assert "bytes, its manifest says" in str(state.damage_of(saved))


def test_another_batch_is_refused_with_both_numbers_and_the_way_out(folder: Path) -> None:
    kept = {"max_steps": LAST, "save_steps": SAVED, **CASES["sft"][1]}
    other = {**BATCH, **kept, "gradient_accumulation_steps": 3, "global_batch_size": 6}
    with pytest.raises(
        state.StateError,
        match=r"holds another run \(global_batch_size: 4 there, 6 here\); to continue it on another number of ranks "
        "give global_batch_size 4 and leave gradient_accumulation_steps out",
    ):
        run_stage("sft", folder, folder / "sft-two-then-one", **other)
