"""GRPO with the exact top-K KL: equation (2) of the report, with groups of n = 3 instead of a critic.

    maximise  E[ r - beta KL(pi || ref) ],  and keep  KL(pi || ref)  small on supervised data (KL-PTX)

    A_i      = (s_i - mean) / (std + eps)                       scores alone; the KL never enters the statistics
    Adv_it   = A_i - beta sum_{u > t} KL_iu                     detached, fixed at the rollout   (placement "split")
    L        = sum_it [ -min(rho Adv, clip(rho) Adv) + beta KL_it ] / tokens  +  ptx_kl_weight * sum KL / PTX tokens

`ref` is the policy this stage starts from, frozen. With `ptx_reference_cache` (written by cache-reference) the last
term reads it from disk. Where beta is 0 as well it is never loaded, and its KL on rollouts is not watched.

The default's group mean and division by the standard deviation deviate from the true gradient of eq. (2) by design
(docs/equations.md); `leave_one_out` with `scale_rewards: none` does not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nova_kernels.logprob import linear_logprobs
from nova_kernels.packing import IGNORE_INDEX
from nova_kernels.topk_kl import TopK, TopKReferenceCache, linear_topk_kl_div
from nova_train import kl as kl_penalty
from nova_train import loop, vllm_rollout
from nova_train.chat import Chat
from nova_train.config import ConfigError, TrainConfig
from nova_train.datasets import read_rows
from nova_train.evaluate import mean_rewards
from nova_train.experience import Experience, ExperienceOptions, PTXBatch, RolloutBatch, Sampler
from nova_train.loader import PackedLoader, ShuffledLoader, items_fingerprint
from nova_train.losses import clipped_policy_loss, own_predictions, predicted_tokens
from nova_train.memory import attach_segments
from nova_train.mesh import Mesh
from nova_train.model import (
    check_head,
    distribute,
    end_generation_at,
    hidden_states,
    lm_head,
    load_causal_lm,
    load_tokenizer,
    mesh_of,
    own_tokens,
)
from nova_train.reference_topk import (
    cache_header,
    check_top_k,
    check_top_k_early,
    open_cache,
    supervised_samples,
    with_cache_rows,
)
from nova_train.rewards import Judge
from nova_train.rollout import Completion, generate, sampling_seed
from nova_train.samples import Prompt, prompts
from nova_train.sharding import gathered

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig(TrainConfig):
    """Keys of `nova-train grpo`; a batch is counted in prompts (TRL counts completions)."""

    max_length: int = 4096  # tokens of a prompt, and of a PTX pack
    learning_rate: float = 1e-6
    num_generations: int = 3  # answers per prompt
    max_completion_length: int = 256  # tokens
    temperature: float = 1.0
    top_p: float = 1.0
    rollout: Literal["hf", "vllm"] = "hf"  # what draws the answers: the trained model itself, or vLLM with its weights
    rollout_batch_size: int = 256  # sequences generated at a time
    vllm_server_base_url: str | None = None  # of a `vllm serve` on other GPUs; null: an engine inside every rank
    vllm_gpu_memory_utilization: float = 0.3  # of the GPU, for the engine inside a rank
    vllm_enable_sleep_mode: bool = False  # the engine inside a rank gives its memory back while the model is trained
    num_iterations: int = 1  # optimiser steps per rollout
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: epsilon
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    advantage_baseline: Literal["group_mean", "leave_one_out"] = "group_mean"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    advantage_eps: float = 1e-4
    reward_std_floor: float = 0.0  # least standard deviation that divides, as a share of the running one
    mask_truncated_completions: bool = False
    beta: float = 0.04  # weight of the KL penalty
    kl_top_k: int = 500  # entries of the reference that the KL sees
    kl_placement: Literal["split", "reward", "loss"] = "split"
    kl_tail: Literal["none", "bucket"] = "none"
    reward_model: str | None = None
    reward_funcs: list[str] = field(default_factory=list)  # module:function or file.py:function
    reward_weights: list[float] | None = None  # reward model first, then the functions; None: 1 each; 0: watch only
    ptx_dataset_name: list[str] = field(default_factory=list)  # supervised rows for the KL-PTX term
    ptx_kl_weight: float = 0.0  # gamma of eq. (2)
    ptx_batch_size: int = 1  # packs per optimiser step
    ptx_reference_cache: str | None = None  # folder of cache-reference: no forward of the reference for the KL-PTX term
    eval_temperature: float = 1.0

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if isinstance(self.ptx_dataset_name, str):
            object.__setattr__(self, "ptx_dataset_name", [self.ptx_dataset_name])
        if self.model_name_or_path is None:
            raise ConfigError("model_name_or_path is missing: the policy to start from")
        for key in (
            "max_completion_length",
            "rollout_batch_size",
            "num_iterations",
            "ptx_batch_size",
            "epsilon",
            "temperature",
        ):
            if getattr(self, key) <= 0:
                raise ConfigError(f"{key} must be positive, got {getattr(self, key)}")
        for key in ("beta", "ptx_kl_weight", "advantage_eps", "reward_std_floor", "eval_temperature"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} must be at least 0, got {getattr(self, key)}")
        if self.epsilon_high is not None and self.epsilon_high <= 0:
            raise ConfigError(f"epsilon_high must be positive or null, got {self.epsilon_high}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.num_generations < 2:
            raise ConfigError(f"num_generations must be at least 2 (a group), got {self.num_generations}")
        if self.reward_model is None and not self.reward_funcs:
            raise ConfigError("no reward: give reward_model, reward_funcs or both")
        judges = len(self.reward_funcs) + (self.reward_model is not None)
        if self.reward_weights is not None and len(self.reward_weights) != judges:
            raise ConfigError(f"reward_weights has {len(self.reward_weights)} values for {judges} rewards")
        if self.ptx_kl_weight > 0 and not self.ptx_dataset_name:
            raise ConfigError(f"ptx_kl_weight is {self.ptx_kl_weight}, but ptx_dataset_name names no data set")
        if self.ptx_reference_cache is not None and self.ptx_kl_weight == 0:
            raise ConfigError(
                f"ptx_reference_cache is {self.ptx_reference_cache}, but ptx_kl_weight is 0: nothing would read it"
            )
        vllm_rollout.check_keys(self)
        check_top_k_early(self.model_name_or_path, self.kl_top_k)
        if self.kl_placement == "reward":
            log.warning("kl_placement: reward drops the KL's own gradient (docs/equations.md); split is exact")

    def row_tokens(self) -> int:
        """All answers to the prompts of a micro-batch lie in one row, each behind its prompt; PTX packs in another."""
        longest = self.max_length + self.max_completion_length
        ptx = self.ptx_batch_size * self.max_length if self.ptx_kl_weight > 0 else 0
        return max(self.per_device_train_batch_size * self.num_generations * longest, ptx)

    def needs_reference(self) -> bool:
        """Whether the reference model is loaded: for the KL of rollouts, or of supervised data without a cache."""
        return self.beta > 0 or self.ptx_reference_cache is None

    def frozen_models(self) -> list[tuple[str, bool]]:
        reference = [(str(self.model_name_or_path), False)] if self.needs_reference() else []
        return reference + ([] if self.reward_model is None else [(self.reward_model, True)])


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """Terms policy, kl (both over response tokens) and ptx (over supervised tokens)."""

    model: PreTrainedModel
    config: GRPOConfig
    weights: Mapping[str, float]

    def counts(self, batch: RolloutBatch | PTXBatch) -> Mapping[str, float]:
        if isinstance(batch, PTXBatch):
            return {"ptx": float((batch.packed.labels[0, 1:] != IGNORE_INDEX).sum())}
        return {"policy": batch.count, "kl": batch.count}

    def terms(self, batch: RolloutBatch | PTXBatch) -> loop.LossTerms:
        own = own_tokens(self.model, batch.num_tokens)
        hidden, targets = predicted_tokens(hidden_states(self.model, batch.packed), batch.packed.labels, own)
        if isinstance(batch, PTXBatch):
            return self._ptx_terms(hidden, batch.ref)
        return self._policy_terms(hidden, targets, batch)

    def _ptx_terms(self, hidden: Tensor, ref: TopK) -> loop.LossTerms:
        head, ref = lm_head(self.model), ref.to(hidden.device)
        kl = linear_topk_kl_div(
            hidden, head.weight, ref, temperature=self.config.temperature, tail=self.config.kl_tail, **head.kwargs()
        )
        metrics = {"ptx/kl": (kl.detach().sum(), kl.numel()), "ptx/ref_mass": (ref_mass(ref).sum(), kl.numel())}
        return loop.LossTerms(sums={"ptx": kl.sum()}, metrics=metrics)

    def _policy_terms(self, hidden: Tensor, targets: Tensor, batch: RolloutBatch) -> loop.LossTerms:
        config, head, mesh = self.config, lm_head(self.model), mesh_of(self.model)
        own = slice(None)
        if mesh.sequence_group is not None:
            own = own_predictions(batch.packed.labels, own_tokens(self.model, batch.num_tokens))
        ref = None if batch.ref is None else batch.ref.to(hidden.device)
        out = linear_logprobs(
            hidden,
            head.weight,
            targets,
            ref=ref,
            temperature=config.temperature,
            tail=config.kl_tail,
            ignore_index=None,
            **head.kwargs(),
        )
        kl = torch.zeros_like(out.entropy) if out.kl is None else out.kl
        if batch.old_logprobs is None or batch.token_advantages is None:
            # Of all tokens of the row: an answer may lie on several ranks.
            batch.old_logprobs, kl_of_row = (_of_row(x.detach(), own, batch, mesh) for x in (out.logprobs, kl))
            batch.token_advantages = kl_penalty.token_advantages(
                batch.advantages, kl_of_row, batch.lengths, beta=config.beta, placement=config.kl_placement
            )
        policy = clipped_policy_loss(
            out.logprobs,
            batch.old_logprobs[own].to(hidden.device),
            batch.token_advantages[own].to(hidden.device),
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
        )
        weights = batch.token_weights[own].to(out.logprobs)
        sums = {"policy": (weights * policy.loss).sum()}
        if kl_penalty.kl_in_loss(config.kl_placement) and config.beta > 0:
            sums["kl"] = (weights * kl).sum()
        n = float(targets.numel())
        metrics: dict[str, tuple[Tensor | float, float]] = {
            "entropy": (out.entropy.sum(), n),
            "clip_ratio/low_mean": (policy.clipped_low.double().sum(), n),
            "clip_ratio/high_mean": (policy.clipped_high.double().sum(), n),
            **batch.metrics,
        }
        if ref is not None and out.policy_mass is not None:
            watched = {"kl": kl.detach(), "policy_mass": out.policy_mass.detach(), "ref_mass": ref_mass(ref)}
            metrics = {**{name: (values.sum(), n) for name, values in watched.items()}, **metrics}
        maxima = {"ratio/max_deviation": (policy.ratio - 1).abs().max()} if n else {}
        return loop.LossTerms(sums=sums, metrics=metrics, maxima=maxima)


def _of_row(values: Tensor, own: slice, batch: RolloutBatch, mesh: Mesh) -> Tensor:
    """[R] of a whole row from this rank's part of it."""
    if mesh.sequence_group is None:
        return values
    row = values.new_zeros(batch.token_weights.numel())
    row[own] = values
    return mesh.sum_over_sequence(row)


