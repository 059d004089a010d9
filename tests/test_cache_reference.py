"""cache-reference, and GRPO that reads what it wrote: the same training without the reference's forward."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from nova_kernels.topk_kl import TopKReferenceCache
from nova_train import loop, reference_topk
from nova_train.__main__ import main
from nova_train.chat import Chat
from nova_train.config import ConfigError
from nova_train.loader import PackedLoader
from nova_train.metrics import read_metrics
from nova_train.model import load_causal_lm, load_tokenizer
from nova_train.stages import cache_reference, grpo
from nova_train.stages.cache_reference import CacheReferenceConfig
from nova_train.stages.pipeline import plan_pipeline, run_pipeline
from nova_train.state import StateError, finished_fingerprint

REWARDS = (
    "def length(prompts, completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache_reference")
    tiny.save_model(folder / "model")
    tiny.save_model(folder / "other", seed=5)
    tiny.prompt_file(folder / "prompts.jsonl")
    tiny.sft_file(folder / "sft.jsonl")
    (folder / "rewards.py").write_text(REWARDS)
    cache_reference.run(cache_config(folder, folder / "cache"))
    return folder


def cache_config(folder: Path, output: Path, **options: Any) -> CacheReferenceConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": [str(folder / "sft.jsonl")],
        "max_length": 128,
        "kl_top_k": 32,
        "disable_progress": True,
    }
    return CacheReferenceConfig(**{**defaults, **options})


def grpo_config(folder: Path, output: Path, **options: Any) -> grpo.GRPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": [str(folder / "prompts.jsonl")],
        "reward_funcs": [f"{folder / 'rewards.py'}:length"],
        "max_length": 128,
        "max_completion_length": 6,
        "kl_top_k": 32,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "num_train_epochs": 9,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "ptx_dataset_name": [str(folder / "sft.jsonl")],
        "ptx_kl_weight": 0.5,
        "disable_progress": True,
    }
    return grpo.GRPOConfig(**{**defaults, **options})


def samples_of(config: CacheReferenceConfig) -> list[dict[str, np.ndarray]]:
    chat = Chat(load_tokenizer(config.model_name_or_path))
    return reference_topk.supervised_samples(config.dataset_name, config, chat)


def test_rows_of_any_pack_are_those_of_a_forward(folder: Path) -> None:
    config = cache_config(folder, folder / "cache")
    samples, cache = samples_of(config), TopKReferenceCache.open(folder / "cache")
    cache.verify()
    assert cache.header.num_samples == len(samples) == 24
    model = load_causal_lm(folder / "model", config, frozen=True)
    loader = PackedLoader(
        reference_topk.with_cache_rows(samples, cache),
        capacity=128, packs_per_step=2, packs_per_micro_batch=2, epochs=1, seed=3,
    )  # fmt: skip
    seen = 0
    for _ in range(len(loader)):
        for packed in loader.next_step():
            found = reference_topk.cached_top_k(cache, packed)
            expected = reference_topk.top_k_of(model, packed, 32, 1.0)
            assert torch.equal(found.ids, expected.ids)
            torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.lse, expected.lse, rtol=0, atol=1e-5)
            seen += len(found.lse)
    assert seen == len(cache) == cache.header.num_rows


def test_truncated_samples_have_the_rows_that_are_left(folder: Path, tmp_path: Path) -> None:
    longest = max(len(sample["input_ids"]) for sample in samples_of(cache_config(folder, tmp_path)))
    config = cache_config(folder, tmp_path, max_length=longest - 2, overlong="truncate")
    whole, cut = samples_of(replace(config, overlong="drop")), samples_of(config)
    assert len(whole) < len(cut)
    cache = TopKReferenceCache.open(cache_reference.run(config))
    rows = reference_topk.rows_of_samples(cut)
    assert torch.equal(cache.offsets, torch.from_numpy(np.cumsum([0, *rows])))
    numbered = reference_topk.with_cache_rows(cut, cache)
    for sample in numbered:
        assert np.array_equal(sample[reference_topk.ROWS] >= 0, sample["labels"] != -100)
    assert np.concatenate([s[reference_topk.ROWS][s[reference_topk.ROWS] >= 0] for s in numbered]).tolist() == list(
        range(len(cache))
    )
    with pytest.raises(ConfigError, match="num_samples is 24 in the cache|data is"):
        c = grpo_config(
            folder, tmp_path / "a", ptx_reference_cache=str(tmp_path), max_length=longest - 2, overlong="drop"
        )
        grpo.run(c)


def test_training_is_the_same_with_and_without_the_cache(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plain = read_metrics(grpo.run(grpo_config(folder, tmp_path / "plain")))
    cached = read_metrics(grpo.run(grpo_config(folder, tmp_path / "cached", ptx_reference_cache=str(folder / "cache"))))
    assert len(plain) == len(cached) == 3
    assert "of 24 samples, values in float32" in caplog.text
    for a, b in zip(plain, cached, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert 0 <= cached[0]["ptx/kl"] < 1e-9, "an unchanged model against its cached self"
    assert cached[-1]["ptx/kl"] > 1e-6
    for name in ("policy_mass", "ref_mass", "ptx/ref_mass"):
        assert 0 < cached[-1][name] <= 1 + 1e-6, name
    assert cached[0]["policy_mass"] == pytest.approx(cached[0]["ref_mass"], abs=1e-6)


def test_without_a_kl_on_rollouts_the_reference_is_never_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(path: str, config: Any, *, frozen: bool = False, mesh: Any = None) -> Any:
        loaded.append(frozen)
        return load_causal_lm(path, config, frozen=frozen, mesh=mesh)

    monkeypatch.setattr(grpo, "load_causal_lm", load)
    options = {"beta": 0.0, "max_steps": 2, "num_iterations": 2}
    plain = read_metrics(grpo.run(grpo_config(folder, tmp_path / "plain", **options)))
    assert loaded == [False, True]
    cache = str(folder / "cache")
    cached = read_metrics(grpo.run(grpo_config(folder, tmp_path / "cached", ptx_reference_cache=cache, **options)))
    assert loaded == [False, True, False]
    assert {"kl", "ref_mass", "policy_mass"} == plain[-1].keys() - cached[-1].keys()
    for name, value in cached[-1].items():
        assert plain[-1][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_an_interrupted_run_continues_byte_for_byte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    def config(name: str) -> grpo.GRPOConfig:
        cache = str(folder / "cache")
        return grpo_config(
            folder, tmp_path / name, ptx_reference_cache=cache, beta=beta, save_steps=1, num_iterations=2
        )

    step = loop.train_step

    def deadly(run: Any) -> int:
        if run.step == 1:
            raise RuntimeError("killed")
        return step(run)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(loop, "train_step", deadly)
        grpo.run(config("killed"))
    killed, whole = grpo.run(config("killed")), grpo.run(config("whole"))
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_cache_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    cache, few = str(folder / "cache"), tiny.sft_file(tmp_path / "few.jsonl", 23)
    changed = tmp_path / "changed.jsonl"
    lines = (folder / "sft.jsonl").read_text().splitlines()
    changed.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    retold = tiny.save_model(tmp_path / "retold")  # the same model under another template that says the same
    tokenizer = load_tokenizer(retold)
    tokenizer.chat_template += "{# new #}"
    tokenizer.save_pretrained(retold)
    for number, (options, message) in enumerate(
        (
            ({"kl_top_k": 16}, "k is 32 in the cache, but 16 here"),
            ({"temperature": 0.5}, "temperature is 1.0 in the cache, but 0.5 here"),
            ({"model_name_or_path": str(folder / "other")}, "model is '[0-9a-f]{64} in float32' in the cache"),
            ({"bf16": True}, "but '[0-9a-f]{64} in float32 under bfloat16 autocast' here"),
            (
                {"ptx_dataset_name": [str(changed)]},
                "data is '[0-9a-f]{64}' in the cache, .*.nova-train cache-reference writes it",
            ),
            ({"model_name_or_path": str(retold)}, "tokenizer is '[0-9a-f]{64}' in the cache"),
            ({"ptx_dataset_name": [str(few)]}, "num_samples is 24 in the cache, but 23 here"),
            ({"ptx_reference_cache": str(tmp_path)}, "ptx_reference_cache: .* no finished cache"),
        )
    ):
        config = grpo_config(folder, tmp_path / str(number), **{"ptx_reference_cache": cache, **options})
        with pytest.raises(ConfigError, match=message):
            grpo.run(config)
        assert not (tmp_path / str(number) / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="ptx_kl_weight is 0: nothing would read it"):
        grpo_config(folder, tmp_path / "z", ptx_reference_cache=cache, ptx_kl_weight=0.0)


def test_fingerprints_change_with_what_they_name(folder: Path, tmp_path: Path) -> None:
    model, same = str(folder / "model"), tiny.save_model(tmp_path / "same")
    first = reference_topk.model_fingerprint(model)
    assert reference_topk.model_fingerprint(str(same)) == first
    assert reference_topk.model_fingerprint(str(folder / "other")) != first
    weights = same / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert reference_topk.model_fingerprint(str(same)) != first
    weights.unlink()
    with pytest.raises(ConfigError, match=r"no \*.safetensors or pytorch_model\*.bin in"):
        reference_topk.model_fingerprint(str(same))
    tokenizer = load_tokenizer(model)
    before = reference_topk.tokenizer_fingerprint(tokenizer)
    assert reference_topk.tokenizer_fingerprint(load_tokenizer(folder / "other")) == before
    tokenizer.chat_template += " "
    changed = reference_topk.tokenizer_fingerprint(tokenizer)
    assert changed != before
    tokenizer.add_tokens(["<|new|>"])
    assert reference_topk.tokenizer_fingerprint(tokenizer) not in (before, changed)


def test_shards_of_several_processes_make_one_cache(folder: Path, tmp_path: Path) -> None:
    def shard(number: int) -> Path:
        return cache_reference.run(cache_config(folder, tmp_path, num_shards=3, shard=number))

    shard(2)
    out = shard(0)
    with pytest.raises(ValueError, match="2 shards wait for the rest"):
        TopKReferenceCache.open(out)
    assert finished_fingerprint(out) is None
    shard(1)
    assert finished_fingerprint(out) is not None
    assert len(list(out.glob("shard-*.bin"))) == 3
    one, many = TopKReferenceCache.open(folder / "cache"), TopKReferenceCache.open(out)
    assert one.header == many.header
    assert torch.equal(one[:].ids, many[:].ids) and torch.equal(one[:].values, many[:].values)


def test_an_interrupted_cache_keeps_its_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cache_config(folder, tmp_path, num_shards=4, kl_top_k=16)
    calls = []

    def forward(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return reference_topk.top_k_of(*arguments)

    monkeypatch.setattr(cache_reference, "top_k_of", forward)
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        cache_reference.run(config)
    kept = len(list(tmp_path.glob("shard-*.json")))
    assert 0 < kept < 4 and not list(tmp_path.glob("*.partial"))
    stop, first = 0, len(calls)
    cache_reference.run(config)
    again = len(calls) - first
    cache_reference.run(config)
    assert len(calls) - first == again, "a finished cache is left as it is"
    fresh = tmp_path / "fresh"
    cache_reference.run(replace(config, output_dir=str(fresh)))
    assert again < len(calls) - first - again, "complete shards were not written again"
    for file in fresh.glob("shard-*.bin"):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
    with pytest.raises(StateError, match="holds another run .*kl_top_k: 16 there, 8 here"):
        cache_reference.run(replace(config, kl_top_k=8))


def test_shards_are_ranges_of_about_equal_rows(folder: Path) -> None:
    header = TopKReferenceCache.open(folder / "cache").header
    rows = np.array([1, 9, 1, 1, 1, 7])
    for count in (1, 2, 3, 6, 50):
        shards = cache_reference.plan_shards(rows, header, count)
        assert [sample for shard in shards for sample in shard] == list(range(6)) and len(shards) <= min(count, 6)
    assert cache_reference.plan_shards(rows, header, 2) == [range(0, 1), range(1, 6)]
    huge = replace(header, num_rows=10**9)
    assert len(cache_reference.plan_shards(np.full(10**4, 10**5), huge, None)) == -(-huge.num_bytes // 2**30)


def test_a_dry_run_tells_rows_bytes_and_time(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, cache = tmp_path / "new" / "cache", TopKReferenceCache.open(folder / "cache")
    words = ["--output_dir", str(out), "--model_name_or_path", str(folder / "model"), "--max_length", "128"]
    words += ["--dataset_name", str(folder / "sft.jsonl"), "--kl_top_k", "32"]
    assert main(["cache-reference", *words, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert f"stage: cache-reference\noutput_dir: {out}\n" in text
    assert f"rows           {len(cache):,}, {32 * 8 + 4} bytes each" in text
    assert "in 1 shards" in text and "time, about" in text and "trained share of tokens" in text
    assert not out.parent.exists()


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"kl_top_k": 1}, "kl_top_k must be at least 2, got 1"),
        ({"kl_top_k": 10**6}, r"kl_top_k must lie in \[2, \d+\] .* got 1000000"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"num_shards": 0}, "num_shards must be at least 1, got 0"),
        ({"shard": 0}, "shard 0 needs num_shards above it, got num_shards None"),
        ({"shard": 2, "num_shards": 2}, "shard 2 needs num_shards above it, got num_shards 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            cache_config(folder, tmp_path, **options)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(cache_reference.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ConfigError, match="the disk has 0.0 free; take another disk, a smaller kl_top_k or cache_dtype"
    ):
        cache_reference.run(cache_config(folder, tmp_path))


def test_a_pipeline_wires_the_cache_between_its_stages(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    stages: list[dict[str, Any]] = [
        {"name": "merged", "run": "merge", "models": [str(folder / "model")]},
        {
            "name": "reference", "run": "cache-reference", "inputs": {"model_name_or_path": "merged"},
            "dataset_name": str(folder / "sft.jsonl"), "max_length": 128, "kl_top_k": 32, "cache_dtype": "float16",
        },
        {
            "name": "policy", "run": "grpo",
            "inputs": {"model_name_or_path": "merged", "ptx_reference_cache": "reference"},
            "dataset_name": str(folder / "prompts.jsonl"), "reward_funcs": [f"{folder / 'rewards.py'}:length"],
            "max_length": 128, "max_completion_length": 4, "kl_top_k": 32, "max_steps": 1, "logging_steps": 1,
            "gradient_accumulation_steps": 2, "ptx_dataset_name": str(folder / "sft.jsonl"), "ptx_kl_weight": 0.1,
        },
    ]  # fmt: skip
    recipe.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "disable_progress": True, "stages": stages}))
    run_pipeline(plan_pipeline(recipe, {}))
    line = read_metrics(tmp_path / "out" / "policy")[0]
    assert 0 <= line["ptx/kl"] < 1e-5, "rounded to float16 on the way"
    stages[2]["kl_top_k"] = 10**6  # the model exists by now: refused while the recipe is read
    recipe.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "stages": stages}))
    with pytest.raises(ConfigError, match=r"stage 3 \(policy\): kl_top_k must lie in .* got 1000000"):
        plan_pipeline(recipe, {})
