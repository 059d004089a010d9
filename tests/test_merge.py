"""The merge stage; the formulas themselves are tested in test_merging.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from nova_train.config import ConfigError
from nova_train.stages import merge
from nova_train.state import StateError


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two models."""
    return [str(tiny.save_model(tmp_path_factory.mktemp("parent"), seed)) for seed in (0, 1, 2)]


def config(tmp_path: Path, parents: list[str], **values: Any) -> merge.MergeConfig:
    keys = {"output_dir": str(tmp_path / "merged"), "models": parents[1:], "disable_progress": True} | values
    return merge.MergeConfig(**keys)


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: p.double() for name, p in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}


def test_a_linear_merge_opens_as_a_model(tmp_path: Path, parents: list[str]) -> None:
    folder = merge.run(config(tmp_path, parents, weights=[3.0, 1.0], normalize=True))
    first, second, merged = (weights_of(path) for path in (*parents[1:], folder))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name], rtol=1e-6, atol=1e-7)
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(parents[1]).chat_template
    )
    assert json.loads((folder / "merge.json").read_text())["method"] == "linear"


def test_task_arithmetic_steps_from_the_base(tmp_path: Path, parents: list[str]) -> None:
    folder = merge.run(config(tmp_path, parents, method="task_arithmetic", base=parents[0], weights=[1, -0.5], lam=0.5))
    base, first, second, merged = (weights_of(path) for path in (*parents, folder))
    for name, tensor in merged.items():
        step = 0.5 * ((first[name] - base[name]) - 0.5 * (second[name] - base[name]))
        torch.testing.assert_close(tensor, base[name] + step, rtol=1e-5, atol=1e-6)


def test_model_stock_lies_between_the_base_and_the_mean(tmp_path: Path, parents: list[str]) -> None:
    folder = merge.run(config(tmp_path, parents, method="model_stock", base=parents[0], dtype="bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    base, first, second, merged = (weights_of(path) for path in (*parents, folder))
    name = "model.layers.0.mlp.up_proj.weight"
    mean = (first[name] + second[name]) / 2
    ratio = (merged[name] - base[name]).norm() / (mean - base[name]).norm()
    assert 0.3 < ratio < 0.95


def test_a_finished_merge_is_left_alone(tmp_path: Path, parents: list[str]) -> None:
    folder = merge.run(config(tmp_path, parents))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert merge.run(config(tmp_path, parents, disable_progress=False)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(StateError, match=r"holds another run \(weights: None there, \[0.25, 0.75\] here\)"):
        merge.run(config(tmp_path, parents, weights=[0.25, 0.75]))


def test_a_merge_that_was_killed_is_done_again(tmp_path: Path, parents: list[str]) -> None:
    folder = merge.run(config(tmp_path, parents))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "finished.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    merge.run(config(tmp_path, parents))
    assert (folder / "model.safetensors").read_bytes() == whole
    assert (folder / "finished.json").exists()


def test_the_result_may_not_be_a_parent(tmp_path: Path, parents: list[str]) -> None:
    own = str(tiny.save_model(tmp_path / "own"))
    before = (Path(own) / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is one of the models to merge"):
        merge.run(config(tmp_path, parents, models=[own, parents[1]], output_dir=own))
    assert (Path(own) / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": []}, r"models: linear needs at least 1, got \[\]"),
        ({"method": "model_stock", "base": "b", "models": ["a"]}, r"model_stock needs at least 2, got \['a'\]"),
        ({"weights": [1.0]}, r"weights needs one value per model, 2 in all, got \[1.0\]"),
        ({"weights": [1.0, 2.0]}, r"weights \[1.0, 2.0\] sum to 3, not 1; set normalize"),
        ({"base": "b"}, "method linear has no base; got base b"),
        ({"method": "model_stock"}, "method model_stock needs base, .* got base None"),
        ({"method": "model_stock", "base": "b", "weights": [1, 1]}, "weights is for linear and task_arithmetic"),
        ({"method": "model_stock", "base": "b", "normalize": True}, "normalize is for linear and task_arithmetic"),
        ({"lam": 0.5}, "lam is for task_arithmetic, got 0.5 for linear"),
        ({"filter_wise": True}, "filter_wise is for model_stock, got True for linear"),
        ({"num_threads": 0}, "num_threads must be positive, got 0"),
    ],
)
def test_options_that_the_method_lacks_are_refused(
    tmp_path: Path, parents: list[str], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, parents, **values)
