"""The one loop: every stage that trains runs through `train`.

An optimiser step takes a list of micro-batches. A stage's objective names its loss terms; each is a sum over items, and
exactly one place (here) divides it by the term's global count, known before the first backward of the step:

    loss = sum_terms  weight_term * (sum over all micro-batches) / (count over all micro-batches)

so the gradient does not depend on how a batch is cut into micro-batches, nor over how many ranks they are spread: the
counts are those of all ranks, and gradients are summed over them. Every rank runs equally many micro-batches, some of
them repeats that add nothing.

Everything a step depends on is in the saved state: a run that is killed and started again gives the same bytes as one
that was not.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nova_train import state
from nova_train.config import TrainConfig, fingerprint, identity
from nova_train.memory import MemoryMeter, MemoryPlan
from nova_train.mesh import Mesh, Repeat, counted, join
from nova_train.metrics import MetricsLog, Window
from nova_train.model import pick_device
from nova_train.optim import Optimizers, learning_rate_factor
from nova_train.sharding import full_state_dict, full_tensor, with_weights
from nova_train.terminal import progress, stop_requests

log = logging.getLogger(__name__)

_TOKENS = "tokens"  # counted beside the terms of the loss

MicroBatch = TypeVar("MicroBatch")
Consumed = TypeVar("Consumed", contravariant=True)
Produced = TypeVar("Produced", covariant=True)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What one micro-batch contributes: `sums` with gradient; without, `metrics` as (sum, count), and `maxima`."""

    sums: Mapping[str, Tensor]
    metrics: Mapping[str, tuple[Tensor | float, float]] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol[Consumed]):
    """The loss of a stage, as named terms."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each term in the loss."""

    def counts(self, batch: Consumed) -> Mapping[str, float]:
        """The number of items of each term in a micro-batch, without running the model."""

    def terms(self, batch: Consumed) -> LossTerms:
        """The sum of each term over a micro-batch, and metrics."""


