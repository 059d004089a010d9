from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attention_truth import make_inputs, one_mask
from nova_kernels.attention import reference, varlen_attention
from nova_kernels.backend import BackendUnavailableError
from nova_kernels.varlen import cu_seqlens_from_lengths
from numerics import OpWatch, assert_as_accurate, undecorate

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

SENSELESS = [float("nan"), float("inf"), -1.0, 0.0]  # as factors on the scores


def run(inputs: Sequence[Tensor], lengths: list[int], **options: object) -> Tensor:
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


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CPU_QUERIES", 2)  # several blocks per sequence
    inputs = make_inputs([5, 1, 3], 4, 2, 2, torch.float64, value_width=3)
    assert torch.autograd.gradcheck(lambda *x: run(x, [5, 1, 3], **options), inputs)


@pytest.mark.parametrize("width", [64, 80, 96, 128, 160, 192, 256])
def test_head_widths(width: int) -> None:
    lengths = [70, 1, 9]
    results = []
    for dtype, attend in ((torch.float32, run), (torch.float32, one_mask), (torch.float64, one_mask)):
        inputs = make_inputs(lengths, 2, 1, width, dtype)
        out = attend(inputs, lengths) if attend is run else attend(*inputs, lengths)
        upstream = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view_as(out).to(dtype)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    for ours, peer, truth in zip(*results, strict=True):
        assert_as_accurate(ours, peer, truth)


def test_values_may_be_narrower_than_keys() -> None:
    inputs = make_inputs([6, 3], 4, 2, 8, torch.float64, value_width=5)
    ours, truth = run(inputs, [6, 3]), one_mask(*inputs, [6, 3])
    assert ours.shape == (9, 4, 5) and (ours - truth).abs().max() < 1e-13


def test_the_backward_holds_no_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from nova_kernels.attention import ops

    undecorate(monkeypatch, ops)
    inputs = make_inputs([600], 2, 2, 4, torch.float32)
    out = run(inputs, [600])
    with OpWatch() as watch:
        out.sum().backward()
    assert watch.elements < 600**2
    assert reference._queries(64, 2**20, torch.device("cpu")) == 1  # and fewer queries where there are many keys


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 4}])
def test_half_precision_is_as_accurate_as_plain_pytorch(dtype: torch.dtype, options: dict) -> None:
    results = []
    for kind, attend in ((dtype, run), (dtype, one_mask), (torch.float64, one_mask)):
        inputs = [x.detach().to(kind).requires_grad_() for x in make_inputs([5, 9], 4, 2, 8, dtype)]
        out = attend(inputs, [5, 9], **options) if attend is run else attend(*inputs, [5, 9], **options)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), inputs)])
    for ours, peer, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert_as_accurate(ours, peer, truth)