def ref_mass(ref: TopK) -> Tensor:
    """The reference's probability [n] of its own kept entries."""
    return torch.exp(torch.logsumexp(ref.values / ref.temperature, dim=-1) - ref.lse)


def run(config: GRPOConfig) -> Path:
    """Train the policy against rewards; returns the folder of the saved model."""
    source = str(config.model_name_or_path)
    check_top_k(source, config.kl_top_k)
    start = loop.begin(config, "grpo")
    if start.finished:
        return Path(config.output_dir)
    if config.rollout == "vllm":
        vllm_rollout.require(config)  # before anything large is loaded
    chat = Chat(load_tokenizer(source))
    mesh = start.mesh
    policy = load_causal_lm(start.model_path(source), config, mesh=mesh)
    check_head(policy)
    distribute(policy, config, mesh)
    end_generation_at(policy, chat.end_of_turn_id)
    plan = attach_segments(policy, config)
    judge = Judge.load(config.reward_model, config.reward_funcs, config.reward_weights, config, chat, mesh)
    ptx, ptx_cache = _ptx_source(config, chat, mesh)
    reference = None
    if config.needs_reference():
        reference = distribute(load_causal_lm(source, config, frozen=True, mesh=mesh), config, mesh)

    engine = None if config.rollout == "hf" else vllm_rollout.start(policy, config, mesh)
    answers = partial(_answers, policy if engine is None else engine, chat, config)

    @contextmanager
    def weights_ready() -> Iterator[None]:
        with gathered(policy) if engine is None else engine.ready(), judge.ready():
            yield

    experience = Experience(
        _asked(config, chat, mesh),
        ptx,
        reference,
        partial(answers, temperature=config.temperature),
        judge.score,
        ExperienceOptions(**{name: getattr(config, name) for name in ExperienceOptions.__slots__}),
        ptx_cache=ptx_cache,
        ready=weights_ready,
        max_steps=config.max_steps,
        mesh=mesh,
    )
    held_out = _prompts(config.eval_dataset_name, config, chat) if config.eval_dataset_name else []
    mesh.require_same("eval_dataset_name: the held-out data", items_fingerprint(held_out))
    evaluated = partial(answers, temperature=config.eval_temperature)
    training = loop.Training(
        config=config,
        start=start,
        model=policy,
        plan=plan,
        objective=PolicyObjective(policy, config, {"policy": 1.0, "kl": config.beta, "ptx": config.ptx_kl_weight}),
        source=experience,
        save_extra=chat.tokenizer.save_pretrained,
        evaluate=partial(_evaluate, held_out, evaluated, judge, weights_ready, mesh) if held_out else None,
    )
    with nullcontext() if engine is None else closing(engine):
        loop.train(training)
    return Path(config.output_dir)


