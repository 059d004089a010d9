"""What a training run occupies on one device, and the plan of its activations.

With P trained parameters of b bytes, M of them under Muon, and F frozen ones (GRPO's reference, a reward model):

    weights          (P + F) b
    gradients        P b
    optimiser        2 (P - M) b + M b                        AdamW keeps two moments, Muon one
    logits chunk     2 * 4 * V min(tokens, rows of a chunk)   logits and their gradient in fp32
    activations      peak of the plan over one full row       a micro-batch is one row; one graph lives at a time

The logits chunk belongs to the loss of a plan: its line stands only where there is none. On several ranks these are
the shares of one of them (share.py), and beside them stands

    gathered         embedding, norms, heads of each model    whole as long as a micro-batch runs

The plan is made for the longest row a micro-batch can be, each of its tokens trained, on a model of fake tensors: they
have the training's device and dtypes, so that the same backends run under the same autocast, and no memory.

    segments: auto     the fastest plan with   activations <= memory_budget - everything else
    segments: sizes    these segments; none: everything is kept

Nothing here changes a result: gradients are the same bits under every plan. Generation's KV cache is not counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from nova_kernels.checkpoint import (
    ACTIONS,
    Action,
    Chain,
    InfeasibleBudgetError,
    SegmentPlan,
    StorageTracker,
    checkpoint_segments,
    format_bytes,
    plan_segments,
    profile_layers,
)
from nova_kernels.lm_head import chunk_rows
from nova_kernels.logprob import linear_logprobs
from nova_kernels.packing import pack_samples
from nova_kernels.topk_kl import TopK
from nova_train.config import ConfigError, TrainConfig, stage_name
from nova_train.model import Head, lm_head, mesh_of, model_without_weights, pick_device
from nova_train.optim import muon_names
from nova_train.sharding import is_sharded
from nova_train.share import Share, device_budget

log = logging.getLogger(__name__)

LOGITS = "logits chunk"
SAMPLE_TOKENS = 512  # of the row that is profiled, where nothing asks for more


class UnpredictableError(ConfigError):
    """A model whose activations cannot be known without its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPart:
    """One line of the estimate."""

    name: str
    num_bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What stays on the device, and what activations add at the worst moment of a micro-batch."""

    parts: list[MemoryPart]  # all but activations and what the loss holds
    activations: SegmentPlan  # for a full row
    tokens: int  # of a full row
    share: Share  # of it, on one rank
    chain_of: Callable[[int], Chain]  # what that costs, for a row of so many tokens
    budget: int | None  # bytes for everything; None: there was none

    @property
    def num_bytes(self) -> int:
        """The predicted peak of everything."""
        return resident_bytes(self.parts) + self.activations.predicted_peak_bytes

    def activation_bytes(self, tokens: int) -> int:
        """The predicted peak of activations for a row of this many tokens."""
        plan = self.activations
        chain = self.chain_of(tokens)
        return SegmentPlan.of(chain, plan.sizes, plan.actions, fsdp=plan.fsdp).predicted_peak_bytes

    def text(self) -> str:
        """The estimate as aligned lines with its sum, and the plan as a table."""
        shared = f" that {self.share.sp} ranks share" if self.share.sp > 1 else ""
        of_row = f"at the worst moment of a row of {self.tokens:,} tokens{shared}, as planned below"
        activations = MemoryPart(name="activations", num_bytes=self.activations.predicted_peak_bytes, formula=of_row)
        limit = "" if self.budget is None else f"of a budget of {format_bytes(self.budget)}"
        return f"{memory_text([*self.parts, activations], limit)}\n\n{self.activations.table()}"


def memory_text(parts: list[MemoryPart], remark: str = "and activations on top") -> str:
    """The parts as aligned lines with their sum."""
    total = MemoryPart(name="sum", num_bytes=resident_bytes(parts), formula=remark)
    return "\n".join(
        f"{part.name:<14} {format_bytes(part.num_bytes):>12}   {part.formula}".rstrip() for part in [*parts, total]
    )


def resident_bytes(parts: list[MemoryPart]) -> int:
    """The sum of the parts."""
    return sum(part.num_bytes for part in parts)


def estimate_memory(config: TrainConfig, *, ranks: int | None = None) -> list[MemoryPart]:
    """All but activations, by the formulas above, from the models' config files; no weights are loaded.

    Args:
        ranks: of the training; None: as many as were started.
    """
    share, meta = Share.of(config, ranks), torch.device("meta")
    model = _trained(config, meta)
    size = getattr(torch, config.dtype).itemsize
    others = [model_without_weights(path, config, meta, reward_head=head) for path, head in config.frozen_models()]
    muon: list[nn.Parameter] = []
    if config.optim == "muon":
        named = list(model.named_parameters())
        names = muon_names(model, named)
        muon = [p for name, p in named if name in names]
    vocabulary: int = model.config.vocab_size
    rows = min(share.tokens(config.row_tokens()), chunk_rows(vocabulary, torch.device(pick_device(config.device))))
    logits = rows * vocabulary if config.has_logits() else 0
    whole = sum(share.gathered_bytes(each) for each in (model, *others))
    per_rank = f" / {share.ranks} ranks" if share.ranks > 1 else ""

    def part(name: str, times: int, parameters: Iterable[nn.Parameter], without: Iterable[nn.Parameter] = ()) -> Any:
        counted, left_out = list(parameters), list(without)
        total = _count(counted) - _count(left_out)
        num_bytes = times * size * (share.numel(counted) - share.numel(left_out))
        return MemoryPart(
            name=name, num_bytes=num_bytes, formula=f"{times} x {total:,} parameters x {size} bytes{per_rank}"
        )

    parts = [
        part("weights", 1, model.parameters()),
        part("frozen models", 1, [p for other in others for p in other.parameters()]),
        part("gradients", 1, model.parameters()),
        part("AdamW", 2, model.parameters(), muon),
        part("Muon", 1, muon),
        MemoryPart(name="gathered", num_bytes=whole, formula="embedding, norms and heads, whole on every rank"),
        MemoryPart(name=LOGITS, num_bytes=8 * logits, formula=f"2 x {logits:,} logits x 4 bytes"),
    ]
    return [line for line in parts if line.num_bytes]


def plan_memory(config: TrainConfig, *, ranks: int | None = None, budget: int | None = None) -> MemoryPlan:
    """The plan of `config.segments` and what it comes to; no weights are loaded.

    Args:
        ranks: of the training; None: as many as were started.
        budget: bytes for everything, with segments: auto; None: `device_budget`.

    Raises:
        UnpredictableError: the model cannot be profiled.
        ConfigError: sizes that do not fit its layers; a memory_budget below the lowest peak there is, which is named.
    """
    share, row = Share.of(config, ranks), config.row_tokens()
    place = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device(pick_device(config.device)):
        model = share.as_gathered(_trained(config, place), config.bf16)
    try:
        sample = _sample(model, share.tokens(row), place)
        with share.keeping_gradients(model):
            profile = profile_layers(model, sample, loss=_trial(config))
    except (ValueError, RuntimeError) as error:
        raise UnpredictableError(
            f"segments: the activations of {type(model).__name__} cannot be predicted ({_first_line(error)}); "
            "give segments as a number of layers, which needs no prediction"
        ) from error
    unseen = _logits_within_the_loss(config, model, share)
    profile = replace(profile, loss=profile.loss.plus(unseen), under_autocast=profile.under_autocast.plus(unseen))

    def chain_of(row: int) -> Chain:
        return share.chain(profile.at(share.tokens(row)), model, row, config)

    parts = [part for part in estimate_memory(config, ranks=ranks) if part.name != LOGITS]
    chain = chain_of(row)
    if config.segments == "auto":
        budget = device_budget(config) if budget is None else budget
        allow = [a for a in ACTIONS if a != "offload" or profile.device != "cpu"]  # a CPU's memory is the host's
        plan = _fastest(config, chain, share, budget, resident_bytes(parts), allow)
    elif config.segments is None:
        plan = SegmentPlan.of(chain, [profile.num_layers], "keep", fsdp=share.fsdp)
    else:
        with _attached(model, config.segments) as handle:
            plan = SegmentPlan.of(chain, handle.sizes, fsdp=share.fsdp)
    return MemoryPlan(
        parts=parts,
        activations=plan,
        tokens=row,
        share=share,
        chain_of=chain_of,
        budget=budget if config.segments == "auto" else None,
    )


def _logits_within_the_loss(config: TrainConfig, model: PreTrainedModel, share: Share) -> int:
    """Bytes of the chunk that the head's operator makes and frees inside itself, where no profile sees it.

    On a CPU the logits of few rows leave the operator, and were seen.
    """
    rows = chunk_rows(model.config.vocab_size, torch.device(pick_device(config.device)))
    tokens = share.tokens(config.row_tokens())
    seen = pick_device(config.device) == "cpu" and tokens <= rows
    return 0 if seen or not config.has_logits() else 8 * min(rows, tokens) * model.config.vocab_size


def attach_segments(model: PreTrainedModel, config: TrainConfig) -> MemoryPlan | None:
    """Attach the segments that the config asks for; the plan they follow, or None where there is nothing to follow.

    Raises:
        ConfigError: as `plan_memory`; a model that cannot be profiled is refused with segments: auto alone.
    """
    if config.segments is None:
        return None
    if config.segments == "auto":
        budget = min(mesh_of(model).gather(device_budget(config)))  # one plan for all ranks
        plan = plan_memory(config, budget=budget)
        _attached(model, plan.activations)
    else:
        _attached(model, config.segments)
        try:
            plan = plan_memory(config)
        except UnpredictableError as error:
            log.warning("%s", error)
            return None
    log.info(
        "segments of %s layers: a row of %s tokens is predicted to take %s, %s in all; %.0f %% of forward runs twice",
        " ".join(map(str, plan.activations.sizes)),
        f"{plan.tokens:,}",
        format_bytes(plan.activations.predicted_peak_bytes),
        format_bytes(plan.num_bytes),
        100 * plan.activations.predicted_recompute,
    )
    return plan


class MemoryMeter:
    """Measures what a plan predicted, without touching a result.

    On a GPU the peak of everything between two log lines; on a CPU, where a plan was made, the exact bytes of the
    activations of the first micro-batch, which takes longer for it.
    """

    def __init__(self, model: PreTrainedModel, plan: MemoryPlan | None) -> None:
        self._model, self._plan = model, plan
        self._on_gpu = model.device.type == "cuda"
        self._measured: dict[str, float] = {}
        self._first = True

    @contextmanager
    def row(self, tokens: int) -> Iterator[None]:
        """Around forward and backward of a micro-batch of this many tokens."""
        first, self._first = self._first, False
        # A tracker of storages does not see FSDP2 free and fill again what it gathers.
        if self._plan is None or self._on_gpu or not first or is_sharded(self._model):
            yield
            return
        with _counted(self._model) as tracker:
            yield
        predicted = self._plan.activation_bytes(tokens)
        log.info(
            "activations of a row of %s tokens: predicted %s (if all are trained), measured %s",
            f"{tokens:,}",
            format_bytes(predicted),
            format_bytes(tracker.peak),
        )
        self._measured = {"activation_bytes": tracker.peak, "predicted_activation_bytes": predicted}

    def figures(self) -> Mapping[str, float]:
        """For timing.jsonl: bytes measured since the last call."""
        if not self._on_gpu:
            measured, self._measured = self._measured, {}
            return measured
        peak = torch.cuda.max_memory_allocated(self._model.device)
        torch.cuda.reset_peak_memory_stats(self._model.device)
        if self._plan is not None and not self._measured:
            log.info(
                "memory at most: predicted %s, measured %s", format_bytes(self._plan.num_bytes), format_bytes(peak)
            )
        self._measured = {"peak_memory_bytes": peak}
        return self._measured


@contextmanager
def _counted(model: nn.Module) -> Iterator[StorageTracker]:
    """Counts what is born inside, but for the parameters' gradients, which the estimate has in a line of its own."""
    places: dict[Tensor, Tensor] = {
        p: torch.empty_like(p) for p in model.parameters() if p.requires_grad and p.grad is None
    }

    def move(parameter: Tensor) -> None:
        if parameter.grad is not None and parameter in places:
            parameter.grad = places.pop(parameter).copy_(parameter.grad)

    hooks = [p.register_post_accumulate_grad_hook(move) for p in places]
    try:
        with StorageTracker() as tracker:
            yield tracker
    finally:
        for hook in hooks:
            hook.remove()


