"""topk_kl: every backend gives what the definition gives, through the front doors, whatever the memory looks like."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nova_kernels import BackendUnavailableError
from nova_kernels.backend import why_not_triton
from nova_kernels.topk_kl import TopK, cuda, topk_kl_div, topk_kl_div_from_logits, topk_select
from numerics import assert_as_accurate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS: dict[str, Callable[[], str | None]] = {
    "cuda": lambda: cuda.why_not(DEVICE),
    "triton": lambda: why_not_triton(DEVICE),
}
DIRECTIONS = pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
# Triton's interpreter computes with numpy, which warns where the hardware is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def here(backend: str) -> str:
    if (reason := RUNS.get(backend, lambda: None)()) is not None:
        pytest.skip(reason)
    return backend


def make(dtype: torch.dtype, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Policy and reference logits [3, 2, 203]."""
    generator = torch.Generator().manual_seed(0)
    ref = 4 * torch.randn(3, 2, 203, generator=generator, dtype=torch.float64)
    policy = ref + noise * torch.randn(ref.shape, generator=generator, dtype=torch.float64)
    return policy.to(dtype).to(DEVICE), ref.to(dtype).to(DEVICE)


@pytest.mark.parametrize("backend", ["cuda", "triton", "threshold", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_selection(backend: str, dtype: torch.dtype) -> None:
    _, logits = make(dtype)
    logits[0, 0, :150], logits[1, 1], logits[2, 0, 7] = -math.inf, 1.5, math.nan
    expected = topk_select(logits, 60, vocab_size=200, temperature=0.7, backend="reference")
    layouts = [logits, logits.transpose(0, 2).contiguous().transpose(0, 2), logits[:, :1].expand(-1, 2, -1)]
    for view in layouts:
        top = topk_select(view, 60, vocab_size=200, temperature=0.7, backend=here(backend))
        wanted = (
            expected
            if view is not layouts[2]
            else TopK(
                ids=expected.ids[:, :1].expand(-1, 2, -1),
                values=expected.values[:, :1].expand(-1, 2, -1),
                lse=expected.lse[:, :1].expand(-1, 2),
                temperature=0.7,
            )
        )
        assert torch.equal(top.ids, wanted.ids)
        torch.testing.assert_close(top.values, wanted.values, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(top.lse, wanted.lse, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", ["cuda", "triton", "threshold", "reference"])
def test_a_single_nan_is_kept(backend: str) -> None:
    """Also where the entries that are not below the threshold are as many as asked for without it."""
    logits = torch.zeros(1, 8, device=DEVICE)
    logits[0, 3] = math.nan
    top = topk_select(logits, 3, backend=here(backend))
    assert top.ids.tolist() == [[0, 1, 3]] and top.values[0, 2].isnan()
    assert topk_select(logits, 7, backend=backend).ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("op", "backend"),
    [("given", name) for name in ("triton", "sparse", "reference")]
    + [("selected", name) for name in ("cuda", "triton", "sparse", "reference")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@DIRECTIONS
def test_kl_and_gradient(op: str, backend: str, dtype: torch.dtype, direction: str) -> None:
    """As accurate as plain PyTorch; what is masked out (NaN here) leaks into nothing."""
    here(backend)
    policy, ref_logits = make(dtype, 0.3)
    mask = torch.tensor([[True, False], [True, True], [False, True]], device=DEVICE)
    policy[~mask], ref_logits[~mask] = math.nan, math.nan
    upstream = torch.linspace(0.5, 1.5, 6, device=DEVICE).view(3, 2)
    options = {"temperature": 0.7, "direction": direction}

    def run(exact: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
        leaf = policy.to(exact).requires_grad_()
        if op == "selected":
            kl = topk_kl_div_from_logits(leaf, ref_logits.to(exact), 20, mask=mask, backend=backend, **options)
        else:
            ref = topk_select(ref_logits.to(exact), 20)
            kl = topk_kl_div(leaf, ref, mask=mask, backend=backend, **options)
        (gradient,) = torch.autograd.grad(kl, leaf, upstream.to(kl.dtype))
        return kl.detach(), gradient

    kl, gradient = run(dtype, backend)
    assert kl.dtype == torch.float32 and gradient.dtype == dtype
    assert not kl[~mask].any() and not gradient[~mask].any()
    assert (gradient.count_nonzero(dim=-1)[mask] <= 20).all()
    truth = run(torch.float64, "reference")
    plain = run(torch.float32, "reference")
    assert_as_accurate(kl, plain[0], truth[0], floor=2e-6)
    if dtype == torch.float32:
        assert_as_accurate(gradient, plain[1], truth[1], floor=2e-6)
        assert gradient.sum(dim=-1).abs().max() < 1e-6
    else:  # Triton's interpreter cuts bfloat16 off instead of rounding
        interpreted = backend == "triton" and DEVICE.type == "cpu"
        assert_as_accurate(gradient, plain[1].to(dtype), truth[1], slack=5.0 if interpreted else 2.0)


@pytest.mark.parametrize("backend", ["triton", "sparse", "reference"])
def test_bad_ids_and_gradients_that_are_not_wanted(backend: str) -> None:
    here(backend)
    policy, ref_logits = make(torch.float32)
    ref = topk_select(ref_logits, 9)
    beyond = TopK(ids=ref.ids + 203 - int(ref.ids.max()), values=ref.values, lse=ref.lse)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"reference id 203 is beyond the policy's vocabulary of 203; both models"):
            topk_kl_div(policy, beyond, backend=backend)
    mask = torch.zeros(3, 2, dtype=torch.bool, device=DEVICE)
    assert not topk_kl_div(policy, beyond, mask=mask, backend=backend).any()  # what is masked out is not looked at
    with torch.no_grad():
        kl = topk_kl_div(policy.requires_grad_(), ref, backend=backend)
    assert not kl.requires_grad
    assert topk_kl_div(policy[:0], ref[:0], backend=backend).shape == (0, 2)
    with pytest.raises(RuntimeError):  # once differentiable
        leaf = policy.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(topk_kl_div(leaf, ref, backend=backend).sum(), leaf, create_graph=True)
        torch.autograd.grad(gradient.sum(), leaf)


@pytest.mark.parametrize("backend", ["cuda", "triton", "sparse"])
def test_a_bucket_is_the_references(backend: str) -> None:
    policy, ref_logits = make(torch.float32)
    if backend != "cuda":
        with pytest.raises(BackendUnavailableError, match="tail='bucket' has a dense gradient"):
            topk_kl_div(policy, topk_select(ref_logits, 9), tail="bucket", backend=backend)
    with pytest.raises(BackendUnavailableError, match="tail='bucket' has a dense gradient"):
        topk_kl_div_from_logits(policy, ref_logits, 9, tail="bucket", backend=backend)
    with pytest.raises(ValueError, match=r"policy and reference logits of one shape, got \[3, 2, 203\] and \[3, 2, 20"):
        topk_kl_div_from_logits(policy, ref_logits[..., :200], 9)


@DIRECTIONS
def test_never_negative_in_a_million_rows(direction: str) -> None:
    """Near-equal policies, peaked and flat ones, and those that have nothing in common."""
    generator = torch.Generator().manual_seed(0)
    for number, noise in enumerate((1e-7, 1e-5, 1e-3, 0.1, 3.0)):
        for scale in (0.1, 8.0):
            ref = scale * torch.randn(100_000, 12, generator=generator)
            policy = ref + noise * torch.randn(ref.shape, generator=generator) + 10 * number
            ids = torch.arange(12, dtype=torch.int32).expand(100_000, -1)
            kl = topk_kl_div(policy, TopK(ids=ids, values=ref, lse=ref.logsumexp(1)), direction=direction)
            assert kl.min() >= 0 and kl.isfinite().all()
