"""Run a list of named stages, each from the results of earlier ones.

    output_dir: runs/demo
    seed: 0                                    # seed, num_threads, disable_progress: defaults for every stage
    stages:
      - {name: base, run: sft, model_name_or_path: gpt2, dataset_name: chat.jsonl}
      - name: policy
        run: grpo
        inputs: {model_name_or_path: base}     # the folder of stage `base`; also base/sub/path, lists and mappings
        dataset_name: prompts.jsonl

Each stage works in output_dir/name. The whole recipe is resolved and checked before the first stage starts. A stage's
fingerprint covers its resolved keys and the fingerprints of the stages it reads, so a rerun skips exactly what is done;
a folder that holds another run is an error, never overwritten. Of several ranks all train; what else there is to do
the first one does alone, and the others wait for it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nova_train.config import (
    ConfigError,
    TrainConfig,
    build_config,
    config_to_dict,
    fingerprint,
    identity,
    launched_ranks,
    read_recipe,
    unknown_name,
    write_text,
)
from nova_train.mesh import Mesh, join
from nova_train.stages.kinds import stage_named
from nova_train.state import StateError, difference, finished_fingerprint, holds_work

log = logging.getLogger(__name__)

_DEFAULTS = ("seed", "num_threads", "disable_progress")
_KEYS = ("output_dir", *_DEFAULTS, "stages")
_CLAIM = "resolved_config.yaml"  # written by every stage first
_RECORD = "pipeline.json"  # in each stage's folder: the fingerprint it was started with


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """One stage, resolved and ready to run."""

    name: str
    kind: str
    config: Any  # the stage's own config dataclass
    run: Callable[[Any], Path]
    inputs: tuple[str, ...]  # names of the stages it reads
    fingerprint: str  # of the resolved keys and of the inputs

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)


def plan_pipeline(recipe: str | Path, overrides: Mapping[str, object]) -> list[PlannedStage]:
    """Resolve every stage of a recipe; nothing runs and nothing is written.

    Raises:
        ConfigError: an unknown or missing key, a wrong value or an unknown input, naming the stage.
    """
    values = {**read_recipe(recipe), **overrides}
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"{recipe}: {unknown_name('key', key, _KEYS)}")
    output_dir, entries = values.get("output_dir"), values.get("stages")
    if not isinstance(output_dir, str) or not output_dir:
        raise ConfigError(f"{recipe}: output_dir must name the folder of all stages, got {output_dir!r}")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{recipe}: stages must be a list of at least one stage, got {entries!r}")
    defaults = {key: values[key] for key in _DEFAULTS if key in values}
    planned: dict[str, PlannedStage] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{recipe}: stage {number}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: expected a mapping with name, run and the stage's keys, got {entry!r}")
        stage = _plan_stage(entry, output_dir, defaults, planned, where)
        planned[stage.name] = stage
    return list(planned.values())


def run_pipeline(stages: Sequence[PlannedStage], *, first: str | None = None, last: str | None = None) -> list[Path]:
    """Run the stages from `first` to `last` (both included; None: from the start, to the end), skipping what is done.

    Raises:
        ConfigError: no stage is called `first` or `last`, or they are the wrong way round.
        StateError: a stage before `first` is not finished, or a folder holds another run.
        RankError: another rank failed.
    """
    begin, end = _range(stages, first, last)
    mesh = join()
    for stage in stages[begin:end]:
        if isinstance(stage.config, TrainConfig):
            join(stage.config.sequence_parallel_size)  # can be split: nobody wants to hear otherwise hours later
    mesh.require_same("the recipe", {stage.name: stage.fingerprint for stage in stages})
    # Every folder is checked before anything runs.
    done = mesh.on_main(lambda: {stage.name: is_done(stage) for stage in stages[:end]})
    for stage in stages[:begin]:
        if not done[stage.name]:
            raise StateError(f"--from {first}: stage {stage.name!r} before it is not finished; leave --from out")
    for number, stage in enumerate(stages[begin:end], begin + 1):
        label = f"[{number}/{len(stages)}] {stage.name}"
        if done[stage.name]:
            log.info("%s: done before, skipped", label)
            continue
        log.info("%s: %s -> %s", label, stage.kind, stage.folder)
        mesh.on_main(_record, stage)
        started = time.perf_counter()
        run_stage(stage.run, stage.config, mesh)
        gc.collect()
        log.info("%s: done in %.0f s", label, time.perf_counter() - started)
    return [stage.folder for stage in stages[begin:end]]


def run_stage(run: Callable[[Any], Any], config: Any, mesh: Mesh) -> None:
    """Run one stage or command: training on all ranks, anything else on the first one while the others wait."""

    def alone() -> None:
        run(config)

    if isinstance(config, TrainConfig):
        run(config)
    else:
        mesh.on_main(alone)


def plan_text(stages: Sequence[PlannedStage]) -> str:
    """The resolved recipe with each stage's state, for `--dry_run`."""
    parts = []
    for number, stage in enumerate(stages, 1):
        done = "done" if is_done(stage) else "to do"
        head = f"# [{number}/{len(stages)}] {stage.name}: {stage.kind} ({done})"
        parts.append(f"{head}\n{yaml.safe_dump(config_to_dict(stage.config), sort_keys=False, allow_unicode=True)}")
    return "\n".join(parts).rstrip()


