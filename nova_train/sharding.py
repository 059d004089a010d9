"""Models whose weights are sharded over the ranks by FSDP2: one unit per layer, and one for embedding, norm and heads.

    gradient of a weight = sum over ranks of the gradients of their losses, each divided by counts over all ranks

The trainer's losses use the head's weight beside the model (nova_train.model), so they run inside the root's forward,
where it is whole. Generation asks for all weights at once: they are gathered once, not once per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nova_kernels.checkpoint import layers_of
from nova_train.mesh import Mesh

ResultT = TypeVar("ResultT")


class _Root(nn.Module):
    """Runs a function while the model's own weights (not those of its layers) are whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def shard(model: nn.Module, mesh: Mesh, *, bf16: bool) -> None:
    """Shard a model in place over all ranks; nothing on a mesh of one."""
    if mesh.all_ranks is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    options: dict[str, Any] = {"mesh": mesh.all_ranks, **({} if policy is None else {"mp_policy": policy})}
    for layer in layers_of(model, "sequence_parallel_size"):
        fully_shard(layer, **options)
    root = _Root(model)
    fully_shard(root, **options)
    for unit in root.modules():
        if isinstance(unit, FSDPModule):  # a sum: an average of three ranks, times three, is rounded in float32
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    object.__setattr__(model, "_root", root)  # no submodule: it holds the model


def is_sharded(model: nn.Module) -> bool:
    return isinstance(getattr(model, "_root", None), FSDPModule)


def with_weights(model: nn.Module, function: Callable[..., ResultT], *args: Any) -> ResultT:
    """Run a function that uses the model and its head: every forward of a sharded model goes through here.

    All ranks must call it equally often. Its result is a tensor, or dicts, lists and tuples of them.
    """
    result: ResultT = function(*args) if not is_sharded(model) else model._root(function, *args)  # type: ignore[operator]
    return result


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights are whole on every rank inside the `with`; each may then call the model as often as it likes."""
    root = getattr(model, "_root", None)
    units = [] if root is None else [module for module in root.modules() if isinstance(module, FSDPModule)]
    if is_sharded(model):
        with_weights(model, lambda: None)  # FSDP2 takes the first module that runs for the root
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not root, recurse=False)


def full_tensor(value: Tensor) -> Tensor:
    """A sharded tensor as a whole one, on every rank; others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like_parameter(value: Any, parameter: Tensor) -> Any:
    """A whole tensor of a parameter's shape, sharded as the parameter is; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def full_state_dict(model: nn.Module, mesh: Mesh) -> Mapping[str, Tensor] | None:
    """The model's weights on the first rank's CPU, one after the other; None on the others. Tied ones stay tied."""
    whole: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            gathered_value = full_tensor(value.detach())
            seen[id(value)] = gathered_value.cpu() if mesh.is_main else gathered_value.new_empty(0)
        whole[name] = seen[id(value)]
    return whole if mesh.is_main else None
