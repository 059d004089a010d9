"""Models as the loop sees them: no noise, a head that is what the losses take it for, refusals of what does not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PhiConfig, PreTrainedConfig, Starcoder2Config

from nova_kernels.packing import pack_samples
from nova_train.config import ConfigError
from nova_train.model import check_head, hidden_states, load_causal_lm

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
NOISY: dict[str, PreTrainedConfig] = {
    "opt": OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.0),
    "starcoder2": Starcoder2Config(**SIZES, intermediate_size=24, num_key_value_heads=1, residual_dropout=0.5),
}
PHI = PhiConfig(**SIZES, intermediate_size=24, resid_pdrop=0.5)  # its head has a bias


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def arithmetic(dtype: str = "float32") -> Any:
    return SimpleNamespace(dtype=dtype, bf16=False, attention_backend=None, device="cpu")


@pytest.mark.parametrize("family", NOISY)
def test_a_trained_model_is_one_model_whatever_dropout_it_has(family: str, tmp_path: Path) -> None:
    """Functional dropout is no module that could be set to 0."""
    model = load_causal_lm(saved(NOISY[family], tmp_path), arithmetic())
    batch = pack_samples([{"input_ids": list(range(8, 40))}])
    first, second = hidden_states(model, batch), hidden_states(model, batch)
    assert torch.equal(first, second) and first.requires_grad
    noisy = hidden_states(model.train(), batch)
    assert not torch.allclose(noisy, first, atol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_with_a_bias_is_checked_in_any_dtype(dtype: str, tmp_path: Path) -> None:
    model = load_causal_lm(saved(PHI, tmp_path), arithmetic(dtype))
    check_head(model)
    with torch.no_grad():
        model.get_output_embeddings().bias.add_(1.0)
        check_head(model)
        model.get_output_embeddings().forward = lambda hidden: 2 * hidden @ model.get_output_embeddings().weight.T
    with pytest.raises(ConfigError, match=r"logits differ from hidden @ head.T by"):
        check_head(model)


def test_a_model_without_a_body_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(saved(PHI, tmp_path), arithmetic())
    monkeypatch.setattr(type(model), "base_model_prefix", "")
    with pytest.raises(ConfigError, match="PhiForCausalLM: its layers cannot be run without its head"):
        check_head(model)
