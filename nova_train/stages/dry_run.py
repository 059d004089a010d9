"""What a training run would need, before it starts: the resolved keys, the data in tokens, the memory in bytes.

Memory, with P trained parameters of b bytes, P2 of them under Muon, and F frozen parameters (GRPO's reference and
reward model):

    weights            (P + F) b
    gradients          P b
    AdamW moments      2 (P - P2) b
    Muon momentum      P2 b
    logits chunk       2 * 4 * min(tokens * V, chunk elements)     logits and their gradient in fp32

Activations are not counted: they depend on `segments` and on the attention backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from nova_train.config import ConfigError, TrainConfig, config_to_dict
from nova_train.optim import muon_names

_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPart:
    """One line of the estimate."""

    name: str
    num_bytes: int
    formula: str


def resolved_text(config: object) -> str:
    """The resolved keys as a recipe."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def estimate_memory(config: TrainConfig, *, reward_head: bool = False) -> list[MemoryPart]:
    """Bytes by the formulas above; reads the models' config files, loads no weights.

    Args:
        reward_head: the trained model is a sequence classifier with one output instead of a causal LM.
    """
    path = _required_path(config)
    model = _empty_model(path, reward_head=reward_head)
    trained = _count(model)
    under_muon = 0
    if config.optim == "muon":
        names = muon_names(model)
        under_muon = sum(p.numel() for name, p in model.named_parameters() if name in names)
    frozen = 0
    if hasattr(config, "kl_top_k"):
        frozen += trained
    if (judge := getattr(config, "reward_model", None)) is not None and Path(judge).exists():
        frozen += _count(_empty_model(judge, reward_head=True))
    size = getattr(torch, config.dtype).itemsize
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = config.per_device_train_batch_size * config.max_length
    chunk = min(tokens * model.config.vocab_size, _CHUNK_ELEMENTS[device])
    parts = [MemoryPart(name="weights", num_bytes=trained * size, formula=f"{trained:,} parameters x {size}")]
    if frozen:
        parts.append(MemoryPart(name="frozen models", num_bytes=frozen * size, formula=f"{frozen:,} x {size}"))
    parts.append(MemoryPart(name="gradients", num_bytes=trained * size, formula=f"{trained:,} x {size}"))
    adam = trained - under_muon
    parts.append(MemoryPart(name="AdamW moments", num_bytes=2 * adam * size, formula=f"2 x {adam:,} x {size}"))
    if under_muon:
        parts.append(
            MemoryPart(name="Muon momentum", num_bytes=under_muon * size, formula=f"{under_muon:,} x {size}")
        )
    parts.append(MemoryPart(name="logits chunk", num_bytes=8 * chunk, formula=f"2 x 4 x {chunk:,} elements ({device})"))
    return parts


def memory_text(parts: list[MemoryPart]) -> str:
    """The estimate as aligned lines with its sum."""
    rows = [*parts, MemoryPart(name="sum", num_bytes=sum(part.num_bytes for part in parts), formula="+ activations")]
    return "\n".join(f"{part.name:<14} {part.num_bytes / 2**20:>12,.1f} MiB   {part.formula}" for part in rows)


def _required_path(config: TrainConfig) -> str:
    if config.model_name_or_path is None:
        raise ConfigError("model_name_or_path is missing: without a model there is nothing to estimate")
    return config.model_name_or_path


def _empty_model(path: str, *, reward_head: bool) -> Any:
    """The model's shapes without memory for its weights."""
    model_config = AutoConfig.from_pretrained(path)
    if reward_head:
        model_config.num_labels = 1
    family = AutoModelForSequenceClassification if reward_head else AutoModelForCausalLM
    with torch.device("meta"):
        return family.from_config(model_config)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