def _fastest(
    config: TrainConfig, chain: Chain, share: Share, budget: int, resident: int, allow: list[Action]
) -> SegmentPlan:
    try:
        return plan_segments(chain, budget_bytes=max(budget - resident, 1), allow=allow, fsdp=share.fsdp)
    except InfeasibleBudgetError as error:
        floor = error.nearest.predicted_peak_bytes
        raise ConfigError(
            f"memory_budget {format_bytes(budget)}: weights, gradients and optimiser take "
            f"{format_bytes(resident)} and a row of {config.row_tokens():,} tokens at least {format_bytes(floor)} "
            f"more; give at least {resident + floor} bytes, or lower max_length or per_device_train_batch_size"
        ) from error


def _attached(model: PreTrainedModel, segments: int | list[int] | SegmentPlan) -> Any:
    """The handle of `checkpoint_segments`, or what is wrong with the key."""
    try:
        return checkpoint_segments(model, segments)
    except ValueError as error:
        raise ConfigError(f"segments: {error}, or auto") from error


def _trained(config: TrainConfig, place: AbstractContextManager[Any]) -> PreTrainedModel:
    return model_without_weights(str(config.model_name_or_path), config, place, reward_head=_is_reward(config))


def _is_reward(config: TrainConfig) -> bool:
    return stage_name(type(config)) == "reward"


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _sample(model: PreTrainedModel, longest: int, place: FakeTensorMode) -> dict[str, Any]:
    """A part of the longest row as models are called with it; boundaries are read on the CPU, so they are real.

    Up to a number of rows the head keeps its logits on a CPU. The profile is made of the row, its half and its quarter:
    all lie on one side of that number, where the longest row of the training lies.
    """
    kept = chunk_rows(model.config.vocab_size, model.device)
    tokens = min(SAMPLE_TOKENS, max(longest, 8)) if longest <= kept else max(SAMPLE_TOKENS, 4 * (kept + 1))
    batch = pack_samples([{"input_ids": [0] * tokens}])
    ids, positions = (place.from_tensor(x.to(model.device)) for x in (batch.input_ids, batch.position_ids))
    return {**batch.attention_kwargs(), "input_ids": ids, "position_ids": positions}


