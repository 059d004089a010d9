from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from nova_train import state
from nova_train.stages.sft import SFTConfig


def config(folder: Path, **options: object) -> SFTConfig:
    return SFTConfig(output_dir=str(folder), model_name_or_path="m", dataset_name=["d.jsonl"], **options)


def write_checkpoint(folder: Path, step: int, keep: int = 2) -> Path:
    return state.save_checkpoint(
        folder,
        step,
        lambda p: (p / "model.safetensors").write_bytes(bytes(100)) and None,
        {"step": step},
        keep=keep,
    )


@pytest.mark.parametrize("made", ["config.json", "header.json", "finished.json", "shard-000000000000.json"])
def test_the_folder_of_another_run_is_refused_by_the_keys_that_differ(tmp_path: Path, made: str) -> None:
    state.claim_folder(config(tmp_path), "sft")
    state.claim_folder(config(tmp_path, disable_progress=True), "sft")
    state.claim_folder(config(tmp_path, learning_rate=1e-2), "sft")  # nothing was made yet: a typo may be corrected
    state.claim_folder(config(tmp_path), "sft")
    (tmp_path / made).write_text("{}")
    with pytest.raises(state.StateError, match=r"holds another run \(learning_rate: 1e-05 there, 0.002 here\)"):
        state.claim_folder(config(tmp_path, learning_rate=2e-3), "sft")
    with pytest.raises(state.StateError, match="stage: 'sft' there, 'reward' here"):
        state.claim_folder(config(tmp_path), "reward")
    with pytest.raises(state.StateError, match="start fresh.*already holds a run"):
        state.claim_folder(config(tmp_path, resume_from_checkpoint=None), "sft")


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, step)
    assert [p.name for p in state.list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert state.load_trainer(tmp_path / "checkpoint-100") == {"step": 100}


@pytest.mark.parametrize("harm", ["truncated", "changed", "missing", "no manifest", "manifest cut"])
def test_a_damaged_checkpoint_is_passed_over_and_it_says_so(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write_checkpoint(tmp_path, 5), write_checkpoint(tmp_path, 10)
    model, manifest = bad / "model.safetensors", bad / "manifest.json"
    if harm == "truncated":
        model.write_bytes(bytes(99))
    elif harm == "changed":
        model.write_bytes(bytes(99) + b"x")
    elif harm == "missing":
        model.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:20])
    assert state.find_checkpoint(config(tmp_path)) == good
    assert "checkpoint-10 is damaged" in caplog.text and "using the one before" in caplog.text
    with pytest.raises(state.StateError, match="use 'auto' for the newest sound one"):
        state.find_checkpoint(config(tmp_path, resume_from_checkpoint=str(bad)))


def test_only_damaged_checkpoints_are_an_error_and_none_are_a_fresh_start(tmp_path: Path) -> None:
    assert state.find_checkpoint(config(tmp_path)) is None
    (write_checkpoint(tmp_path, 5) / "trainer.pt").unlink()
    with pytest.raises(state.StateError, match=r"every checkpoint is damaged \(checkpoint-5\)"):
        state.find_checkpoint(config(tmp_path))


def test_a_checkpoint_interrupted_while_written_does_not_count(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        state.save_checkpoint(tmp_path, 5, fail, {}, keep=2)
    assert state.find_checkpoint(config(tmp_path)) is None
    assert write_checkpoint(tmp_path, 5).is_dir()


def test_all_generators_come_back() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    random.gauss(0, 1)
    before = state.rng_state()
    first = draw()
    draw()
    state.restore_rng(before)
    assert draw() == first


def test_finished_is_written_last_and_read_back(tmp_path: Path) -> None:
    assert state.finished_fingerprint(tmp_path) is None
    state.mark_finished(tmp_path, "abc", steps=3)
    assert state.finished_fingerprint(tmp_path) == "abc"
    assert json.loads((tmp_path / "finished.json").read_text())["steps"] == 3


def test_two_writers_never_share_a_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    monkeypatch.setattr(Path, "replace", lambda partial, path: names.append(partial.name))
    for _ in range(2):
        state.mark_finished(tmp_path, "abc")
        state.claim_folder(config(tmp_path), "sft")
    assert len(set(names)) == 4, "process ids are equal on two hosts"


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_optimisers_in_parts_keep_what_there_is_and_make_nothing(tmp_path: Path) -> None:
    """Of weights that were never updated there is nothing to save, and saving must not count as a step."""

    def made() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    model, optimizer = made()
    for name in ("never", "once"):
        state.write_sharded(tmp_path / name, model, {"adamw": optimizer})
        assert [len(entry) for entry in optimizer.state.values()] == ([] if name == "never" else [3])
        found, again = made()
        state.read_sharded_weights(tmp_path / name, found)
        state.read_sharded_optimizers(tmp_path / name, found, {"adamw": again})
        assert torch.equal(found.weight, model.weight)
        for weight, other in zip(model.parameters(), found.parameters(), strict=True):
            saved, read = optimizer.state.get(weight, {}), again.state.get(other, {})
            assert saved.keys() == read.keys()
            assert all(torch.equal(read[key], value) for key, value in saved.items())
        model.weight.grad = torch.ones_like(model.weight)  # the bias never has one
        optimizer.step()
