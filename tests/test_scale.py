"""Scale: what a rank holds is what was predicted, the page shows what the command prints, launch files are sound."""

from __future__ import annotations

import subprocess
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import LlamaForCausalLM

import tiny
from nova_kernels.ulysses import HeadPlan, TokenPlan, comm_bytes
from nova_train import memory
from nova_train.config import ConfigError
from nova_train.fleet import MODEL_SHAPES, chain_of, saved_items
from nova_train.scale import Scale
from nova_train.share import Share
from nova_train.stages import plan_memory
from nova_train.stages.grpo import GRPOConfig
from nova_train.stages.plan_memory import PlanMemoryConfig, plan_rows
from nova_train.stages.reward import RewardConfig
from nova_train.stages.sft import SFTConfig
from nova_train.world.model import ModelSize, untrained_model
from nova_train.world.tokenizer import build_tokenizer
from processes import on_ranks
from scale_ranks import occupied

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "recipes" / "cluster"
TOKENS = 512
SIZE = ModelSize(hidden=64, layers=4, heads=4, intermediate=224, context=1024, initializer_range=0.1)
RESIDENT = ("weights", "gradients", "AdamW")
IDS = 2 * 3 * 8  # bytes per token of the two micro-batches of a step: ids, labels, positions; no plan counts them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and rows of one length: every rank has as much to do in every micro-batch."""
    folder = tmp_path_factory.mktemp("scale")
    tokenizer = build_tokenizer(512)
    untrained_model(tokenizer, SIZE, 0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    shape = LlamaForCausalLM.config_class.from_pretrained(folder / "model")
    shape.update({"tie_word_embeddings": False, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True})
    LlamaForCausalLM(shape).save_pretrained(folder / "grouped")
    tokenizer.save_pretrained(folder / "grouped")
    tiny.write_rows(folder / "sft.jsonl", [{"prompt": "1", "completion": "0123456789" * 97}] * 24)
    return folder


def keys(folder: Path, **values: Any) -> dict[str, Any]:
    base = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": [str(folder / "sft.jsonl")],
        "max_length": TOKENS,
        "packing": False,
        "gradient_accumulation_steps": 2,  # while the second runs backward, the gradients of the first are there
        "learning_rate": 1e-3,
        "max_steps": 2,
        "save_steps": 100,
        "disable_progress": True,
        "segments": [2, 1, 1],
    }
    return base | values


def predicted(folder: Path, ranks: int, tokens: int, **values: Any) -> tuple[dict[str, int], int]:
    """What lasts, by name, and the most that is alive at once in a row of so many tokens, with its ids.

    Without the chunk of logits: no tracker sees what an operator has to itself.
    """
    plan = memory.plan_memory(SFTConfig(output_dir="unused", **keys(folder, **values)), ranks=ranks)
    parts = {part.name: part.num_bytes for part in plan.parts if part.name != "logits chunk"}
    return parts, sum(parts.values()) + plan.activation_bytes(tokens) + IDS * tokens


def check(folder: Path, name: str, ranks: int, **values: Any) -> int:
    """That all ranks hold what was predicted; the most that one of them held."""
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(ranks)]
    for each in found:
        parts, total = predicted(folder, ranks, each["tokens"], **values)
        assert all(each[key] == parts[key] for key in RESIDENT), (name, each, parts)
        assert 0.9 * TOKENS < each["tokens"] <= TOKENS
        assert 0.995 < total / each["peak"] < 1.005, (name, each, total)
    return max(int(each["peak"]) for each in found)


def test_peak_bytes_of_a_rank_fall_as_predicted(folder: Path) -> None:
    """Every byte of one process, of two that shard, and of two that share rows besides."""
    cases: dict[str, dict[str, Any]] = {"dp": {}, "sp": {"sequence_parallel_size": 2, "bf16": True}}
    occupied(folder, {"one": keys(folder)})
    on_ranks(2, occupied, folder, {name: keys(folder, **values) for name, values in cases.items()})
    one = check(folder, "one", 1)
    two = {name: check(folder, name, 2, **values) for name, values in cases.items()}
    assert two["sp"] < 0.7 * two["dp"] < 0.7 * one


