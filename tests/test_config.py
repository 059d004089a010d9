from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_train.config import (
    ConfigError,
    TrainConfig,
    build_config,
    config_to_dict,
    fingerprint,
    identity,
    load_config,
    parse_flags,
    write_config,
)
from nova_train.values import parse_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    output_dir: str
    rate: float = 0.5
    steps: int | None = None
    loud: bool = False
    mode: Literal["fast", "slow"] = "fast"
    names: list[str] = field(default_factory=list)
    pair: tuple[float, ...] = ()
    table: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must be at least 0, got {self.rate}")


TRAIN = {"output_dir": "out", "dataset_name": "a.jsonl", "max_length": 64, "learning_rate": 1e-3}


def toy(**values: object) -> ToyConfig:
    return build_config(ToyConfig, {"output_dir": "out", **values}, where="toy")


def train(**values: object) -> TrainConfig:
    return build_config(TrainConfig, {**TRAIN, **values}, where="train")


@pytest.mark.parametrize(
    ("key", "given_value", "expected"),
    [
        ("rate", "1e-5", 1e-5),
        ("rate", 2, 2.0),
        ("steps", "null", None),
        ("steps", None, None),
        ("steps", "1e3", 1000),
        ("steps", 7.0, 7),
        ("loud", "True", True),
        ("loud", False, False),
        ("mode", "slow", "slow"),
        ("names", "one", ["one"]),
        ("names", ["1e-5", "null"], ["1e-5", "null"]),
        ("names", "[a, b]", ["a", "b"]),
        ("pair", ["1", 2], (1.0, 2.0)),
        ("table", "{a: 1}", {"a": 1}),
        ("output_dir", "007", "007"),
    ],
)
def test_values_are_read_by_their_type_hint(key: str, given_value: object, expected: object) -> None:
    value = getattr(toy(**{key: given_value}), key)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rate", "fast", r"toy: rate: expected a finite number, got 'fast' \(str\)"),
        ("rate", True, "rate: expected a finite number, got True"),
        ("rate", "nan", "rate: expected a finite number"),
        ("rate", -1, "toy: rate must be at least 0, got -1.0"),
        ("steps", 1.5, "steps: expected a whole number, got 1.5"),
        ("steps", [1], r"steps: expected a whole number, got \[1\]"),
        ("loud", "yes", "loud: expected true or false, got 'yes'"),
        ("loud", 1, r"loud: expected true or false, got 1 \(int\)"),
        ("mode", "slwo", "mode: expected fast or slow, got 'slwo'"),
        ("names", [1], r"names\[0\]: expected text .*, got 1"),
        ("names", None, "names: expected a list, got None"),
        ("names", {"a": 1}, "names: expected a list"),
        ("names", "[a", "names: not valid YAML"),
        ("table", {"a": "b"}, r"table\.a: expected a whole number, got 'b'"),
        ("table", 3, "table: expected a mapping with text as keys, got 3"),
        ("table", {1: 1}, "table: expected a mapping with text as keys"),
        ("output_dir", 7, "output_dir: expected text .*, got 7"),
        ("output_dir", None, "output_dir: expected text"),
    ],
)
def test_a_wrong_value_is_refused_by_name(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy(**{key: value})


def test_an_unknown_key_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="unknown key 'learning_rte'; did you mean 'learning_rate'"):
        train(learning_rte=1.0)
    with pytest.raises(ConfigError, match="unknown key 'zzz'; expected one of output_dir, rate"):
        toy(zzz=1)


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match="train needs output_dir, dataset_name, max_length, learning_rate"):
        build_config(TrainConfig, {}, where="x")


def test_flags_win_over_the_recipe(tmp_path) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("output_dir: here\nrate: 1e-5\nnames: [a]\n", encoding="utf-8")
    config = load_config(ToyConfig, recipe, {"names": ["b", "c"], "steps": "3"})
    assert config == ToyConfig(output_dir="here", rate=1e-5, names=["b", "c"], steps=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: 1\nrate: 2\n", "the key 'rate' stands twice"),
        ("table: {a: 1, a: 2}\n", "the key 'a' stands twice"),
        ("rate: [1", "not valid YAML"),
        ("- 1\n", "expected a mapping of keys to values, got list"),
        ("stage: sft\n", "a recipe for 'sft', not for 'toy'"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path, text: str, message: str) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        load_config(ToyConfig, recipe, {"output_dir": "out"})
    assert "bad.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="none.yaml: expected a readable YAML recipe: No such file"):
        load_config(ToyConfig, tmp_path / "none.yaml", {})


def test_an_empty_recipe_has_no_keys(tmp_path) -> None:
    recipe = tmp_path / "empty.yaml"
    recipe.write_text("", encoding="utf-8")
    assert load_config(ToyConfig, recipe, {"output_dir": "out"}) == ToyConfig(output_dir="out")


def test_flags_are_parsed_as_text() -> None:
    words = "run.yaml --learning-rate 1e-5 --dataset_name a b --bf16 --seed=3 --low -1 --empty="
    assert parse_flags(words.split()) == (
        "run.yaml",
        {"learning_rate": "1e-5", "dataset_name": ["a", "b"], "bf16": True, "seed": "3", "low": "-1", "empty": ""},
    )
    assert parse_flags([]) == (None, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-x 1", "expected --key value, got '-x'"),
        ("--a 1 --a 2", "--a is given twice"),
        ("one.yaml two.yaml", "expected --key before the value 'two.yaml'"),
        ("--a=1 2", "expected --key before the value '2'"),
    ],
)
def test_bad_flags_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_flags(words.split())


