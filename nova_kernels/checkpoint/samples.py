"""A sample to profile with: how many tokens it has, and the same with fewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Sample = Mapping[str, Any] | Tensor  # a model's keyword arguments, or hidden states [..., T, H]


def sample_shape(sample: Sample) -> tuple[int, int]:
    """(rows, tokens per row).

    Raises:
        ValueError: a mapping without input_ids or inputs_embeds, or a tensor of fewer than two dimensions.
    """
    if isinstance(sample, Tensor):
        if sample.ndim < 2:
            raise ValueError(f"profile_layers: expected hidden states [..., T, H], got {list(sample.shape)}")
        return sample.shape[:-2].numel(), sample.shape[-2]
    tokens = sample.get("input_ids", sample.get("inputs_embeds"))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise ValueError(
            f"profile_layers: expected input_ids [B, T] or inputs_embeds in the sample, got {list(sample)}"
        )
    return tokens.shape[0], tokens.shape[1]


def shortened(sample: Sample, length: int) -> Sample:
    """The sample with the first `length` tokens of every row; packed boundaries are cut there."""
    _, full = sample_shape(sample)
    if isinstance(sample, Tensor):
        return sample[..., :length, :]
    return {name: _shortened(name, value, full, length) for name, value in sample.items()}


def _shortened(name: str, value: Any, full: int, length: int) -> Any:
    if name.startswith(("cu_seq_lens", "cu_seqlens")):
        return torch.cat([value[value < length], value.new_tensor([length])])
    if name.startswith(("max_length", "max_seqlen")):
        return min(value, length)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    dims = [dim for dim in range(1, value.ndim) if value.shape[dim] == full]
    if name != "attention_mask" or value.ndim < 4:  # a mask [B, 1, T, T] has queries and keys
        dims = dims[-1:] if name == "position_ids" else dims[:1]
    for dim in dims:
        value = value.narrow(dim, 0, length)
    return value
