"""Merge saved models into one: linear, task arithmetic or model stock; nova_kernels.merging has the equations."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from nova_kernels.merging import merge_state
from nova_train.config import ConfigError, fingerprint, identity
from nova_train.state import claim_folder, finished_fingerprint, mark_finished

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Keys of `nova-train merge`."""

    output_dir: str  # the merged model; opens with AutoModel*
    method: Literal["linear", "task_arithmetic", "model_stock"] = "linear"
    models: list[str]  # folders of saved models
    base: str | None = None  # the model that the others continued from; for all methods but linear
    weights: list[float] | None = None  # one per model; None: equal. Not for model_stock
    normalize: bool | None = None  # divide the weights by their sum; None: linear weights must sum to 1
    lam: float = 1.0  # task_arithmetic: factor on the whole step
    filter_wise: bool = False  # model_stock: one angle per row instead of one per tensor
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of the result; None: as the models are saved
    num_threads: int = 1  # CPU threads
    disable_progress: bool = False

    def __post_init__(self) -> None:
        fewest = 2 if self.method == "model_stock" else 1
        if len(self.models) < fewest:
            raise ConfigError(f"models: {self.method} needs at least {fewest}, got {self.models}")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ConfigError(f"weights needs one value per model, {len(self.models)} in all, got {self.weights}")
        if (self.method == "linear") != (self.base is None):
            rule = "has no base" if self.method == "linear" else "needs base, the model that the others continued from"
            raise ConfigError(f"method {self.method} {rule}; got base {self.base}")
        for key, unset, owners in (
            ("weights", None, ("linear", "task_arithmetic")),
            ("normalize", None, ("linear", "task_arithmetic")),
            ("lam", 1.0, ("task_arithmetic",)),
            ("filter_wise", False, ("model_stock",)),
        ):
            if getattr(self, key) != unset and self.method not in owners:
                raise ConfigError(f"{key} is for {' and '.join(owners)}, got {getattr(self, key)} for {self.method}")
        if self.method == "linear" and self.weights and self.normalize is None and abs(sum(self.weights) - 1) > 1e-6:
            raise ConfigError(
                f"weights {self.weights} sum to {sum(self.weights):g}, not 1; set normalize to true or false"
            )
        if self.num_threads <= 0:
            raise ConfigError(f"num_threads must be positive, got {self.num_threads}")


def run(config: MergeConfig) -> Path:
    """Merge `config.models`; returns the folder of the merged model. A finished merge is left as it is."""
    folder = Path(config.output_dir)
    claim_folder(config, "merge")
    if finished_fingerprint(folder) is not None:
        return folder
    torch.set_num_threads(config.num_threads)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=config.disable_progress) as bar:
        task = bar.add_task(f"merge ({config.method})", total=None)
        report = merge_state(
            config.method,
            config.models,
            folder,
            base=config.base,
            weights=config.weights,
            normalize=config.normalize,
            lam=config.lam,
            filter_wise=config.filter_wise,
            dtype=None if config.dtype is None else getattr(torch, config.dtype),
            overwrite=True,  # what an interrupted merge of this very run left
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    log.info("%s", report)
    mark_finished(folder, fingerprint({"stage": "merge", **identity(config)}), tensors=report.num_tensors)
    return folder
