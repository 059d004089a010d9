"""Activation checkpointing: bytes alive at the worst moment, work done twice, time of a step; how long a sequence fits.

    peak         bytes above weights, gradients and token ids (checkpoint_models.py)
    predicted    the plan's own number, from a profile of a few tokens
    recomputed   FLOPs of a step above those without checkpointing / FLOPs of the layers' forward pass

`step` is a Llama-shaped model at one length, `blocks` a stack of MLPs that keep n = 3 times their input. Every way's
gradients are those of no checkpointing before it is timed: bit for bit on a CPU; on CUDA within 2 %, where attention
adds in any order, and against Hugging Face's, since nothing else may fit.

`longest` searches, by measuring, the most tokens that train within a budget for all that is alive: weights, gradients,
batch and activations. One step of 5 % further does not fit, measured as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.checkpoint_models import FlopCount, Shape, Subject, longest, subject
from benchmarks.checkpoint_ways import (
    DECREASING,
    NESTED,
    NONE,
    OFFLOAD,
    PER_LAYER,
    budgets,
    by_hand_of,
    uniform_of,
)
from benchmarks.lm_inputs import distance
from benchmarks.ways import Way

SECONDS = 2.0
COUNTED = 4096  # tokens that FLOPs are counted for: no checkpointing has to fit
TOLERANCE = 0.02  # where the order of additions is not fixed

BF16 = torch.bfloat16
NARROW = Shape(64, 48, 176, heads=4, key_heads=2)
WIDE = Shape(8192, 6, 28672, heads=64, key_heads=8, vocabulary=1024, dtype=BF16)  # Llama-3-70B's layers
DEEP = Shape(1024, 48, 2816, heads=16, key_heads=4, vocabulary=256, dtype=BF16)
QUICK = Shape(16, 8, 44, heads=2, key_heads=1)


@dataclass(frozen=True)
class Budgeted:
    """How long a sequence fits: a model, bytes for all that is alive, tokens to begin with."""

    shape: Shape
    budget: int
    first: int


STEPS = {"cpu": [(NARROW, 256)], "cuda": [(WIDE, 16384), (WIDE, 32768)], "quick": [(QUICK, 32)]}
BLOCKS = {
    "cpu": (Shape(64, 48, 192), 1024),
    "cuda": (Shape(2048, 48, 3 * 2048, dtype=BF16), 8192),
    "quick": (Shape(8, 48, 24), 64),
}
LONGEST = {
    "cpu": Budgeted(Shape(32, 48, 88, heads=4, key_heads=2), 12 * 2**20, 64),
    "cuda": Budgeted(DEEP, 6 * 2**30, 2048),
    "quick": Budgeted(QUICK, 2**19, 16),
}


def step_ways(device: str) -> list[Way]:
    offload = [OFFLOAD] if device == "cuda" else []  # on a CPU it frees nothing
    shares = (0.25, 0.5, 0.75) if device != "cuda" else (0.5,)
    by_hand = by_hand_of(2, 4) if device != "cuda" else by_hand_of(2)
    return [NONE, PER_LAYER, *by_hand, *uniform_of(1, 2, 4), DECREASING, NESTED, *offload, *budgets(*shares)]


BLOCK_WAYS = [NONE, *uniform_of(1, 2, 3, 4, 6, 8, 12), DECREASING]


def longest_ways(device: str) -> list[Way]:
    return [NONE, PER_LAYER, *uniform_of(2), DECREASING, NESTED, *([OFFLOAD] if device == "cuda" else [])]


def cases(device: str, quick: bool) -> Iterator[tuple[str, Way, Shape, int]]:
    """(case, way, model, tokens); for `longest`, tokens to begin with."""
    place = "quick" if quick else device
    for shape, tokens in STEPS[place]:
        yield from (("step", way, replace(shape, device=device), tokens) for way in step_ways(device))
    shape, tokens = BLOCKS[place]
    yield from (("blocks", way, replace(shape, device=device), tokens) for way in BLOCK_WAYS)
    shape, first = LONGEST[place].shape, LONGEST[place].first
    yield from (("longest", way, replace(shape, device=device), first) for way in longest_ways(device))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.getoption
    found = list(cases(options("--device"), options("--quick")))
    labels = [f"{case}-{tokens}-{way.name}".replace(" ", "_") for case, way, _, tokens in found]
    metafunc.parametrize(("case", "way", "shape", "tokens"), found, ids=labels)


@lru_cache(maxsize=1)
def right(shape: Shape, tokens: int) -> list[Tensor]:
    """Gradients, in host memory."""
    given = subject(shape)
    reference = PER_LAYER if shape.device == "cuda" and shape.heads else NONE
    with reference.run(given, tokens):
        given.step(given.sample(tokens))
    return [gradient.to("cpu", copy=True) for gradient in given.gradients]


@lru_cache(maxsize=1)
def without_checkpointing(shape: Shape, tokens: int) -> tuple[int, int]:
    """FLOPs of a step, and of the layers' forward pass."""
    given = subject(shape)
    with FlopCount() as count:
        given.step(given.sample(tokens))
    return count.total, given.forward_flops(tokens)


