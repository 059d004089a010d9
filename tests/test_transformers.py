from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from nova_kernels.integrations.transformers import check_packing, use_varlen_attention
from nova_kernels.packing import PackedBatch, pack_samples

LENGTHS = [5, 1, 11, 7]
SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=4),
    "gemma2-softcap-window": lambda: Gemma2Config(**SIZES, head_dim=4, sliding_window=4, attn_logit_softcapping=2.0),
}


def make_model(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)


def make_batch(pad_to: int | None = None) -> PackedBatch:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 37, (length,), generator=generator) for length in LENGTHS]
    return pack_samples([{"input_ids": sample} for sample in ids], pad_to=pad_to)


def gradients(model: PreTrainedModel, logits: Tensor) -> list[Tensor]:
    upstream = torch.linspace(0.5, 1.5, logits.numel(), dtype=logits.dtype).view_as(logits)
    return list(torch.autograd.grad(logits, list(model.parameters()), upstream))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_by_one(name: str) -> None:
    tolerance = 1e-5 if name.startswith("gemma2") else 1e-10  # its own attention takes the softmax in float32
    model, batch = make_model(name), make_batch()
    alone = torch.cat([model(ids, use_cache=False).logits for ids in batch.input_ids.split(LENGTHS, 1)], 1)
    expected = gradients(model, alone)
    with use_varlen_attention(model):
        packed = model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits
        actual = gradients(model, packed)
    assert (packed - alone).abs().max() < tolerance
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() < tolerance * (1 + theirs.abs().max())


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_sample_does_not_notice_its_neighbour(name: str) -> None:
    model, batch = make_model(name, torch.float32), make_batch()
    with use_varlen_attention(model), torch.no_grad():
        before = model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits
        changed = batch.input_ids.clone()
        changed[0, : LENGTHS[0]] = 36 - changed[0, : LENGTHS[0]]
        after = model(input_ids=changed, **batch.attention_kwargs()).logits
    assert not torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])
    assert torch.equal(before[:, LENGTHS[0] :], after[:, LENGTHS[0] :])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pad_to", [None, 31])
def test_check_packing_is_content_with_varlen_attention(name: str, pad_to: int | None) -> None:
    model, batch = make_model(name), make_batch(pad_to)
    with use_varlen_attention(model):
        assert check_packing(model, batch) < 1e-10


def test_check_packing_finds_every_leak() -> None:
    model, batch = make_model("llama"), make_batch()
    positions = {"position_ids": batch.position_ids}
    leaks = {
        "a KV cache": positions,
        "a mask of ones": positions | {"use_cache": False, "attention_mask": torch.ones_like(batch.input_ids)},
        "no boundaries": {"use_cache": False},
    }
    assert check_packing(model, batch, positions | {"use_cache": False}) < 1e-10
    for kwargs in leaks.values():
        assert check_packing(model, batch, kwargs) > 0.1
    with use_varlen_attention(model):
        assert check_packing(model, batch, {}) > 0.1  # one sequence, as nobody says otherwise


def test_check_packing_reports_nan_and_leaves_the_mode_alone() -> None:
    model, batch = make_model("qwen2"), make_batch()
    model.train()
    model.model.layers[0].eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert check_packing(model, batch) != check_packing(model, batch)
    assert model.training and not model.model.layers[0].training


def test_boundaries_from_positions_and_positions_from_boundaries() -> None:
    model, batch = make_model("llama"), make_batch()
    everything = batch.attention_kwargs()
    with use_varlen_attention(model), torch.no_grad():
        expected = model(input_ids=batch.input_ids, **everything).logits
        by_position = model(input_ids=batch.input_ids, position_ids=batch.position_ids)
        by_boundary = model(input_ids=batch.input_ids, cu_seq_lens_q=batch.cu_seqlens)
    assert torch.equal(expected, by_position.logits) and torch.equal(expected, by_boundary.logits)
    assert by_position.past_key_values is None


def test_rows_of_a_batch_are_sequences() -> None:
    model = make_model("qwen2")
    ids = make_batch().input_ids[:, :24].view(3, 8)
    own = model(ids, use_cache=False).logits
    with use_varlen_attention(model):
        assert (model(ids).logits - own).abs().max() < 1e-10


def test_sequence_classification_is_packed_through_its_base_model() -> None:
    model = AutoModelForSequenceClassification.from_config(Qwen2Config(**SIZES, num_labels=1)).double()
    with use_varlen_attention(model):
        assert check_packing(model, make_batch()) < 1e-10


def test_the_model_is_put_back() -> None:
    model, batch = make_model("llama"), make_batch()
    ids = batch.input_ids[:, :5]
    own = model.config._attn_implementation
    config = model.config.to_dict()
    before = model.generate(ids, max_new_tokens=4, do_sample=False)
    handle = use_varlen_attention(model)
    assert handle.attached and model.config.to_dict() == config
    with pytest.raises(ValueError, match="generate inside `with handle.suspended"):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    with handle.suspended():
        assert model.config._attn_implementation == own and not handle.attached
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), before)
    assert handle.attached
    handle.restore()
    handle.restore()
    with handle.suspended():
        pass
    assert not handle.attached and model.config._attn_implementation == own
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), before)


def test_two_models_do_not_share_anything() -> None:
    first, second, batch = make_model("qwen2"), make_model("qwen2"), make_batch()
    with use_varlen_attention(first):
        assert second.config._attn_implementation != first.config._attn_implementation
        second(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"use_cache": True}, r"takes no KV cache; pass use_cache=False", id="cache"),
        pytest.param({"attention_mask": torch.ones(1, 24)}, r"no attention_mask, not even one of ones", id="mask"),
        pytest.param({"cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32)}, r"count 24, ends at 9", id="bounds"),
        pytest.param({"cu_seq_lens_k": torch.tensor([0, 24], dtype=torch.int32)}, r"q and cu_seq_lens_k", id="cross"),
        pytest.param(
            {"cu_seq_lens_q": None, "position_ids": torch.arange(24)[None] + 3}, r"start at \[3\]", id="left-padding"
        ),
        pytest.param(
            {"cu_seq_lens_q": None, "position_ids": torch.zeros(3, 1, 24).long()}, r"do not tell boundaries", id="3-D"
        ),
        pytest.param({"input_ids": torch.ones(2, 12).long()}, r"one packed row \[1, T\], got \[2, 12\]", id="rows"),
    ],
)
def test_calls_that_would_leak_are_refused(change: dict, message: str) -> None:
    model, batch = make_model("qwen2"), make_batch()
    with use_varlen_attention(model), pytest.raises(ValueError, match=message):
        model(**({"input_ids": batch.input_ids} | batch.attention_kwargs() | change))


def test_dropout_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, attention_dropout=0.1)).train()
    with use_varlen_attention(model), pytest.raises(ValueError, match=r"no dropout, got 0.1; set attention_dropout"):
        model(input_ids=make_batch().input_ids)


def test_what_cannot_be_attached_is_refused() -> None:
    model = make_model("qwen2")
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel, got Linear"):
        use_varlen_attention(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with use_varlen_attention(model), pytest.raises(ValueError, match="has it already; use its handle"):
        use_varlen_attention(model)