class Source(Protocol[Produced]):
    """Where the micro-batches of each optimiser step come from."""

    def __len__(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def next_step(self) -> Sequence[Produced | Repeat[Produced]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the step in progress was completed and saved; the same command continues."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"interrupted after step {step}; saved in {folder}; the same command continues from there")
        self.step = step
        self.folder = folder


class DivergenceError(RuntimeError):
    """The gradient is infinite or not a number; nothing was updated with it."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a run begins: fresh, from a checkpoint, or not at all because it is finished."""

    stage: str
    finished: bool
    checkpoint: Path | None
    mesh: Mesh
    identity: Mapping[str, Any]  # what the run's results depend on

    def model_path(self, fresh: str) -> str:
        """Where the trained model is loaded from: the checkpoint if there is one."""
        return str(self.checkpoint) if self.checkpoint is not None else fresh


def begin(config: TrainConfig, stage: str) -> Start:
    """Claim the output folder, fix threads and seeds, and find the checkpoint to continue from."""
    mesh = join(config.sequence_parallel_size, device=pick_device(config.device))
    config = replace(config, global_batch_size=config.step_size(mesh.dp))
    mesh.require_same("the configuration", identity(config))

    def claim() -> tuple[bool, Path | None]:
        state.claim_folder(config, stage)
        if state.finished_fingerprint(config.output_dir) is not None:
            return True, None
        return False, state.find_checkpoint(config)

    finished, checkpoint = mesh.on_main(claim)
    if mesh.is_main and config.step_size(mesh.dp) <= config.per_device_train_batch_size * (mesh.dp - 1):
        log.warning(
            "%s: a step of %d is less than %d data-parallel groups take with per_device_train_batch_size %d: some of "
            "them only wait; lower it, or raise global_batch_size or sequence_parallel_size",
            stage, config.step_size(mesh.dp), mesh.dp, config.per_device_train_batch_size,
        )  # fmt: skip
    torch.set_num_threads(mesh.cpu_threads(config.num_threads))
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    return Start(stage, finished=finished, checkpoint=checkpoint, mesh=mesh, identity=identity(config))


@dataclass(kw_only=True)
class Training(Generic[MicroBatch]):
    """One training run: what `train` needs besides the configuration.

    plan: of the model's activations, whose prediction is measured and logged.
    save_extra: writes what a stage keeps beside the model (tokenizer, reward statistics) into a folder.
    evaluate: metrics of held-out data, called every `eval_steps` and at the end; must not use the global generators.
    """

    config: TrainConfig
    start: Start
    model: PreTrainedModel
    objective: Objective[MicroBatch]
    source: Source[MicroBatch]
    plan: MemoryPlan | None = None
    save_extra: Callable[[Path], None]
    evaluate: Callable[[], Mapping[str, float]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # goes into finished.json

    def __post_init__(self) -> None:
        self.mesh = self.start.mesh
        self.mesh.require_same(f"{self.start.stage}: the data of the run", self.source.identity)
        self.optimizers = Optimizers(self.model, self.config)
        self.window = Window()
        self.meter = MemoryMeter(self.model, self.plan)
        self.total_steps = len(self.source)
        self.step = 0
        self.tokens = 0
        self.lines: int | None = None  # of metrics.jsonl
        unnamed = {name: value for name, value in self.start.identity.items() if name != "output_dir"}
        self.fingerprint = fingerprint({"stage": self.start.stage, **unnamed})

    def restore(self, checkpoint: Path) -> None:
        """Everything but the model's weights, which were loaded from the checkpoint already."""
        saved = state.load_trainer(checkpoint)
        if saved["run"] != self.fingerprint:
            raise state.StateError(
                f"resume_from_checkpoint {checkpoint}: it belongs to a run with another configuration; "
                "continue that run with its own, or start from its model with model_name_or_path"
            )
        self.step, self.tokens, self.lines = saved["step"], saved["tokens"], saved["lines"]
        if state.has_sharded_weights(checkpoint):
            state.read_sharded_optimizers(checkpoint, self.model, self.optimizers.by_name)
        else:
            self.optimizers.load_state_dict(saved["optimizers"])
        self.source.load_state_dict(saved["source"])
        if self.mesh.is_main:  # what all ranks have counted
            self.window.load_state_dict(saved["window"])
        state.restore_rng(saved["rng"])

    def save(self) -> Path:
        """A checkpoint of the step just completed."""
        trainer = {
            "run": self.fingerprint,
            "step": self.step,
            "tokens": self.tokens,
            "lines": self.lines,
            "source": self.source.state_dict(),
            "window": Window.merged(self.mesh.gather(self.window.state_dict())).state_dict(),
            "rng": state.rng_state(),
        }
        if self.mesh.size == 1:
            trainer["optimizers"] = self.optimizers.state_dict()
        return state.save_checkpoint(
            self.config.output_dir,
            self.step,
            self.write_model if self.mesh.size == 1 else self.write_shards,
            trainer,
            keep=self.config.save_total_limit,
            mesh=self.mesh,
        )

    def write_shards(self, folder: Path) -> None:
        """This rank's part of the model and the optimisers; the first rank adds what is not tensors."""

        def write_rest() -> None:
            self.model.config.save_pretrained(folder)
            if self.model.can_generate():
                self.model.generation_config.save_pretrained(folder)
            self.save_extra(folder)

        self.mesh.on_main(write_rest)
        state.write_sharded(folder, self.model, self.optimizers.by_name)

    def write_model(self, folder: Path) -> None:
        """The model as Hugging Face saves it, and the stage's own files."""
        weights = None if self.mesh.size == 1 else full_state_dict(self.model, self.mesh)

        def write() -> None:
            self.model.save_pretrained(folder, state_dict=weights)
            self.save_extra(folder)

        self.mesh.on_main(write)


def train(run: Training[Any]) -> None:
    """Run to the last step, save the result into output_dir and mark it finished.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM on any rank, after the step in progress was saved. A second Ctrl-C stops at
            once.
        DivergenceError: gradients that are not finite (the last checkpoint stays).
    """
    config = run.config
    if run.start.checkpoint is not None:
        run.restore(run.start.checkpoint)
        run.mesh.on_main(state.drop_newer, config.output_dir, run.step)
    metrics = MetricsLog(
        config.output_dir if run.mesh.is_main else None,
        step=run.step,
        lines=run.lines,
        report_to=config.report_to,
        run_name=config.output_dir,
    )
    shown = run.mesh.is_main and not config.disable_progress
    with progress(run.start.stage, run.step, run.total_steps, shown=shown) as advance, stop_requests() as stop_asked:
        while run.step < run.total_steps:
            started = time.perf_counter()
            tokens = train_step(run)
            run.step += 1
            run.tokens += tokens
            seconds = time.perf_counter() - started
            if run.step % config.logging_steps == 0 or run.step == run.total_steps:
                window = Window.merged(run.mesh.gather(run.window.take()))
                metrics.write(run.step, {**window.figures(), "num_tokens": run.tokens})
                speed = {"step_time": seconds, "tokens_per_second": tokens / seconds}
                metrics.write_timing(run.step, {**speed, **run.meter.figures()})
            last = run.step == run.total_steps
            due = config.eval_steps is not None and run.step % config.eval_steps == 0
            if run.evaluate is not None and due and not last:
                metrics.write(run.step, run.evaluate())
            advance(tokens)
            run.lines = metrics.lines
            if run.mesh.any(stop_asked()):
                raise Interrupted(run.step, run.save())
            if run.evaluate is not None if last else run.step % config.save_steps == 0:
                run.save()  # before the closing evaluation too, so that nothing is lost if it is cut off
        if run.evaluate is not None:
            metrics.write(run.step, run.evaluate())
    run.write_model(Path(config.output_dir))
    run.mesh.on_main(
        state.mark_finished,
        config.output_dir,
        fingerprint(run.start.identity),
        steps=run.step,
        tokens=run.tokens,
        **run.facts,
    )


def train_step(run: Training[Any]) -> int:
    """One optimiser step; returns the tokens it processed."""
    batches = run.source.next_step()
    tokens = accumulate_gradients(run.objective, batches, run.window, run.meter.row, model=run.model, mesh=run.mesh)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not torch.isfinite(norm):
        raise DivergenceError(
            f"{run.config.output_dir}: the gradient norm is {float(norm)} at step {run.step + 1}; "
            "lower learning_rate, or look at the batch (metrics.jsonl has the steps before)"
        )
    if run.config.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.max_grad_norm, norm)
    factor = learning_rate_factor(run.step, run.total_steps, run.config)
    run.optimizers.step(factor)
    if run.mesh.is_main:
        run.window.add("grad_norm", norm, 1)
        run.window.add("learning_rate", run.config.learning_rate * factor, 1)
    return tokens


def accumulate_gradients(
    objective: Objective[Any],
    batches: Sequence[Any],
    window: Window,
    around: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    *,
    model: nn.Module | None = None,
    mesh: Mesh | None = None,
) -> int:
    """Backward of one optimiser step over its micro-batches; the only place that divides a loss.

    Args:
        batches: this rank's; all ranks have equally many.
        around: entered for each micro-batch, with its tokens.
        model: whose weights are sharded over the ranks of `mesh`; None: one process.

    Returns:
        the number of tokens in the micro-batches of all ranks.
    """
    mesh = mesh or Mesh()
    counts = dict.fromkeys(objective.weights, 0.0) | {_TOKENS: 0.0}
    for batch, counts_here in map(counted, batches):
        if counts_here:
            counts[_TOKENS] += batch.num_tokens
            for name, count in objective.counts(batch).items():
                counts[name] += count
    counts = mesh.total(counts)
    tokens = int(counts.pop(_TOKENS))
    computed: dict[str, None] = {}  # terms, in order: one of weight 0 may be left out
    for batch, counts_here in map(counted, batches):
        with around(batch.num_tokens):
            computed |= _backward(objective, batch, counts, window, model, factor=float(counts_here))
    if mesh.is_main:
        window.add("loss", 0.0, 1)
        for name in computed:
            window.add(f"loss/{name}", 0.0, counts[name])
    return tokens


def _backward(
    objective: Objective[Any],
    batch: Any,
    counts: Mapping[str, float],
    window: Window,
    model: nn.Module | None,
    factor: float,
) -> dict[str, None]:
    """Forward and backward of one micro-batch, its gradient times a factor; nothing of its graph is left afterwards.

    Returns:
        the names of the terms that it has.
    """

    def compute() -> tuple[Mapping[str, Tensor], Mapping[str, tuple[Tensor | float, float]], Mapping[str, Tensor]]:
        terms = objective.terms(batch)
        return terms.sums, terms.metrics, terms.maxima

    sums, metrics, maxima = compute() if model is None else with_weights(model, compute)
    parts = {
        name: objective.weights[name] * total / counts[name]
        for name, total in sums.items()
        if counts.get(name, 0.0) > 0
    }
    if parts:  # a micro-batch may hold nothing that counts, such as answers that were all cut off
        loss = torch.stack([part.reshape(()) for part in parts.values()]).sum()
        if loss.requires_grad:
            (loss * factor if factor != 1.0 else loss).backward()
        if factor:
            window.add("loss", loss, 0)
    if not factor:
        return dict.fromkeys(parts)
    for name in parts:
        window.add(f"loss/{name}", sums[name], 0)
    for name, (value, count) in metrics.items():
        window.add(name, value, count)
    for name, value in maxima.items():
        window.add_maximum(name, value)
    return dict.fromkeys(parts)
