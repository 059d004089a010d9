"""Varlen attention on a GPU: each kernel against float64, judged by PyTorch's own attention at the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from attention_truth import make_inputs, one_mask
from nova_kernels.attention import flash, reference, torch_varlen, varlen_attention
from nova_kernels.integrations.transformers import use_varlen_attention
from nova_kernels.packing import PackedBatch, pack_samples
from nova_kernels.varlen import cu_seqlens_from_lengths
from numerics import assert_as_accurate

pytestmark = pytest.mark.gpu

KERNELS = ["torch_varlen", "flash"]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of one number; what is below needs no comparison
SHAPES = [
    pytest.param([5, 1, 170, 30], 4, 4, 64, id="ragged"),
    pytest.param([70, 2, 129], 8, 2, 128, id="grouped-heads"),
    pytest.param([40, 0, 33, 0], 4, 1, 96, id="empty-sequences"),
    pytest.param([300], 2, 2, 256, id="one-wide"),
    pytest.param([1, 1, 1], 4, 2, 64, id="single-tokens"),
    pytest.param([9, 17], 2, 1, 8, id="narrow"),
]
OPTIONS: list[Any] = [
    pytest.param({}, id="plain"),
    pytest.param({"causal": False}, id="both-ways"),
    pytest.param({"window": 16}, id="window"),
    pytest.param({"window": 16, "causal": False}, id="window-both-ways"),
    pytest.param({"softmax_scale": 0.25}, id="scale"),
]


def run(inputs: tuple[Tensor, ...], lengths: list[int], **options: Any) -> Tensor:
    q, k, v = inputs
    bounds = cu_seqlens_from_lengths(lengths)
    return varlen_attention(q, k, v, cu_seqlens=bounds, max_seqlen=max(lengths), **options)


def plain_pytorch(inputs: tuple[Tensor, ...], lengths: list[int], **options: Any) -> Tensor:
    """PyTorch's own attention, and its own gradients, one sequence at a time."""
    q, k, v = inputs
    how = {"causal": True, "window": None, "softmax_scale": q.shape[-1] ** -0.5, "softcap": None} | options
    return reference.varlen_attention(q, k, v, lengths, **how)


