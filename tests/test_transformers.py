from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

from nova_kernels.integrations.transformers import attach, use_varlen_attention
from nova_kernels.integrations.transformers.packing_check import check_packing
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
            {"cu_seq_lens_q": None, "position_ids": torch.zeros(3, 1, 24).long()},
            r"position_ids \[3, 1, 24\] do not tell .*, \[1, 24\] would; .* pass cu_seq_lens_q, int32",
            id="3-D",
        ),
        pytest.param(
            {"cu_seq_lens_q": None, "position_ids": torch.arange(23)[None]}, r"position_ids \[1, 23\] do", id="short"
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


def test_no_mask_is_built_and_boundaries_are_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("gemma2-softcap-window"), make_batch()
    seen, settle, settled = [], attach.boundaries_on, []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True)
    monkeypatch.setattr(attach, "boundaries_on", lambda *args: settled.append(args) or settle(*args))
    with use_varlen_attention(model):
        model(input_ids=batch.input_ids, **batch.attention_kwargs())
    assert len(settled) == 1 and len(seen) == 3
    assert all(kwargs["attention_mask"] is None and kwargs["max_length_q"] == 11 for kwargs in seen)
    assert all(kwargs["cu_seq_lens_q"] is kwargs["cu_seq_lens_k"] is seen[0]["cu_seq_lens_q"] for kwargs in seen)


def test_masks_that_models_make_are_refused() -> None:
    """Where no forward hook sees them: inside the model."""
    model = make_model("llama")
    embeds, none_given = torch.zeros(1, 6, 16), torch.zeros(1, 0, dtype=torch.bool)
    chunked = Llama4TextConfig(**SIZES, attention_chunk_size=4)
    with use_varlen_attention(model):
        chunked._attn_implementation = config = model.config._attn_implementation
        config = model.config
        assert create_causal_mask(config, embeds, none_given, None) is None
        assert create_causal_mask(config, embeds, None, None) is None
        with pytest.raises(ValueError, match=r"llama: varlen attention takes no attention_mask, got one of \[1, 6\]"):
            create_causal_mask(config, embeds, torch.ones(1, 6), None)
        with pytest.raises(ValueError, match="cannot express the mask that this model adds"):
            create_causal_mask(config, embeds, none_given, None, or_mask_function=lambda *_: torch.tensor(True))
        with pytest.raises(ValueError, match="cannot express the mask that this model adds"):
            create_causal_mask(config, embeds, none_given, None, block_sequence_ids=torch.zeros(1, 6).long())
        assert create_chunked_causal_mask(chunked, embeds[:, :4], none_given, None) is None
        with pytest.raises(ValueError, match=r"no chunks \(attention_chunk_size=4\); use rows of at most 4 tokens"):
            create_chunked_causal_mask(chunked, embeds, none_given, None)


def test_boundaries_on_a_device_are_not_read() -> None:
    """The meta device has nothing to read: what works there does not wait for a GPU."""
    with torch.device("meta"):
        model = make_model("llama", torch.bfloat16)
    batch = make_batch().to("meta")
    kwargs = batch.attention_kwargs() | {"cu_seq_lens_q": batch.cu_seqlens.to("meta"), "position_ids": None}
    with use_varlen_attention(model):
        assert model(input_ids=batch.input_ids, **kwargs).logits.is_meta
        with pytest.raises(ValueError, match=r"max_length_q"):
            model(input_ids=batch.input_ids, **kwargs | {"max_length_q": None})


def test_layers_need_the_forward_hook() -> None:
    model, batch = make_model("llama"), make_batch()
    with use_varlen_attention(model) as handle:
        handle._registration.remove()
        with pytest.raises(ValueError, match=r"no boundaries arrived; call the whole model"):
            model(input_ids=batch.input_ids, **batch.attention_kwargs())
