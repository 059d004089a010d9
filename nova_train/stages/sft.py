"""Supervised fine-tuning: next-token loss on assistant tokens, packed rows, global token mean.

    L = - (1 / trained tokens) sum_t log pi(y_t | y_<t)      over assistant tokens and their end of turn

Report: lr 1e-5, 2-6 epochs, weight decay 0.1, AdamW (0.9, 0.95), ChatML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nova_kernels.logprob import linear_cross_entropy
from nova_kernels.packing import PackedBatch
from nova_train import loop
from nova_train.chat import Chat
from nova_train.config import ConfigError, TrainConfig
from nova_train.datasets import Row, read_rows
from nova_train.loader import PackedLoader, samples_fingerprint
from nova_train.losses import predicted_tokens
from nova_train.memory import attach_segments
from nova_train.mesh import Mesh, counted
from nova_train.model import (
    check_head,
    distribute,
    end_generation_at,
    hidden_states,
    lm_head,
    load_causal_lm,
    load_tokenizer,
    own_tokens,
)
from nova_train.samples import sft_samples
from nova_train.sharding import with_weights

Sample = Mapping[str, Any]
MakeSamples = Callable[[Sequence[Row], Chat], list[Sample]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTConfig(TrainConfig):
    """Keys of `nova-train sft`."""

    max_length: int = 4096  # tokens per sample, and per pack
    learning_rate: float = 1e-5
    num_train_epochs: float = 2.0
    packing: bool = True  # False: every sample is a row of its own (still without padding)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if self.model_name_or_path is None:
            raise ConfigError("model_name_or_path is missing: a folder or a Hugging Face name")


@dataclass(frozen=True, slots=True)
class NextToken:
    """The objective: cross-entropy of assistant tokens."""

    model: PreTrainedModel
    weights: Mapping[str, float]

    def counts(self, batch: PackedBatch) -> Mapping[str, float]:
        return {"sft": float((batch.labels != -100).sum())}

    def terms(self, batch: PackedBatch) -> loop.LossTerms:
        head = lm_head(self.model)
        own = own_tokens(self.model, batch.num_tokens)
        hidden, targets = predicted_tokens(hidden_states(self.model, batch), batch.labels, own)
        losses = linear_cross_entropy(hidden, head.weight, targets, ignore_index=None, **head.kwargs())
        return loop.LossTerms(sums={"sft": losses.sum()})


def run(config: SFTConfig, *, make_samples: MakeSamples | None = None, stage: str = "sft") -> Path:
    """Fine-tune on conversations; returns the folder of the saved model.

    Args:
        make_samples: turns rows into samples, for stages that train on rows of another form (PAS).
        stage: the name in progress bars and in the folder's resolved_config.yaml.
    """
    start = loop.begin(config, stage)
    if start.finished:
        return Path(config.output_dir)
    tokenizer = load_tokenizer(str(config.model_name_or_path))
    chat = Chat(tokenizer)

    def samples_of(names: Sequence[str]) -> list[Sample]:
        rows = read_rows(
            names,
            kind="sft" if make_samples is None else "rows",
            on_bad_row=config.on_bad_row,
            columns=config.dataset_columns,
        )
        if make_samples is not None:
            return make_samples(rows, chat)
        return list(sft_samples(rows, chat, config.max_length, config.overlong, on_bad_row=config.on_bad_row))

    loader = packed_loader(samples_of(config.dataset_name), config, start.mesh, packing=config.packing)
    model = load_causal_lm(start.model_path(str(config.model_name_or_path)), config, mesh=start.mesh)
    check_head(model)
    distribute(model, config, start.mesh)
    end_generation_at(model, chat.end_of_turn_id)
    plan = attach_segments(model, config)
    objective = NextToken(model, {"sft": 1.0})
    held_out = samples_of(config.eval_dataset_name) if config.eval_dataset_name else []
    start.mesh.require_same("eval_dataset_name: the held-out data", samples_fingerprint(held_out))
    loop.train(
        loop.Training(
            config=config,
            start=start,
            model=model,
            plan=plan,
            objective=objective,
            source=loader,
            save_extra=tokenizer.save_pretrained,
            evaluate=(lambda: {"eval_loss": mean_loss(objective, held_out, config, start.mesh)}) if held_out else None,
        )
    )
    return Path(config.output_dir)


def packed_loader(samples: Sequence[Sample], config: TrainConfig, mesh: Mesh, *, packing: bool = True) -> PackedLoader:
    """Packs of `max_length` tokens, `per_device_train_batch_size` of them side by side in a micro-batch."""
    return PackedLoader(
        samples,
        capacity=config.max_length,
        packs_per_step=config.step_size(mesh.dp),
        packs_per_micro_batch=config.per_device_train_batch_size,
        epochs=config.num_train_epochs,
        seed=config.seed,
        packing=packing,
        max_steps=config.max_steps,
        mesh=mesh,
    )


@torch.no_grad()
def mean_loss(objective: NextToken, samples: Sequence[Sample], config: TrainConfig, mesh: Mesh) -> float:
    """Mean loss per trained token over held-out samples, each counted once."""
    packs = PackedLoader(
        samples,
        capacity=config.max_length,
        packs_per_step=mesh.dp,
        packs_per_micro_batch=1,
        epochs=1,
        seed=config.seed,
        mesh=mesh,
    )
    total = count = 0.0
    for _ in range(len(packs)):
        for batch, counts in map(counted, packs.next_step()):
            sums = with_weights(objective.model, lambda batch=batch: objective.terms(batch).sums)
            total += float(sums["sft"]) * counts
            count += objective.counts(batch)["sft"] * counts
    found = mesh.gather((total, count / mesh.sp))
    return sum(part for part, _ in found) / max(sum(part for _, part in found), 1.0)
