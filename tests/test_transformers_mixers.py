"""Models that cannot be packed: attention is not all that mixes their tokens, or attends to an encoder."""

from __future__ import annotations

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Lfm2Config,
    Mamba2Config,
    PreTrainedConfig,
    T5Config,
)

from nova_kernels.integrations.transformers import use_varlen_attention

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
LFM2 = Lfm2Config(
    **SIZES,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    layer_types=["conv", "full_attention"],
)
MAMBA2 = Mamba2Config(**SIZES, num_heads=4, head_dim=8, state_size=8, n_groups=1)
T5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
BART = BartConfig(
    vocab_size=32,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
)


@pytest.mark.parametrize("config", [LFM2, MAMBA2], ids=["lfm2", "mamba2"])
def test_models_whose_convolutions_or_states_would_leak_are_refused(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="mixes tokens outside of its attention"):
        use_varlen_attention(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
def test_models_with_an_encoder_and_a_decoder_are_refused(config: PreTrainedConfig) -> None:
    model = AutoModelForSeq2SeqLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="encoder-decoder models are not supported: .* use the model's own attention"):
        use_varlen_attention(model)
    assert model.config._attn_implementation == before
