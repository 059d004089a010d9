"""Experience for GRPO: prompts -> n answers each -> scores -> advantages -> packed rows with the reference's top-K.

A rollout is used for `num_iterations` optimiser steps. Old log-probabilities and the KL-to-go are those of the
trainer's own forward at the first of them, over the very packs of the update, so the ratio is exactly 1 there and the
KL of a model with itself exactly 0. Generation is seeded per (run, rollout, answer), whatever the batching.

Several ranks answer and score a part of a rollout's prompts each, and exchange the answers; advantages are those of the
whole rollout. Each packs its own micro-batches of the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nova_kernels.packing import IGNORE_INDEX, PackedBatch, pack_samples
from nova_kernels.topk_kl import TopK, TopKReferenceCache
from nova_train.advantages import RunningMoments, group_advantages
from nova_train.loader import PackedLoader, ShuffledLoader
from nova_train.losses import own_predictions
from nova_train.mesh import Mesh, Repeat, mapped
from nova_train.reference_topk import cached_top_k, top_k_of
from nova_train.rollout import Completion
from nova_train.samples import Prompt
from nova_train.sharding import with_weights

Metrics = dict[str, tuple[float, float]]


@dataclass(kw_only=True, slots=True)
class RolloutBatch:
    """A micro-batch of answers: whole groups, one packed row. R = response tokens that count."""

    packed: PackedBatch  # labels hold the response tokens
    lengths: Tensor  # int64 [S], response tokens of each answer
    advantages: Tensor  # fp32 [S]
    token_weights: Tensor  # fp32 [R], each token's weight in the sum of the loss
    count: float  # what the sum is divided by, over all micro-batches of the step
    ref: TopK | None  # the reference's top-K at the positions that predict response tokens, [R, K]; this rank's of them
    old_logprobs: Tensor | None = None  # [R], filled by the first forward
    token_advantages: Tensor | None = None  # [R], likewise
    metrics: Metrics = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.packed.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class PTXBatch:
    """A micro-batch of supervised samples with the reference's top-K at the trained positions."""

    packed: PackedBatch
    ref: TopK

    @property
    def num_tokens(self) -> int:
        return self.packed.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperienceOptions:
    """How answers are sampled and weighed; the keys of GRPOConfig of the same names."""

    num_generations: int
    temperature: float
    kl_top_k: int
    loss_type: str
    advantage_baseline: str
    scale_rewards: str
    advantage_eps: float
    reward_std_floor: float
    mask_truncated_completions: bool
    max_completion_length: int
    num_iterations: int


# prompts, seeds -> answers; (prompts, answers) -> scores [n] and metrics. Both supplied by the stage.
Sampler = Callable[[Sequence[Prompt], Sequence[tuple[int, int]]], list[Completion]]
Scorer = Callable[[Sequence[Prompt], Sequence[Completion]], tuple[Tensor, Metrics]]


