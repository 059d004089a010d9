"""Configuration: one flat set of keys per stage, from a YAML recipe and flags of the same names; flags win.

A stage's keys are the fields of its frozen dataclass; the type hints say what a value may be. Text is read by the hint
(`nova_train.values`), so that recipes, flags and resolved configs mean the same. An unknown key, a wrong type or an
impossible value is a `ConfigError` that names key and value.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import secrets
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from nova_train.values import ConfigError as ConfigError
from nova_train.values import coerce, parse_bytes, parse_yaml

ConfigT = TypeVar("ConfigT")

# These change what is shown, where a run starts, which part a process does or what is kept in memory, never the results
# of a run: they are no part of its identity.
PRESENTATION_KEYS = frozenset(
    {
        "disable_progress",
        "memory_budget",
        "report_to",
        "resume_from_checkpoint",
        "segments",
        "sequence_parallel_size",
        "shard",
        "verify",
        "vllm_enable_sleep_mode",
        "vllm_gpu_memory_utilization",
        "vllm_server_base_url",
    }
)
# How a step is cut into micro-batches; what it holds is global_batch_size.
_CUTS = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Keys that every training stage shares. A subclass with a check of its own calls `TrainConfig.__post_init__`."""

    output_dir: str  # results, checkpoints and metrics
    model_name_or_path: str | None = None  # folder or Hugging Face name; None: the stage builds its default model
    dataset_name: list[str]  # JSONL, .jsonl.gz or Parquet files, or Hugging Face data set names
    eval_dataset_name: list[str] = field(default_factory=list)  # held-out data of the same form
    dataset_columns: dict[str, str] = field(default_factory=dict)  # {ours: theirs}, or {ours: text with {theirs} in it}
    on_bad_row: Literal["error", "skip"] = "error"
    max_length: int  # tokens per sample, and per pack
    overlong: Literal["error", "truncate", "drop"] = "error"  # a sample longer than max_length

    per_device_train_batch_size: int = 1  # packs (sft, pas), pairs (reward), prompts (grpo) per micro-batch
    gradient_accumulation_steps: int = 8  # micro-batches per optimiser step and data-parallel group
    # Of one optimiser step over all ranks; given alone, it sets the accumulation, so that a run goes on with any number
    # of ranks. Null: the product of the two and the number of data-parallel groups.
    global_batch_size: int | None = None
    sequence_parallel_size: int = 1  # ranks that share every row of tokens; the others are data parallel

    learning_rate: float  # peak
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_rate: float = 0.0  # fraction of the peak left at the last step
    warmup_steps: int = 0  # optimiser steps
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0  # None: no clipping
    optim: Literal["adamw", "muon"] = "adamw"
    muon_learning_rate: float | None = None  # for 2-D layer weights; the rest stays with AdamW at learning_rate

    num_train_epochs: float = 1.0
    max_steps: int | None = None  # optimiser steps; None: from the epochs
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"  # of the weights
    bf16: bool = False  # bfloat16 autocast
    # Activation checkpoints: layers per segment, a list of all sizes, auto (the fastest plan within memory_budget), or
    # null (all activations are kept).
    segments: Literal["auto"] | int | list[int] | None = None
    # For segments: auto, bytes or a text like 60GiB: all that training may occupy on one device. Null: 90 % of the GPU,
    # or half of the machine's memory on a CPU.
    memory_budget: int | str | None = None
    attention_backend: str | None = None  # None: the fastest that can run

    seed: int = 0
    num_threads: int = 1  # CPU threads of one process; ranks that share CPUs take no more than their part
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    logging_steps: int = 10  # optimiser steps
    eval_steps: int | None = None  # optimiser steps; None: only at the end
    save_steps: int = 500  # optimiser steps
    save_total_limit: int = 2  # checkpoints kept
    resume_from_checkpoint: str | None = "auto"  # auto, a checkpoint folder, or null: start fresh in an empty folder
    report_to: list[str] = field(default_factory=list)  # wandb, tensorboard, trackio
    disable_progress: bool = False

    def __post_init__(self) -> None:
        for key in ("dataset_name", "eval_dataset_name", "report_to"):
            if isinstance(value := getattr(self, key), str):
                object.__setattr__(self, key, [value])
        if not self.output_dir:
            raise ConfigError("output_dir must name a folder, got an empty text")
        if not self.dataset_name:
            raise ConfigError("dataset_name must name at least one data set, got an empty list")
        for key in _POSITIVE:
            if (value := getattr(self, key)) is not None and value <= 0:
                raise ConfigError(f"{key} must be positive, got {value}")
        for key in ("warmup_steps", "weight_decay", "save_total_limit", "seed"):
            if (value := getattr(self, key)) < 0:
                raise ConfigError(f"{key} must be at least 0, got {value}")
        for key, upper in (("adam_beta1", False), ("adam_beta2", False), ("min_lr_rate", True)):
            value = getattr(self, key)
            if not (0 <= value < 1 or (upper and value == 1)):
                raise ConfigError(f"{key} must lie in [0, 1{']' if upper else ')'}, got {value}")
        if (self.muon_learning_rate is None) == (self.optim == "muon"):
            raise ConfigError(
                f"muon_learning_rate goes with optim: muon, got optim={self.optim!r} and "
                f"muon_learning_rate={self.muon_learning_rate}"
            )
        if self.seed >= 2**32:
            raise ConfigError(f"seed must lie below 2^32, got {self.seed}")
        if unknown := sorted(set(self.report_to) - {"wandb", "tensorboard", "trackio"}):
            raise ConfigError(f"report_to: expected wandb, tensorboard or trackio, got {unknown[0]!r}")
        _check_segments(self.segments, self.memory_budget)
        self.step_size(max(1, launched_ranks() // self.sequence_parallel_size))

    def step_size(self, dp: int) -> int:
        """Packs, pairs or prompts of one optimiser step over `dp` data-parallel groups.

        Raises:
            ConfigError: global_batch_size and the accumulation say different things.
        """
        product = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.global_batch_size is None:
            return product * dp
        # A global batch that was given alone has set the accumulation of one group.
        if self.global_batch_size not in (product, product * dp):
            groups = f" x {dp} data-parallel groups" if dp > 1 else ""
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x gradient_accumulation_steps {self.gradient_accumulation_steps}"
                f"{groups} = {product * dp}; leave one of them out"
            )
        return self.global_batch_size

    def row_tokens(self) -> int:
        """Most tokens of a micro-batch, which runs as one packed row: its activations depend on them."""
        return self.per_device_train_batch_size * self.max_length

    def frozen_models(self) -> list[tuple[str, bool]]:
        """Models beside the trained one: where each is loaded from, and whether it is a reward model."""
        return []

    def has_logits(self) -> bool:
        """Whether the loss goes through the LM head."""
        return True


def launched_ranks() -> int:
    """Processes of this run, as torchrun (or a launcher that sets its variables) has started them."""
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or given == "0":
        raise ConfigError(f"WORLD_SIZE must be a number of processes, got {given!r}; for one process unset it")
    return int(given)


def _check_segments(segments: object, memory_budget: int | str | None) -> None:
    """What can be known of them without the model."""
    for size in segments if isinstance(segments, list) else [segments]:
        if isinstance(size, int) and size <= 0:
            raise ConfigError(f"segments must be positive numbers of layers, got {segments}")
    if segments == []:
        raise ConfigError("segments must name the size of every segment, got an empty list; null keeps all activations")
    if memory_budget is not None:
        parse_bytes(memory_budget, "memory_budget")
        if segments != "auto":
            raise ConfigError(f"memory_budget goes with segments: auto, got segments={segments!r}")


_POSITIVE = (
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "sequence_parallel_size",
    "learning_rate",
    "adam_epsilon",
    "max_grad_norm",
    "muon_learning_rate",
    "num_train_epochs",
    "max_steps",
    "num_threads",
    "logging_steps",
    "eval_steps",
    "save_steps",
)


def load_config(cls: type[ConfigT], recipe: str | Path | None, overrides: Mapping[str, object]) -> ConfigT:
    """Build `cls` from a recipe and overrides (flags); overrides win.

    Raises:
        ConfigError: unreadable recipe, unknown or missing key, wrong type, or a value that `cls` refuses.
    """
    values = {} if recipe is None else read_recipe(recipe)
    values.update(overrides)
    return build_config(cls, values, where=stage_name(cls) if recipe is None else str(recipe))


def build_config(cls: type[ConfigT], values: Mapping[str, object], *, where: str) -> ConfigT:
    """Build `cls` from plain values; `where` opens every error message."""
    hints = typing.get_type_hints(cls)
    values = _without_stage(cls, values, where)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: {unknown_name('key', key, list(fields))}")
    coerced = {key: coerce(value, hints[key], f"{where}: {key}") for key, value in values.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in coerced and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {stage_name(cls)} needs {', '.join(missing)}; give it in the recipe or as a flag")
    if {"global_batch_size", "gradient_accumulation_steps"} <= fields.keys():
        per_device = coerced.get("per_device_train_batch_size", fields["per_device_train_batch_size"].default)
        _derive_accumulation(coerced, per_device, where)
    try:
        return cls(**coerced)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_recipe(path: str | Path) -> dict[str, object]:
    """The mapping in a YAML file; a key that stands twice is an error."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: expected a readable YAML recipe: {reason}") from error
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def parse_flags(argv: Sequence[str]) -> tuple[str | None, dict[str, object]]:
    """`recipe.yaml --key value --list a b --flag` -> (recipe, {key: text | [text, ..] | True}).

    Values stay text: the type hint of the key reads them later. `--learning-rate` is `--learning_rate`,
    `--key=value` works, and a negative number is a value.
    """
    recipe: str | None = None
    flags: dict[str, list[str]] = {}
    key: str | None = None
    for word in argv:
        if word.startswith("-") and not re.match(r"-\.?\d", word) and word != "-":
            if not re.match(r"--[A-Za-z]", word):
                raise ConfigError(f"expected --key value, got {word!r}")
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if key in flags:
                raise ConfigError(f"--{key} is given twice; several values go behind one flag")
            flags[key] = [value] if equals else []
            key = None if equals else key
        elif key is not None:
            flags[key].append(word)
        elif recipe is None and not flags:
            recipe = word
        else:
            raise ConfigError(f"expected --key before the value {word!r}")
    single: dict[str, object] = {}
    for name, words in flags.items():
        single[name] = True if not words else words[0] if len(words) == 1 else words
    return recipe, single


def config_to_dict(config: object) -> dict[str, Any]:
    """The fields as plain YAML types, in the order of the class."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}  # type: ignore[arg-type]


def identity(config: object) -> dict[str, Any]:
    """The fields that a run's results depend on: `config_to_dict` without `PRESENTATION_KEYS`, and with the batch of a
    step instead of how it is cut."""
    return identity_of(config_to_dict(config))


def identity_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` of plain values, as a resolved config has them."""
    kept = {key: value for key, value in values.items() if key not in PRESENTATION_KEYS and key not in _CUTS}
    if all(key in values for key in _CUTS) and kept.get("global_batch_size") is None:
        kept["global_batch_size"] = math.prod(values[key] for key in _CUTS)
    return kept


def resolved_text(config: object, *, stage: str | None = None) -> str:
    """The resolved config as a recipe that names its stage (default: by the class, `SFTConfig` -> sft)."""
    values = {"stage": stage or stage_name(type(config)), **config_to_dict(config)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def write_config(config: object, path: str | Path, *, stage: str | None = None) -> None:
    """Write `resolved_text`; the file appears whole or not at all."""
    write_text(path, resolved_text(config, stage=stage))


def write_text(path: str | Path, text: str) -> None:
    """The file appears whole or not at all; processes on several hosts may share its folder."""
    partial = Path(f"{path}.{secrets.token_hex(8)}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def fingerprint(mapping: Mapping[str, object]) -> str:
    """SHA-256 (hex) of the mapping as canonical JSON: sorted keys, no spaces."""
    text = json.dumps(mapping, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def stage_name(cls: type) -> str:
    """`SFTConfig` -> sft, `InspectDataConfig` -> inspect-data."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "-", cls.__name__.removesuffix("Config")).lower()


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """The message for a name (a key, a stage, a command) that does not exist, with a suggestion where one is near."""
    if near := difflib.get_close_matches(name, known, n=1):
        return f"unknown {what} {name!r}; did you mean {near[0]!r}?"
    return f"unknown {what} {name!r}; expected one of {', '.join(known)}"


def _without_stage(cls: type, values: Mapping[str, object], where: str) -> dict[str, object]:
    """A resolved config names its stage; another stage's file is refused."""
    rest = dict(values)
    if "stage" in rest and (stage := rest.pop("stage")) != stage_name(cls):
        raise ConfigError(f"{where}: this is a recipe for {stage!r}, not for {stage_name(cls)!r}")
    return rest


def _derive_accumulation(values: dict[str, Any], per_device: Any, where: str) -> None:
    """With `global_batch_size` alone, accumulation = global / per device."""
    total = values.get("global_batch_size")
    if total is None or values.get("gradient_accumulation_steps") is not None:
        return
    if per_device <= 0 or total % per_device:
        raise ConfigError(
            f"{where}: global_batch_size {total} is not a multiple of per_device_train_batch_size {per_device}"
        )
    values["gradient_accumulation_steps"] = total // per_device


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
