"""Whether the samples of a packed row see each other: their logits together against their logits alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nova_kernels.packing import PackedBatch
from nova_kernels.varlen import lengths_of


@torch.no_grad()
def check_packing(model: PreTrainedModel, batch: PackedBatch, model_kwargs: Mapping[str, Any] | None = None) -> float:
    """Largest difference between the logits of a packed row and those of its samples one by one.

    About 1e-6 in float32 when the samples are kept apart, 0.1 or more when they see each other. Works with and without
    varlen attention, so it also tells whether another trainer's way of calling the model leaks.

    Args:
        model: returns logits per token; of other models (sequence classification) the last hidden states are compared.
        batch: the packed row, on the model's device.
        model_kwargs: what the model is called with beside input_ids; None is `batch.attention_kwargs()`.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        packed = _outputs(model, batch.input_ids, batch.attention_kwargs() if model_kwargs is None else model_kwargs)
        lengths = lengths_of(batch.cu_seqlens)
        alone = [_outputs(model, ids, {"use_cache": False}) for ids in batch.input_ids.split(lengths, dim=1)]
        differences = (packed - torch.cat(alone, dim=1)).abs()
        return float(differences.max())
    finally:
        for module, mode in modes:
            module.training = mode


def _outputs(model: PreTrainedModel, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    logits: Tensor | None = getattr(model(input_ids=input_ids, **kwargs), "logits", None)
    if logits is not None and logits.ndim == 3:
        return logits
    hidden: Tensor = model.base_model(input_ids=input_ids, **kwargs).last_hidden_state
    return hidden
