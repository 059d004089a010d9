"""logprob by the Triton row kernels: as accurate as plain PyTorch, on the CPU interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.backend import why_not_triton
from nova_kernels.logprob import LogprobTerms, dispatch, linear_cross_entropy, linear_logprobs
from nova_kernels.topk_kl import TopK, dense, linear_ops, linear_topk_kl_div, linear_topk_select
from numerics import assert_as_accurate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif(why_not_triton(DEVICE) is not None, reason="Triton kernels cannot run here"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
HEADS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0, "temperature": 0.7},
    {"vocab_size": 90, "temperature": 1.3, "direction": "ref_policy"},
    {"tail": "bucket"},
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks both ways."""
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, DEVICE.type, 500)
    monkeypatch.setattr(lm_head.arithmetic, "NARROWEST", 40)


def make(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """[hidden, weight, bias], targets (some ignored), the reference's hidden."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 8), (101, 8), (101,), (12, 8))
    hidden, weight, bias, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    targets = torch.randint(90, (12,), generator=generator)
    targets[[1, 5, 11]] = -100
    leaves = [x.to(dtype).to(DEVICE).requires_grad_() for x in (hidden, weight, bias)]
    return leaves, targets.to(DEVICE), (hidden + 0.3 * noise).to(dtype).to(DEVICE)


def run(dtype: torch.dtype, exact: torch.dtype, backend: str, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Terms and gradients of the inputs that `dtype` can hold, computed from them as `exact`."""
    leaves, targets, other = make(dtype)
    leaves = [leaf.detach().to(exact).requires_grad_() for leaf in leaves]
    head = {name: options[name] for name in ("softcap", "temperature", "vocab_size") if name in options}
    ref: TopK = linear_topk_select(other.to(exact), leaves[1], 9, bias=leaves[2], **head)
    terms: LogprobTerms = linear_logprobs(
        leaves[0], leaves[1], targets, bias=leaves[2], ref=ref, backend=backend, **options
    )
    assert terms.kl is not None and terms.policy_mass is not None
    upstream = torch.linspace(0.5, 1.5, 12, device=DEVICE).to(terms.logprobs.dtype)
    gradients = torch.autograd.grad([terms.logprobs, terms.kl], leaves, [upstream, upstream.flip(0)])
    return *(term.detach() for term in terms if term is not None), *gradients


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(options: dict[str, Any], dtype: torch.dtype) -> None:
    truth = run(dtype, torch.float64, "reference", options)
    plain = run(dtype, torch.float32, "reference", options)
    for actual, peer, exact in zip(run(dtype, dtype, "triton", options), plain, truth, strict=True):
        assert_as_accurate(actual, peer.to(actual.dtype), exact, floor=2e-6)


def test_bits_do_not_depend_on_gradients_and_the_kl_with_itself_is_zero() -> None:
    leaves, targets, _ = make(torch.float32)
    hidden, weight, bias = leaves
    head = {"bias": bias, "softcap": 2.0}
    ref = linear_topk_select(hidden, weight, 9, mask=targets != -100, **head)
    options = {"ref": ref, "backend": "triton", **head}
    terms = linear_logprobs(hidden, weight, targets, **options)
    assert (terms.kl == 0).all()
    with torch.no_grad():
        for one, other in zip(terms, linear_logprobs(hidden, weight, targets, **options), strict=True):
            assert torch.equal(one, other)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, backend="triton")
    plain = linear_cross_entropy(hidden, weight, targets, bias=bias, backend="reference")
    torch.testing.assert_close(loss, plain)
    assert not loss[targets == -100].any()


def test_every_row_counts() -> None:
    """ignore_index=None: nothing is ignored, not even -100, which is then outside the vocabulary."""
    (hidden, weight, _), targets, _ = make(torch.float32)
    kept = targets.clamp(min=0)
    for backend in ("triton", "chunked"):
        expected = linear_logprobs(hidden, weight, kept, backend=backend)
        actual = linear_logprobs(hidden, weight, kept, ignore_index=None, backend=backend)
        for one, other in zip(actual[:2], expected[:2], strict=True):
            assert torch.equal(one, other)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="target -100 is outside the vocabulary of 101$"):
            linear_logprobs(hidden, weight, targets, ignore_index=None)


@pytest.mark.parametrize("tail", ["none", "bucket"])
@pytest.mark.parametrize("rows", ["triton", "chunked"])
@pytest.mark.parametrize(("common", "softcap"), [(0.0, 4.0), (5.0, None), (5.0, 30.0)])
def test_what_cuda_does_with_bfloat16(
    monkeypatch: pytest.MonkeyPatch, common: float, softcap: float | None, rows: str, tail: str
) -> None:
    """16-bit factors, float32 sums, gradients of the products in bfloat16: here on any device.

    `common` is the size of what all rows of the weight share, of which dh must show nothing.
    """
    for module in (lm_head, dispatch):
        monkeypatch.setattr(module, "factor_dtype", lambda hidden, weight: torch.bfloat16)
    for module in (linear_ops, dense):
        monkeypatch.setattr(module, "runs_triton", lambda device, dtype: rows == "triton")
    (hidden, weight, bias), targets, other = make(torch.bfloat16)
    weight = (weight.detach() + common * torch.linspace(-1, 1, 8).to(weight)).requires_grad_()
    mask, head = targets != -100, {"bias": bias, "softcap": softcap, "temperature": 0.8}
    ref = linear_topk_select(other, weight, 9, mask=mask, **head)
    own = linear_topk_select(hidden, weight, 9, mask=mask, **head)
    assert (linear_topk_kl_div(hidden, weight, own, mask=mask, backend="dense", tail=tail, **head) == 0).all()
    # Triton's interpreter cuts bfloat16 off instead of rounding it, which nothing puts right in `dense`.
    interpreted = (rows, DEVICE.type) == ("triton", "cpu")
    for backend in (rows,) if interpreted and common else ("dense", rows):
        results = []
        for exact, name in ((torch.bfloat16, backend), (torch.float32, "reference"), (torch.float64, "reference")):
            leaves = [x.detach().to(exact).requires_grad_() for x in (hidden, weight, bias)]
            options = {**head, "bias": leaves[2], "tail": tail, "backend": name}
            if backend == "dense":
                kl = linear_topk_kl_div(leaves[0], leaves[1], ref, mask=mask, **options)
                terms = [kl]
            else:
                found = linear_logprobs(leaves[0], leaves[1], targets, ref=ref, **options)
                terms = [found.logprobs, found.kl]
            upstream = [torch.linspace(0.5, 1.5, 12, device=DEVICE).to(term.dtype) for term in terms]
            gradients = torch.autograd.grad(terms, leaves, upstream)
            results.append([*(term.detach() for term in terms), *gradients])
        for actual, peer, truth in zip(*results, strict=True):
            # A second rounding, of the gradient by the products, where plain PyTorch has one.
            slack = 4.0 if interpreted else 2.5
            assert_as_accurate(actual, peer.to(actual.dtype), truth, slack=slack, floor=2e-6)
