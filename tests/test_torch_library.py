"""The operators of torch.library: opcheck, torch.compile(fullgraph=True), and that nothing is left to eager mode."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nova_kernels import (
    LinearCrossEntropyLoss,
    LinearTopKKLDivLoss,
    TopKKLDivLoss,
    linear_cross_entropy,
    linear_logprobs,
    linear_topk_kl_div,
    linear_topk_select,
    topk_kl_div,
    topk_kl_div_from_logits,
    topk_select,
    varlen_attention,
)
from nova_kernels.attention import ops as attention_ops
from nova_kernels.logprob import ops as logprob_ops
from nova_kernels.topk_kl import linear_ops, ops
from nova_kernels.varlen import cu_seqlens_from_lengths

N, V, H, K = 6, 23, 5, 4
MASK = torch.tensor([True, True, False, True, True, True])
TARGETS = torch.tensor([3, 0, -100, 22, 7, 7])


def make() -> tuple[Tensor, ...]:
    """hidden, weight, bias, policy logits (all leaves), reference logits."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, H), (V, H), (V,), (N, V), (N, V))
    hidden, weight, bias, logits, ref_logits = (torch.randn(shape, generator=generator) for shape in shapes)
    return *(leaf.requires_grad_() for leaf in (hidden, weight, bias, logits)), ref_logits


HIDDEN, WEIGHT, BIAS, LOGITS, REF_LOGITS = make()
ROW, BOUNDS = HIDDEN.detach()[:, None], cu_seqlens_from_lengths([2, 0, 4])
QKV = (ROW.expand(N, 2, H).clone().requires_grad_(), ROW, LOGITS.detach()[:, None].requires_grad_())
REF = topk_select(REF_LOGITS, K)
TOP = (REF.ids, REF.values)
F32 = torch.float32

OPERATORS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "topk_select": (ops.topk_select, (REF_LOGITS, K, 1.3, None, 0, "threshold")),
    "topk_kl_div": (ops.topk_kl_div, (LOGITS, *TOP, MASK, 1.0, "policy_ref", True, "sparse")),
    "topk_kl_div-no-gradient": (ops.topk_kl_div, (LOGITS.detach(), *TOP, None, 0.7, "ref_policy", False, "sparse")),
    "topk_kl_div_from_logits": (
        ops.topk_kl_div_from_logits,
        (LOGITS, REF_LOGITS, MASK, K, 1.0, "ref_policy", True, "sparse"),
    ),
    "topk_kl_div_backward": (ops.topk_kl_div_backward, (REF.values, REF.lse, REF.ids, V, torch.bfloat16, "sparse")),
    "linear_topk_select": (
        linear_ops.linear_topk_select,
        (HIDDEN.detach(), WEIGHT.detach(), BIAS.detach(), MASK, K, 2.0, V - 1, 1.0, F32, None, 0),
    ),
    **{
        f"linear_topk_kl_div-{backend}-{tail}": (
            linear_ops.linear_topk_kl_div,
            (HIDDEN, WEIGHT, BIAS, *TOP, REF.lse, MASK, 2.0, V, 1.0, "policy_ref", tail, F32, None, 0, True, backend),
        )
        for backend, tail in (("dense", "none"), ("dense", "bucket"), ("union", "none"), ("gather", "none"))
    },
    "varlen_attention": (attention_ops.varlen_attention, (*QKV, BOUNDS, 4, True, 3, 0.5, None)),
    "varlen_attention-softcap": (attention_ops.varlen_attention, (*QKV, BOUNDS, 9, False, None, 1.0, 2.0)),
    "varlen_attention_backward": (
        attention_ops.varlen_attention_backward,
        (*(LOGITS.detach()[:, None].expand(N, 2, V), *(x.detach() for x in QKV)), BOUNDS, 4, True, None, 1.0, None),
    ),
    "linear_logprobs": (
        logprob_ops.linear_logprobs,
        (
            *(HIDDEN, WEIGHT, BIAS, TARGETS, *TOP, REF.lse, None, V, 0.7, "policy_ref", "bucket", -100, True),
            *(F32, None, 0, True, False),
        ),
    ),
    "linear_logprobs-cross-entropy": (
        logprob_ops.linear_logprobs,
        (
            *(HIDDEN, WEIGHT, None, TARGETS, None, None, None, 3.0, V, 1.0, "policy_ref", "none", -100, False),
            *(F32, None, 0, True, False),
        ),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    operator, arguments = OPERATORS[name]
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


CALLS: dict[str, Callable[[], Tensor]] = {
    "topk_select": lambda: topk_select(LOGITS, K).lse * LOGITS[:, 0],
    "topk_kl_div": lambda: topk_kl_div(LOGITS, REF, mask=MASK, temperature=0.7),
    "topk_kl_div_from_logits": lambda: topk_kl_div_from_logits(LOGITS, REF_LOGITS, K),
    "linear_topk_kl_div": lambda: linear_topk_kl_div(
        *(HIDDEN, WEIGHT, linear_topk_select(HIDDEN, WEIGHT, K)), bias=BIAS, mask=MASK, softcap=3.0
    ),
    "linear_topk_kl_div-bucket": lambda: linear_topk_kl_div(HIDDEN, WEIGHT, REF, tail="bucket"),
    "linear_logprobs": lambda: sum(  # type: ignore[return-value]
        term for term in linear_logprobs(HIDDEN, WEIGHT, TARGETS, bias=BIAS, ref=REF) if term is not None
    ),
    "linear_cross_entropy": lambda: linear_cross_entropy(HIDDEN, WEIGHT, TARGETS, ignore_index=-100),
    "varlen_attention": lambda: varlen_attention(
        *(torch.stack([HIDDEN, -HIDDEN], 1), HIDDEN[:, None].sin(), LOGITS[:, None]),
        cu_seqlens=BOUNDS,
        max_seqlen=4,
        window=2,
    ),
    "TopKKLDivLoss": lambda: TopKKLDivLoss(reduction="sum")(LOGITS, REF, MASK),
    "LinearTopKKLDivLoss": lambda: LinearTopKKLDivLoss()(HIDDEN, WEIGHT, REF, BIAS, MASK),
    "LinearCrossEntropyLoss": lambda: LinearCrossEntropyLoss(softcap=2.0)(HIDDEN, WEIGHT, TARGETS),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name: str) -> None:
    """`aot_eager` traces forward and backward as the default compiler does, without its code generation."""
    torch.compiler.reset()
    call, leaves = CALLS[name], (HIDDEN, WEIGHT, BIAS, LOGITS)
    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = run()
        upstream = torch.linspace(0.5, 1.5, out.numel()).view_as(out)
        gradients = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
        results.append([out, *(gradient for gradient in gradients if gradient is not None)])
    assert len(results[0]) == len(results[1]) > 1
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default compiler needs g++ on the CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiles_with_the_default_compiler() -> None:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        terms = linear_logprobs(hidden * 2, weight, TARGETS, ref=REF)
        assert terms.kl is not None
        return (terms.kl - terms.logprobs).sum()

    expected = torch.autograd.grad(loss(HIDDEN, WEIGHT), (HIDDEN, WEIGHT))
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(HIDDEN, WEIGHT), (HIDDEN, WEIGHT))
    for compiled, eager in zip(actual, expected, strict=True):
        torch.testing.assert_close(compiled, eager)