class Experience:
    """The source of GRPO's optimiser steps: fresh rollouts every `num_iterations` steps, PTX batches at every step."""

    def __init__(
        self,
        prompts: ShuffledLoader[Prompt],
        ptx: PackedLoader | None,
        ref_policy: PreTrainedModel | None,
        sample: Sampler,
        score: Scorer,
        options: ExperienceOptions,
        *,
        ptx_cache: TopKReferenceCache | None = None,
        ready: Callable[[], AbstractContextManager[Any]] = nullcontext,
        max_steps: int | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Nothing is drawn yet.

        Args:
            prompts: of all ranks' steps.
            ref_policy: the reference; None: rollouts go without its KL, and PTX batches need `ptx_cache`.
            ptx_cache: the reference's top-K of the samples of `ptx`, which carry their rows of it.
            ready: entered around answering and scoring, on all ranks together.
        """
        if ref_policy is None and ptx is not None and ptx_cache is None:
            raise ValueError("Experience: PTX batches need a reference: give ref_policy or ptx_cache")
        self._prompts, self._ptx, self._ref_policy, self._ptx_cache = prompts, ptx, ref_policy, ptx_cache
        self._sample, self._score, self._ready = sample, score, ready
        self._options, self._max_steps = options, max_steps
        self._mesh = mesh or Mesh()
        self._moments = RunningMoments()
        self._rollouts = 0
        self._left = 0  # optimiser steps that the current rollout still serves
        self._batches: list[RolloutBatch | Repeat[RolloutBatch]] = []

    def __len__(self) -> int:
        steps = len(self._prompts) * self._options.num_iterations
        return steps if self._max_steps is None else min(steps, self._max_steps)

    @property
    def identity(self) -> str:
        return " ".join(source.identity for source in (self._prompts, self._ptx) if source is not None)

    def next_step(self) -> list[Any]:
        """This rank's micro-batches: RolloutBatch and PTXBatch, or a Repeat of one."""
        if self._left == 0:
            self._batches = self._collect(self._prompts.next_step())
            self._left = self._options.num_iterations
            self._rollouts += 1
        self._left -= 1
        ptx = [] if self._ptx is None else [mapped(self._with_reference, batch) for batch in self._ptx.next_step()]
        return [*self._batches, *ptx]

    def _collect(self, micro_batches: Sequence[Any]) -> list[RolloutBatch | Repeat[RolloutBatch]]:
        options, n = self._options, self._options.num_generations
        prompts = [prompt for micro in micro_batches for prompt in micro for _ in range(n)]
        completions, scores, metrics = self._answered(prompts)
        self._moments.update(scores)
        groups = scores.view(-1, n)
        advantages = group_advantages(
            groups,
            baseline=options.advantage_baseline,
            scale_rewards=options.scale_rewards,
            eps=options.advantage_eps,
            spread_floor=options.reward_std_floor * self._moments.std,
        ).view(-1)
        lengths = [len(c.ids) for c in completions]
        rollout: Metrics = {
            "reward": (float(scores.sum()), len(scores)),
            "reward_std": (float(groups.std(dim=1).sum()), len(groups)),
            "frac_reward_zero_std": (float((groups == groups[:, :1]).all(dim=1).sum()), len(groups)),
            "completions/mean_length": (float(sum(lengths)), len(lengths)),
            "completions/clipped_ratio": (float(sum(not c.finished for c in completions)), len(completions)),
        }
        ends = list(itertools.accumulate(n * len(micro) for micro in micro_batches))
        parts = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]

        def pack(part: slice) -> RolloutBatch:
            return self._pack(prompts[part], completions[part], advantages[part])

        batches = [mapped(pack, part) for part in self._mesh.share(parts)]
        if isinstance(batches[0], RolloutBatch) and self._mesh.is_main:
            batches[0].metrics = metrics | rollout
        return batches

    def _answered(self, prompts: Sequence[Prompt]) -> tuple[list[Completion], Tensor, Metrics]:
        """All answers, their scores fp32 [n] and metrics, on every rank."""
        mesh, n = self._mesh, self._options.num_generations
        groups = [list(range(first, first + n)) for first in range(0, len(prompts), n)]
        own: Metrics = {}

        def answer(some: Sequence[list[int]]) -> list[list[Completion]]:
            chosen = [index for group in some for index in group]
            drawn = self._sample([prompts[index] for index in chosen], [(self._rollouts, index) for index in chosen])
            return [drawn[first : first + n] for first in range(0, len(drawn), n)]

        def score(some: Sequence[list[int]]) -> list[list[float]]:
            chosen = [index for group in some for index in group]
            scores, found = self._score([prompts[i] for i in chosen], [completions[i] for i in chosen])
            own.update(found)
            return scores.view(-1, n).tolist()

        with self._ready():
            completions = [one for group in mesh.spread(groups, answer) for one in group]
            scores = torch.tensor([one for group in mesh.spread(groups, score) for one in group])
        metrics: Metrics = {}
        for part in mesh.gather(own):
            for name, (total, count) in part.items():
                before = metrics.get(name, (0.0, 0.0))
                metrics[name] = (before[0] + total, before[1] + count)
        return completions, scores, metrics

    def _pack(self, prompts: Sequence[Prompt], completions: Sequence[Completion], advantages: Tensor) -> RolloutBatch:
        options = self._options
        kept = [c.finished or not options.mask_truncated_completions for c in completions]
        samples = []
        for prompt, completion, keep in zip(prompts, completions, kept, strict=True):
            ids = np.asarray([*prompt.ids, *completion.ids], dtype=np.int64)
            labels = ids.copy()
            labels[: len(prompt.ids) if keep else None] = IGNORE_INDEX
            samples.append({"input_ids": ids, "labels": labels})
        packed = pack_samples(samples)
        lengths = torch.tensor([len(c.ids) if keep else 0 for c, keep in zip(completions, kept, strict=True)])
        weights, count = token_weights(lengths, options.loss_type, options.max_completion_length)
        return RolloutBatch(
            packed=packed,
            lengths=lengths,
            advantages=advantages,
            token_weights=weights,
            count=count,
            ref=self._reference(packed),
        )

    def _with_reference(self, packed: PackedBatch) -> PTXBatch:
        own = own_predictions(packed.labels, self._mesh.own_tokens(packed.num_tokens))
        ref = self._reference(packed) if self._ptx_cache is None else cached_top_k(self._ptx_cache, packed, own)
        assert ref is not None, "checked when the experience was made"
        return PTXBatch(packed=packed, ref=ref)

    def _reference(self, packed: PackedBatch) -> TopK | None:
        """The frozen policy's top-K at every trained position, from the same packs and chunks as the update."""
        if self._ref_policy is None:
            return None
        model, options = self._ref_policy, self._options
        return with_weights(model, lambda: top_k_of(model, packed, options.kl_top_k, options.temperature))

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks: the micro-batches of the whole step, in order."""
        return {
            "prompts": self._prompts.state_dict(),
            "ptx": None if self._ptx is None else self._ptx.state_dict(),
            "moments": self._moments.state_dict(),
            "rollouts": self._rollouts,
            "left": self._left,
            "batches": self._whole_step() if self._left else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])
        if self._ptx is not None:
            self._ptx.load_state_dict(state["ptx"])
        self._moments.load_state_dict(state["moments"])
        self._rollouts, self._left = state["rollouts"], state["left"]
        self._batches = [mapped(self._restored, saved) for saved in self._mesh.share(state["batches"])]

    def _whole_step(self) -> list[dict[str, Any]]:
        ranks = self._mesh.gather([_to_state(batch) for batch in self._batches if isinstance(batch, RolloutBatch)])
        turns: dict[int, dict[str, Any]] = {}
        for rank, states in enumerate(ranks):
            for turn, saved in enumerate(states):
                place = turn * self._mesh.dp + rank // self._mesh.sp
                turns[place] = saved if place not in turns else _joined(turns[place], saved)
        return [turns[place] for place in sorted(turns)]

    def _restored(self, saved: Mapping[str, Any]) -> RolloutBatch:
        """A batch of the saved step with this rank's part of the reference."""
        batch = _from_state(saved)
        if not self._mesh.is_main:
            batch.metrics = {}
        if batch.ref is not None:
            own = own_predictions(batch.packed.labels, self._mesh.own_tokens(batch.num_tokens))
            ref = batch.ref
            batch.ref = TopK(ids=ref.ids[own], values=ref.values[own], lse=ref.lse[own], temperature=ref.temperature)
        return batch


