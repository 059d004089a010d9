"""What a training run would need, before it starts: its resolved keys, its data in tokens, its memory in bytes.

With P trained parameters of b bytes, M of them under Muon, and F frozen ones (GRPO's reference, a reward model):

    weights          (P + F) b
    gradients        P b
    optimiser        2 (P - M) b + M b                        AdamW keeps two moments, Muon one
    logits chunk     2 * 4 * min(tokens * V, chunk limit)     logits and their gradient in fp32

Activations come on top: they depend on `segments` and on the attention backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from nova_train.config import TrainConfig, config_to_dict
from nova_train.optim import _muon_names

_CHUNK_LIMIT = {"cpu": 2**22, "cuda": 2**27}  # logits held at once


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPart:
    """One line of the estimate."""

    name: str
    num_bytes: int
    formula: str


def describe(stage: str, config: Any) -> str:
    """The resolved keys as a recipe; for a stage that trains, the data and the memory as well."""
    keys = yaml.safe_dump({"stage": stage, **config_to_dict(config)}, sort_keys=False, allow_unicode=True, width=120)
    if not isinstance(config, TrainConfig):
        return keys.rstrip()
    return "\n".join([keys, memory_text(estimate_memory(config, stage))])


def estimate_memory(config: TrainConfig, stage: str) -> list[MemoryPart]:
    """Bytes by the formulas above, from the models' config files; no weights are loaded."""
    model = _without_memory(str(config.model_name_or_path), reward_head=stage == "reward")
    trained, size = _count(model), getattr(torch, config.dtype).itemsize
    frozen = trained if stage == "grpo" else 0
    if judge := getattr(config, "reward_model", None):
        frozen += _count(_without_memory(judge, reward_head=True))
    muon = 0
    if config.optim == "muon":
        named = list(model.named_parameters())
        names = _muon_names(model, named)
        muon = sum(p.numel() for name, p in named if name in names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = config.per_device_train_batch_size * config.max_length
    elements = min(tokens * model.config.vocab_size, _CHUNK_LIMIT[device])

    def part(name: str, times: int, parameters: int) -> MemoryPart:
        formula = f"{times} x {parameters:,} parameters x {size} bytes"
        return MemoryPart(name=name, num_bytes=times * parameters * size, formula=formula)

    parts = [
        part("weights", 1, trained),
        part("frozen models", 1, frozen),
        part("gradients", 1, trained),
        part("AdamW", 2, trained - muon),
        part("Muon", 1, muon),
        MemoryPart(
            name="logits chunk", num_bytes=8 * elements, formula=f"2 x {elements:,} elements x 4 bytes ({device})"
        ),
    ]
    return [line for line in parts if line.num_bytes]


def memory_text(parts: list[MemoryPart]) -> str:
    """The estimate as aligned lines with its sum."""
    total = MemoryPart(name="sum", num_bytes=sum(part.num_bytes for part in parts), formula="and activations on top")
    return "\n".join(
        f"{part.name:<14} {part.num_bytes / 2**20:>12,.1f} MiB   {part.formula}" for part in [*parts, total]
    )


def _without_memory(path: str, *, reward_head: bool) -> nn.Module:
    """The model's shapes, on the meta device."""
    config = AutoConfig.from_pretrained(path)
    if reward_head:
        config.num_labels = 1
    family = AutoModelForSequenceClassification if reward_head else AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = family.from_config(config)
    return model


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