def _trial(config: TrainConfig) -> Callable[[PreTrainedModel, Mapping[str, Any]], Tensor]:
    """The memory of a stage's loss, if not its value: every token is trained."""
    entries: int = getattr(config, "kl_top_k", 0)  # of the reference, in reinforcement learning

    def loss(model: PreTrainedModel, sample: Mapping[str, Any]) -> Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.bf16):
            hidden: Tensor = model.base_model(**sample).last_hidden_state[0]
        total = hidden.new_zeros(())
        head = Head(model.get_input_embeddings().weight, None, None)
        if _is_reward(config):
            total = total + model.score(hidden[:2]).sum()
        else:
            head = lm_head(model)
        if not config.has_logits():
            return total
        tokens, device = hidden.shape[0], hidden.device
        ref = None
        if entries:
            ids = torch.zeros(tokens, entries, dtype=torch.int32, device=device)
            values = torch.zeros(tokens, entries, device=device)
            ref = TopK(ids=ids, values=values, lse=values[:, 0], temperature=1.0)
        rows = hidden.index_select(0, torch.arange(tokens, device=device))
        targets = torch.zeros(tokens, dtype=torch.int64, device=device)
        terms = linear_logprobs(rows, head.weight, targets, ref=ref, ignore_index=None, **head.kwargs())
        return total + terms.logprobs.sum() + (0 if terms.kl is None else terms.kl.sum())

    return loss
