"""Within the same bytes a planned model trains longer sequences than one that checkpoints every layer: measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks.checkpoint_models import Shape, Subject, longest
from benchmarks.checkpoint_ways import NESTED, NONE, PER_LAYER
from benchmarks.ways import Way

DEEP = Shape(16, 48, 44, heads=2, key_heads=1)
BUDGET = 3 * 2**20  # bytes for weights, gradients, token ids and activations
GAIN = 1.5


@pytest.fixture(scope="module")
def deep() -> Subject:
    return Subject(DEEP)


def total_bytes(way: Way, deep: Subject, tokens: int) -> int:
    with way.run(deep, tokens):
        return deep.total_bytes(tokens)


def test_a_planned_model_trains_half_as_many_tokens_again_within_a_budget(deep: Subject) -> None:
    fits, too_many = longest(lambda tokens: total_bytes(PER_LAYER, deep, tokens), BUDGET, 64)
    assert total_bytes(PER_LAYER, deep, fits) <= BUDGET < total_bytes(PER_LAYER, deep, too_many)
    assert too_many < 1.06 * fits
    longer = round(GAIN * too_many)
    assert total_bytes(NESTED, deep, longer) <= BUDGET
    assert total_bytes(NONE, deep, fits // 2) > BUDGET, "no checkpointing should need far more"


def test_its_gradients_are_those_of_no_checkpointing(deep: Subject) -> None:
    sample = deep.sample(24)
    deep.step(sample)
    expected = [gradient.clone() for gradient in deep.gradients]
    with NESTED.run(deep, 24) as plan:
        assert plan.num_layers == 48 and "nested" in plan.actions
        deep.step(sample)
    assert all(map(torch.equal, deep.gradients, expected))


def test_the_search_finds_neighbours_and_measures_both() -> None:
    asked = []

    def total(tokens: int) -> int:
        asked.append(tokens)
        return 1000 + 10 * tokens + (500 if tokens > 300 else 0)  # not quite a line

    fits, too_many = longest(total, 6000, 16)
    assert total(fits) <= 6000 < total(too_many) and too_many <= 1.05 * fits + 8
    assert {fits, too_many} <= set(asked[:-2])
    with pytest.raises(AssertionError, match="not even 16 tokens fit into 1,100 bytes"):
        longest(total, 1100, 16)
