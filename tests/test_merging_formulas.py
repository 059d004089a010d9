"""The pure functions on lists of tensors, against their formulas; saved models: test_merging.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nova_kernels.merging import linear, model_stock, task_arithmetic


def make_tensors(count: int = 3, shape: tuple[int, ...] = (5, 4)) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    base, shared = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    tunes = [base + shared + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return tunes, base


def test_linear_is_the_weighted_mean() -> None:
    tunes, _ = make_tensors()
    torch.testing.assert_close(linear(tunes), sum(tunes) / 3)
    torch.testing.assert_close(linear(tunes, [2, 1, 1], normalize=True), tunes[0] / 2 + tunes[1] / 4 + tunes[2] / 4)
    torch.testing.assert_close(linear(tunes, [2, -1, 1], normalize=False), 2 * tunes[0] - tunes[1] + tunes[2])
    assert torch.equal(linear(tunes, [0, 1, 0]), tunes[1])


def test_task_arithmetic_steps_from_the_base() -> None:
    tunes, base = make_tensors()
    moved = sum(tune - base for tune in tunes)
    torch.testing.assert_close(task_arithmetic(tunes, base, lam=0.3), base + 0.3 * moved)
    torch.testing.assert_close(task_arithmetic(tunes, base, normalize=True), sum(tunes) / 3)
    assert torch.equal(task_arithmetic(tunes, base, lam=0.0), base)
    forgotten = task_arithmetic(tunes[:1], base, [-1.0])
    torch.testing.assert_close(forgotten, 2 * base - tunes[0])


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_is_the_formula(filter_wise: bool) -> None:
    tunes, base = make_tensors(4)
    rows = range(5) if filter_wise else [slice(None)]
    for row in rows:
        deltas = [(tune - base)[row].flatten() for tune in tunes]
        cosines = [torch.cosine_similarity(a, b, 0) for i, a in enumerate(deltas) for b in deltas[:i]]
        cos = sum(cosines) / len(cosines)
        t = 4 * cos / (1 + 3 * cos)
        expected = t * (sum(tunes) / 4)[row] + (1 - t) * base[row]
        torch.testing.assert_close(model_stock(tunes, base, filter_wise=filter_wise)[row], expected)


def test_model_stock_limits() -> None:
    tunes, base = make_tensors(2)
    same = model_stock([tunes[0], tunes[0]], base)
    torch.testing.assert_close(same, tunes[0])
    assert torch.equal(model_stock([base, base], base), base)
    assert torch.equal(model_stock([base, tunes[0]], base), base)
    opposite = model_stock([tunes[0], 2 * base - tunes[0]], base)
    assert torch.equal(opposite, base)
    orthogonal = model_stock([base + torch.eye(5, 4), base + torch.eye(5, 4).roll(1, 1)], base)
    assert torch.equal(orthogonal, base)


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9])
def test_model_stock_does_not_depend_on_the_size_of_the_updates(scale: float) -> None:
    tunes, base = make_tensors(3)
    step = model_stock([base + scale * (tune - base) for tune in tunes], torch.zeros_like(base) + base) - base
    torch.testing.assert_close(step / scale, model_stock(tunes, base) - base, rtol=1e-5, atol=1e-5)


def test_one_row_tensors_have_one_angle() -> None:
    tunes, base = make_tensors(3, (7,))
    assert torch.equal(model_stock(tunes, base, filter_wise=True), model_stock(tunes, base))


def test_sums_are_float32_and_rounded_once() -> None:
    tensors = [torch.full((3,), value, dtype=torch.bfloat16) for value in (1.0, 2**-9, 2**-9)]
    total = linear(tensors, [1, 1, 1], normalize=False)
    assert total.dtype == torch.float32 and torch.equal(total, torch.full((3,), 1 + 2**-8))
    assert linear(make_tensors()[0]).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda t, b: linear(t, [1, 2, 1]), r"sum to 4, not 1; pass normalize=True", id="silent-rescaling"),
        pytest.param(lambda t, b: linear(t, [1, 2]), r"expected 3 weights.*got 2: \[1, 2\]", id="count"),
        pytest.param(lambda t, b: linear(t, [1, -2, 1], normalize=True), r"sum to 0 and cannot", id="zero-sum"),
        pytest.param(lambda t, b: linear(t, [math.nan, 1, 0]), r"must be finite", id="nan"),
        pytest.param(lambda t, b: linear([]), r"at least one tensor", id="none"),
        pytest.param(lambda t, b: linear([b, b[:2]]), r"tensor 1 has shape \[2, 4\]", id="shape"),
        pytest.param(lambda t, b: linear([b.long()]), r"tensor 0 is torch.int64", id="integers"),
        pytest.param(lambda t, b: model_stock([b], b), r"at least 2 tensors beside the base, got 1", id="one"),
        pytest.param(lambda t, b: task_arithmetic(t, b[:1]), r"tensor 3 has shape \[1, 4\]", id="base-shape"),
    ],
)
def test_wrong_tensors_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*make_tensors())
