"""plan-memory: the numbers add up, the page shows what the command prints, mistakes are named."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

from nova_kernels.checkpoint import SegmentPlan, profile_layers
from nova_train.__main__ import main
from nova_train.config import ConfigError
from nova_train.fleet import Card, ModelShape, equal_segments, memory_need, saved_items
from nova_train.model import model_without_weights
from nova_train.stages import plan_memory
from nova_train.stages.plan_memory import PlanMemoryConfig, plan_rows
from nova_train.subject import Subject

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


def subject_of(**keys: Any) -> Subject:
    return PlanMemoryConfig(**keys).subject()


@pytest.mark.slow
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
    last = list(plan_rows(config.subject(), replace(config, allow=["segment"])))[-1]
    assert last.name == "fastest that fits"
    assert set(last.plan.actions) == {"segment"}


def test_too_few_gpus_are_told_how_many_it_takes() -> None:
    config = PlanMemoryConfig(model="qwen2-72b", kernels="eager", tokens=32768, gpus=18, segments=[2])
    lines = printed(config)
    assert lines[-1] == "none of these fits on 18 GPUs; 'offloaded boundaries' would on 23 GPUs"
    assert all(row["fits"] == "no" for row in table(lines))


def test_no_number_of_gpus_is_told() -> None:
    asked = {"model": "llama-3-70b", "tokens": 10**6}
    says = "none of these fits on any number of GPUs; give fewer tokens, or a larger card_gb"
    assert printed(PlanMemoryConfig(**asked))[-1] == says


@pytest.mark.parametrize("budget", ["60GiB", 60 * GIB])
def test_a_budget_is_of_all_that_training_occupies(budget: int | str) -> None:
    """As in training: states and activations. The slack of the card is not training's."""
    config = PlanMemoryConfig(model="llama-3-70b", memory_budget=budget, gpus=32, segments=[1, 2])
    rows = {row.name: row for row in plan_rows(config.subject(), config)}
    taken = {name: row.need.total(32, Card(slack_bytes=0)) for name, row in rows.items()}
    assert 0.95 * 60 * GIB < taken["fastest that fits"] <= 60 * GIB
    assert (
        {name for name, row in rows.items() if not plan_memory.fits(row, config)}
        == {name for name, num_bytes in taken.items() if num_bytes > 60 * GIB}
        == {"all kept", "each layer"}
    )
    lines = printed(config)
    assert f"memory_budget {budget} per GPU, and 4 GB slack; 16 bytes per parameter, sharded" in lines[2]
    assert {row["plan"]: row["GPUs"] for row in table(lines)}["2 per segment"] == "30"


def test_a_budget_below_the_floor_names_the_floor() -> None:
    asked: dict[str, Any] = {"model": "qwen2-72b", "gpus": 64, "segments": []}
    with pytest.raises(
        ConfigError, match=r"memory_budget \.5GiB: on 64 GPUs states take 16\.9 GiB of each and "
    ) as error:
        printed(PlanMemoryConfig(**asked, memory_budget=".5GiB"))
    floor = int(str(error.value).split("give at least ")[1].split(" bytes")[0])
    assert table(printed(PlanMemoryConfig(**asked, memory_budget=floor)))[-1]["plan"] == "fastest that fits"
    with pytest.raises(ConfigError, match="give at least"):
        printed(PlanMemoryConfig(**asked, memory_budget=floor - 1))


def test_a_small_model_fits_on_one_gpu_and_shards_nothing(tmp_path: Path) -> None:
    config = PlanMemoryConfig(model=str(small_config(tmp_path)), tokens=4096, gpus=1, segments=[1, 2])
    lines = printed(config)
    rows = table(lines)
    assert [row["plan"] for row in rows][-1] == "fastest that fits"
    assert rows[-1]["segments"] == "4 kept"
    assert list(rows[0]) == ["plan", "activations", "logits", "states", "sum", "again", "fits", "segments"]
    assert "nested, sharded again" not in [row["plan"] for row in rows]
    assert "sharded" not in lines[2] and lines[3].endswith("the sum is on one GPU, with the slack")


def test_one_gpu_that_is_too_small_is_told_so() -> None:
    says = "none of these fits on 1 GPU; 'offloaded boundaries' would on 18 GPUs"
    assert printed(PlanMemoryConfig(model="llama-3-70b", gpus=1, segments=[2]))[-1] == says


def test_equal_plans_are_those_that_the_model_has_layers_for(tmp_path: Path) -> None:
    config = PlanMemoryConfig(model=str(small_config(tmp_path)), tokens=512)
    sizes = [row.plan.sizes[0] for row in plan_rows(config.subject(), config)]
    assert sizes[1:5] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"segments: 999 layers per segment, but .* has 4; give at most 4"):
        printed(replace(config, segments=[2, 999]))


