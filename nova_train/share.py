"""What one rank of several holds: its part of every weight and of every row, and what is whole for a while.

Weights are sharded over all N ranks by FSDP2 (sharding.py), rows of T tokens over the sp ranks of a group:

    weights, gradients, moments      ceil(rows / N) of every matrix
    activations                      of ceil(T / sp) tokens
    whole for a whole micro-batch    embedding, norms, heads and biases; their gradients as they come
    whole for a moment               layers, as nova_kernels.checkpoint counts them (FSDP); one at the loss
    attention on sp ranks            on a GPU its output by heads and by tokens; copies of key heads

The numbers are those of the rank that holds most, so that all ranks make one plan of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from nova_kernels.checkpoint import FSDP, Chain, LayerCost, layers_of
from nova_kernels.ulysses import HeadPlan
from nova_train.config import TrainConfig, launched_ranks
from nova_train.model import pick_device
from nova_train.sharding import matrices, outside_layers
from nova_train.values import parse_bytes

ModelT = TypeVar("ModelT", bound=nn.Module)

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

    def gathered_bytes(self, model: nn.Module) -> int:
        """What stays whole while a model runs."""
        return 0 if self.ranks == 1 else self._whole_bytes(outside_layers(model))

    def as_gathered(self, model: ModelT, bf16: bool) -> ModelT:
        """The same model of fake tensors, in the dtypes that a rank of several sees: its layers' matrices differ."""
        for layer in layers_of(model, "sequence_parallel_size") if self.ranks > 1 and bf16 else []:
            for module in layer.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    if p.ndim > 1:
                        setattr(module, name, nn.Parameter(p.detach().bfloat16(), requires_grad=p.requires_grad))
        return model

    @contextmanager
    def keeping_gradients(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with` gradients of weights are new and stay, as FSDP2 has them before they are summed."""
        kept: list[torch.Tensor] = []
        trained = [] if self.ranks == 1 else _trained(model.parameters())
        hooks = [p.register_hook(kept.append) for p in trained]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def chain(self, chain: Chain, model: nn.Module, row: int, config: TrainConfig) -> Chain:
        """The costs of `tokens(row)` tokens of a model `as_gathered`, as they are on a rank of several.

        Args:
            chain: measured with `keeping_gradients`.
        """
        if self.ranks == 1:
            return chain
        modules = layers_of(model, "sequence_parallel_size")
        layers = tuple(
            self._sharded(self._exchanged(cost, model, row, config), matrices(module), config.bf16)
            for cost, module in zip(chain.layers, modules, strict=True)
        )
        first, last = layers[0].summed, layers[-1].weights
        outside = outside_layers(model)
        # In the end the weights outside are gone as well, when their gradients are summed.
        summed = self._whole_bytes(_trained(outside)) + self._sent_bytes(outside, config.bf16)
        return replace(
            chain,
            layers=layers,
            loss=chain.loss + last,
            under_autocast=chain.under_autocast + last,
            embedding=max(chain.embedding + first, summed - self._whole_bytes(outside)),
        )

    def _sharded(self, cost: LayerCost, weights: list[nn.Parameter], bf16: bool) -> LayerCost:
        return replace(
            cost,
            weights=self._whole_bytes(weights),
            gradients=self._whole_bytes(_trained(weights)),
            sent=self._sent_bytes(weights, bf16),
            backward_sharded=cost.backward,
        )

    def _exchanged(self, layer: LayerCost, model: Any, row: int, config: TrainConfig) -> LayerCost:
        """A layer whose attention is exchanged with the ranks of its group: it keeps some heads of all tokens.

        Beside what attention keeps, its output is kept by tokens, as it is without ranks. On a GPU attention keeps its
        own as well: without ranks that is the same tensor.
        """
        if self.sp == 1:
            return layer
        settings = model.config.get_text_config()
        heads = settings.num_attention_heads
        kv_heads = getattr(settings, "num_key_value_heads", None) or heads
        width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
        plan = HeadPlan.build(heads, kv_heads, self.sp)
        outputs = 1 if pick_device(config.device) == "cuda" else 0
        by_heads = max((1 + outputs) * len(plan.q_heads(p)) + 2 * len(plan.kv_heads(p)) for p in range(self.sp))
        element = 2 if config.bf16 else model.dtype.itemsize
        more = max(0, element * width * (row * by_heads - self.tokens(row) * (heads + 2 * kv_heads)))
        return replace(
            layer, saved=layer.saved + more, recompute=layer.recompute + more, recompute_cut=layer.recompute_cut + more
        )

    def _whole_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Of gathered weights, or their gradients: the parts of all ranks, with what fills up the last."""
        return self.ranks * sum(self.numel([p]) * p.element_size() for p in parameters)

    def _sent_bytes(self, parameters: Iterable[nn.Parameter], bf16: bool) -> int:
        """Of the buffer in which gradients are summed, in float32 with bf16."""
        return self.ranks * sum(self.numel([p]) * (4 if bf16 else p.element_size()) for p in _trained(parameters))


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def device_budget(config: TrainConfig) -> int:
    """`memory_budget` in bytes, or a share of the device's memory where there is none; of one rank."""
    if config.memory_budget is not None:
        return parse_bytes(config.memory_budget, "memory_budget")
    if pick_device(config.device) == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(0).total_memory)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_here)
