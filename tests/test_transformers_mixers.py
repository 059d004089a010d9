"""Models in which attention is not all that carries tokens from one to the next."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, Lfm2Config, Mamba2Config, PreTrainedConfig

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


@pytest.mark.parametrize("config", [LFM2, MAMBA2], ids=["lfm2", "mamba2"])
def test_models_whose_convolutions_or_states_would_leak_are_refused(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="mixes tokens outside of its attention"):
        use_varlen_attention(model)
    assert model.config._attn_implementation == before