def test_autocast_runs_in_its_dtype() -> None:
    inputs = make_inputs([5, 9], 2, 2, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(inputs, [5, 9])
        (gradient,) = torch.autograd.grad(out.sum(), inputs[:1])
        assert run(make_inputs([5], 2, 2, 8, torch.float64), [5]).dtype == torch.float64
    with torch.no_grad():
        expected = run([x.bfloat16() for x in inputs], [5, 9])
    assert torch.equal(out, expected) and gradient.dtype == torch.float32


def test_strided_inputs() -> None:
    rows = torch.randn(14, 3, 2, 8, dtype=torch.float64)
    views = tuple(x.requires_grad_() for x in rows.unbind(1))
    copies = tuple(x.detach().clone().requires_grad_() for x in views)
    for ours, expected in zip(
        torch.autograd.grad(run(views, [5, 9]).sum(), views),
        torch.autograd.grad(run(copies, [5, 9]).sum(), copies),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_no_tokens_give_no_output() -> None:
    q = torch.zeros(0, 4, 8)
    for lengths in ([], [0, 0]):
        assert run((q, q[:, :2], q[:, :2, :5]), lengths).shape == (0, 4, 5)


@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_autocast_does_not_cast_everything(which: int, dtype: torch.dtype) -> None:
    """PyTorch's leaves float64 alone."""
    inputs = [torch.zeros(6, 2, 4)] * 3
    inputs[which] = inputs[which].to(dtype)
    with torch.autocast("cpu"), pytest.raises(ValueError, match=f"must have one floating-point dtype, got .*{dtype}"):
        run(inputs, [4, 2])


def test_boundaries_on_the_meta_device_give_shapes() -> None:
    bounds = cu_seqlens_from_lengths([4, 2]).to("meta")
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.zeros(6, 4, 8, dtype=dtype, device="meta", requires_grad=True)
        k = torch.zeros(6, 2, 8, dtype=dtype, device="meta", requires_grad=True)
        out = varlen_attention(q, k, k, cu_seqlens=bounds, max_seqlen=4, window=2)
        dq, dk = torch.autograd.grad(out.sum(), (q, k))
        assert out.is_meta and out.dtype == dtype and out.shape == dq.shape == q.shape and dk.shape == k.shape
        with pytest.raises(ValueError, match=r"expected int32 of shape \[S \+ 1\], got torch.int64"):
            varlen_attention(q, k, k, cu_seqlens=bounds.long(), max_seqlen=4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_forward_mode_is_refused_and_not_zero(which: int) -> None:
    inputs = [torch.ones(6, 2, 4) for _ in range(3)]

    def attention(x: Tensor) -> Tensor:
        return run([*inputs[:which], x, *inputs[which + 1 :]], [4, 2])

    for derivative in (lambda x: torch.func.jvp(attention, (x,), (x,)), torch.func.jacfwd(attention)):
        with pytest.raises(RuntimeError, match="use reverse mode"):
            derivative(inputs[which])
    with torch.autograd.forward_ad.dual_level():
        assert attention(inputs[which]).shape == (6, 2, 4)
        with pytest.raises(RuntimeError, match="use reverse mode"):
            attention(torch.autograd.forward_ad.make_dual(inputs[which], inputs[which]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"q": torch.zeros(6, 4)}, r"expected q \[T, Hq, D\].*got \[6, 4\]", id="q-2-D"),
        pytest.param({"k": torch.zeros(5, 2, 3)}, r"needs k \[6, Hkv, 3\].*got \[5, 2, 3\]", id="k-too-short"),
        pytest.param({"q": torch.zeros(6, 3, 3)}, r"multiple of Hkv, got Hq = 3, Hkv = 2", id="heads"),
        pytest.param({"cu_seqlens": cu_seqlens_from_lengths([4])}, r"token count 6, ends at 4", id="boundaries"),
        pytest.param({"cu_seqlens": torch.tensor([0, 4, 2, 6]).int()}, r"entry 2 is 2 after 4", id="descending"),
        pytest.param({"cu_seqlens": torch.tensor([0, 4, 6])}, r"expected int32.*got torch.int64", id="int64"),
        pytest.param({"max_seqlen": 3}, r"sequence 0 has 4 tokens, .*pass max_seqlen=4", id="max-seqlen"),
        pytest.param(
            {"max_seqlen": torch.tensor(4)}, r"must be an int, got tensor\(4\); compute it", id="max-seqlen-tensor"
        ),
        pytest.param({"max_seqlen": True}, r"max_seqlen must be an int, got True", id="max-seqlen-bool"),
        pytest.param({"causal": 0}, r"causal must be True or False, got 0", id="causal"),
        pytest.param(
            {"softmax_scale": torch.tensor(0.5)}, r"must be a Python number, got tensor\(0.5", id="scale-tensor"
        ),
        pytest.param(
            {"softmax_scale": True}, r"softmax_scale must be a Python number, got True; None =", id="scale-bool"
        ),
        pytest.param({"softcap": "5"}, r"softcap must be a Python number, got '5'; None = no cap", id="softcap-str"),
        pytest.param({"backend": ["flash"]}, r"backend must be a name, got \['flash'\]; None =", id="backend-list"),
        pytest.param({"cu_seqlens": [0, 4, 6]}, r"is a list; cu_seqlens_from_lengths makes one", id="boundaries-list"),
        pytest.param({"v": torch.zeros(6, 2, 0)}, r"heads need a width, got D = 3, Dv = 0", id="no-width"),
        pytest.param({"v": torch.zeros(6, 2, 3).double()}, r"one floating-point dtype, got .*float64", id="dtypes"),
        pytest.param({"q": torch.zeros(6, 2, 3).int()}, r"one floating-point dtype, got torch.int32", id="integers"),
        pytest.param({"v": torch.zeros(6, 2, 3).to("meta")}, r"are on cpu, cpu, meta; move them", id="devices"),
        pytest.param({"window": 0}, r"window must be at least 1 token, got 0", id="window"),
        pytest.param({"window": 1.5}, r"window must be an int, a number of tokens, got 1.5", id="window-float"),
        pytest.param({"window": True}, r"window must be an int, a number of tokens, got True", id="window-bool"),
        *(
            pytest.param(
                {"softmax_scale": scale}, rf"softmax_scale must be positive and finite, got {scale}", id=str(scale)
            )
            for scale in SENSELESS
        ),
        pytest.param({"softcap": 0.0}, r"softcap must be positive, got 0.0", id="softcap"),
        pytest.param({"backend": "magic"}, r"unknown backend 'magic'", id="backend"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    row = torch.zeros(6, 2, 3)
    arguments = {"q": row, "k": row, "v": row, "cu_seqlens": cu_seqlens_from_lengths([4, 2]), "max_seqlen": 4} | change
    with pytest.raises((ValueError, TypeError, BackendUnavailableError), match=message):
        varlen_attention(**arguments)