def is_done(stage: PlannedStage) -> bool:
    """Whether this very stage (same keys, same inputs) is finished.

    Raises:
        StateError: the folder was started with other keys or other inputs.
    """
    path = stage.folder / _RECORD
    if not path.exists() or not holds_work(stage.folder):
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["fingerprint"] != stage.fingerprint:
        shown, way_out = _difference(found, stage)
        raise StateError(
            f"{stage.folder} holds another run of stage {stage.name!r} ({shown}); {way_out}"
            "choose another output_dir, or remove that folder to run the stage again"
        )
    return finished_fingerprint(stage.folder) is not None


def _plan_stage(
    entry: Mapping[str, Any],
    output_dir: str,
    defaults: Mapping[str, object],
    earlier: Mapping[str, PlannedStage],
    where: str,
) -> PlannedStage:
    keys = dict(entry)
    name, kind_name, inputs = keys.pop("name", None), keys.pop("run", None), keys.pop("inputs", None) or {}
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise ConfigError(f"{where}: name must be a plain folder name, got {name!r}")
    where = f"{where} ({name})"
    if name in earlier:
        raise ConfigError(f"{where}: the name {name!r} is taken by an earlier stage")
    if "output_dir" in keys:
        raise ConfigError(f"{where}: a stage's folder is output_dir/name; remove its output_dir {keys['output_dir']!r}")
    config_class, run = stage_named(kind_name, where).load()
    if not isinstance(inputs, dict):
        raise ConfigError(f"{where}: inputs must map keys to earlier stages, got {inputs!r}")
    read: dict[str, None] = {}

    def path_of(value: object, place: str) -> str:
        if not isinstance(value, str) or ".." in value.split("/"):
            raise ConfigError(f"{place}: expected the name of an earlier stage, or stage/path, got {value!r}")
        stage = value.split("/", 1)[0]
        if stage not in earlier:
            known = ", ".join(earlier) or "none: this is the first"
            raise ConfigError(f"{place}: no earlier stage is called {stage!r} (earlier stages: {known})")
        read[stage] = None
        return os.path.join(output_dir, value)

    keys = _merged(keys, _map_leaves(inputs, path_of, f"{where}: inputs"), where)
    own = {key: value for key, value in defaults.items() if key in config_class.__dataclass_fields__}
    config = build_config(config_class, {**own, **keys, "output_dir": os.path.join(output_dir, name)}, where=where)
    covered = {"run": kind_name, "keys": _identity(config), "inputs": {n: earlier[n].fingerprint for n in read}}
    return PlannedStage(
        name=name, kind=kind_name, config=config, run=run, inputs=tuple(read), fingerprint=fingerprint(covered)
    )


def _map_leaves(value: Any, change: Callable[[object, str], str], place: str) -> Any:
    """The same lists and mappings with `change(leaf, its place)` for every leaf."""
    if isinstance(value, dict):
        return {key: _map_leaves(item, change, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_map_leaves(item, change, f"{place}[{number}]") for number, item in enumerate(value)]
    return change(value, place)


def _merged(keys: Mapping[str, Any], inputs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both together; a mapping may have some of its entries under inputs, anything else stands in one place only."""
    merged = dict(keys)
    for key, value in inputs.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = _merged(merged[key], value, f"{where}: {key}")
        else:
            raise ConfigError(f"{where}: {key!r} is given both as a key and under inputs")
    return merged


def _range(stages: Sequence[PlannedStage], first: str | None, last: str | None) -> tuple[int, int]:
    names = [stage.name for stage in stages]
    for flag, name in (("--from", first), ("--until", last)):
        if name is not None and name not in names:
            raise ConfigError(f"{flag}: {unknown_name('stage', name, names)}")
    begin = 0 if first is None else names.index(first)
    end = len(names) if last is None else names.index(last) + 1
    if begin >= end:
        raise ConfigError(f"--from {first} stands after --until {last} in the pipeline: {', '.join(names)}")
    return begin, end


def _record(stage: PlannedStage) -> None:
    """Note which run the folder is about to hold, before the stage makes anything in it."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    if not holds_work(stage.folder):
        (stage.folder / _CLAIM).unlink(missing_ok=True)
    path = stage.folder / _RECORD
    text = json.dumps({"fingerprint": stage.fingerprint, "run": stage.kind, "keys": _identity(stage.config)}, indent=1)
    write_text(path, text + "\n")


def _identity(config: Any) -> dict[str, Any]:
    """What the results of a stage depend on; for one that trains, with the batch of all ranks."""
    if isinstance(config, TrainConfig):
        groups = max(1, launched_ranks() // config.sequence_parallel_size)
        config = replace(config, global_batch_size=config.step_size(groups))
    return identity(config)


def _difference(found: Mapping[str, Any], stage: PlannedStage) -> tuple[str, str]:
    """What sets a recorded run apart, in a few words, and the way out."""
    shown, way_out = difference(found["keys"], _identity(stage.config))
    return shown or f"same keys, but {' or '.join(stage.inputs) or 'its kind'} changed", way_out