def results(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], *arguments: Any, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    out = attend(leaves, *arguments, **options)
    upstream = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view_as(out).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def or_skip(backend: str, inputs: tuple[Tensor, ...], **options: Any) -> None:
    q, _, v = inputs
    how = {"window": options.get("window"), "softmax_scale": options.get("softmax_scale", q.shape[-1] ** -0.5)}
    why = flash.why_not(q, v) if backend == "flash" else torch_varlen.why_not(q, v, softcap=None, **how)
    if why is not None:
        pytest.skip(why)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_are_as_accurate_as_plain_pytorch(
    backend: str, dtype: torch.dtype, lengths: list[int], heads: int, kv_heads: int, width: int, options: dict
) -> None:
    inputs = tuple(x.detach().cuda() for x in make_inputs(lengths, heads, kv_heads, width, dtype))
    or_skip(backend, inputs, **options)
    ours = results(run, inputs, lengths, backend=backend, **options)
    peers = results(plain_pytorch, inputs, lengths, **options)
    exact = tuple(x.double().cpu() for x in inputs)
    truths = results(lambda leaves, lengths, **how: one_mask(*leaves, lengths, **how), exact, lengths, **options)
    for actual, peer, truth in zip(ours, peers, truths, strict=True):
        assert actual.dtype == dtype
        assert_as_accurate(actual.cpu(), peer.cpu(), truth, floor=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_flash_has_a_softcap(dtype: torch.dtype) -> None:
    lengths = [70, 1, 33]
    inputs = tuple(x.detach().cuda() for x in make_inputs(lengths, 4, 2, 64, dtype))
    or_skip("flash", inputs)
    options = {"softcap": 2.0, "window": 16}
    ours = results(run, inputs, lengths, backend="flash", **options)
    peers = results(plain_pytorch, inputs, lengths, **options)
    exact = tuple(x.double().cpu() for x in inputs)
    truths = results(lambda leaves, lengths, **how: one_mask(*leaves, lengths, **how), exact, lengths, **options)
    for actual, peer, truth in zip(ours, peers, truths, strict=True):
        assert_as_accurate(actual.cpu(), peer.cpu(), truth, floor=ROUNDING[dtype])


@pytest.mark.parametrize("backend", KERNELS)
def test_deterministic_where_torch_is_asked_to_be(backend: str) -> None:
    lengths = [700, 1, 323]
    inputs = tuple(x.detach().cuda() for x in make_inputs(lengths, 8, 2, 64, torch.bfloat16))
    or_skip(backend, inputs)
    torch.use_deterministic_algorithms(True)
    first, second = (results(run, inputs, lengths, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_nothing_waits_for_the_device(backend: str) -> None:
    lengths = [70, 1, 33]
    inputs = tuple(x.detach().cuda() for x in make_inputs(lengths, 4, 2, 64, torch.bfloat16))
    or_skip(backend, inputs)
    q, k, v = (x.requires_grad_() for x in inputs)
    for bounds in (cu_seqlens_from_lengths(lengths), cu_seqlens_from_lengths(lengths).cuda()):
        for mode in ("default", "error"):  # the first call loads kernels
            torch.cuda.set_sync_debug_mode(mode)
            try:
                out = varlen_attention(q, k, v, cu_seqlens=bounds, max_seqlen=70, backend=backend)
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_as_one_graph(backend: str) -> None:
    lengths = [70, 1, 33]
    inputs = tuple(x.detach().cuda() for x in make_inputs(lengths, 4, 2, 64, torch.bfloat16))
    or_skip(backend, inputs)
    torch.compiler.reset()
    bounds = cu_seqlens_from_lengths(lengths).cuda()

    def attention(leaves: tuple[Tensor, ...]) -> Tensor:
        return varlen_attention(*leaves, cu_seqlens=bounds, max_seqlen=70, window=16, backend=backend)

    eager = results(attention, inputs)
    compiled = results(torch.compile(attention, fullgraph=True, backend="aot_eager"), inputs)
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected, atol=0.02, rtol=0.02)


def make_batch(lengths: list[int]) -> PackedBatch:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 97, (length,), generator=generator) for length in lengths]
    return pack_samples([{"input_ids": sample} for sample in ids])


@pytest.mark.parametrize("sliding_window", [None, 16])
@pytest.mark.parametrize("backend", KERNELS)
def test_models_on_packed_rows(backend: str, sliding_window: int | None) -> None:
    """Samples are apart to the bit, logits as right as the model's own attention, and nothing waits in a forward."""
    or_skip(backend, tuple(torch.zeros(1, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)))
    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    torch.manual_seed(1)
    config = MistralConfig(**sizes, sliding_window=sliding_window) if sliding_window else LlamaConfig(**sizes)
    truth_model = AutoModelForCausalLM.from_config(config).double()
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(truth_model.state_dict())
    lengths, own = [40, 1, 57, 30], model.config._attn_implementation
    model, batch = model.to("cuda", torch.bfloat16), make_batch(lengths)
    rows = batch.input_ids.split(lengths, 1)
    with torch.no_grad():
        truth = torch.cat([truth_model(ids, use_cache=False).logits for ids in rows], 1)
        peer = torch.cat([model(ids.cuda(), use_cache=False).logits for ids in rows], 1)
        batch = batch.to("cuda")
        with use_varlen_attention(model, backend=backend):
            model(input_ids=batch.input_ids, **batch.attention_kwargs())
            torch.cuda.set_sync_debug_mode("error")
            try:
                packed = model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits
            finally:
                torch.cuda.set_sync_debug_mode("default")
            changed = batch.input_ids.clone()
            changed[0, :40] = 96 - changed[0, :40]
            neighbour = model(input_ids=changed, **batch.attention_kwargs()).logits
    assert model.config._attn_implementation == own
    assert_as_accurate(packed.cpu(), peer.cpu(), truth, floor=2**-8)
    assert torch.equal(packed[:, 40:], neighbour[:, 40:]) and not torch.equal(packed[:, :40], neighbour[:, :40])
