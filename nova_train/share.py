"""What one rank of several holds: its part of every weight and of every row, and what is whole for a while.

Weights are sharded over all N ranks by FSDP2 (sharding.py), rows of T tokens over the sp ranks of a group:

    weights, gradients, moments      ceil(rows / N) of every matrix
    activations                      of ceil(T / sp) tokens
    whole for a whole micro-batch    embedding, norm and head; their gradient from the loss on
    whole for a moment               layers, as nova_kernels.checkpoint counts them (FSDP); one more at the loss
    attention on sp ranks            output by heads and by tokens, and copies of key heads

The numbers are those of the rank that holds most, so that all ranks make one plan of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nova_kernels.checkpoint import FSDP, Chain, LayerCost, layers_of
from nova_kernels.ulysses import HeadPlan
from nova_train.config import TrainConfig, launched_ranks
from nova_train.model import pick_device
from nova_train.values import parse_bytes

GPU_SHARE, CPU_SHARE = 0.9, 0.5  # of the device's memory, where no memory_budget is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank of `ranks`, of which `sp` share every row."""

    ranks: int = 1
    sp: int = 1

    @classmethod
    def of(cls, config: TrainConfig, ranks: int | None = None) -> Share:
        """That of a training on this many ranks; None: on those that were started. One process shares with nobody."""
        ranks = launched_ranks() if ranks is None else ranks
        return cls(ranks=ranks, sp=config.sequence_parallel_size if ranks > 1 else 1)

    @property
    def fsdp(self) -> FSDP | None:
        """How the layers are sharded."""
        return FSDP() if self.ranks > 1 else None

    def tokens(self, row: int) -> int:
        """Of a row."""
        return -(-row // self.sp)

    def numel(self, parameters: Iterable[nn.Parameter]) -> int:
        """Elements of these parameters; FSDP2 cuts their first dimension and rounds up."""
        return sum(-(-p.shape[0] // self.ranks) * p.shape[1:].numel() if p.ndim else 1 for p in parameters)

    def gathered_bytes(self, model: nn.Module, bf16: bool) -> int:
        """What stays whole while a model runs: all but its layers."""
        return 0 if self.ranks == 1 else _bytes(_outside(model), bf16)

    def chain(self, chain: Chain, model: nn.Module, row: int, config: TrainConfig) -> Chain:
        """The costs of `tokens(row)` tokens, as they are on a rank of several."""
        if self.ranks == 1:
            return chain
        bf16 = config.bf16
        layers = [self._layer(layer, model, row, bf16) for layer in chain.layers]
        if bf16:  # gradients are summed in float32: what waits to be sent is twice as large
            above = [*chain.layers[1:], replace(chain.layers[-1], weights=0)]
            layers = [
                replace(one, backward=one.backward + up.weights, recompute_cut=one.recompute_cut + up.weights)
                for one, up in zip(layers, above, strict=True)
            ]
        outside = _outside(model)
        gradient = _bytes(_trained(outside), bf16)
        head = _bytes(_trained([p for p in outside if p is _head(model)]), bf16)
        sent = gradient * (2 if bf16 else 1)
        first, last = chain.layers[0].weights * (2 if bf16 else 1), chain.layers[-1].weights
        return replace(
            chain,
            layers=tuple(layers),
            loss=chain.loss + last,
            under_autocast=chain.under_autocast + last,
            after_loss=chain.after_loss + head,
            embedding=max(chain.embedding + head + first, gradient + sent + sent // self.ranks),
        )

    def _layer(self, layer: LayerCost, model: Any, row: int, bf16: bool) -> LayerCost:
        """A layer whose attention is exchanged with the ranks of its group."""
        if self.sp == 1:
            return layer
        settings = model.config.get_text_config()
        heads = settings.num_attention_heads
        kv_heads = getattr(settings, "num_key_value_heads", None) or heads
        width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
        element = 2 if bf16 else model.dtype.itemsize
        plan = HeadPlan.build(heads, kv_heads, self.sp)
        by_heads = max(len(plan.q_heads(rank)) + len(plan.kv_heads(rank)) for rank in range(self.sp))
        more = element * width * (2 * row * by_heads + self.tokens(row) * (heads - 2 * heads - 2 * kv_heads))
        more = max(more, 0)
        return replace(
            layer, saved=layer.saved + more, recompute=layer.recompute + more, recompute_cut=layer.recompute_cut + more
        )


def _outside(model: nn.Module) -> list[nn.Parameter]:
    inside = {id(p) for layer in layers_of(model, "sequence_parallel_size") for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _bytes(parameters: Iterable[nn.Parameter], bf16: bool) -> int:
    return sum(p.numel() * (torch.bfloat16.itemsize if bf16 else p.element_size()) for p in parameters)


def _head(model: Any) -> Any:
    """What the loss multiplies hidden states with: the LM head, or that of a reward model."""
    head = model.get_output_embeddings()
    return (model.score if head is None else head).weight


def device_budget(config: TrainConfig) -> int:
    """`memory_budget` in bytes, or a share of the device's memory where there is none; of one rank."""
    if config.memory_budget is not None:
        return parse_bytes(config.memory_budget, "memory_budget")
    if pick_device(config.device) == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(0).total_memory)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_here)
