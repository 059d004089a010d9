"""topk_kl from hidden states: the chunk walk against the definition, its bits and its memory."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nova_kernels import BackendUnavailableError, TopK, lm_head
from nova_kernels.topk_kl import dense, linear_ops, linear_topk_kl_div, linear_topk_select, topk_kl_div, union
from numerics import OpWatch, assert_as_accurate, undecorate

DIRECTIONS = pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
TAILS = pytest.mark.parametrize("tail", ["none", "bucket"])
MASK = torch.tensor([True, True, False, True, False, True, True, True, False, True, True])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, "cpu", 4 * 37)


def make_head(dtype: torch.dtype = torch.float64, num_rows: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy hidden, weight, bias, and the reference's hidden."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((num_rows, 6), (41, 6), (41,), (num_rows, 6))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2].requires_grad_(), tensors[3]


@DIRECTIONS
@TAILS
@pytest.mark.parametrize(("softcap", "temperature", "mask"), [(None, 1.0, None), (2.0, 0.7, MASK), (None, 1.3, MASK)])
def test_linear_equals_definition(
    small_chunks: None, direction: str, tail: str, softcap: float | None, temperature: float, mask: Tensor | None
) -> None:
    hidden, weight, bias, ref_hidden = make_head()
    head = {"bias": bias, "softcap": softcap, "vocab_size": 37, "temperature": temperature, "mask": mask}
    tops = [linear_topk_select(ref_hidden, weight, 8, backend=b, **head) for b in ("dense", "reference")]
    assert torch.equal(tops[0].ids, tops[1].ids) and not tops[0].values.requires_grad
    torch.testing.assert_close(tops[0].values, tops[1].values)
    torch.testing.assert_close(tops[0].lse, tops[1].lse)
    results = []
    for backend in ("dense", "reference"):
        kl = linear_topk_kl_div(hidden, weight, tops[0], direction=direction, tail=tail, backend=backend, **head)
        upstream = torch.linspace(0.5, 1.5, 11, dtype=torch.float64)
        results.append((kl, *torch.autograd.grad((kl * upstream).sum(), [hidden, weight, bias])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    if mask is not None:
        assert not results[0][0][~mask].any() and not results[0][1][~mask].any()
        assert (tops[0].ids[~mask] == -1).all() and (tops[0].lse[~mask] == -math.inf).all()


@DIRECTIONS
@TAILS
def test_linear_gradcheck(small_chunks: None, direction: str, tail: str) -> None:
    hidden, weight, bias, ref_hidden = make_head(num_rows=5)
    options = {"softcap": 3.0, "temperature": 0.8}
    ref = linear_topk_select(ref_hidden, weight, 6, bias=bias, **options)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_topk_kl_div(hidden, weight, ref, bias=bias, direction=direction, tail=tail, **options)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@DIRECTIONS
@TAILS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_linear_kl_of_a_model_with_itself_is_zero(
    small_chunks: None, dtype: torch.dtype, direction: str, tail: str
) -> None:
    hidden, weight, bias, _ = make_head(dtype)
    for mask in (None, MASK):
        head = {"bias": bias, "softcap": 2.0, "temperature": 0.7, "mask": mask}
        ref = linear_topk_select(hidden, weight, 8, **head)
        options = {"direction": direction, "tail": tail, **head}
        kl = linear_topk_kl_div(hidden, weight, ref, backend="dense", **options)
        assert (kl == 0).all()
        assert not any(g.any() for g in torch.autograd.grad(kl.sum(), [hidden, weight, bias]))
        with torch.no_grad():
            assert torch.equal(kl, linear_topk_kl_div(hidden, weight, ref, backend="dense", **options))
            for backend in ("union", "gather") if tail == "none" else ():  # other products: rounding, never negative
                rounding = linear_topk_kl_div(hidden, weight, ref, backend=backend, **options)
                assert (rounding >= 0).all() and rounding.max() < 1e-12


@TAILS
def test_linear_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch, tail: str) -> None:
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, "cpu", 2000)
    hidden, weight = torch.randn(300, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    undecorate(monkeypatch, linear_ops)
    with OpWatch() as seen:
        ref = linear_topk_select(hidden, weight, 5)
        linear_topk_kl_div(hidden, weight, ref, tail=tail, backend="dense").sum().backward()
    assert seen.elements == 2000  # hidden has 1200 elements, [N, V] would have 30,000


@DIRECTIONS
@TAILS
def test_linear_unused_slots(small_chunks: None, direction: str, tail: str) -> None:
    """A reference without most of the vocabulary: its unused slots have id -1, and row -1 of the weight is real."""
    hidden, weight, bias, ref_hidden = make_head()
    few = torch.where(torch.arange(41) % 9 == 4, bias.detach(), -math.inf)
    ref = linear_topk_select(ref_hidden, weight, 8, bias=few)
    assert ref.ids[0].tolist() == [4, 13, 22, 31, 40, -1, -1, -1]
    results = []
    for backend in ("dense", "reference"):
        kl = linear_topk_kl_div(
            hidden, weight, ref, bias=bias, softcap=2.0, direction=direction, tail=tail, backend=backend
        )
        upstream = torch.linspace(0.5, 1.5, 11, dtype=torch.float64)
        results.append((kl, *torch.autograd.grad(kl, [hidden, weight, bias], upstream)))
    for actual, expected in zip(*results, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_linear_frozen_weight_and_empty_input() -> None:
    hidden, weight, _, ref_hidden = make_head()
    ref = linear_topk_select(ref_hidden, weight, 8)
    full = torch.autograd.grad(linear_topk_kl_div(hidden, weight, ref).sum(), [hidden, weight])
    (alone,) = torch.autograd.grad(linear_topk_kl_div(hidden, weight.detach(), ref).sum(), hidden)
    assert torch.equal(alone, full[0])
    (alone,) = torch.autograd.grad(linear_topk_kl_div(hidden.detach(), weight, ref).sum(), weight)
    assert torch.equal(alone, full[1])
    nothing = linear_topk_kl_div(hidden[:0], weight, linear_topk_select(hidden[:0], weight, 8))
    assert nothing.shape == (0,)
    kl = linear_topk_kl_div(hidden, weight, ref, mask=torch.zeros(11, dtype=torch.bool))
    assert not kl.any() and not torch.autograd.grad(kl.sum(), hidden)[0].any()


def test_linear_refusals() -> None:
    hidden, weight, _, _ = make_head()
    ref = linear_topk_select(hidden, weight, 8)
    with pytest.raises(ValueError, match="linear_topk_select: k must not exceed the vocabulary of 37, got 40"):
        linear_topk_select(hidden, weight, 40, vocab_size=37)
    with pytest.raises(ValueError, match=r"linear_topk_select: expected mask bool \[11\], got torch.bool \[3\]"):
        linear_topk_select(hidden, weight, 8, mask=MASK[:3])
    with pytest.raises(ValueError, match=r"linear_topk_kl_div: expected a reference with rows \[4\], got \[11\]"):
        linear_topk_kl_div(hidden[:4], weight, ref)
    with pytest.raises(ValueError, match="unknown backend 'onion'"):
        linear_topk_kl_div(hidden, weight, ref, backend="onion")
    for backend in ("union", "gather"):
        with pytest.raises(BackendUnavailableError, match="tail='bucket' needs the logits of the whole vocabulary"):
            linear_topk_kl_div(hidden, weight, ref, tail="bucket", backend=backend)
    beyond = TopK(ids=ref.ids + 1, values=ref.values, lse=ref.lse)
    for backend in ("dense", "union", "gather", "reference"):
        with pytest.raises(
            ValueError, match="linear_topk_kl_div: reference id 41 is beyond the policy's vocabulary of 41"
        ):
            linear_topk_kl_div(hidden, weight, beyond, backend=backend)


@pytest.mark.parametrize("path", [dense, union], ids=["dense", "union"])
@pytest.mark.parametrize("common", [0.0, 8.0])
def test_rounded_gradients_do_not_show_what_all_rows_share(path: ModuleType, common: float) -> None:
    """bfloat16 products round a gradient whose rows sum to 0; what all rows of W have in common still stays out."""
    generator = torch.Generator().manual_seed(0)
    hidden, shared = torch.randn(40, 32, generator=generator), torch.randn(32, generator=generator)
    weight = (torch.randn(300, 32, generator=generator) + common * shared).bfloat16()
    ids = torch.stack([torch.randperm(300, generator=generator)[:64].sort().values for _ in range(40)]).int()
    ids[3, 60:] = -1
    by_kept = torch.randn(40, 64, generator=generator).masked_fill(ids < 0, 0.0)
    by_kept -= by_kept.sum(1, keepdim=True) / (ids >= 0).sum(1, keepdim=True) * (ids >= 0)
    needs = {"needs_hidden": True, "needs_weight": True}
    truth = path.backward(hidden.bfloat16().double(), weight.double(), ids, by_kept.double(), **needs)
    plain = path.backward(hidden.bfloat16().float(), weight.float(), ids, by_kept, **needs)
    actual = path.backward(hidden.bfloat16(), weight, ids, by_kept, **needs)
    for found, peer, exact, dtype in zip(actual, plain, truth, (torch.bfloat16, torch.bfloat16), strict=True):
        assert_as_accurate(found.to(dtype), peer.to(dtype), exact)


def test_compiles_where_the_number_of_tokens_varies() -> None:
    """Under dynamic shapes, by the rule and by name."""
    torch.compiler.reset()
    weight = torch.randn(60, 6)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(hidden: Tensor, ids: Tensor, values: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        ref = TopK(ids=ids, values=values, lse=lse)
        return linear_topk_kl_div(hidden, weight, ref), linear_topk_kl_div(hidden, weight, ref, backend="dense")

    for num_rows in (5, 9, 70):
        hidden = torch.randn(num_rows, 6, requires_grad=True)
        ref = linear_topk_select(torch.randn(num_rows, 6), weight, 7)
        by_rule, by_name = run(hidden, ref.ids, ref.values, ref.lse)
        torch.testing.assert_close(by_rule, by_name)
        torch.autograd.grad(by_rule.sum() + by_name.sum(), hidden)


@pytest.mark.parametrize("backend", ["dense", "union", "gather", "reference"])
def test_references_that_are_odd(backend: str) -> None:
    """Unused slots anywhere, values in them, and rows that are masked out and hold nothing but NaN."""
    hidden, weight, _, ref_hidden = make_head()
    ref = linear_topk_select(ref_hidden, weight, 8)
    ids, values = ref.ids.clone(), ref.values.clone()
    ids[0, 2], ids[1, 0], values[1, 5] = -1, -1, -math.inf
    odd = TopK(ids=ids, values=values, lse=ref.lse)
    cleaned = TopK(ids=ids, values=values.masked_fill(ids < 0, -math.inf), lse=ref.lse)
    expected = linear_topk_kl_div(hidden, weight, cleaned, backend="reference")
    torch.testing.assert_close(linear_topk_kl_div(hidden, weight, odd, backend=backend), expected)
    logits = hidden @ weight.t()
    torch.testing.assert_close(topk_kl_div(logits, odd, backend="sparse"), expected)

    broken = hidden.detach().masked_fill(~MASK.unsqueeze(1), math.nan).requires_grad_()
    elsewhere = TopK(ids=ids.masked_fill(~MASK.unsqueeze(1), 10**6), values=values, lse=ref.lse)
    kl = linear_topk_kl_div(broken, weight, elsewhere, mask=MASK, backend=backend)
    torch.testing.assert_close(kl, expected.where(MASK, 0.0))
    for gradient in torch.autograd.grad(kl.sum(), [broken, weight]):
        assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="reference id -5 is no id; unused slots bear -1"):
        linear_topk_kl_div(hidden, weight, TopK(ids=ids - 4, values=values, lse=ref.lse), backend=backend)
    with pytest.raises(ValueError, match=r"values must be float32 or float64, got torch.int64; use .float\(\)"):
        TopK(ids=ids, values=values.long(), lse=ref.lse)
