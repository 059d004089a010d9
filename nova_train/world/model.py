"""The quickstart's untrained language model: a small Llama with random weights, about 1.1 million parameters.

Llama, because for some model types (Qwen2 is one) AutoTokenizer puts the family's own rules for cutting text in the
place of those that the folder's tokenizer.json holds; for Llama it takes the file as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 512  # width of the gated MLP
    context: int = 512  # tokens
    initializer_range: float = 0.05  # standard deviation of the random weights

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"world: hidden {self.hidden} must be a multiple of heads {self.heads}")


def untrained_model(tokenizer: PreTrainedTokenizerBase, size: ModelSize, seed: int) -> LlamaForCausalLM:
    """Random weights that depend on `seed` only; the global generator is left as it was. float32, on the CPU."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=size.context,
        initializer_range=size.initializer_range,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