def _answers(
    writer: PreTrainedModel | vllm_rollout.Engine,
    chat: Chat,
    config: GRPOConfig,
    asked: Sequence[Prompt],
    places: Sequence[tuple[int, int]],
    temperature: float,
) -> list[Completion]:
    """One answer per prompt; each is seeded by its place (rollout, number)."""
    ids, end = [prompt.ids for prompt in asked], chat.end_of_turn_id
    how: dict[str, Any] = {
        "seeds": [sampling_seed(config.seed, *place) for place in places],
        "end_ids": [end],
        "max_new_tokens": config.max_completion_length,
        "temperature": temperature,
        "top_p": config.top_p,
    }
    if isinstance(writer, vllm_rollout.Engine):
        return writer.generate(ids, **how)
    return generate(writer, ids, pad_id=end, batch_size=config.rollout_batch_size, **how)


def _evaluate(
    held_out: Sequence[Prompt],
    answers_to: Sampler,
    judge: Judge,
    weights_ready: Callable[[], AbstractContextManager[None]],
    mesh: Mesh,
) -> Mapping[str, float]:
    """Mean scores of one answer per held-out prompt."""

    def answers_of(some: Sequence[tuple[Prompt, tuple[int, int]]]) -> list[Completion]:
        return answers_to([prompt for prompt, _ in some], [place for _, place in some])

    def scores_of(some: Sequence[tuple[Prompt, Completion]]) -> list[dict[str, float]]:
        scores = judge.each([prompt for prompt, _ in some], [answer for _, answer in some])
        return [{name: float(values[i]) for name, values in scores.items()} for i in range(len(some))]

    with weights_ready():
        answers = mesh.spread([(prompt, (-1, index)) for index, prompt in enumerate(held_out)], answers_of)
        scores = mesh.spread(list(zip(held_out, answers, strict=True)), scores_of)
    return mean_rewards(
        held_out, {name: torch.tensor([one[name] for one in scores], dtype=torch.float64) for name in scores[0]}
    )


