"""Models whose weights are sharded over the ranks by FSDP2: one unit per layer, and one for all that is not a layer's.

    gradient of a weight = sum over ranks of the gradients of their losses, each divided by counts over all ranks

With bf16 the matrices of layers are gathered in bfloat16, which is what autocast makes of them in one process. All else
stays as it is: the residual stream, embedding and heads, and the vectors of layers (norms, biases), which are few and
belong to the unit outside. So several ranks compute what one computes, and gradients are summed in float32.

The trainer's losses use the head's weight beside the model (nova_train.model), so they run inside the root's forward,
where it is whole. Generation asks for all weights at once: they are gathered once, not once per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nova_kernels.checkpoint import layers_of
from nova_train.mesh import Mesh

ResultT = TypeVar("ResultT")


class _Root(nn.Module):
    """Runs a function while the weights `outside` are whole."""

    def __init__(self, model: nn.Module, outside: list[nn.Parameter]) -> None:
        super().__init__()
        self.model = model
        self.outside = nn.ParameterList(outside)  # beside their places in the layers: there FSDP2 would not find them

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def outside_layers(model: nn.Module) -> list[nn.Parameter]:
    """Weights that stay whole while a model runs, in its own dtype: embedding, norms, heads, and biases of layers."""
    inside = {id(p) for layer in layers_of(model, "sequence_parallel_size") for p in matrices(layer)}
    return [p for p in model.parameters() if id(p) not in inside]


def matrices(layer: nn.Module) -> list[nn.Parameter]:
    """Weights of a layer that are gathered when it runs: those of two or more dimensions."""
    return [p for p in layer.parameters() if p.ndim > 1]


def shard(model: nn.Module, mesh: Mesh, *, bf16: bool) -> None:
    """Shard a model in place over all ranks; nothing on a mesh of one."""
    if mesh.all_ranks is None:
        return
    reduced = torch.float32 if bf16 else None
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=reduced, cast_forward_inputs=False
    )
    outside = outside_layers(model)
    for layer in layers_of(model, "sequence_parallel_size"):
        fully_shard(layer, mesh=mesh.all_ranks, mp_policy=policy, ignored_params=set(outside))
    root = _Root(model, outside)
    fully_shard(root, mesh=mesh.all_ranks, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduced))
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
    """All weights are whole on every rank inside the `with`; each may then call the model as often as it likes.

    With bf16 the model's body runs under autocast there, as it does in training, on any number of ranks; its head, as
    there, does not.
    """
    root = getattr(model, "_root", None)
    units = [] if root is None else [module for module in root.modules() if isinstance(module, FSDPModule)]
    if is_sharded(model):
        with_weights(model, lambda: None)  # FSDP2 takes the first module that runs for the root
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        with _body_in_autocast(model) if getattr(model, "_autocast", False) else nullcontext():
            yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not root, recurse=False)


@contextmanager
def _body_in_autocast(model: Any) -> Iterator[None]:
    """Every forward of the model's body enters autocast, as the trainer's own do."""
    body = model.base_model
    before = vars(body).get("forward")
    device = next(body.parameters()).device.type
    body.forward = torch.autocast(device, dtype=torch.bfloat16)(body.forward)
    try:
        yield
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before


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
