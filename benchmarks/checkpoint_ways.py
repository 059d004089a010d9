"""Ways of checkpointing a model, each a context manager: way(subject, tokens) -> the plan that is attached, or None.

Hugging Face     model.gradient_checkpointing_enable, non-reentrant: every layer on its own
by hand          k layers as one under torch.utils.checkpoint, non-reentrant: what is written without a library
nova_kernels     checkpoint_segments with a plan: k layers per segment, or what plan_segments finds
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.checkpoint_models import Subject
from benchmarks.ways import Way
from nova_kernels.checkpoint import Action, SegmentPlan, checkpoint_segments, plan_segments

MakePlan = Callable[[Subject, int], SegmentPlan]
Attach = Callable[[Subject, int], AbstractContextManager[SegmentPlan | None]]


@contextmanager
def nothing(subject: Subject, tokens: int) -> Iterator[SegmentPlan | None]:
    yield SegmentPlan.of(subject.profile, [1] * subject.shape.layers, "keep", tokens=tokens)


@contextmanager
def per_layer(subject: Subject, tokens: int) -> Iterator[None]:
    model: Any = subject.model
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5
        enable, disable = model.activation_checkpointing_enable, model.activation_checkpointing_disable
    else:
        enable, disable = model.gradient_checkpointing_enable, model.gradient_checkpointing_disable
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        disable()


class Merged(nn.Module):
    """Consecutive layers as one."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Any, **kwargs: Any) -> Any:
        return checkpoint(self.run, hidden, use_reentrant=False, **kwargs)

    def run(self, hidden: Any, **kwargs: Any) -> Any:
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        return hidden


@contextmanager
def by_hand(subject: Subject, tokens: int, *, k: int) -> Iterator[None]:
    holder: Any = getattr(subject.model, "model", subject.model)
    own = holder.layers
    holder.layers = nn.ModuleList(Merged(list(own[at : at + k])) for at in range(0, len(own), k))
    try:
        yield
    finally:
        holder.layers = own


@contextmanager
def planned(subject: Subject, tokens: int, *, make: MakePlan) -> Iterator[SegmentPlan]:
    plan = make(subject, tokens)
    with checkpoint_segments(subject.model, plan):
        yield plan


def uniform(subject: Subject, tokens: int, *, k: int) -> SegmentPlan:
    full, rest = divmod(subject.shape.layers, k)
    return SegmentPlan.of(subject.profile, [k] * full + [rest] * (rest > 0), tokens=tokens)


def leanest(subject: Subject, tokens: int, *, allow: tuple[Action, ...]) -> SegmentPlan:
    return plan_segments(subject.profile, tokens=tokens, allow=allow)


def under_budget(subject: Subject, tokens: int, *, share: float, allow: tuple[Action, ...]) -> SegmentPlan:
    """The fastest plan within a share of what is alive without checkpointing."""
    whole = SegmentPlan.of(subject.profile, [1] * subject.shape.layers, "keep", tokens=tokens)
    budget = round(share * whole.predicted_peak_bytes)
    return plan_segments(subject.profile, tokens=tokens, budget_bytes=budget, allow=allow)


def ours(name: str, make: Callable[..., SegmentPlan], **options: Any) -> Way:
    attach = partial(planned, make=partial(make, **options))
    return Way(f"nova_kernels, {name}", attach, "nova-kernels")


NONE = Way("no checkpointing", nothing)
PER_LAYER = Way("Hugging Face, per layer", per_layer, "transformers")
DECREASING = ours("lowest peak, segments", leanest, allow=("keep", "segment"))
NESTED = ours("lowest peak, nested", leanest, allow=("keep", "segment", "nested"))
OFFLOAD = ours("lowest peak, offload", leanest, allow=("keep", "segment", "nested", "offload"))


def by_hand_of(*counts: int) -> list[Way]:
    return [Way(f"torch.utils.checkpoint, k = {k}", partial(by_hand, k=k)) for k in counts]


def uniform_of(*counts: int) -> list[Way]:
    return [ours(f"k = {k}", uniform, k=k) for k in counts]


def budgets(*shares: float, allow: tuple[Action, ...] = ("keep", "segment", "nested")) -> list[Way]:
    return [ours(f"budget {share:.0%}".replace("%", " %"), under_budget, share=share, allow=allow) for share in shares]
