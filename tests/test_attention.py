from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nova_kernels.attention import varlen_attention
from nova_kernels.backend import BackendUnavailableError
from nova_kernels.varlen import cu_seqlens_from_lengths
from numerics import assert_as_accurate

SHAPES = [
    pytest.param([1], 1, 1, 1, id="smallest"),
    pytest.param([5, 1, 17, 3], 4, 4, 8, id="ragged"),
    pytest.param([7, 2, 9], 6, 2, 5, id="grouped-heads-odd-width"),
    pytest.param([4, 0, 3, 0], 2, 1, 4, id="empty-sequences"),
    pytest.param([130], 2, 2, 16, id="one-long"),
]
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"causal": False}, id="both-ways"),
    pytest.param({"window": 3}, id="window"),
    pytest.param({"window": 2, "causal": False}, id="window-both-ways"),
    pytest.param({"softcap": 0.7, "softmax_scale": 1.3}, id="softcap"),
    pytest.param({"softcap": 2.0, "window": 4}, id="softcap-window"),
    pytest.param({"softcap": 2.0, "causal": False}, id="softcap-both-ways"),
]


def make_inputs(
    lengths: list[int], heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(sum(lengths), count, width) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def one_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    *,
    causal: bool = True,
    window: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same maths for the whole row at once, with one T x T mask."""
    total = sum(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    distance = torch.arange(total)[:, None] - torch.arange(total)
    visible = sequence[:, None] == sequence
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance.abs() < window
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(groups, 1))
    scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(groups, 1))


def run(inputs: tuple[Tensor, Tensor, Tensor], lengths: list[int], **options: object) -> Tensor:
    return varlen_attention(
        *inputs,
        cu_seqlens=cu_seqlens_from_lengths(lengths),
        max_seqlen=max(lengths, default=0),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "width"), SHAPES)
def test_matches_a_mask_in_output_and_gradients(
    lengths: list[int], heads: int, kv_heads: int, width: int, options: dict
) -> None:
    truth_inputs = make_inputs(lengths, heads, kv_heads, width, torch.float64)
    truth = one_mask(*truth_inputs, lengths, **options)
    upstream = torch.linspace(0.5, 1.5, truth.numel(), dtype=torch.float64).view_as(truth)
    truth_grads = torch.autograd.grad(truth, truth_inputs, upstream)
    inputs = make_inputs(lengths, heads, kv_heads, width, torch.float32)
    ours, peer = run(inputs, lengths, **options), one_mask(*inputs, lengths, **options)
    assert_as_accurate(ours, peer, truth.detach())
    ours_grads, peer_grads = (torch.autograd.grad(out, inputs, upstream.float()) for out in (ours, peer))
    for ours_grad, peer_grad, truth_grad in zip(ours_grads, peer_grads, truth_grads, strict=True):
        assert_as_accurate(ours_grad, peer_grad, truth_grad)


@pytest.mark.parametrize("options", OPTIONS)
def test_exact_in_float64(options: dict) -> None:
    inputs = make_inputs([6, 1, 9], 4, 2, 3, torch.float64)
    difference = run(inputs, [6, 1, 9], **options) - one_mask(*inputs, [6, 1, 9], **options)
    assert difference.abs().max() < 1e-13


def test_gradcheck() -> None:
    inputs = make_inputs([3, 2], 2, 1, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: run(x, [3, 2]), inputs)


def test_a_sequence_does_not_notice_its_neighbours() -> None:
    lengths = [5, 8, 4]
    q, k, v = make_inputs(lengths, 2, 2, 4, torch.float32)
    before = run((q, k, v), lengths)
    with torch.no_grad():
        for x in (q, k, v):
            x[:5] = 1e4
            x[13:] = torch.nan
    after = run((q, k, v), lengths)
    assert torch.equal(before[5:13], after[5:13])


def test_gradients_do_not_change_the_forward() -> None:
    lengths = [33, 1, 12]
    inputs = make_inputs(lengths, 4, 2, 8, torch.float32)
    with torch.no_grad():
        without = run(inputs, lengths)
    assert torch.equal(without, run(inputs, lengths))


def test_bfloat16_stays_bfloat16() -> None:
    inputs = make_inputs([5, 9], 2, 2, 8, torch.bfloat16)
    for options in ({}, {"softcap": 3.0}):
        assert run(inputs, [5, 9], **options).dtype == torch.bfloat16


def test_no_tokens_give_no_output() -> None:
    q = torch.zeros(0, 4, 8)
    for lengths in ([], [0, 0]):
        assert run((q, q[:, :2], q[:, :2, :5]), lengths).shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"q": torch.zeros(6, 4)}, r"expected q \[T, Hq, D\].*got \[6, 4\]", id="q-2-D"),
        pytest.param({"k": torch.zeros(5, 2, 3)}, r"needs k \[6, Hkv, 3\].*got \[5, 2, 3\]", id="k-too-short"),
        pytest.param({"q": torch.zeros(6, 3, 3)}, r"multiple of Hkv, got Hq = 3, Hkv = 2", id="heads"),
        pytest.param({"cu_seqlens": cu_seqlens_from_lengths([4])}, r"token count 6, ends at 4", id="boundaries"),
        pytest.param({"max_seqlen": 3}, r"sequence 0 has 4 tokens, more than max_seqlen=3", id="max-seqlen"),
        pytest.param({"window": 0}, r"window must be at least 1 token, got 0", id="window"),
        pytest.param({"softcap": 0.0}, r"softcap must be positive, got 0.0", id="softcap"),
        pytest.param({"backend": "magic"}, r"unknown backend 'magic'", id="backend"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    row = torch.zeros(6, 2, 3)
    arguments = {"q": row, "k": row, "v": row, "cu_seqlens": cu_seqlens_from_lengths([4, 2]), "max_seqlen": 4} | change
    with pytest.raises((ValueError, BackendUnavailableError), match=message):
        varlen_attention(**arguments)
