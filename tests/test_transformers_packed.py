"""Packed rows equal their samples one by one: families of models, backends, documents. A row that leaks does not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from attention_truth import kernel
from nova_kernels.attention import flash, torch_varlen
from nova_kernels.integrations.transformers import interface, use_varlen_attention
from nova_kernels.packing import PackedBatch, pack_samples
from nova_kernels.varlen import cu_seqlens_from_lengths, lengths_of

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {name: value for name, value in SIZES.items() if name != "head_dim"}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**QWEN2),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=4),
    "gemma": lambda: GemmaConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=4, attn_logit_softcapping=2.0),
}
DOCUMENTS = {
    "some": [5, 1, 11, 7],
    "one": [13],
    "single-tokens": [1, 1, 1],
    "many": [2, 9, 1, 1, 6, 3, 12, 4, 1, 8, 5, 2],
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)


def make_batch(documents: str = "some") -> PackedBatch:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 37, (length,), generator=generator) for length in DOCUMENTS[documents]]
    return pack_samples([{"input_ids": sample} for sample in ids])


def packed_and_alone(model: PreTrainedModel, batch: PackedBatch) -> list[list[Tensor]]:
    """Logits and the gradients of all parameters; of the packed row, and of its samples one by one."""
    results = []
    for apart in (False, True):
        if apart:
            rows = batch.input_ids.split(lengths_of(batch.cu_seqlens), 1)
            logits = torch.cat([model(ids, use_cache=False).logits for ids in rows], 1)
        else:
            logits = model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits
        upstream = torch.linspace(0.5, 1.5, logits.numel(), dtype=logits.dtype).view_as(logits)
        upstream = upstream / logits.numel()
        results.append([logits.detach(), *torch.autograd.grad(logits, list(model.parameters()), upstream)])
    return results


def assert_packed_equals_alone(model: PreTrainedModel, batch: PackedBatch, tolerance: float | None = None) -> None:
    names = ["logits", *(name for name, _ in model.named_parameters())]
    limit = TOLERANCE[model.dtype] if tolerance is None else tolerance
    for name, packed, alone in zip(names, *packed_and_alone(model, batch), strict=True):
        in_float32 = "gemma" in model.config.model_type and "norm" in name
        bound = max(limit, 1e-6 * float(alone.abs().max())) if in_float32 else limit
        assert float((packed - alone).abs().max()) <= bound, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_by_one(name: str, dtype: torch.dtype) -> None:
    model, batch = make_model(name, dtype), make_batch()
    with use_varlen_attention(model, backend="reference"):
        assert_packed_equals_alone(model, batch)


@pytest.mark.parametrize("documents", ["one", "single-tokens", "many"])
@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2"])
def test_documents_of_every_kind(name: str, documents: str) -> None:
    model, batch = make_model(name, torch.float64), make_batch(documents)
    with use_varlen_attention(model):
        assert_packed_equals_alone(model, batch)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_by_one_on_the_models_own_attention(name: str, dtype: torch.dtype) -> None:
    model, batch = make_model(name, dtype), make_batch()
    _, alone = packed_and_alone(model, batch)
    with use_varlen_attention(model):
        packed, _ = packed_and_alone(model, batch)
    # Gemma 2's own attention takes its softmax in float32.
    limit = 1e-5 if name == "gemma2" else TOLERANCE[dtype]
    for ours, theirs, parameter in zip(
        packed, alone, ["logits", *(n for n, _ in model.named_parameters())], strict=True
    ):
        bound = 1e-6 * float(theirs.abs().max()) if "gemma" in name and "norm" in parameter else 0.0
        assert float((ours - theirs).abs().max()) <= max(limit, bound), parameter


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_that_leaks_fails(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same assertion, with boundaries that the attention ignores."""
    model, batch, attend = make_model(name, dtype), make_batch(), interface.attend

    def leaking(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        whole = cu_seqlens_from_lengths([len(q)])
        return attend(q, k, v, **options | {"cu_seqlens": whole, "on_device": whole, "max_seqlen": len(q)})

    monkeypatch.setattr(interface, "attend", leaking)
    with use_varlen_attention(model), pytest.raises(AssertionError, match="logits"):
        assert_packed_equals_alone(model, batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_does_not_notice_its_neighbour(name: str) -> None:
    model, batch = make_model(name, torch.float32), make_batch()
    with use_varlen_attention(model), torch.no_grad():
        before = model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits
        changed = batch.input_ids.clone()
        changed[0, :5] = 36 - changed[0, :5]
        after = model(input_ids=changed, **batch.attention_kwargs()).logits
    assert not torch.equal(before[:, :5], after[:, :5])
    assert torch.equal(before[:, 5:], after[:, 5:])


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """flash-attn's and torch's kernels, played by a mask; the windows they were told."""
    windows = []

    def flash_attention(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        windows.append(how["window_size"])
        return kernel(q, k, v, how["cu_seqlens_q"], how["window_size"], how["softmax_scale"], how["softcap"])

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
        window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        windows.append(window_size)
        return kernel(q, k, v, cu_q, window_size, scale, 0.0)

    varlen_attn.__kwdefaults__ = {"scale": None, "window_size": (-1, -1), "enable_gqa": False}
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attention))
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flash, "why_not", lambda q, v: None)
    monkeypatch.setattr(torch_varlen, "why_not", lambda q, v, **_: None)
    return windows


@pytest.mark.parametrize(
    ("backend", "name"),
    [("flash", name) for name in CONFIGS] + [("torch_varlen", name) for name in CONFIGS if name != "gemma2"],
)
def test_kernels_are_told_what_models_want(backend: str, name: str, flash_on_cpu: list[tuple[int, int]]) -> None:
    model, batch = make_model(name, torch.float64), make_batch()
    _, alone = packed_and_alone(model, batch)
    with use_varlen_attention(model, backend=backend), torch.no_grad():
        packed = model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits
    assert (packed - alone[0]).abs().max() < (1e-5 if name == "gemma2" else 1e-10)
    expected = {"mistral": [(3, 0), (3, 0)], "gemma2": [(3, 0), (-1, 0)]}
    assert flash_on_cpu == expected.get(name, [(-1, 0), (-1, 0)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_on_meta_run_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)
    batch = make_batch()
    for kwargs in (batch.attention_kwargs(), {"cu_seq_lens_q": batch.cu_seqlens}, {"position_ids": batch.position_ids}):
        with use_varlen_attention(model):
            logits = model(input_ids=batch.input_ids.to("meta"), **kwargs).logits
        gradients = torch.autograd.grad(logits.sum(), list(model.parameters()))
        assert logits.is_meta and logits.shape == (1, 24, 37)
        assert [g.shape for g in gradients] == [p.shape for p in model.parameters()]


def test_positions_on_meta_cannot_tell_boundaries() -> None:
    with torch.device("meta"):
        model = make_model("llama", torch.float32)
    batch = make_batch().to("meta")
    with use_varlen_attention(model), pytest.raises(ValueError, match="have no values; pass cu_seq_lens_q, on the CPU"):
        model(input_ids=batch.input_ids, position_ids=batch.position_ids)
