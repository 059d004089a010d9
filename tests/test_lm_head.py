"""lm_head: the chunk walk gives the logits and gradients of the plain definition, the same bits on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.lm_head import Head, HeadGradients
from numerics import assert_as_accurate

HEADS = [
    pytest.param(False, None, None, id="plain"),
    pytest.param(True, None, 37, id="bias-padded-vocabulary"),
    pytest.param(True, 2.5, None, id="bias-softcap"),
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, "cpu", 5 * 41)


def make_inputs(dtype: torch.dtype, bias: bool, num_rows: int = 13) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, vector = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((num_rows, 7), (41, 7), (41,))
    )
    return hidden, weight, vector if bias else None


def test_chunks_cover_the_rows() -> None:
    assert lm_head.chunk_rows(500, torch.device("cpu")) == 2**22 // 500
    assert lm_head.chunk_rows(500, torch.device("cuda")) == 2**27 // 500
    assert lm_head.chunk_rows(2**23, torch.device("cpu")) == 1
    assert [(part.start, part.stop) for part in lm_head.chunks(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert list(lm_head.chunks(0, 3)) == []


@pytest.mark.parametrize(("bias", "softcap", "vocab_size"), HEADS)
def test_walk_equals_definition(small_chunks: None, bias: bool, softcap: float | None, vocab_size: int | None) -> None:
    hidden, weight, vector = make_inputs(torch.float64, bias)
    truth = lm_head.dense_logits(hidden, weight, vector, softcap, vocab_size)
    upstream = torch.linspace(0.5, 1.5, truth.numel(), dtype=torch.float64).view_as(truth)
    expected = torch.autograd.grad((truth * upstream).sum(), [hidden, weight, *([] if vector is None else [vector])])

    head = Head.prepare(hidden, weight, vector, softcap, vocab_size)
    gradients = HeadGradients(head, hidden, weight, vector, None, (True, True, True))
    buffer = head.buffer(13)
    assert len(buffer) == 205 // head.vocabulary
    with torch.no_grad():
        for part in lm_head.chunks(13, len(buffer)):
            chunk = head.rows(hidden, None, part)
            logits = head.logits(chunk, buffer)
            torch.testing.assert_close(logits, truth[part], rtol=1e-13, atol=1e-13)
            gradients.add(part, chunk, upstream[part] * head.softcap_slope(logits))
    for actual, wanted in zip(gradients.result(), expected, strict=False):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_same_bits_wherever_the_tensors_lie() -> None:
    """Matrix products of one row, or of float64, pick other kernels for memory off a 16-byte boundary."""
    weight = torch.randn(50, 64, dtype=torch.float64)
    hidden = torch.randn(3, 64, dtype=torch.float64)

    def moved(tensor: Tensor) -> Tensor:
        place = tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor)
        return place.copy_(tensor)

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        head = Head.prepare(hidden, weight, None, None, None)
        return head.logits(head.rows(hidden, None, slice(0, 3)), head.buffer(3))

    assert moved(weight).data_ptr() % 16 == 8
    assert torch.equal(logits(hidden, weight), logits(moved(hidden), moved(weight)))
    assert torch.equal(logits(hidden, weight), logits(hidden.t().contiguous().t(), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_arithmetic_under_autocast(dtype: torch.dtype) -> None:
    hidden, weight, vector = make_inputs(dtype, bias=True)
    plain = hidden.double() @ weight.double().t() + vector.double()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        head = Head.prepare(hidden, weight, vector, None, None)
        with lm_head.without_autocast(hidden.device):
            logits = head.logits(head.rows(hidden, None, slice(0, 13)), head.buffer(13))
        dense = lm_head.dense_logits(hidden, weight, vector, None, None)
    for actual in (logits, dense):
        assert actual.dtype == torch.float32
        assert_as_accurate(actual, plain.detach().float(), plain.detach())


def test_weight_gradient_adds_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, "cpu", 41)
    hidden, weight, _ = make_inputs(torch.bfloat16, bias=False, num_rows=700)
    upstream = torch.linspace(0.5, 1.5, 700 * 41).view(700, 41)
    head = Head.prepare(hidden, weight, None, None, None)
    gradients = HeadGradients(head, hidden, weight, None, None, (False, True, False))
    for part in lm_head.chunks(700, 1):
        gradients.add(part, head.rows(hidden.detach(), None, part), upstream[part])
    truth = upstream.double().t() @ hidden.detach().double()
    not_needed, actual, _ = gradients.result()
    assert not_needed is None and actual is not None and actual.dtype == torch.bfloat16
    assert_as_accurate(actual, truth.bfloat16(), truth, slack=1.01)


def test_take_and_spread_are_inverse() -> None:
    values = torch.randn(5, 2)
    rows = lm_head.kept_rows(torch.tensor([True, False, True, True, False]))
    assert rows is not None and rows.tolist() == [0, 2, 3]
    assert lm_head.kept_rows(torch.ones(5, dtype=torch.bool)) is None
    assert torch.equal(lm_head.take(values, rows, slice(1, 3)), values[[2, 3]])
    assert torch.equal(lm_head.take(values, None, slice(1, 3)), values[1:3])
    back = lm_head.spread(values[[0, 2, 3]], rows, 5)
    assert torch.equal(back[[0, 2, 3]], values[[0, 2, 3]]) and not back[[1, 4]].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 7)}, r"hidden \[N, H\] and weight \[V, H\], got \[1, 3, 7\] and \[41, 7\]; flat"),
        ({"hidden": torch.zeros(3, 6)}, r"got \[3, 6\] and \[41, 7\]"),
        ({"hidden": torch.zeros(3, 7, dtype=torch.int64)}, "floating-point hidden and weight, got torch.int64"),
        ({"bias": torch.zeros(40)}, r"expected bias of shape \[V\] = \[41\], got \[40\]"),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0; pass None"),
        ({"vocab_size": 42}, "vocab_size must lie between 1 and the 41 rows of weight, got 42"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    inputs = {"hidden": torch.zeros(3, 7), "weight": torch.zeros(41, 7), "bias": None, "softcap": None}
    with pytest.raises(ValueError, match=r"^my_op: .*" + message):
        lm_head.check_head("my_op", **{**inputs, "vocab_size": None, **change})
