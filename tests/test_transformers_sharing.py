"""Models that share a config object, and copies of attached models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from nova_kernels.integrations.transformers import IMPLEMENTATION, use_varlen_attention
from nova_kernels.packing import pack_samples

BATCH = pack_samples([{"input_ids": torch.arange(3, 3 + length)} for length in (5, 1, 9)])


def make_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )


def make_models(config: LlamaConfig) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    first, second = LlamaForCausalLM(config).double(), LlamaForCausalLM(config).double()
    assert first.config is second.config
    return first, second


@torch.no_grad()
def packed(model: PreTrainedModel) -> Tensor:
    return model(input_ids=BATCH.input_ids, **BATCH.attention_kwargs()).logits


@torch.no_grad()
def with_cache(model: PreTrainedModel) -> Tensor:
    """What only the model's own attention can do."""
    return model(input_ids=BATCH.input_ids, use_cache=True).logits


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-out", "last-out"])
def test_the_last_to_be_restored_puts_the_shared_config_back(order: tuple[int, int]) -> None:
    models = make_models(make_config())
    own, before = models[0].config._attn_implementation, [with_cache(model) for model in models]
    alone = []
    for model in models:
        with use_varlen_attention(model):
            alone.append(packed(model))
    handles = [use_varlen_attention(model) for model in models]
    assert all(torch.equal(packed(model), logits) for model, logits in zip(models, alone, strict=True))
    early, late = order
    handles[early].restore()
    assert not handles[early].attached and handles[late].attached
    assert torch.equal(packed(models[late]), alone[late])
    with pytest.raises(ValueError, match="attach it if it shares the config of an attached one"):
        packed(models[early])
    handles[late].restore()
    assert models[0].config._attn_implementation == own
    assert all(torch.equal(with_cache(model), logits) for model, logits in zip(models, before, strict=True))


def test_a_model_is_suspended_though_another_shares_its_config() -> None:
    first, second = make_models(make_config())
    own, before = first.config._attn_implementation, with_cache(first)
    with use_varlen_attention(first) as handle, use_varlen_attention(second) as other:
        with handle.suspended():
            assert torch.equal(with_cache(first), before)
            with pytest.raises(ValueError, match=f"was set to '{own}' while varlen attention is attached"):
                packed(second)
            with other.suspended():
                with_cache(second)
            assert torch.equal(with_cache(first), before)
        packed(first), packed(second)
    assert first.config._attn_implementation == own


def test_attaching_twice_is_told_by_the_model_itself() -> None:
    first, second = make_models(make_config())
    with use_varlen_attention(first), use_varlen_attention(second):
        for model in (first, second):
            with pytest.raises(ValueError, match="has it already; use its handle"):
                use_varlen_attention(model)


def test_a_copy_of_an_attached_model_is_attached() -> None:
    model, _ = make_models(make_config())
    own = model.config._attn_implementation
    with use_varlen_attention(model) as handle:
        expected = packed(model)
        twin, twin_handle = copy.deepcopy((model, handle))
        assert torch.equal(packed(twin), expected)
        with pytest.raises(ValueError, match=r"has it already; .* copy inside `with handle.suspended\(\):`"):
            use_varlen_attention(twin)
        twin_handle.restore()
        assert handle.attached and not twin_handle.attached and twin.config._attn_implementation == own
        assert torch.equal(packed(model), expected)
        with use_varlen_attention(twin):
            assert torch.equal(packed(twin), expected)
        with handle.suspended():
            plain = copy.deepcopy(model)
        with use_varlen_attention(plain):
            assert torch.equal(packed(plain), expected)
        assert plain.config._attn_implementation == own
    assert model.config._attn_implementation == own


def test_a_config_copied_from_an_attached_model_is_refused() -> None:
    model, _ = make_models(make_config())
    with use_varlen_attention(model):
        other = LlamaForCausalLM(copy.deepcopy(model.config)).double()
        assert other.config._attn_implementation == IMPLEMENTATION
        with pytest.raises(ValueError, match=r'call model.set_attn_implementation\("sdpa"\) first'):
            use_varlen_attention(other)
        other.set_attn_implementation("sdpa")
        with use_varlen_attention(other):
            packed(other)
        assert other.config._attn_implementation == "sdpa"
