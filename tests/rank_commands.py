"""Command lines run by several ranks, each rank's output and exit code in files; and faults to try them with."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

from nova_train import loop, mesh
from nova_train.__main__ import main
from nova_train.config import ConfigError, TrainConfig
from nova_train.stages import kinds
from processes import on_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class DrillConfig(TrainConfig):
    """A stage of all ranks in which some of them fail."""

    dataset_name: list[str] = field(default_factory=lambda: ["none"])
    max_length: int = 1
    learning_rate: float = 1.0
    fault: str = "mistake"
    on: list[int] = field(default_factory=lambda: [0, 1])  # ranks


def run(config: DrillConfig) -> None:
    """Fail, or wait for somebody who never answers."""
    ranks = mesh.join(config.sequence_parallel_size)
    faults = {"mistake": ConfigError("odd"), "bug": KeyError("bug"), "own": OSError(f"disk {ranks.rank} is full")}
    if ranks.rank in config.on:
        raise faults[config.fault]
    ranks.any(False)


@dataclass(frozen=True, kw_only=True, slots=True)
class AloneConfig:
    """A stage that the first rank runs alone."""

    output_dir: str
    fault: str = "none"


def run_alone(config: AloneConfig) -> Path:
    """Say so, and fail if asked."""
    print(f"alone on rank {os.environ['RANK']}")
    if config.fault == "interrupt":
        raise KeyboardInterrupt
    if config.fault == "mistake":
        raise ConfigError("odd")
    return Path(config.output_dir)


def on_two_ranks(commands: Mapping[str, list[str]], folder: Path) -> None:
    """`run_commands` as torchrun starts it: what the ranks meet at lives on when one of them ends."""
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in commands]
    on_ranks(2, run_commands, commands, [store.port for store in stores], folder)


def run_commands(commands: Mapping[str, list[str]], ports: list[int], folder: Path) -> None:
    """Each in turn on all ranks: folder/<name>.<rank>.{out,err,code}; "{rank}" in a word is the rank's own number.

    Words with = in front of a command are variables of its environment. SIGNALLED=15 makes the ranks that ON names send
    themselves this signal in the second step; FOLDER is where the command runs.
    """
    rank = os.environ["RANK"]
    _add_stages()
    step = loop.train_step

    def signalled(training: loop.Training[Any]) -> int:
        if training.step == 1 and rank in os.environ.get("ON", "").split():
            signal.raise_signal(int(os.environ["SIGNALLED"]))
        return step(training)

    loop.train_step = signalled
    mesh.WAIT_SECONDS = 1.0
    for (name, words), port in zip(commands.items(), ports, strict=True):
        words = [word.format(rank=rank, folder=folder) for word in words]
        variables = dict(word.split("=") for word in itertools.takewhile(lambda word: "=" in word, words))
        os.environ.update({"MASTER_PORT": str(port), "ON": "", "FOLDER": str(folder), **variables})
        os.chdir(os.environ["FOLDER"])
        with (folder / f"{name}.{rank}.out").open("w") as out, (folder / f"{name}.{rank}.err").open("w") as err:
            for stream, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), stream)
            try:
                code = main(words[len(variables) :])
            except Exception:  # noqa: BLE001 - as the interpreter would
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        gc.collect()  # a process that ends would close what a traceback still holds of the connection
        (folder / f"{name}.{rank}.code").write_text(str(code))


def _add_stages() -> None:
    for name, config, function in (("drill", DrillConfig, run), ("alone", AloneConfig, run_alone)):
        module = ModuleType(f"{name}_stage")
        vars(module).update({config.__name__: config, "run": function})
        sys.modules[module.__name__] = module
        kinds.STAGES[name] = kinds.Kind(module.__name__, config.__name__, "for tests")