def test_the_global_batch_sets_the_accumulation() -> None:
    config = train(global_batch_size=32, per_device_train_batch_size=4)
    assert config.gradient_accumulation_steps == 8
    assert train(global_batch_size=6, per_device_train_batch_size=2).gradient_accumulation_steps == 3
    with pytest.raises(ConfigError, match="global_batch_size 6 is not a multiple of per_device_train_batch_size 4"):
        train(global_batch_size=6, per_device_train_batch_size=4)
    with pytest.raises(ConfigError, match="global_batch_size 32 is not .* 4 x gradient_accumulation_steps 2 = 8"):
        train(global_batch_size=32, per_device_train_batch_size=4, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_length", 0, "max_length must be positive, got 0"),
        ("max_steps", -1, "max_steps must be positive, got -1"),
        ("warmup_steps", -1, "warmup_steps must be at least 0, got -1"),
        ("adam_beta2", 1.0, r"adam_beta2 must lie in \[0, 1\), got 1.0"),
        ("min_lr_rate", 1.5, r"min_lr_rate must lie in \[0, 1\], got 1.5"),
        ("optim", "muon", "muon_learning_rate goes with optim: muon"),
        ("muon_learning_rate", 0.02, "muon_learning_rate goes with optim: muon"),
        ("report_to", ["wandb", "mlflow"], "report_to: .* got 'mlflow'"),
        ("dataset_name", [], "dataset_name must name at least one data set"),
        ("output_dir", "", "output_dir must name a folder"),
    ],
)
def test_impossible_training_values_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(**{key: value})


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        ("auto", "auto"),
        ("4", 4),
        (4, 4),
        ("null", None),
        (None, None),
        ([3, 3, 2], [3, 3, 2]),
        (["3", "3", "2"], [3, 3, 2]),
        ("3 3 2", [3, 3, 2]),
        ("[3, 3, 2]", [3, 3, 2]),
        ([8], [8]),
    ],
)
def test_segments_are_a_word_a_number_or_a_list(given_value: object, expected: object, tmp_path) -> None:
    config = train(segments=given_value)
    assert config.segments == expected and type(config.segments) is type(expected)
    write_config(config, tmp_path / "resolved.yaml")
    assert load_config(TrainConfig, tmp_path / "resolved.yaml", {}) == config


def test_segments_from_flags() -> None:
    recipe, flags = parse_flags(["--segments", "3", "3", "2", "--memory_budget=60GiB"])
    assert recipe is None and flags == {"segments": ["3", "3", "2"], "memory_budget": "60GiB"}
    assert train(segments=flags["segments"]).segments == [3, 3, 2]
    assert train(segments="auto", memory_budget="64e9").memory_budget == 64_000_000_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segments": "atuo"}, "segments: expected auto, a whole number, a list of whole numbers or null, got 'atuo'"),
        ({"segments": [2, "x"]}, r"segments: expected auto, .*, got \[2, 'x'\]"),
        ({"segments": True}, "segments: expected auto, .*, got True"),
        ({"segments": 1.5}, "segments: expected auto, .*, got 1.5"),
        ({"segments": 0}, "segments must be positive numbers of layers, got 0"),
        ({"segments": [3, 0]}, r"segments must be positive numbers of layers, got \[3, 0\]"),
        ({"segments": []}, "segments must name the size of every segment, got an empty list"),
        ({"memory_budget": "60GiB"}, "memory_budget goes with segments: auto, got segments=None"),
        ({"memory_budget": 1000, "segments": 2}, "memory_budget goes with segments: auto, got segments=2"),
        ({"memory_budget": "60 cards", "segments": "auto"}, "memory_budget must be a size such as 60GiB, .*'60 cards'"),
        ({"memory_budget": -1, "segments": "auto"}, "memory_budget must be a size such as 60GiB, .* got -1"),
        ({"memory_budget": "0", "segments": "auto"}, "memory_budget must be at least one byte, got 0"),
    ],
)
def test_segments_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(**values)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (17, 17),
        ("17", 17),
        ("2 KB", 2000),
        ("2KiB", 2048),
        ("1.5gib", 3 * 2**29),
        ("80GB", 80 * 10**9),
        ("1 TiB", 2**40),
    ],
)
def test_sizes_are_read_with_their_units(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text, "size") == num_bytes


def test_one_data_set_name_becomes_a_list_of_one() -> None:
    assert TrainConfig(output_dir="o", dataset_name="a", max_length=8, learning_rate=1.0).dataset_name == ["a"]  # type: ignore[arg-type]


@given(
    rate=st.floats(0, 1e300),
    steps=st.none() | st.integers(-(2**40), 2**40),
    names=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))),
    output_dir=st.sampled_from(["out", "1e-5", "null", "true", "a: b", "日本"]),
)
def test_a_written_config_reads_back_the_same(tmp_path_factory, rate, steps, names, output_dir) -> None:
    path = tmp_path_factory.mktemp("config") / "resolved_config.yaml"
    config = ToyConfig(output_dir=output_dir, rate=rate, steps=steps, names=names, pair=(rate,), table={"a": 1})
    write_config(config, path, stage="toy")
    assert load_config(ToyConfig, path, {}) == config


def test_the_fingerprint_sees_values_and_not_their_order() -> None:
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert len(fingerprint({})) == 64


def test_presentation_is_no_part_of_the_identity() -> None:
    plain, shown = train(), train(disable_progress=True, report_to="wandb", resume_from_checkpoint=None, segments=2)
    assert identity(plain) == identity(shown)
    assert config_to_dict(plain) != config_to_dict(shown)
    assert identity(plain) != identity(train(seed=1))
