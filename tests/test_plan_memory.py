"""plan-memory: the numbers add up, the page shows what the command prints, mistakes are named."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig

from nova_kernels.checkpoint import SegmentPlan
from nova_train.__main__ import main
from nova_train.config import ConfigError
from nova_train.fleet import ModelShape, equal_segments, memory_need, saved_items
from nova_train.stages import plan_memory
from nova_train.stages.plan_memory import PlanMemoryConfig, plan_rows, subject_of

PAGE = Path(__file__).parent.parent / "docs" / "fleet.md"
GIB = 2**30
SMALL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def printed(config: PlanMemoryConfig) -> list[str]:
    """Lines, without the blank ones."""
    out = StringIO()
    plan_memory.run(config, console=Console(file=out, width=plan_memory.WIDTH, color_system=None))
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


def table(lines: list[str]) -> list[dict[str, str]]:
    """The rows of a Markdown table, by column."""
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [dict(zip(head, row, strict=True)) for row in rows]


def small_config(folder: Path, family: str = "llama", **fields: Any) -> Path:
    path = folder / "config.json"
    AutoConfig.for_model(family, **{**SMALL, **fields}).save_pretrained(folder)
    return path


def test_the_page_shows_what_the_command_prints() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = page.partition("<!-- nova-train plan-memory --fleet -->\n")[2].partition("<!-- end -->")[0]
    assert [line for line in shown.splitlines() if line] == printed(PlanMemoryConfig(fleet=True))


def test_parts_add_up_and_the_card_holds_them() -> None:
    rows = table(printed(PlanMemoryConfig(model="llama-3-70b", kernels="eager", logit_bytes=8, segments=[1, 2])))
    assert [row["plan"] for row in rows][:3] == ["all kept", "each layer", "2 per segment"]
    assert [row["GPUs"] for row in rows][:3] == ["-", "33", "27"]
    for row in rows[1:]:
        parts = sum(float(row[name]) for name in ("activations", "logits", "gathered", "states")) + 4e9 / GIB
        assert parts == pytest.approx(float(row["sum"]), abs=0.26)
        assert float(row["sum"]) <= 80e9 / GIB + 0.05
    assert rows[0]["sum"] == "-"


def test_the_number_of_gpus_decides_what_fits_and_what_is_fastest() -> None:
    config = PlanMemoryConfig(model="llama-3-70b", tokens=32768, gpus=32, segments=[2])
    rows = {row["plan"]: row for row in table(printed(config))}
    assert {name for name, row in rows.items() if row["fits"] == "no"} == {"all kept", "2 per segment"}
    fastest, leanest = rows["fastest that fits"], rows["offloaded boundaries"]
    assert float(fastest["sum"]) <= 80e9 / GIB
    assert float(fastest["sum"]) > float(leanest["sum"])
    assert int(fastest["again"][:-1]) < int(leanest["again"][:-1])
    last = list(plan_rows(subject_of(config), replace(config, allow=["segment"])))[-1]
    assert last.name == "fastest that fits"
    assert set(last.plan.actions) == {"segment"}


def test_too_few_gpus_are_told_how_many_it_takes() -> None:
    config = PlanMemoryConfig(model="qwen2-72b", kernels="eager", tokens=32768, gpus=18, segments=[2])
    lines = printed(config)
    assert lines[-1] == "none of these fits on 18 GPUs; 'offloaded boundaries' would on 23 GPUs"
    assert all(row["fits"] == "no" for row in table(lines))


def test_a_budget_is_kept() -> None:
    config = PlanMemoryConfig(model="llama-3-70b", memory_budget=30, segments=[])
    *_, row = plan_rows(subject_of(config), config)
    assert row.need.activations + row.need.logits + row.need.gathered <= 30 * GIB
    assert row.plan.predicted_recompute < 0.8


def test_a_small_model_fits_on_one_gpu_and_shards_nothing(tmp_path: Path) -> None:
    config = PlanMemoryConfig(model=str(small_config(tmp_path)), tokens=4096, gpus=1, segments=[1, 2])
    rows = table(printed(config))
    assert [row["plan"] for row in rows][-1] == "fastest that fits"
    assert rows[-1]["segments"] == "4 kept"
    assert {row["GPUs"] for row in rows} == {"1"}
    assert {row["gathered"] for row in rows} == {"0.0"}
    assert "nested, sharded again" not in [row["plan"] for row in rows]


def test_a_folder_and_its_config_are_the_same(tmp_path: Path) -> None:
    path = small_config(tmp_path, "qwen2")
    by_file, by_folder = (subject_of(PlanMemoryConfig(model=str(name), tokens=64)) for name in (path, tmp_path))
    assert by_file.chain == by_folder.chain
    assert by_file.parameters == ModelShape.from_config(json.loads(path.read_text())).parameters


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_is_measured_agrees_with_the_formula(family: str, tmp_path: Path) -> None:
    """On the meta device a layer saves what the items of `eager` say, without the cos and sin that all layers share."""
    model = str(small_config(tmp_path, family))
    measured = subject_of(PlanMemoryConfig(model=model, tokens=4096, kernels="measured", logit_bytes=8))
    formula = subject_of(PlanMemoryConfig(model=model, tokens=4096, kernels="eager", logit_bytes=8))
    assert measured.parameters == formula.parameters
    assert measured.chain.loss == formula.chain.loss == 4096 * 512 * 8
    shape = ModelShape.from_config(json.loads((tmp_path / "config.json").read_text()))
    items = saved_items(shape, "eager")
    for ours, theirs in zip(measured.chain.layers, formula.chain.layers, strict=True):
        assert ours.boundary == theirs.boundary
        assert ours.weights == theirs.weights
        n = ours.saved / ours.boundary + ours.saves_input
        assert n == pytest.approx(sum(items.values()) - items["cos, sin"], rel=0.005)


def test_the_70b_model_measured_needs_as_many_gpus_as_the_formula_says() -> None:
    config = PlanMemoryConfig(model="llama-3-70b", kernels="measured")
    subject = subject_of(config)
    layer = subject.chain.layers[0]
    assert layer.saved / layer.boundary == pytest.approx(24.27, abs=0.005)
    assert layer.backward / layer.boundary == pytest.approx(8.0, abs=0.01)
    plans = (SegmentPlan.of(subject.chain, equal_segments(80, k)) for k in (1, 2, 3, 4, 5))
    needs = [memory_need(subject.chain, p.bounds, p.actions, parameters=subject.parameters) for p in plans]
    assert [need.minimum_gpus(config.card) for need in needs] == [28, 27, 30, 36, 46]


def test_a_family_without_a_formula_is_measured(tmp_path: Path) -> None:
    model = str(small_config(tmp_path, "granite", head_dim=32))
    with pytest.raises(ConfigError, match="'granite' is none of llama, mistral, qwen2, qwen3.*kernels: measured"):
        subject_of(PlanMemoryConfig(model=model))
    subject = subject_of(PlanMemoryConfig(model=model, kernels="measured", tokens=512))
    assert len(subject.chain.layers) == 4
    assert all(layer.saved > 10 * layer.boundary for layer in subject.chain.layers)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model": "lama-3-70b"}, "unknown model 'lama-3-70b'; did you mean 'llama-3-70b'?"),
        ({"model": "./nowhere/model"}, "model ./nowhere/model: no such folder here"),
        ({"model": "qwen2-72b", "memory_budget": 5.0}, "memory_budget 5.0 GiB lies below the 12.16 GiB"),
    ],
)
def test_models_and_budgets_that_cannot_be(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", "\\?")):
        plan_memory.run(PlanMemoryConfig(**keys), console=Console(file=StringIO()))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"tokens": 0}, "tokens must be positive, got 0"),
        ({"gpus": -1}, "gpus must be positive, got -1"),
        ({"memory_budget": 0.0}, "memory_budget must be positive, got 0.0"),
        ({"logit_bytes": -1.0}, "logit_bytes must be at least 0, got -1.0"),
        ({"slack_gb": 80.0}, "slack_gb 80.0 leaves nothing of card_gb 80.0"),
        ({"segments": [2, 0]}, "segments: expected at least 1 layer per segment, got 0"),
        ({"allow": []}, "allow is empty; expected some of keep, segment, nested, offload"),
        ({"allow": ["nest"]}, "allow: unknown action 'nest'; did you mean 'nested'?"),
        ({"model": None}, "model=None and fleet=False: give model, or fleet"),
        ({"fleet": True}, "model='qwen2-72b' and fleet=True: it has models of its own"),
    ],
)
def test_keys_that_cannot_be(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PlanMemoryConfig(**{"model": "qwen2-72b", **keys})
    assert says in str(caught.value)


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan-memory", "--model", "qwen2-72b", "--tokens", "32768", "--segments", "1", "2", "--gpus", "40"]
    assert main(words) == 0
    rows = {row["plan"]: row for row in table(capsys.readouterr().out.splitlines())}
    assert (rows["each layer"]["GPUs"], rows["2 per segment"]["GPUs"]) == ("70", "40")
    assert (rows["each layer"]["fits"], rows["2 per segment"]["fits"]) == ("no", "yes")
    assert main(["plan-memory", "--model", "nowhere"]) == 2
    assert "unknown model 'nowhere'" in capsys.readouterr().err
