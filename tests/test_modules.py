"""modules: each is its function with a reduction."""

from __future__ import annotations

import pytest
import torch

from nova_kernels import (
    LinearCrossEntropyLoss,
    LinearTopKKLDivLoss,
    TopKKLDivLoss,
    linear_cross_entropy,
    linear_topk_kl_div,
    topk_kl_div,
    topk_select,
)

MASK = torch.tensor([True, False, True, True])
LABELS = torch.tensor([5, -100, 0, 9])


def test_they_are_their_functions() -> None:
    hidden, weight, bias, logits = torch.randn(4, 3), torch.randn(10, 3), torch.randn(10), torch.randn(4, 10)
    ref = topk_select(torch.randn(4, 10), 3)
    options = {"temperature": 0.7, "direction": "ref_policy"}
    head = {"softcap": 2.0, "vocab_size": 10}
    pairs = [
        (
            TopKKLDivLoss(reduction="none", **options)(logits, ref, MASK),
            topk_kl_div(logits, ref, mask=MASK, **options),
        ),
        (
            LinearTopKKLDivLoss(reduction="none", **options, **head)(hidden, weight, ref, bias, MASK),
            linear_topk_kl_div(hidden, weight, ref, bias=bias, mask=MASK, **options, **head),
        ),
        (
            LinearCrossEntropyLoss(reduction="none", temperature=0.7, **head)(hidden, weight, LABELS, bias),
            linear_cross_entropy(hidden, weight, LABELS, bias=bias, temperature=0.7, **head),
        ),
    ]
    for module, function in pairs:
        assert torch.equal(module, function) and module.any()
    plain = torch.nn.functional.cross_entropy(hidden @ weight.t(), LABELS)
    torch.testing.assert_close(LinearCrossEntropyLoss()(hidden, weight, LABELS), plain)


def test_reductions() -> None:
    logits, ref = torch.randn(4, 10), topk_select(torch.randn(4, 10), 3)
    kl = topk_kl_div(logits, ref, mask=MASK)
    torch.testing.assert_close(TopKKLDivLoss()(logits, ref, MASK), kl.sum() / 3)
    torch.testing.assert_close(TopKKLDivLoss()(logits, ref), topk_kl_div(logits, ref).mean())
    torch.testing.assert_close(TopKKLDivLoss(reduction="sum")(logits, ref, MASK), kl.sum())
    assert TopKKLDivLoss()(logits, ref, torch.zeros(4, dtype=torch.bool)) == 0
    assert TopKKLDivLoss()(logits[:0], ref[:0]) == 0
    hidden, weight, labels = torch.randn(4, 3), torch.randn(10, 3), torch.tensor([1, 2, 3, 4])
    mean = linear_cross_entropy(hidden, weight, labels).mean()
    torch.testing.assert_close(LinearCrossEntropyLoss(ignore_index=None)(hidden, weight, labels), mean)


def test_options_are_shown_and_checked() -> None:
    assert "tail='bucket'" in repr(TopKKLDivLoss(tail="bucket", backend="reference"))
    with pytest.raises(ValueError, match=r"LinearCrossEntropyLoss: reduction must be one of .*, got 'avg'"):
        LinearCrossEntropyLoss(reduction="avg")
