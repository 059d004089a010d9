"""Merge saved models into one: linear, task arithmetic or model stock; nova_kernels.merging has the equations."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nova_kernels.merging import merge_state
from nova_train.config import ConfigError, fingerprint, identity
from nova_train.state import claim_folder, finished_fingerprint, mark_finished

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Keys of `nova-train merge`."""

    output_dir: str  # the merged model; opens with AutoModel*
    method: Literal["linear", "task_arithmetic", "model_stock"] = "linear"
    models: list[str]  # folders of saved models, at least two
    base: str | None = None  # the model that the others continued from; needed by all but linear
    weights: list[float] | None = None  # one per model; None: equal
    normalize: bool = True  # divide the weights by their sum
    lam: float = 1.0  # task arithmetic: length of the step from the base
    filter_wise: bool = False  # model stock: one angle per row instead of one per tensor
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of the result; None: as the models are saved
    num_threads: int = 1  # CPU threads
    disable_progress: bool = False

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ConfigError(f"models must name at least two models, got {self.models}")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ConfigError(f"weights needs one value per model, {len(self.models)} in all, got {self.weights}")
        if self.weights is not None and self.normalize and sum(self.weights) == 0:
            raise ConfigError(f"weights sum to 0 and cannot be normalised, got {self.weights}; set normalize: false")
        if self.method != "linear" and self.base is None:
            raise ConfigError(f"method {self.method} needs base, the model that the others continued from")
        if self.method == "model_stock" and self.weights is not None:
            raise ConfigError("model_stock takes no weights: its angles set the step")


def run(config: MergeConfig) -> Path:
    """Merge `config.models`; returns the folder of the merged model. A finished merge is left as it is."""
    folder = Path(config.output_dir)
    claim_folder(config, "merge")
    if finished_fingerprint(folder) is not None:
        log.info("%s: already merged", folder)
        return folder
    torch.set_num_threads(config.num_threads)
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
        progress=None if config.disable_progress else _progress_line,
    )
    log.info("%s", report)
    mark_finished(folder, fingerprint(identity(config)))
    return folder