@pytest.mark.slow
def test_peak_bytes_of_four_ranks(folder: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "4-1": {"bf16": True},
        "2-2": {"sequence_parallel_size": 2},
        "1-4": {"sequence_parallel_size": 4, "bf16": True},
        "grouped": {"sequence_parallel_size": 4, "model_name_or_path": str(folder / "grouped")},  # copies of key heads
        "auto": {"sequence_parallel_size": 2, "segments": "auto", "memory_budget": "7MiB"},
        "each": {"segments": 1, "bf16": True, "model_name_or_path": str(folder / "grouped")},
        "kept": {"segments": [4]},
    }
    on_ranks(4, occupied, folder, {name: keys(folder, **values) for name, values in cases.items()})
    for name, values in cases.items():
        check(folder, name, 4, **values)


def test_a_plan_for_ranks_without_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher started counts, one process is one process, and shares are rounded up."""
    config = SFTConfig(output_dir="unused", **keys(folder))
    one, four = memory.plan_memory(config), memory.plan_memory(config, ranks=4)
    assert "gathered" not in {part.name for part in one.parts} and one.activations.fsdp is None
    weights = [next(p for p in plan.parts if p.name == "weights") for plan in (one, four)]
    assert weights[0].num_bytes / 4 <= weights[1].num_bytes < weights[0].num_bytes / 3.9
    assert weights[1].formula.endswith("x 4 bytes / 4 ranks")
    assert "gathers: 4 forward, 4 backward" in four.text() and "gathers" not in one.text()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert memory.plan_memory(config).num_bytes == four.num_bytes
    assert Share(ranks=4).numel([torch.nn.Parameter(torch.zeros(6, 5)), torch.nn.Parameter(torch.zeros(()))]) == 11


def test_shared_rows_halve_activations_and_are_said(folder: Path) -> None:
    dp, sp = (
        memory.plan_memory(SFTConfig(output_dir="unused", **keys(folder, sequence_parallel_size=size)), ranks=2)
        for size in (1, 2)
    )
    assert 0.45 < sp.activations.predicted_peak_bytes / dp.activations.predicted_peak_bytes < 0.75
    assert "a row of 512 tokens that 2 ranks share" in sp.text() and "share" not in dp.text()


def test_segments_auto_keep_the_budget_of_a_rank(folder: Path) -> None:
    auto = keys(folder, segments="auto", sequence_parallel_size=2)
    lean = memory.plan_memory(
        SFTConfig(output_dir="unused", **keys(folder, segments=1, sequence_parallel_size=2)), ranks=4
    )
    plan = memory.plan_memory(SFTConfig(output_dir="unused", **auto, memory_budget=lean.num_bytes), ranks=4)
    assert plan.num_bytes <= lean.num_bytes and plan.activations.fsdp is not None
    assert "offload" not in plan.activations.actions, "the host's memory is the device's"
    assert plan.activations.predicted_recompute <= lean.activations.predicted_recompute
    with pytest.raises(ConfigError, match="give at least"):
        memory.plan_memory(SFTConfig(output_dir="unused", **auto, memory_budget=lean.num_bytes // 2), ranks=4)


def test_frozen_models_are_shared_too(folder: Path) -> None:
    grpo = GRPOConfig(
        output_dir="unused",
        model_name_or_path=str(folder / "model"),
        dataset_name=["unread"],
        reward_funcs=["a:b"],
    )
    one, two = ({p.name: p.num_bytes for p in memory.estimate_memory(grpo, ranks=n)} for n in (1, 2))
    assert two["frozen models"] == two["weights"] == pytest.approx(one["weights"] / 2, rel=0.01)
    plain = {p.name: p.num_bytes for p in memory.estimate_memory(SFTConfig(output_dir="o", **keys(folder)), ranks=2)}
    assert two["gathered"] == 2 * plain["gathered"], "the reference's embedding and head are whole as well"


def test_a_reward_model_has_its_own_head(folder: Path) -> None:
    values = {key: value for key, value in keys(folder, segments=1).items() if key != "packing"}
    pairs = RewardConfig(output_dir="unused", **values)
    one, two = (memory.plan_memory(pairs, ranks=ranks) for ranks in (1, 2))
    assert two.activations.predicted_peak_bytes > one.activations.predicted_peak_bytes, "layers are whole for a while"
    assert memory.resident_bytes(two.parts) < 0.6 * memory.resident_bytes(one.parts)


# plan-memory and the page


def printed(config: PlanMemoryConfig) -> list[str]:
    out = StringIO()
    plan_memory.run(config, console=Console(file=out, width=plan_memory.WIDTH, color_system=None))
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


def test_the_page_shows_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- nova-train plan-memory --scale -->\n")[2].partition("<!-- end -->")[0]
    assert [line for line in shown.splitlines() if line] == printed(PlanMemoryConfig(scale=True))


def test_a_row_that_gpus_share_is_one_of_fewer_tokens() -> None:
    """But for the output of attention that is kept twice, and copies of key heads."""
    shape = MODEL_SHAPES["qwen2-72b"]
    shared, alone = chain_of(shape, 65536, sp=4).layers[0], chain_of(shape, 16384).layers[0]
    assert shared.boundary == alone.boundary and shared.weights == alone.weights
    assert shared.saved - alone.saved == alone.boundary, "64 x 128 = 8192: one more output"
    assert shared.flops > alone.flops, "attention has all tokens of the row"
    items = saved_items(shape, "fused", 16)
    assert items["queries, keys, values"] == 1 + 2 * 16 / 64, "16 GPUs, 8 key heads: two copies"
    uneven = saved_items(MODEL_SHAPES["qwen2-7b"], "fused", 8)
    assert uneven["attention output"] == pytest.approx(8 * 4 / 28), "28 heads on 8 GPUs: 4 on the busiest"


def test_gpus_come_in_multiples_of_those_that_share_a_row() -> None:
    config = PlanMemoryConfig(model="qwen2-72b", tokens=65536, sequence_parallel_size=8, segments=[1])
    needs = [row.need.minimum_gpus(config.card) for row in plan_rows(config.subject(), config)]
    assert any(needs) and all(need is None or need % 8 == 0 for need in needs)
    assert any("65,536 tokens in a row that 8 GPUs share" in line for line in printed(config))
    with pytest.raises(ConfigError, match="gpus 12 is no multiple of sequence_parallel_size 8"):
        PlanMemoryConfig(model="qwen2-72b", sequence_parallel_size=8, gpus=12)
    with pytest.raises(ConfigError, match="what is measured is a model by itself"):
        PlanMemoryConfig(model="qwen2-72b", sequence_parallel_size=8, kernels="measured").subject()


def test_traffic_is_that_of_the_formulas() -> None:
    at = Scale(shape=MODEL_SHAPES["qwen2-72b"], gpus=64, sp=8, tokens=16384)
    heads, tokens = HeadPlan.build(64, 8, 8), TokenPlan.build(16384, 8)
    forward = comm_bytes(heads, tokens, rank=0, head_dim=128, element_size=2).total
    assert at.exchanged_bytes == 3 * 80 * forward
    assert at.gathered_bytes == at.shape.parameters * 8 * 63 / 64
    alone = Scale(shape=at.shape, gpus=64, sp=1, tokens=16384)
    assert alone.exchanged_bytes == 0 and alone.compute_seconds == pytest.approx(8 * at.compute_seconds)
    # 8 operations per weight and token, the head's 6, and attention over half the square.
    products = 8 * 80 * at.shape.layer_matmuls + 6 * at.shape.vocab * at.shape.hidden
    attention = 8 * 80 * 16384 * at.shape.q_width
    assert alone.compute_seconds * 400e12 == pytest.approx(16384 * (products + attention))


# launch files


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_shell_files_parse_and_can_be_run(name: str) -> None:
    path = CLUSTER / name
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.read_text().startswith("#!/usr/bin/env bash\n") and path.stat().st_mode & 0o111


def test_torchrun_gets_the_words_of_the_command_line(tmp_path: Path) -> None:
    """A torchrun that prints what it is given, and no GPU."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS" "$@"\n')
    fake.chmod(0o755)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    words = ["bash", str(CLUSTER / "torchrun.sh"), "sft", "my recipe.yaml"]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = [subprocess.check_output(words, env={**path, **more}, text=True) for more in ({}, {"RANKS": "2"})]
    end = "--max-restarts 3 -m nova_train sft my recipe.yaml\n"
    assert said == [f"1 --standalone --nproc-per-node {ranks} {end}" for ranks in (1, 2)]


def test_the_kubernetes_file_is_one_job_whose_pods_find_each_other() -> None:
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(given["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(given["GPUS"])
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["selector"] == {"job-name": name}
    endpoint = f"{name}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    assert f"--rdzv-endpoint {endpoint} " in container["args"][0]
    assert {each["name"] for each in pod["volumes"]} == {each["name"] for each in container["volumeMounts"]}
