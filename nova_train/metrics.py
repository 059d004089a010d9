"""metrics.jsonl: what a run computed, byte for byte the same on every machine-independent rerun and after every resume.

One JSON object per line, first key "step". Wall-clock figures and measured memory go to timing.jsonl, so that
metrics.jsonl can be compared byte for byte; on resume both are cut back to the restored step. Trackers (wandb,
tensorboard, trackio) get copies of the metrics.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TRACKERS = ("wandb", "tensorboard", "trackio")


class Window:
    """Figures of the steps since the last log line: a mean is a running (sum, count), a maximum a (value, None)."""

    def __init__(self) -> None:
        self._totals: dict[str, list[Any]] = {}

    def add(self, name: str, total: torch.Tensor | float, count: float) -> None:
        """Add `total` over `count` items; tensors stay on their device until the line is written."""
        value = total.detach().double() if isinstance(total, torch.Tensor) else float(total)
        entry = self._totals.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + value
        entry[1] += float(count)

    def add_maximum(self, name: str, value: torch.Tensor | float) -> None:
        """Keep the largest value; it is logged as it is, and does not depend on how a batch is cut."""
        value = torch.as_tensor(value).detach().double()
        entry = self._totals.setdefault(name, [value, None])
        entry[0] = torch.maximum(torch.as_tensor(entry[0]).to(value), value)

    def figures(self) -> dict[str, float]:
        """Each metric's mean or maximum, in the order of first use; the window is emptied."""
        figures = {
            name: float(total) if count is None else float(total) / count
            for name, (total, count) in self._totals.items()
            if count is None or count > 0
        }
        self._totals = {}
        return figures

    def take(self) -> dict[str, list[Any]]:
        """What was added so far; the window is emptied."""
        taken = self.state_dict()
        self._totals = {}
        return taken

    @classmethod
    def merged(cls, parts: Sequence[Mapping[str, Sequence[Any]]]) -> Window:
        """One window of what several ranks took."""
        window = cls()
        for part in parts:
            for name, (value, count) in part.items():
                if count is None:
                    window.add_maximum(name, value)
                else:
                    window.add(name, value, count)
        return window

    def state_dict(self) -> dict[str, list[Any]]:
        return {name: [float(total), count] for name, (total, count) in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[Any]]) -> None:
        self._totals = {name: list(entry) for name, entry in state.items()}


class MetricsLog:
    """Appends lines to metrics.jsonl and timing.jsonl of one run, cut back at the start to what a state knows of."""

    def __init__(
        self,
        output_dir: str | Path | None,
        *,
        step: int,
        lines: int | None = None,
        report_to: Sequence[str] = (),
        run_name: str = "",
    ) -> None:
        """Keep the lines up to `step`, and of metrics.jsonl no more than `lines` (None: all of them).

        Without a folder nothing is written: of several ranks, one writes.
        """
        self._silent = output_dir is None
        self.lines = lines or 0
        if output_dir is None:
            return
        folder = Path(output_dir)
        self._metrics = folder / "metrics.jsonl"
        self._timing = folder / "timing.jsonl"
        self.lines = _cut_back(self._metrics, step, lines)  # of metrics.jsonl, part of a run's state
        _cut_back(self._timing, step, None)
        self._trackers = [_open_tracker(name, folder, run_name) for name in report_to]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics; values are rounded to 9 significant digits."""
        self.lines += 1
        if self._silent:
            return
        line = {"step": step, **{name: _rounded(value) for name, value in values.items()}}
        _append(self._metrics, line)
        for send in self._trackers:
            send(step, {name: float(value) for name, value in values.items()})

    def write_timing(self, step: int, values: Mapping[str, float]) -> None:
        """One line of figures that no rerun repeats: seconds, tokens per second, measured bytes."""
        if self._silent:
            return
        _append(self._timing, {"step": step, **{name: _rounded(value) for name, value in values.items()}})


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; [] where there is none."""
    path = Path(output_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _rounded(value: float) -> float | None:
    number = float(value)
    return float(f"{number:.9g}") if math.isfinite(number) else None


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def _cut_back(path: Path, step: int, lines: int | None) -> int:
    """Keep the lines up to `step`, at most `lines`; one that a killed process left half-written goes too."""
    if not path.exists():
        return 0
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if line and json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break
    kept = kept[:lines]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
    return len(kept)


def _open_tracker(name: str, folder: Path, run_name: str) -> Any:
    """A function (step, values) for one tracker; the package is imported here, only when asked for."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def send(step: int, values: Mapping[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return send
    if name in ("wandb", "trackio"):
        module = __import__(name)
        run = module.init(project="nova-kernels", name=run_name, **({"dir": str(folder)} if name == "wandb" else {}))
        return lambda step, values: run.log(values, step=step)
    raise ValueError(f"report_to: expected some of {TRACKERS}, got {name!r}")
