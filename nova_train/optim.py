"""Optimisers and the learning-rate schedule.

AdamW on everything, or Muon (nova_train/muon.py) on the 2-D weights of the decoder layers with AdamW for embeddings,
heads, norms and biases. Weight decay applies to weights of two or more dimensions only.

    rate(step) = peak * warmup(step) * decay(step)
    warmup     = min(1, (step + 1) / warmup_steps)
    decay      = floor + (1 - floor) * {(1 + cos(pi x)) / 2 | 1 - x | 1},   x = progress after warm-up in [0, 1]

The schedule is a pure function of the step, so it has no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nova_train.config import ConfigError, TrainConfig
from nova_train.muon import Muon
from nova_train.sharding import like_parameter


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """The share of the peak rate that optimiser step `step` (0-based) uses."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = max(1, total_steps - config.warmup_steps)
    x = min(1.0, (step - config.warmup_steps) / span)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * x)), "linear": 1 - x, "constant": 1.0}[config.lr_scheduler_type]
    return config.min_lr_rate + (1 - config.min_lr_rate) * shape


class Optimizers:
    """The optimisers of one model, stepped together on one schedule."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for_muon = muon_names(model, named) if config.optim == "muon" else set()
        if config.optim == "muon" and config.muon_learning_rate is None:
            raise ConfigError("optim: muon needs muon_learning_rate (for the 2-D layer weights); 0.02 is a usual value")
        if config.optim == "muon" and not for_muon:
            raise ConfigError(
                f"optim: muon finds no 2-D weight under '.layers.' in {type(model).__name__}; use optim: adamw"
            )
        rest = [p for name, p in named if name not in for_muon]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._members: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.AdamW(
                    [group for group in groups if group["params"]],
                    lr=config.learning_rate,
                    betas=(config.adam_beta1, config.adam_beta2),
                    eps=config.adam_epsilon,
                    fused=True,
                ),
                config.learning_rate,
            )
        ]
        if for_muon and config.muon_learning_rate is not None:
            weights = [p for name, p in named if name in for_muon]
            muon = Muon(weights, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
            self._members.append((muon, config.muon_learning_rate))

    def step(self, factor: float) -> None:
        """One update of every member at `factor` times its peak rate; gradients are cleared afterwards."""
        for optimizer, peak in self._members:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @property
    def by_name(self) -> dict[str, torch.optim.Optimizer]:
        return dict(zip(("adamw", "muon"), (optimizer for optimizer, _ in self._members), strict=False))

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer, _ in self._members]

    def load_state_dict(self, states: Iterable[dict[str, Any]]) -> None:
        """States of one process; ranks that shard the parameters shard them, too."""
        for (optimizer, _), saved in zip(self._members, states, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                index: {name: like_parameter(value, parameters[index]) for name, value in entry.items()}
                for index, entry in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": moments})


def muon_names(model: nn.Module, named: Iterable[tuple[str, nn.Parameter]]) -> set[str]:
    """Names of the 2-D weights inside the decoder's layer stack: not the embeddings, not the head."""
    return {name for name, p in named if p.ndim == 2 and ".layers." in f".{name}"}