def _asked(config: GRPOConfig, chat: Chat, mesh: Mesh) -> ShuffledLoader[Prompt]:
    """The prompts of all ranks' steps."""
    return ShuffledLoader(
        _prompts(config.dataset_name, config, chat),
        per_step=config.step_size(mesh.dp),
        per_micro_batch=config.per_device_train_batch_size,
        epochs=config.num_train_epochs,
        seed=config.seed,
        max_steps=None if config.max_steps is None else math.ceil(config.max_steps / config.num_iterations),
    )


def _prompts(names: Sequence[str], config: GRPOConfig, chat: Chat) -> list[Prompt]:
    rows = read_rows(names, kind="prompt", on_bad_row=config.on_bad_row, columns=config.dataset_columns)
    return prompts(rows, chat, config.max_length, config.overlong, on_bad_row=config.on_bad_row)


def _ptx_source(config: GRPOConfig, chat: Chat, mesh: Mesh) -> tuple[PackedLoader | None, TopKReferenceCache | None]:
    """Packs of supervised samples, and the cache of the reference's top-K over them if there is one."""
    if config.ptx_kl_weight == 0:
        return None, None
    samples, cache = supervised_samples(config.ptx_dataset_name, config, chat), None
    if config.ptx_reference_cache is not None:
        cache = open_cache(config.ptx_reference_cache, cache_header(samples, config, chat.tokenizer))
        samples = with_cache_rows(samples, cache)
        read = (len(cache), len(samples), cache.header.dtype)
        log.info("ptx_reference_cache: %d rows of %d samples, values in %s", *read)
    loader = PackedLoader(
        samples,
        capacity=config.max_length,
        packs_per_step=config.ptx_batch_size,
        packs_per_micro_batch=config.ptx_batch_size,
        epochs=None,
        seed=config.seed + 1,
        mesh=mesh,
    )
    return loader, cache