def check(given: Subject, gradients: list[Tensor]) -> None:
    """The gradients of the last step are those of no checkpointing."""
    for (name, _), found, expected in zip(given.model.named_parameters(), given.gradients, gradients, strict=True):
        if given.shape.device != "cuda":
            assert torch.equal(found, expected), f"another gradient of {name}"
            continue
        error = distance(found, expected.to(found.device))
        assert error < TOLERANCE, f"gradient of {name}: {error:.1e} relative to Hugging Face's"


def peak_and_recomputed(given: Subject, tokens: int, step_flops: int, forward_flops: int) -> dict[str, Any]:
    """Measured on the model as it is now."""
    with FlopCount() as count:
        peak = given.peak_bytes(tokens)
    if tokens > COUNTED:
        with FlopCount() as count:
            given.step(given.sample(COUNTED))
    return {"peak_bytes": peak, "recomputed": round((count.total - step_flops) / forward_flops, 4)}


def bench_checkpoint(measure: Any, attempt: Any, case: str, way: Way, shape: Shape, tokens: int) -> None:
    facts = {"case": case, "impl": way.name, "package": way.package, **shape.facts()}
    if case == "longest":
        facts["budget_bytes"] = next(
            given.budget for given in LONGEST.values() if given.shape == replace(shape, device=given.shape.device)
        )
    else:
        facts["tokens"] = tokens
    with attempt(ours=way.ours, **facts):
        given = subject(shape)
        if case == "longest":
            fitted(measure, way, given, tokens, facts)
            return
        gradients = right(shape, tokens)
        work = without_checkpointing(shape, min(tokens, COUNTED))
        sample = given.sample(tokens)
        with way.run(given, tokens) as plan:
            facts |= peak_and_recomputed(given, tokens, *work)
            if plan is not None:
                facts["predicted_bytes"] = plan.predicted_peak_bytes
                facts["predicted_recomputed"] = round(plan.predicted_recompute, 4)
            measure(
                lambda: given.step(sample),
                check=lambda _: check(given, gradients),
                seconds=SECONDS,
                once=shape.device == "cuda" and bool(shape.heads),  # seconds, and warm by now
                **facts,
            )


def fitted(measure: Any, way: Way, given: Subject, first: int, facts: dict[str, Any]) -> None:
    """The longest sequence within the budget, and one step of it."""
    gradients = right(given.shape, first)

    @cache
    def total_bytes(tokens: int) -> int:
        with way.run(given, tokens):
            try:
                return given.total_bytes(tokens)
            except torch.OutOfMemoryError:
                return 2**62

    tokens, too_many = longest(total_bytes, facts["budget_bytes"], first)
    sample = given.sample(tokens)
    facts |= {"tokens": tokens, "too_many": too_many, "total_bytes": total_bytes(tokens)}
    with way.run(given, tokens):
        given.step(given.sample(first))
        check(given, gradients)
        measure(lambda: given.step(sample), check=lambda _: None, once=True, **facts)
