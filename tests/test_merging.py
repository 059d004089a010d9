from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from nova_kernels.merging import linear, merge_state, model_stock, stream, task_arithmetic

SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": [1, 2, 1], "normalize": True},
    "task_arithmetic": {"weights": [0.5, 0.25, 0.5], "lam": 0.7},
    "model_stock": {},
}


def save_models(
    folder: Path,
    count: int = 3,
    dtype: torch.dtype = torch.float32,
    shard: str = "2KB",
    vocabulary: tuple[str, ...] = ("a", "b", "c"),
    **config: Any,
) -> tuple[list[Path], Path]:
    """`count` models that continued from a base, in shards, with a tokenizer."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, **config)).to(dtype)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    paths = []
    for number in range(count + 1):
        if number:
            model.load_state_dict({name: value + 0.1 * torch.randn_like(value) for name, value in start.items()})
            model.tie_weights()
        paths.append(folder / f"model-{number}")
        model.save_pretrained(paths[-1], max_shard_size=shard)
        tokenizer.save_pretrained(paths[-1])
    return paths[1:], paths[0]


def state_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def expected_state(method: str, sources: list[Path], base: Path, **options: Any) -> dict[str, Tensor]:
    states, start = [state_of(source) for source in sources], state_of(base)
    merged = {}
    for name, tensor in states[0].items():
        tensors = [state[name] for state in states]
        if method == "linear":
            merged[name] = linear(tensors, **options)
        elif method == "task_arithmetic":
            merged[name] = task_arithmetic(tensors, start[name], **options)
        else:
            merged[name] = model_stock(tensors, start[name], **options)
        merged[name] = merged[name].to(tensor.dtype)
    return merged


def base_for(method: str, base: Path) -> Path | None:
    return None if method == "linear" else base


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    return save_models(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("piece", [2**22, 40, 1], ids=["whole", "pieces", "row-by-row"])
@pytest.mark.parametrize("method", [*METHODS, "model_stock-filter-wise"])
def test_saved_models_are_merged_by_the_formula(
    method: str,
    piece: int,
    saved: tuple[list[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "MAX_PIECE", piece)
    sources, base = saved
    options = {"filter_wise": True} if method.endswith("filter-wise") else METHODS[method]
    method = method.removesuffix("-filter-wise")
    seen: list[tuple[int, int]] = []
    report = merge_state(
        method,  # type: ignore[arg-type]
        sources,
        tmp_path / "out",
        base=base_for(method, base),
        progress=lambda done, total: seen.append((done, total)),
        **options,
    )
    merged, expected = state_of(tmp_path / "out"), expected_state(method, sources, base, **options)
    assert merged.keys() == expected.keys() and len(merged) == report.num_tensors
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.num_bytes, report.num_bytes)
    if method == "model_stock":
        assert report.ratios.keys() == merged.keys() and all(0 <= t <= 1 for t in report.ratios.values())


@pytest.mark.parametrize("shard", ["2KB", "1GB"], ids=["shards", "one-file"])
def test_the_result_opens_and_keeps_its_companions(shard: str, tmp_path: Path) -> None:
    sources, _ = save_models(tmp_path, shard=shard)
    (sources[0] / "metrics.jsonl").write_text("{}")
    out = merge_state("linear", sources, tmp_path / "deep" / "out").out
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = state_of(out)
    assert torch.equal(model.state_dict()["model.norm.weight"], state["model.norm.weight"])
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(sources[0]).get_vocab()
    assert not (out / "metrics.jsonl").exists()
    assert (out / "model.safetensors.index.json").exists() == (shard == "2KB")


def test_a_model_merged_with_itself_is_itself(tmp_path: Path) -> None:
    (source,), base = save_models(tmp_path, count=1, dtype=torch.bfloat16)
    for method in METHODS:
        options = {"lam": 0.5} if method == "task_arithmetic" else {}
        out = tmp_path / method
        merge_state(method, [source, source], out, base=base_for(method, base), **options)  # type: ignore[arg-type]
        assert all(torch.equal(tensor, state_of(source)[name]) for name, tensor in state_of(out).items())


def test_dtypes(tmp_path: Path) -> None:
    low, _ = save_models(tmp_path / "low", count=2, dtype=torch.bfloat16)
    high, _ = save_models(tmp_path / "high", count=1)
    for number, (sources, dtype, expected) in enumerate(
        [(low, None, "bfloat16"), ([low[0], high[0]], None, "float32"), (low, torch.float16, "float16")]
    ):
        out = merge_state("linear", sources, tmp_path / str(number), dtype=dtype).out
        assert {str(tensor.dtype) for tensor in state_of(out).values()} == {f"torch.{expected}"}
        assert str(AutoModelForCausalLM.from_pretrained(out).dtype) == f"torch.{expected}"
    mixed = merge_state("model_stock", low, tmp_path / "mixed", base=high[0]).out
    assert {tensor.dtype for tensor in state_of(mixed).values()} == {torch.bfloat16}


def test_integer_tensors_are_copied_or_refused(tmp_path: Path) -> None:
    sources, _ = save_models(tmp_path, count=2, shard="1GB")
    for source in sources:
        state = state_of(source) | {"model.steps": torch.tensor(7), "model.scale": torch.tensor(0.5)}
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    merged = state_of(merge_state("linear", sources, tmp_path / "out").out)
    assert merged["model.steps"] == 7 and merged["model.scale"] == 0.5
    save_file(state | {"model.steps": torch.tensor(8)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.steps is not a floating-point tensor and differs"):
        merge_state("linear", sources, tmp_path / "again")


def add_head(source: Path, change: float) -> None:
    """Save the output embedding too, as some trainers do with tied models."""
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + change
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_copy_that_only_one_model_saved_is_left_out(tmp_path: Path) -> None:
    (one, two), _ = save_models(tmp_path, count=2, shard="1GB", tie_word_embeddings=True)
    add_head(one, change=0.0)
    for number, sources in enumerate([[one, two], [two, one]]):
        report = merge_state("linear", sources, tmp_path / f"out-{number}")
        assert report.left_out == ("lm_head.weight",)
        opened = AutoModelForCausalLM.from_pretrained(report.out)
        assert opened.lm_head.weight is opened.model.embed_tokens.weight
        assert "lm_head.weight" not in state_of(report.out)
    add_head(one, change=1.0)
    with pytest.raises(ValueError, match=r"lacks 1 tensors that .*\['lm_head.weight'\]"):
        merge_state("linear", [one, two], tmp_path / "no")


def test_provenance_says_how_to_do_it_again(tmp_path: Path) -> None:
    sources, base = save_models(tmp_path, count=2)
    out = merge_state("task_arithmetic", sources, tmp_path / "out", base=base, weights=[3, 1], normalize=True).out
    record = json.loads((out / "merge.json").read_text())
    assert (record["method"], record["weights"], record["lam"]) == ("task_arithmetic", [0.75, 0.25], 1.0)
    assert [entry["path"] for entry in record["sources"]] == [str(path) for path in sources]
    assert record["base"]["bytes"] == sum(tensor.nbytes for tensor in state_of(base).values())
    again = merge_state("task_arithmetic", sources, tmp_path / "again", base=base, weights=[3, 1], normalize=True).out
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert all((out / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_a_failed_merge_leaves_nothing(tmp_path: Path) -> None:
    sources, _ = save_models(tmp_path, count=2)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt):
        merge_state("linear", sources, tmp_path / "out", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-0", "model-1", "model-2"]


def test_a_folder_in_use_keeps_what_is_not_a_model(tmp_path: Path) -> None:
    sources, _ = save_models(tmp_path, count=2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "resolved_config.yaml").write_text("stage: merge")
    (out / "model-00009-of-00009.safetensors").write_text("left by an interrupted merge")
    merge_state("linear", sources, out)
    first = state_of(out)
    assert (out / "resolved_config.yaml").exists() and not (out / "model-00009-of-00009.safetensors").exists()
    with pytest.raises(FileExistsError, match=r"out holds a model already; remove it or pass overwrite=True"):
        merge_state("linear", sources, out)
    merge_state("linear", sources, out, weights=[1, 0], overwrite=True)
    assert not torch.equal(state_of(out)["lm_head.weight"], first["lm_head.weight"])
    assert (out / "resolved_config.yaml").exists()


def test_an_interrupted_replacement_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, _ = save_models(tmp_path, count=2)
    out = merge_state("linear", sources, tmp_path / "out").out
    (out / "notes.txt").write_text("mine")
    replace = Path.replace

    def stop(path: Path, target: Path) -> Path:
        if path.name == "model.safetensors.index.json":
            raise KeyboardInterrupt("stop")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_state("linear", sources, out, overwrite=True)
    assert (out / "notes.txt").exists() and not (out / "config.json").exists()
    merge_state("linear", sources, out)
    AutoModelForCausalLM.from_pretrained(out)


def break_config(source: Path, key: str, value: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))


def cut_shard(source: Path) -> None:
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-5])


def rename_token(source: Path) -> None:
    path = source / "tokenizer.json"
    path.write_text(path.read_text().replace('"b": 1', '"x": 1').replace('"b":1', '"x":1'))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        pytest.param(lambda s: (s / "config.json").unlink(), FileNotFoundError, r"has no config.json", id="config"),
        pytest.param(
            lambda s: sorted(s.glob("*.safetensors"))[0].unlink(), FileNotFoundError, r"lacks the shard", id="shard"
        ),
        pytest.param(
            lambda s: (s / "model.safetensors.index.json").unlink(), FileNotFoundError, r"has neither", id="index"
        ),
        pytest.param(cut_shard, ValueError, r"should have \d+ bytes, it has \d+; was saving interrupted", id="cut"),
        pytest.param(
            lambda s: break_config(s, "num_attention_heads", 4),
            ValueError,
            r"num_attention_heads is 2 .* and 4",
            id="heads",
        ),
        pytest.param(rename_token, ValueError, r"token 1 is 'b' in .* and 'x' in .*one tokenizer", id="tokenizer"),
    ],
)
def test_models_that_cannot_be_merged_are_refused_before_anything_is_written(
    damage: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    sources, _ = save_models(tmp_path, count=2)
    damage(sources[1])
    with pytest.raises(error, match=message):
        merge_state("linear", sources, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_other_names_shapes_and_vocabularies_are_refused(tmp_path: Path) -> None:
    (one,), base = save_models(tmp_path / "one", count=1)
    (deeper,), _ = save_models(tmp_path / "deeper", count=1)
    state = state_of(deeper)
    for file in deeper.glob("*.safetensors*"):
        file.unlink()
    save_file(state | {"model.extra": torch.ones(2)}, deeper / "model.safetensors")
    with pytest.raises(ValueError, match=r"one.model-1 lacks 1 tensors that .*deeper.model-1 has: \['model.extra'\]"):
        merge_state("linear", [one, deeper], tmp_path / "out")
    save_file(state | {"lm_head.weight": torch.ones(24, 8)}, deeper / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight is \[23, 8\] in .* and \[24, 8\] in .*; resize"):
        merge_state("linear", [one, deeper], tmp_path / "out")
    (more,), _ = save_models(tmp_path / "more", count=1, vocabulary=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match=r"only one of the tokenizers of .* has \['d'\]"):
        merge_state("linear", [one, more], tmp_path / "out")
    merge_state("task_arithmetic", [more], tmp_path / "out", base=base)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        pytest.param("average", {}, r"method must be .*, got 'average'", id="method"),
        pytest.param("linear", {"base": "x"}, r"linear has no base, got x; list it among the sources", id="base"),
        pytest.param("task_arithmetic", {}, r"task_arithmetic needs base", id="no-base"),
        pytest.param("linear", {"lam": 0.5}, r"only task_arithmetic has lam, got lam=0.5 for linear", id="lam"),
        pytest.param("task_arithmetic", {"base": "x", "lam": math.inf}, r"lam must be finite, got inf", id="inf"),
        pytest.param("linear", {"filter_wise": True}, r"only model_stock has filter_wise", id="filter-wise"),
        pytest.param("model_stock", {"base": "x", "weights": [1, 1]}, r"takes no weights", id="stock-weights"),
        pytest.param("model_stock", {"base": "x", "sources": ["a"]}, r"at least 2 sources, got \['a'\]", id="one"),
        pytest.param("linear", {"sources": "abc"}, r"needs a list of at least 1 sources, got abc", id="string"),
        pytest.param("linear", {"out": "a"}, r"a is one of the models to merge", id="out"),
    ],
)
def test_options_that_a_method_lacks_are_refused(method: Any, options: dict, message: str, tmp_path: Path) -> None:
    arguments = {"sources": ["a", "b"], "out": tmp_path / "out"} | options
    with pytest.raises(ValueError, match=message):
        merge_state(method, **arguments)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder nowhere; sources are folders of saved models"):
        merge_state("linear", ["nowhere"], tmp_path / "out")
