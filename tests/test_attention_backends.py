"""FlashAttention behind varlen_attention: what is refused, what the kernels are told, shapes without memory, FLOPs.

No kernel runs here: functions of the same arguments stand in for flash-attn and for torch's entry, as of each version.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from attention_truth import kernel, make_inputs, one_mask
from nova_kernels.attention import count_flops, flash, flops, kernels, torch_varlen, varlen_attention
from nova_kernels.attention.dispatch import attend, boundaries_on
from nova_kernels.backend import BackendUnavailableError
from nova_kernels.varlen import cu_seqlens_from_lengths

LENGTHS = [5, 1, 9]
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"causal": False}, id="both-ways"),
    pytest.param({"window": 3}, id="window"),
    pytest.param({"window": 2, "causal": False}, id="window-both-ways"),
    pytest.param({"window": 1}, id="only-itself"),
    pytest.param({"window": 9}, id="window-of-all"),
    pytest.param({"softmax_scale": 0.3}, id="scale"),
]


def half(width: int = 16, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.zeros(15, heads, width, dtype=dtype, device=device) for heads in (4, 2, 2))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return varlen_attention(q, k, v, cu_seqlens=cu_seqlens_from_lengths(LENGTHS), max_seqlen=9, **options)


class Calls(list[dict[str, Any]]):
    """Arguments of the calls of a stand-in."""


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """A flash_attn package in whose place the mask computes, on any device."""
    calls = Calls()

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):  # type: ignore[no-untyped-def]  # fmt: skip
        calls.append(locals() | {"calls": None})
        assert cu_seqlens_q is cu_seqlens_k and dropout_p == 0 and not return_attn_probs
        right = 0 if causal else window_size[1]
        return kernel(q, k, v, cu_seqlens_q, (window_size[0], right), softmax_scale, softcap)

    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    flash._why_not_import.cache_clear()
    yield calls
    flash._why_not_import.cache_clear()


def torch_entry(version: str, calls: Calls) -> Callable[..., Tensor]:
    """torch's varlen_attn as of a version; the mask computes."""

    def told(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **how: Any) -> Tensor:
        calls.append(how | {"max": max_q})
        assert cu_q is cu_k and max_q == max_k
        window = how.get("window_size", (-1, 0 if how.get("is_causal") else -1))
        return kernel(q, k, v, cu_q, window, how.get("scale", q.shape[-1] ** -0.5), 0.0)

    def of_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
        return told(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=is_causal)

    def of_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        return told(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    def of_2_12(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
                enable_gqa=False):  # type: ignore[no-untyped-def]  # fmt: skip
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return told(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    return {"2.10": of_2_10, "2.11": of_2_11, "2.12": of_2_12}[version]


@pytest.mark.parametrize("options", [*OPTIONS, pytest.param({"softcap": 2.0}, id="softcap")])
def test_flash_is_told_the_same_maths(flash_attn: Calls, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "why_not", lambda q, v: None)
    inputs = make_inputs(LENGTHS, 4, 2, 8, torch.float64)
    difference = call(*inputs, **options, backend="flash") - one_mask(*inputs, LENGTHS, **options)
    assert difference.abs().max() < 1e-13
    assert flash_attn[0]["max_seqlen_q"] == flash_attn[0]["max_seqlen_k"] == 9
    assert flash_attn[0]["deterministic"] is False


def test_flash_is_deterministic_where_torch_is_asked_to_be(flash_attn: Calls) -> None:
    q, k, v = make_inputs(LENGTHS, 2, 2, 8, torch.float64)
    torch.use_deterministic_algorithms(True)
    bounds = cu_seqlens_from_lengths(LENGTHS)
    flash.varlen_attention(q, k, v, bounds, 9, causal=True, window=None, softmax_scale=1.0, softcap=None)
    assert flash_attn[0]["deterministic"] is True and flash_attn[0]["softcap"] == 0.0


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("version", ["2.10", "2.11", "2.12"])
def test_every_torch_is_told_the_same_maths(version: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", torch_entry(version, calls))
    why_not = torch_varlen.why_not
    monkeypatch.setattr(torch_varlen, "why_not", lambda q, v, **how: why_not(*half(8)[::2], **how))
    inputs = make_inputs(LENGTHS, 4, 2, 8, torch.float64)
    window, scale = options.get("window", 9) < 9, "softmax_scale" in options
    if version == "2.10" and (window or scale):
        with pytest.raises(BackendUnavailableError, match="no window in torch" if window else r"scale is D \*\* -0.5"):
            call(*inputs, **options, backend="torch_varlen")
        return
    difference = call(*inputs, **options, backend="torch_varlen") - one_mask(*inputs, LENGTHS, **options)
    assert difference.abs().max() < 1e-13
    assert calls[0]["max"] == 9


def test_kernels_never_take_their_decoding_path(flash_attn: Calls) -> None:
    q, k, v = make_inputs([1, 0, 1], 2, 1, 8, torch.float64)
    bounds = cu_seqlens_from_lengths([1, 0, 1])
    out = flash.varlen_attention(q, k, v, bounds, 1, causal=True, window=None, softmax_scale=1.0, softcap=None)
    assert flash_attn[0]["max_seqlen_q"] == 2 and torch.allclose(out, v.repeat_interleave(2, 1))


def test_kernels_read_heads_element_by_element() -> None:
    strided = torch.zeros(4, 8, 2).transpose(1, 2)
    assert kernels.readable(strided).stride(-1) == 1 and kernels.readable(strided.mT).is_set_to(strided.mT)


@pytest.mark.parametrize(
    ("backend", "inputs", "options", "reason"),
    [
        ("flash", half(device="cpu"), {}, r"runs on CUDA, the tensors are on cpu"),
        ("torch_varlen", half(device="cpu"), {}, r"runs on CUDA, the tensors are on cpu"),
        ("torch_varlen", half(dtype=torch.float32), {}, r"takes float16 and bfloat16, not float32"),
        ("torch_varlen", half(12), {}, r"heads of width 8, 16, ..., 256, not 12"),
        ("torch_varlen", half(264), {}, r"heads of width 8, 16, ..., 256, not 264"),
        ("torch_varlen", (*half()[:2], half(8)[2]), {}, r"not Dv = 8 with D = 16"),
        ("torch_varlen", half(), {"softcap": 2.0}, r"it has no softcap; install flash-attn, which has"),
    ],
)
def test_what_cannot_run_says_why(backend: str, inputs: tuple[Tensor, ...], options: dict, reason: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"backend '{backend}' cannot run: .*{reason}"):
        call(*inputs, **options, backend=backend)


def test_flash_attn_that_is_missing_broken_or_old_says_so(flash_attn: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    q, _, v = half()

    class OnCuda:
        """Of a tensor on a GPU, what is asked first."""

        device = torch.device("cuda")
        shape, dtype = q.shape, q.dtype

    on_cuda: Any = OnCuda()
    assert flash.why_not(on_cuda, v) is None
    flash._why_not_import.cache_clear()
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", lambda q, k, v, causal=False: q)
    assert "too old; install 2.6" in str(flash.why_not(on_cuda, v))
    flash._why_not_import.cache_clear()
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_varlen_func")
    assert "cannot be imported" in str(flash.why_not(on_cuda, v))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert flash.why_not(on_cuda, v) == "flash-attn is not installed"


def test_no_tokens_are_left_to_the_reference() -> None:
    q = torch.zeros(0, 4, 16, dtype=torch.bfloat16, device="meta")
    assert kernels.why_not(q, q) == "there are no tokens"
    assert varlen_attention(q, q, q, cu_seqlens=cu_seqlens_from_lengths([]), max_seqlen=0).shape == q.shape


@pytest.mark.parametrize(
    ("dtype", "ran"), [(torch.bfloat16, "torch_attn._varlen_attn"), (torch.float32, "nova_kernels.varlen_attention")]
)
def test_meta_tensors_plan_what_a_gpu_would_run(dtype: torch.dtype, ran: str) -> None:
    """Boundaries stay on the CPU, so that FLOPs are those of the documents."""
    count_flops()
    inputs = half(dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        out = call(*inputs, window=3)
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert out.is_meta and out.shape == (15, 4, 16) and out.dtype == dtype
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    pairs = 25 + 1 + 81
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    assert counts == {ran: 2 * pairs * 4 * 32, f"{ran}_backward": 2 * pairs * 4 * 80}
    with pytest.raises(ValueError, match="ends at 14"):
        varlen_attention(*inputs, cu_seqlens=cu_seqlens_from_lengths([5, 9]), max_seqlen=9)


def test_flops_are_those_of_pytorchs_own_attention() -> None:
    count_flops()
    inputs = make_inputs([7], 4, 4, 8, torch.float32)
    as_one = tuple(x.detach().transpose(0, 1)[None].to("meta").requires_grad_() for x in inputs)
    backends = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with backends, FlopCounterMode(display=False) as plain:
        torch.nn.functional.scaled_dot_product_attention(*as_one)
    with FlopCounterMode(display=False) as ours:
        varlen_attention(*inputs, cu_seqlens=cu_seqlens_from_lengths([7]), max_seqlen=7)
    assert ours.get_total_flops() == plain.get_total_flops() == 2 * 49 * 4 * 16


def test_flops_where_torch_has_no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.10 and 2.11; boundaries without values count as full sequences."""
    for name in ("_varlen_attn", "_varlen_attn_backward"):
        monkeypatch.delitem(flop_registry, getattr(torch.ops.torch_attn, name), raising=False)
    count_flops()
    inputs = half()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(call(*inputs).sum(), inputs)
    assert counter.get_total_flops() == 2 * (25 + 1 + 81) * 4 * (32 + 80)
    assert flops._pairs(torch.zeros(4, dtype=torch.int32, device="meta"), 9, 15) == 9 * 15


def test_boundaries_that_were_checked_are_not_checked_again() -> None:
    """A caller that attends many times within the same boundaries settles them once."""
    q, k, v = half()
    wrong = cu_seqlens_from_lengths([5, 9])
    options: dict[str, Any] = {"max_seqlen": 9, "causal": True, "window": None, "softmax_scale": None, "softcap": None}
    with pytest.raises(ValueError, match="ends at 14"):
        attend(q, k, v, cu_seqlens=wrong, backend="torch_varlen", **options)
    assert attend(q, k, v, cu_seqlens=wrong, on_device=wrong, backend="torch_varlen", **options).is_meta
    with pytest.raises(ValueError, match="more than max_seqlen=8"):
        boundaries_on(torch.device("meta"), cu_seqlens_from_lengths(LENGTHS), 15, 8)


def test_compiles_as_one_graph_on_meta() -> None:
    """What a compiler meets on a GPU, without one: questions to backends, imports, the operator of torch."""
    torch.compiler.reset()
    inputs, bounds = half(), cu_seqlens_from_lengths(LENGTHS).to("meta")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, cu_seqlens=bounds, max_seqlen=9, window=3, backend="torch_varlen")

    out = torch.compile(attention, fullgraph=True, backend="aot_eager")(*inputs)
    assert out.shape == (15, 4, 16)
    assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]
