"""cache-reference in a folder that has something in it: other keys, lost files, a crash, and its way out."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig

import tiny
from nova_kernels.topk_kl import TopKReferenceCache
from nova_train import reference_topk
from nova_train.__main__ import main
from nova_train.config import ConfigError
from nova_train.stages import cache_reference, dry_run
from nova_train.stages.cache_reference import CacheReferenceConfig
from nova_train.stages.pipeline import plan_pipeline, run_pipeline
from nova_train.state import StateError, finished_fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    tiny.save_model(folder / "model")
    tiny.sft_file(folder / "sft.jsonl", 6)
    return folder


def config_of(folder: Path, output: Path, **options: Any) -> CacheReferenceConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": [str(folder / "sft.jsonl")],
        "max_length": 128,
        "kl_top_k": 8,
        "num_shards": 2,
        "disable_progress": True,
    }
    return CacheReferenceConfig(**{**defaults, **options})


def test_other_keys_never_mix_with_shards_that_wait(folder: Path, tmp_path: Path) -> None:
    first = config_of(folder, tmp_path, shard=1, temperature=0.5)
    cache_reference.run(first)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(StateError, match="holds another run .*temperature: 0.5 there, 1.0 here"):
        cache_reference.run(config_of(folder, tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    out = cache_reference.run(replace(first, shard=0))
    assert TopKReferenceCache.open(out).header.temperature == 0.5


def test_a_pipeline_does_not_take_the_shards_of_other_keys(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\nstages:\n- {{name: r, run: cache-reference, model_name_or_path: {folder / 'model'}, "
        f"dataset_name: {folder / 'sft.jsonl'}, max_length: 128, kl_top_k: 8, num_shards: 2, shard: 0}}\n"
    )
    run_pipeline(plan_pipeline(recipe, {}))
    assert finished_fingerprint(tmp_path / "r") is None
    recipe.write_text(recipe.read_text().replace("kl_top_k: 8", "kl_top_k: 9"))
    with pytest.raises(StateError, match="holds another run of stage 'r' .kl_top_k: 8 there, 9 here"):
        run_pipeline(plan_pipeline(recipe, {}))


def test_a_lost_file_is_written_again_before_the_end(folder: Path, tmp_path: Path) -> None:
    cache_reference.run(config_of(folder, tmp_path, shard=0))
    (tmp_path / "shard-000000000000.bin").unlink()
    cache_reference.run(config_of(folder, tmp_path))
    TopKReferenceCache.open(tmp_path).verify()


def test_a_finished_cache_that_does_not_fit_says_what_to_remove(folder: Path, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    out = tmp_path / "out"
    config = config_of(folder, out, model_name_or_path=str(model))

    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=f"output_dir: .*{message}.*; remove {out} and run again"):
            cache_reference.run(config)

    cache_reference.run(config)
    shard = out / "shard-000000000000.bin"
    whole, header = shard.read_bytes(), (out / "header.json").read_text()
    cache_reference.run(config)
    shard.unlink()
    refused("shard-000000000000.bin is missing")
    (out / "finished.json").unlink()  # a crash between the publishing and the end
    refused("shard-000000000000.bin is missing")
    shard.write_bytes(whole)
    with pytest.raises(StateError, match="kl_top_k: 8 there, 7 here"):
        cache_reference.run(replace(config, kl_top_k=7))
    cache_reference.run(config)
    assert finished_fingerprint(out) is not None
    (out / "header.json").unlink()
    refused("no finished cache")
    (out / "header.json").write_text(header)
    tiny.save_model(model, seed=5)
    refused("model is '[0-9a-f]{64} in float32' in the cache")


def test_a_damaged_mark_is_a_config_error(folder: Path, tmp_path: Path) -> None:
    cache_reference.run(config_of(folder, tmp_path, shard=0))
    (tmp_path / "shard-000000000000.json").write_text("{")
    with pytest.raises(ConfigError, match=f"damaged header, no JSON.*; remove {tmp_path} and run again"):
        cache_reference.run(config_of(folder, tmp_path))


def test_verify_reads_everything(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(folder, tmp_path)
    cache_reference.run(config)
    assert "verified" not in caplog.text
    cache_reference.run(replace(config, verify=True))
    assert "rows are as they were written" in caplog.text
    shard = tmp_path / "shard-000000000000.bin"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    cache_reference.run(config)
    with pytest.raises(ConfigError, match=f"its bytes changed since it was written.*; remove {tmp_path} and run again"):
        cache_reference.run(replace(config, verify=True))


def test_the_model_is_loaded_only_where_a_shard_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, tmp_path)
    for shard in (0, 1):
        cache_reference.run(replace(config, shard=shard))
    for name in ("header.json", "finished.json"):
        (tmp_path / name).unlink()
    monkeypatch.delattr(cache_reference, "load_causal_lm")
    cache_reference.run(replace(config, shard=0))
    assert finished_fingerprint(tmp_path) is not None


def test_the_same_command_started_twice(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, started = config_of(folder, tmp_path), []

    def forward(*arguments: Any) -> Any:
        if not started:
            started.append(1)
            cache_reference.run(config)  # the other one, from beginning to end
        return reference_topk.top_k_of(*arguments)

    monkeypatch.setattr(cache_reference, "top_k_of", forward)
    cache_reference.run(config)
    assert not list(tmp_path.glob("*.partial"))
    TopKReferenceCache.open(tmp_path).verify()


@pytest.mark.parametrize("shards", [1, 2])
def test_another_cache_that_appears_meanwhile_is_a_config_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    other = cache_reference.run(config_of(folder, tmp_path / "other", temperature=0.5))

    def forward(*arguments: Any) -> Any:
        (tmp_path / "out" / "header.json").write_bytes((other / "header.json").read_bytes())
        return top_k_of(*arguments)

    top_k_of = reference_topk.top_k_of
    monkeypatch.setattr(cache_reference, "top_k_of", forward)
    with pytest.raises(ConfigError, match="output_dir: .* holds another finished cache; remove it or choose another"):
        cache_reference.run(config_of(folder, tmp_path / "out", num_shards=shards))


def test_the_time_is_of_the_models_own_arithmetic(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, linear = [], dry_run.nn.functional.linear

    def watched(rows: Any, weight: Any) -> Any:
        seen.append(linear(rows, weight))
        return seen[-1]

    monkeypatch.setattr(dry_run.nn.functional, "linear", watched)
    for options, dtype in (({}, "float32"), ({"bf16": True}, "bfloat16"), ({"dtype": "float64"}, "float64")):
        assert dry_run._linear_rate(config_of(folder, tmp_path, **options)) > 0
        assert str(seen[-1].dtype) == f"torch.{dtype}" and len(seen) >= 2
        seen.clear()
    assert "time, about" in dry_run.cache_text(config_of(folder, tmp_path))
    moe = tiny.save_model(tmp_path / "moe")
    MixtralConfig(
        vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    ).save_pretrained(moe)  # fmt: skip
    assert "time" not in dry_run.cache_text(config_of(folder, tmp_path, model_name_or_path=str(moe)))


def test_verify_is_a_key_of_the_command(folder: Path, tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--model_name_or_path", str(folder / "model"), "--max_length", "128"]
    words += ["--dataset_name", str(folder / "sft.jsonl"), "--kl_top_k", "8"]
    for verify in ([], ["--verify", "true"]):
        assert main(["cache-reference", *words, *verify]) == 0
    file = tmp_path / "shard-000000000000.bin"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert main(["cache-reference", *words, "--verify", "true"]) == 2