def test_a_folder_and_its_config_are_the_same(tmp_path: Path) -> None:
    path = small_config(tmp_path, "qwen2")
    by_file, by_folder = (subject_of(model=str(name), tokens=64) for name in (path, tmp_path))
    assert by_file.chain == by_folder.chain
    assert by_file.parameters == ModelShape.from_config(json.loads(path.read_text())).parameters


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_is_measured_agrees_with_the_formula(family: str, tmp_path: Path) -> None:
    """On the meta device a layer saves what the items of `eager` say, without the cos and sin that all layers share."""
    model = str(small_config(tmp_path, family))
    measured = subject_of(model=model, tokens=4096, kernels="measured", logit_bytes=8)
    formula = subject_of(model=model, tokens=4096, kernels="eager", logit_bytes=8)
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
    subject = config.subject()
    layer = subject.chain.layers[0]
    assert layer.saved / layer.boundary == pytest.approx(24.27, abs=0.005)
    assert layer.backward / layer.boundary == pytest.approx(8.0, abs=0.01)
    plans = (SegmentPlan.of(subject.chain, equal_segments(80, k)) for k in (1, 2, 3, 4, 5))
    needs = [memory_need(subject.chain, p.bounds, p.actions, parameters=subject.parameters) for p in plans]
    assert [need.minimum_gpus(config.card) for need in needs] == [28, 27, 30, 36, 46]


def test_a_family_without_a_formula_is_measured(tmp_path: Path) -> None:
    model = str(small_config(tmp_path, "granite", head_dim=32))
    with pytest.raises(ConfigError, match="'granite' is none of llama, mistral, qwen2, qwen3.*kernels: measured"):
        subject_of(model=model)
    subject = subject_of(model=model, kernels="measured", tokens=512)
    assert len(subject.chain.layers) == 4
    assert all(layer.saved > 10 * layer.boundary for layer in subject.chain.layers)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_dropout_is_off_as_in_training(family: str, tmp_path: Path) -> None:
    """Both families have dropout in their configuration; layers cost what they cost as the trainer prepares them."""
    path = small_config(tmp_path, family, bos_token_id=0, eos_token_id=0, is_decoder=True)
    subject = subject_of(model=str(path), kernels="measured", tokens=512)
    arithmetic = SimpleNamespace(dtype="bfloat16", bf16=False, attention_backend=None, device="cpu")
    model = model_without_weights(path, arithmetic, torch.device("meta"))
    assert not model.training
    ids = torch.zeros(1, 64, dtype=torch.int64, device="meta")
    bounds = torch.tensor([0, 64], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 64, "max_length_k": 64}
    sample = {"input_ids": ids, "position_ids": ids, **packed, "use_cache": False}
    assert profile_layers(model, sample).at(512).layers == subject.chain.layers
    assert subject.chain.layers[0].saved > 5 * subject.chain.layers[0].boundary


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model": "lama-3-70b"}, "unknown model 'lama-3-70b'; did you mean 'llama-3-70b'?"),
        ({"model": "./nowhere/model"}, "model ./nowhere/model: no such folder here"),
    ],
)
def test_models_that_cannot_be(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", "\\?")):
        plan_memory.run(PlanMemoryConfig(**keys), console=Console(file=StringIO()))


@pytest.mark.parametrize(
    ("family", "fields", "kernels", "says"),
    [
        (
            "llama",
            {"hidden_size": "64"},
            "fused",
            "'hidden_size' expected int, got str (value: '64'); correct its config",
        ),
        (
            "llama",
            {"num_attention_heads": 0},
            "measured",
            "ZeroDivisionError: integer modulo by zero; correct its config",
        ),
        ("llama", {"hidden_act": "sillu"}, "measured", "no model can be built: KeyError: 'sillu'; correct its config"),
        (
            "llama",
            {"pad_token_id": 999},
            "measured",
            "no model can be built: AssertionError: Padding_idx must be within",
        ),
        ("t5", {}, "fused", "'t5' is no decoder-only (causal) language model; only those can be planned"),
        ("t5", {}, "measured", "'t5' is no decoder-only (causal) language model; only those can be planned"),
        ("vit", {}, "measured", "'vit' is no decoder-only (causal) language model; only those can be planned"),
        # The grouped product of the experts refuses this width.
        (
            "mixtral",
            {"hidden_size": 36},
            "measured",
            "kernels: measured: its layers do not run on the meta device, which",
        ),
    ],
)
def test_configurations_that_cannot_be_are_one_line(
    family: str, fields: dict[str, Any], kernels: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_config(tmp_path, family)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    assert main(["plan-memory", "--model", str(tmp_path), "--kernels", kernels]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"nova-train plan-memory: model {tmp_path}") and says in told


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"tokens": 0}, "tokens must be positive, got 0"),
        ({"gpus": -1}, "gpus must be positive, got -1"),
        ({"memory_budget": 0}, "memory_budget must be at least one byte, got 0"),
        ({"memory_budget": "60G"}, "memory_budget '60G' has two meanings: give 60GiB (powers of 1024) or 60GB"),
        ({"memory_budget": "5 cards"}, "memory_budget must be a size such as 60GiB"),
        ({"memory_budget": "77GB"}, "memory_budget 77GB is more than the 70.8 GiB that card_gb 80.0 less slack_gb 4.0"),
        ({"logit_bytes": -1.0}, "logit_bytes must be at least 0, got -1.0"),
        ({"slack_gb": 80.0}, "slack_gb 80.0 leaves nothing of card_gb 80.0"),
        ({"segments": [2, 0]}, "segments: expected at least 1 layer per segment, got 0"),
        ({"allow": []}, "allow is empty; expected some of keep, segment, nested, offload"),
        ({"allow": ["nest"]}, "allow: unknown action 'nest'; did you mean 'nested'?"),
        ({"model": None}, "model=None, fleet=False and scale=False: give model, fleet or scale"),
        ({"fleet": True}, "model='qwen2-72b', fleet=True and scale=False: they have models of their own"),
        ({"scale": True}, "model='qwen2-72b', fleet=False and scale=True: they have models of their own"),
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
