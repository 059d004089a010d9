"""Reward model: Bradley-Terry on pairs plus alpha times the error to absolute scores, equation (1) of the report.

    L = sum_pairs -log sigmoid(r_w - r_l) / pairs  +  alpha * sum_scored (r - s)^2 / (scored / 2)

Every pair may have both scores, one or none (then it adds nothing to the second term); with both everywhere this is
eq. (1). Scores are z-normalised per source on the training split. `lm_loss_weight` adds the next-token loss of the
chosen answers, which keeps the backbone able to judge content; the head stays a linear map of the last state, so
the saved model is an AutoModelForSequenceClassification with num_labels = 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nova_kernels.logprob import linear_cross_entropy
from nova_kernels.packing import IGNORE_INDEX, PackedBatch, pack_samples
from nova_train import loop
from nova_train.chat import Chat
from nova_train.config import ConfigError, TrainConfig
from nova_train.datasets import read_rows
from nova_train.loader import ShuffledLoader, items_fingerprint
from nova_train.losses import bradley_terry, next_token_targets, score_error
from nova_train.memory import attach_segments
from nova_train.mesh import Mesh, counted
from nova_train.model import (
    Head,
    check_head,
    distribute,
    give_own_pad_token,
    hidden_states,
    lm_head,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    mesh_of,
    own_tokens,
    require_same_weights,
)
from nova_train.rewards import last_token_rewards
from nova_train.samples import Pair, preference_pairs
from nova_train.sharding import with_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig(TrainConfig):
    """Keys of `nova-train reward`; a batch is counted in pairs."""

    max_length: int = 4096  # tokens per sequence (prompt and answer)
    learning_rate: float = 1e-5
    num_train_epochs: float = 1.0
    score_loss_weight: float = 1.0  # alpha of eq. (1); 0: Bradley-Terry alone
    lm_loss_weight: float = 0.0  # weight of the next-token loss on chosen answers

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if self.model_name_or_path is None:
            raise ConfigError("model_name_or_path is missing: the model whose weights the reward model starts from")
        for key in ("score_loss_weight", "lm_loss_weight"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} must be at least 0, got {getattr(self, key)}")

    def row_tokens(self) -> int:
        """Chosen and rejected sequences lie in one row."""
        return 2 * self.per_device_train_batch_size * self.max_length

    def has_logits(self) -> bool:
        return self.lm_loss_weight > 0


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """Mean and standard deviation of the absolute scores of one source, on the training split."""

    mean: float
    std: float
    count: int

    def normalize(self, score: float | None) -> float:
        return math.nan if score is None else (score - self.mean) / self.std


def score_scales(pairs: Sequence[Pair]) -> dict[str, ScoreScale]:
    """Per source; a source with fewer than two different scores gets std 1."""
    values: dict[str, list[float]] = {}
    for pair in pairs:
        known = [s for s in (pair.chosen_score, pair.rejected_score) if s is not None]
        values.setdefault(pair.source, []).extend(known)
    scales = {}
    for source, scores in values.items():
        if len(set(scores)) < 2:
            scales[source] = ScoreScale(scores[0] if scores else 0.0, 1.0, len(scores))
            continue
        mean = sum(scores) / len(scores)
        variance = sum((s - mean) ** 2 for s in scores) / len(scores)
        scales[source] = ScoreScale(mean, math.sqrt(variance), len(scores))
    return scales


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A micro-batch of pairs: all chosen sequences, then all rejected ones, in one packed row."""

    packed: PackedBatch  # labels hold the chosen answers only
    scores: Tensor  # fp32 [2 * pairs], normalised; NaN = no score

    @property
    def num_pairs(self) -> int:
        return self.scores.numel() // 2

    @property
    def num_tokens(self) -> int:
        return self.packed.num_tokens


def collate_pairs(pairs: Sequence[Pair], scales: Mapping[str, ScoreScale]) -> PairBatch:
    """Pairs -> one packed row; a source without a scale keeps its scores as they are."""
    samples: list[dict[str, Any]] = []
    for pair in pairs:
        labels = pair.chosen.copy()
        labels[: pair.prompt_length] = IGNORE_INDEX
        samples.append({"input_ids": pair.chosen, "labels": labels})
    for pair in pairs:
        samples.append({"input_ids": pair.rejected, "labels": pair.rejected * 0 + IGNORE_INDEX})
    plain = ScoreScale(0.0, 1.0, 0)
    chosen = [scales.get(pair.source, plain).normalize(pair.chosen_score) for pair in pairs]
    rejected = [scales.get(pair.source, plain).normalize(pair.rejected_score) for pair in pairs]
    return PairBatch(pack_samples(samples), torch.tensor(chosen + rejected, dtype=torch.float32))


