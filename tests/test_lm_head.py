"""lm_head: the two walks give the statistics and gradients of the plain definition, the same bits on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.lm_head import Head, RowTerms, rows, walk
from numerics import OpWatch, assert_as_accurate

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


def test_blocks_of_the_backward() -> None:
    """All rows and as many columns as the bound allows; fewer rows where columns would become too few."""
    cpu = torch.device("cpu")
    assert lm_head.arithmetic.tile_shape(2048, 50_000, 4096, cpu) == (2048, 2048)
    assert lm_head.arithmetic.tile_shape(100, 500, 4096, cpu) == (100, 500)
    assert lm_head.arithmetic.tile_shape(100_000, 50_000, 64, cpu) == (4096, 1024)
    assert lm_head.arithmetic.tile_shape(8192, 151_936, 4096, torch.device("cuda")) == (8192, 8192)
    assert lm_head.arithmetic.tile_shape(256, 151_936, 4096, torch.device("cuda")) == (256, 16_384)
    assert lm_head.arithmetic.tile_shape(0, 7, 4, cpu) == (1, 7)


@pytest.mark.parametrize(("bias", "softcap", "vocab_size"), HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_walks_equal_definition(
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    bias: bool,
    softcap: float | None,
    vocab_size: int | None,
) -> None:
    """Statistics, kept logits and gradients; forward in chunks of rows, backward in blocks of rows and columns."""
    monkeypatch.setattr(lm_head.arithmetic, "NARROWEST", 30)
    hidden, weight, vector = make_inputs(torch.float64, bias)
    targets, ids = torch.arange(13) * 3, torch.arange(13 * 4).view(13, 4).int() % 45 - 3  # some are outside
    logits = lm_head.dense_logits(hidden, weight, vector, softcap, vocab_size)
    vocabulary = logits.shape[1]
    inside = (ids >= 0) & (ids < vocabulary)
    kept = logits.gather(1, ids.where(inside, 0).long()).where(inside, 0.0)
    log_p = (logits / temperature).log_softmax(1)
    target = torch.where(targets < vocabulary, log_p.gather(1, targets.clamp(max=vocabulary - 1)[:, None])[:, 0], 0.0)
    a, b = torch.linspace(0.5, 1.5, 13, dtype=torch.float64), torch.linspace(-1, 2, 52, dtype=torch.float64).view(13, 4)
    leaves = [hidden, weight, *([] if vector is None else [vector])]
    expected = torch.autograd.grad((a * target).sum() + (b * kept).sum(), leaves)

    with torch.no_grad():
        head = Head.prepare(weight, vector, softcap, vocabulary, torch.float64)
        stats = walk.forward(hidden, head, temperature, targets, ids, entropy=True, in_triton=False)
        assert stats.target is not None and stats.kept is not None
        torch.testing.assert_close(rows.log_sum_exp(stats), (logits / temperature).logsumexp(1))
        torch.testing.assert_close(stats.kept, kept)
        entropy = stats.total.log() - stats.weighted / stats.total
        torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(1))
        known = targets < vocabulary
        torch.testing.assert_close(stats.target[known], (target + (logits / temperature).logsumexp(1))[known])
        slope = 1.0 if softcap is None else lm_head.softcap_slope(stats.kept, softcap)
        a = a * known
        terms = RowTerms(stats.maximum, -a / (temperature * stats.total), a / temperature, targets, b * slope, ids)
        gradients = walk.backward(
            *(hidden, head, temperature, terms),
            weight=weight,
            bias=vector,
            needed=(True, True, True),
            in_triton=False,
        )
    for actual, wanted in zip(gradients, expected, strict=False):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-12)


def test_same_bits_wherever_the_tensors_lie() -> None:
    """Matrix products of one row, or of float64, pick other kernels for memory off a 16-byte boundary."""
    weight = torch.randn(50, 64, dtype=torch.float64)
    hidden = torch.randn(3, 64, dtype=torch.float64)

    def moved(tensor: Tensor) -> Tensor:
        place = tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor)
        return place.copy_(tensor)

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        head = Head.prepare(weight, None, None, 50, torch.float64)
        return head.products(head.hidden(hidden), head.buffer(3))

    assert moved(weight).data_ptr() % 16 == 8
    assert torch.equal(logits(hidden, weight), logits(moved(hidden), moved(weight)))
    assert torch.equal(logits(hidden, weight), logits(hidden.t().contiguous().t(), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_arithmetic_under_autocast(dtype: torch.dtype) -> None:
    hidden, weight, vector = make_inputs(dtype, bias=True)
    plain = hidden.double() @ weight.double().t() + vector.double()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        head = Head.prepare(weight, vector, None, 41, lm_head.factor_dtype(hidden, weight))
        logits = head.logits_(head.products(head.hidden(hidden), head.buffer(13)))
        dense = lm_head.dense_logits(hidden, weight, vector, None, None)
    for actual in (logits, dense):
        assert actual.dtype == torch.float32
        assert_as_accurate(actual, plain.detach().float(), plain.detach())


@pytest.mark.parametrize("narrowest", [1, 41])
def test_weight_gradient_adds_up_in_float32(monkeypatch: pytest.MonkeyPatch, narrowest: int) -> None:
    """In one product, or in a sum over blocks of rows; no float32 copy of all of it where it is the smaller."""
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, "cpu", 700)
    monkeypatch.setattr(lm_head.arithmetic, "NARROWEST", narrowest)
    hidden, weight, _ = make_inputs(torch.bfloat16, bias=False, num_rows=700)
    by_kept = torch.linspace(0.5, 1.5, 700 * 3).view(700, 3)
    ids = torch.stack([torch.randperm(41)[:3] for _ in range(700)]).int()
    upstream = torch.zeros(700, 41).scatter_(1, ids.long(), by_kept)
    head = Head.prepare(weight, None, None, 41, torch.float32)
    terms = RowTerms(None, None, None, None, by_kept, ids)
    needed = (False, True, False)
    found = walk.backward(
        head.hidden(hidden), head, 1.0, terms, weight=weight.detach(), bias=None, needed=needed, in_triton=False
    )
    truth = upstream.double().t() @ hidden.detach().double()
    assert found.hidden is None and found.weight is not None and found.weight.dtype == torch.bfloat16
    assert_as_accurate(found.weight, truth.bfloat16(), truth, slack=1.01)


def test_backward_holds_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, "cpu", 3000)
    monkeypatch.setattr(lm_head.arithmetic, "NARROWEST", 10)
    hidden, weight = torch.randn(300, 4), torch.randn(500, 4)
    head = Head.prepare(weight, None, None, 500, torch.float32)
    ones = torch.ones(300)
    terms = RowTerms(ones, ones, ones, torch.zeros(300, dtype=torch.int64), None, None)
    with OpWatch() as seen:
        walk.backward(hidden, head, 1.0, terms, weight=weight, bias=None, needed=(True, True, False), in_triton=False)
    assert seen.elements == 3000  # [N, V] would have 150,000


def test_take_and_spread_are_inverse() -> None:
    values = torch.randn(5, 2)
    rows = lm_head.kept_rows(torch.tensor([True, False, True, True, False]))
    assert rows is not None and rows.tolist() == [0, 2, 3]
    assert lm_head.kept_rows(torch.ones(5, dtype=torch.bool)) is None and lm_head.kept_rows(None) is None
    assert torch.equal(lm_head.take(values, rows), values[[0, 2, 3]])
    assert lm_head.take(values, None) is values
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
        ({"vocab_start": 5}, "vocab_start 5 without a group"),
        ({"vocab_size": 42}, "vocab_size must lie between 1 and the 41 rows of weight, got 42"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    inputs = {"hidden": torch.zeros(3, 7), "weight": torch.zeros(41, 7), "bias": None, "softcap": None}
    with pytest.raises(ValueError, match=r"^my_op: .*" + message):
        lm_head.check_head("my_op", **{**inputs, "vocab_size": None, **change})