def token_weights(lengths: Tensor, loss_type: str, max_completion_length: int) -> tuple[Tensor, float]:
    """How the policy loss is aggregated: fp32 weight of each response token [R], and the count that divides the sum.

    dapo      sum over tokens / tokens                                    (global token mean)
    grpo      mean over answers of the mean over their tokens
    dr_grpo   sum over tokens / (answers * max_completion_length)         (a constant, whatever the lengths)
    """
    answers = int((lengths > 0).sum())
    ones = torch.ones(int(lengths.sum()), dtype=torch.float32)
    if loss_type == "dapo":
        return ones, float(ones.numel())
    if loss_type == "grpo":
        return ones / lengths.repeat_interleave(lengths), float(answers)
    if loss_type == "dr_grpo":
        return ones, float(answers * max_completion_length)
    raise ValueError(f"loss_type must be dapo, grpo or dr_grpo, got {loss_type!r}")


def _to_state(batch: RolloutBatch) -> dict[str, Any]:
    """A rollout batch as tensors and plain types, for a checkpoint between two inner iterations."""
    packed, ref = batch.packed, batch.ref
    return {
        "packed": [packed.input_ids, packed.labels, packed.position_ids, packed.cu_seqlens, packed.max_seqlen],
        "ref": None if ref is None else [ref.ids, ref.values, ref.lse, ref.temperature],
        "lengths": batch.lengths,
        "advantages": batch.advantages,
        "token_weights": batch.token_weights,
        "count": batch.count,
        "old_logprobs": batch.old_logprobs,
        "token_advantages": batch.token_advantages,
        "metrics": {name: list(pair) for name, pair in batch.metrics.items()},
    }


def _joined(row: dict[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of ranks that split its row, with the next one's part of the reference behind."""
    if row["ref"] is not None:
        parts = zip(row["ref"][:3], part["ref"][:3], strict=True)
        row["ref"] = [*(torch.cat([a, b.to(a.device)]) for a, b in parts), row["ref"][3]]
    return row


def _from_state(saved: Mapping[str, Any]) -> RolloutBatch:
    ids, labels, positions, cu_seqlens, longest = saved["packed"]
    ref = None
    if saved["ref"] is not None:
        top_ids, values, lse, temperature = saved["ref"]
        ref = TopK(ids=top_ids, values=values, lse=lse, temperature=temperature)
    rest = {name: value for name, value in saved.items() if name not in ("packed", "ref", "metrics")}
    return RolloutBatch(
        packed=PackedBatch(
            input_ids=ids, labels=labels, position_ids=positions, cu_seqlens=cu_seqlens, max_seqlen=longest
        ),
        ref=ref,
        metrics={name: (pair[0], pair[1]) for name, pair in saved["metrics"].items()},
        **rest,
    )