@dataclass(frozen=True, slots=True)
class PairwiseAndAbsolute:
    """The objective: terms bt (per pair), score (per two scored answers) and lm (per chosen token)."""

    model: PreTrainedModel
    head: Head | None  # LM head for the lm term; None: the input embeddings, which it is tied to
    weights: Mapping[str, float]

    def counts(self, batch: PairBatch) -> Mapping[str, float]:
        return {
            "bt": float(batch.num_pairs),
            "score": float((~torch.isnan(batch.scores)).sum()) / 2,
            "lm": float((batch.packed.labels != IGNORE_INDEX).sum()),
        }

    def terms(self, batch: PairBatch) -> loop.LossTerms:
        hidden = hidden_states(self.model, batch.packed)
        rewards = last_token_rewards(self.model, hidden, batch.packed).view(2, -1)
        scores = batch.scores.to(rewards).view(2, -1)
        # Ranks that share the row have all rewards; each takes the loss of some pairs.
        mesh = mesh_of(self.model)
        rewards, scores = rewards[:, mesh.sp_rank :: mesh.sp], scores[:, mesh.sp_rank :: mesh.sp]
        chosen, rejected = rewards
        errors = score_error(rewards, scores)
        sums = {"bt": bradley_terry(chosen, rejected).sum(), "score": errors.sum()}
        if self.weights["lm"] > 0:
            own = own_tokens(self.model, batch.num_tokens)
            targets = next_token_targets(batch.packed.labels)[own].to(hidden.device)
            tied = self.model.get_input_embeddings().weight
            weight, options = (tied, {}) if self.head is None else (self.head.weight, self.head.kwargs())
            sums["lm"] = linear_cross_entropy(hidden, weight, targets, **options).sum()
        margin = (chosen - rejected).detach()
        scored, pairs = float((~torch.isnan(scores)).sum()), margin.numel()
        metrics: dict[str, tuple[Tensor | float, float]] = {
            "accuracy": ((margin > 0).double().sum(), pairs),
            "margin": (margin.sum(), pairs),
            "mean_reward": (rewards.detach().sum(), 2 * pairs),
            "score_mae": (errors.detach().sqrt().sum(), scored),
            "scored_fraction": (scored, 2 * pairs),
        }
        return loop.LossTerms(sums=sums, metrics=metrics)


def run(config: RewardConfig) -> Path:
    """Train the reward model; returns the folder of the saved model."""
    start = loop.begin(config, "reward")
    if start.finished:
        return Path(config.output_dir)
    source = str(config.model_name_or_path)
    tokenizer = load_tokenizer(start.model_path(source))
    chat = Chat(tokenizer)
    pairs = _read_pairs(config.dataset_name, chat, config)
    scales = score_scales(pairs)
    held_out = _read_pairs(config.eval_dataset_name, chat, config) if config.eval_dataset_name else []
    start.mesh.require_same("eval_dataset_name: the held-out data", items_fingerprint(held_out))
    model = load_reward_model(start.model_path(source), config, mesh=start.mesh)
    give_own_pad_token(model, tokenizer, chat.end_of_turn_id)
    distribute(model, config, start.mesh)
    plan = attach_segments(model, config)

    def save_extra(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        facts = {"reward_position": "last token", "score_scales": {k: asdict(v) for k, v in scales.items()}}
        (folder / "reward_config.json").write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")

    objective = PairwiseAndAbsolute(
        model,
        _untied_head(source, config, start.mesh) if config.lm_loss_weight > 0 else None,
        {"bt": 1.0, "score": config.score_loss_weight, "lm": config.lm_loss_weight},
    )
    loop.train(
        loop.Training(
            config=config,
            start=start,
            model=model,
            plan=plan,
            objective=objective,
            source=ShuffledLoader(
                pairs,
                per_step=config.step_size(start.mesh.dp),
                per_micro_batch=config.per_device_train_batch_size,
                epochs=config.num_train_epochs,
                seed=config.seed,
                max_steps=config.max_steps,
                collate=lambda some: collate_pairs(some, scales),
                mesh=start.mesh,
            ),
            save_extra=save_extra,
            evaluate=(lambda: evaluate_pairs(objective, held_out, scales, start.mesh)) if held_out else None,
            facts={"pairs": len(pairs)},
        )
    )
    return Path(config.output_dir)


@torch.no_grad()
def evaluate_pairs(
    objective: PairwiseAndAbsolute,
    pairs: Sequence[Pair],
    scales: Mapping[str, ScoreScale],
    mesh: Mesh | None = None,
    *,
    per_batch: int = 64,
) -> dict[str, float]:
    """Accuracy and mean margin over held-out pairs, `per_batch` at a time."""
    mesh = mesh or Mesh()
    correct = margin = 0.0
    for first, counts in map(counted, mesh.share(range(0, len(pairs), per_batch))):
        batch = collate_pairs(pairs[first : first + per_batch], scales)
        metrics = with_weights(objective.model, lambda batch=batch: objective.terms(batch).metrics)
        correct += float(metrics["accuracy"][0]) * counts
        margin += float(metrics["margin"][0]) * counts
    correct, margin = (sum(values) for values in zip(*mesh.gather((correct, margin)), strict=True))
    return {"eval_accuracy": correct / len(pairs), "eval_margin": margin / len(pairs)}


def _read_pairs(names: Sequence[str], chat: Chat, config: RewardConfig) -> list[Pair]:
    rows = read_rows(names, kind="preference", on_bad_row=config.on_bad_row, columns=config.dataset_columns)
    return preference_pairs(rows, chat, config.max_length, config.overlong, on_bad_row=config.on_bad_row)


def _untied_head(path: str, config: RewardConfig, mesh: Mesh) -> Head | None:
    """The starting model's LM head, frozen, where it is more than the input embeddings; None where it is not."""
    model = load_causal_lm(path, config, frozen=True)
    require_same_weights(model, mesh)
    check_head(model)
    head = lm_head(model)
    plain = model.config.tie_word_embeddings and head.bias is None and head.softcap is None
    return None if plain else head
