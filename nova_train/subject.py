"""The model that is planned for: its layers as a chain of costs, by formula or counted on the meta device.

    eager, fused    what layers save by the formulas of `fleet`, for the families that it knows
    measured        any decoder with one stack of layers, run as it is trained: bfloat16, packed rows, dropout off

Nothing is loaded but a configuration, and nothing is computed. The loss is `logit_bytes` per logit in both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nova_kernels.checkpoint import Chain, profile_layers
from nova_kernels.integrations.transformers import use_varlen_attention
from nova_train.config import ConfigError, unknown_name
from nova_train.fleet import MODEL_SHAPES, Kernels, ModelShape, chain_of
from nova_train.model import MALFORMED, load_model_config, one_line

Counting = Literal["eager", "fused", "measured"]
PROFILED_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The model that is planned for."""

    name: str
    parameters: int
    chain: Chain  # of one GPU, with the logits in `loss`
    sp: int = 1  # GPUs that share a row


def subject_of(model: str, tokens: int, kernels: Counting, logit_bytes: float, *, sp: int = 1) -> Subject:
    """The model of a built-in name, a folder, a config.json or a name on the Hub, for rows that `sp` GPUs share.

    Raises:
        ConfigError: no such model, a malformed configuration, one that is no causal language model, one whose layers
            have no formula or cannot be run without data; shared rows of a measured one.
    """
    shape = MODEL_SHAPES.get(model)
    if kernels == "measured":
        if sp > 1:
            raise ConfigError(
                f"sequence_parallel_size {sp}: what is measured is a model by itself; take kernels: eager or fused for "
                "rows that GPUs share"
            )
        settings = _built_in(shape) if shape is not None else _configuration(model)
        return _measured(model, settings, tokens, logit_bytes)
    if shape is None:
        try:
            shape = ModelShape.from_config(_configuration(model).to_dict(), name=model)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"model {model}: {error}") from error
    return by_formula(shape, tokens, kernels, logit_bytes, sp=sp)


def by_formula(shape: ModelShape, tokens: int, kernels: Kernels, logit_bytes: float, *, sp: int = 1) -> Subject:
    """A shape whose layers save what the formulas of `fleet` say."""
    chain = chain_of(shape, tokens, kernels=kernels, logit_bytes=logit_bytes, sp=sp)
    return Subject(name=shape.name, parameters=shape.parameters, chain=chain, sp=sp)


def _built_in(shape: ModelShape) -> Any:
    return AutoConfig.for_model(
        shape.family,
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
    )


def _configuration(model: str) -> Any:
    """The Hugging Face configuration of a causal model; a plain word that is no folder is a misspelt built-in name."""
    if not Path(model).exists() and "/" not in model:
        unknown = unknown_name("model", model, list(MODEL_SHAPES))
        raise ConfigError(f"{unknown} A folder, a config.json or owner/name will do as well")
    settings = load_model_config(model)
    if settings.is_encoder_decoder or settings.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model {model}: {settings.model_type!r} is no decoder-only (causal) language model; only those can be "
            "planned: give one of them"
        )
    return settings


def _measured(name: str, settings: Any, tokens: int, logit_bytes: float) -> Subject:
    """The whole model on the meta device, its layers profiled at a few tokens."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    except MALFORMED as error:
        raise ConfigError(f"model {name}: no model can be built: {one_line(error)}; correct its config.json") from error
    boundaries = torch.tensor([0, PROFILED_TOKENS], dtype=torch.int32)
    sample = {
        "input_ids": torch.zeros(1, PROFILED_TOKENS, dtype=torch.int64, device="meta"),
        "position_ids": torch.arange(PROFILED_TOKENS, device="meta")[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": PROFILED_TOKENS,
        "max_length_k": PROFILED_TOKENS,
        "use_cache": False,
    }
    try:
        use_varlen_attention(model)
        # As models are trained: without dropout.
        chain = profile_layers(model.eval(), sample).at(tokens)
    except ValueError as error:
        raise ConfigError(f"model {name}, kernels: measured: {error}") from error
    except RuntimeError as error:
        raise ConfigError(
            f"model {name}, kernels: measured: its layers do not run on the meta device, which has no data "
            f"({one_line(error)}); give a model of a family with a formula, with kernels: eager or fused, or measure "
            "this one with profile_layers on a real device"
        ) from error
    loss = round(tokens * settings.get_text_config().vocab_size * logit_bytes)
    parameters = sum(weight.numel() for weight in model.parameters())
    return Subject(name=name, parameters=parameters, chain=replace(chain, loss=loss, after_loss=0))
