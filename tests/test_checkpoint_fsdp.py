"""Segments on layers that fully_shard has split over two processes: the gradients of one process, the gathers planned.

A segment gathers its layers when it is computed again and, held, has them at hand for their backward: one gather per
layer and direction, and as many unsharded layers as the segment has. With reshard it gathers all but its last layer
once more, and beside the last layer, whose backward waits, one at a time is unsharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from transformers import AutoModelForCausalLM, LlamaConfig

from nova_kernels.checkpoint import FSDP, Chain, LayerCost, SegmentPlan, checkpoint_segments
from nova_kernels.checkpoint.cost import Action
from processes import on_ranks

WIDTH, COUNT, ROWS = 10, 7, 3


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    action: Action
    reshard: bool = False
    prefetch: int = 1  # layers gathered ahead in backward

    @property
    def longest(self) -> int:
        return 1 if self.action == "keep" else max(self.sizes)

    @property
    def gathers_in_backward(self) -> int:
        again = sum(size - 1 for size in self.sizes) if self.reshard and self.action != "keep" else 0
        return sum(self.sizes) + again

    @property
    def unsharded(self) -> int:
        """Layers whose parameters are whole at once."""
        return min(2, self.longest) if self.reshard else self.longest

    @property
    def gathered(self) -> int:
        """The same, with those that were gathered ahead and wait."""
        if self.reshard:
            return max(min(2 + self.prefetch, self.longest), 1 + self.prefetch)
        return max(self.longest, 1 + self.prefetch)


SIZES = {"k=1": (1,) * COUNT, "k=2": (2, 2, 2, 1), "k=3": (3, 3, 1)}
CASES = {
    "keep": Case((COUNT,), "keep"),
    **{name: Case(sizes, "segment") for name, sizes in SIZES.items()},
    **{f"{name} reshard": Case(sizes, "segment", reshard=True) for name, sizes in SIZES.items()},
    "alone": Case((4, 2, 1), "segment", prefetch=0),
    "reshard alone": Case((4, 3), "segment", reshard=True, prefetch=0),
    "nested": Case((4, 3), "nested"),
    "nested reshard": Case((4, 3), "nested", reshard=True),
}
LLAMA = {
    "keep": Case((4,), "keep"),
    "segment": Case((3, 1), "segment", reshard=True),
    "nested": Case((4,), "nested"),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.drop(torch.tanh(self.up(hidden))))


class Stack(nn.Module):
    """Begins and ends with parameters of its own, which the root holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(COUNT)])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.embed(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


def make_stack() -> tuple[nn.Module, nn.ModuleList]:
    torch.manual_seed(2)
    model = Stack().double()
    return model, model.layers


def make_llama() -> tuple[nn.Module, nn.ModuleList]:
    torch.manual_seed(2)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model = AutoModelForCausalLM.from_config(config).train()
    return model, model.model.layers


def step(model: nn.Module, rank: int) -> None:
    """Forward and backward of one rank's rows; gradients are summed where they are."""
    torch.manual_seed(5 + rank)
    if isinstance(model, Stack):
        model(torch.randn(ROWS, WIDTH, dtype=torch.float64)).square().sum().backward()
    else:
        model(input_ids=torch.randint(0, 31, (2, 9))).logits.logsumexp(-1).square().mean().backward()


class Counts:
    """Gathers of layers, and how many are whole at once; [in forward, in backward]."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.groups = [layer._get_fsdp_state()._fsdp_param_group for layer in layers]
        self.gathers, self.unsharded, self.gathered = [0, 0], [0, 0], [0, 0]

    @contextmanager
    def counting(self) -> Iterator[None]:
        own = FSDPParamGroup.unshard, FSDPParamGroup.wait_for_unshard

        def unshard(group: Any, *args: Any, **kwargs: Any) -> None:
            waits = group._all_gather_result
            own[0](group, *args, **kwargs)
            self.look(begun=group in self.groups and group._all_gather_result is not waits)

        def wait_for_unshard(group: Any) -> None:
            own[1](group)
            self.look(begun=False)

        FSDPParamGroup.unshard, FSDPParamGroup.wait_for_unshard = unshard, wait_for_unshard
        try:
            yield
        finally:
            FSDPParamGroup.unshard, FSDPParamGroup.wait_for_unshard = own

    def look(self, *, begun: bool) -> None:
        phase = int(torch._C._current_graph_task_id() != -1)
        whole = [group.is_unsharded for group in self.groups]
        waiting = [group._all_gather_result is not None for group in self.groups]
        self.gathers[phase] += begun
        self.unsharded[phase] = max(self.unsharded[phase], sum(whole))
        self.gathered[phase] = max(self.gathered[phase], sum(a or b for a, b in zip(whole, waiting, strict=True)))


def attach(layers: nn.ModuleList, case: Case) -> Any:
    unit = LayerCost(boundary=1, saved=4, saves_input=True, forward=2, recompute=5, recompute_cut=5, backward=4)
    chain = Chain(layers=(unit,) * len(layers))
    fsdp = FSDP(prefetch=case.prefetch, reshard=case.reshard)
    return checkpoint_segments(layers, SegmentPlan.of(chain, case.sizes, case.action, fsdp=fsdp))


def run(case: Case, model: nn.Module, layers: nn.ModuleList, rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
        if case.prefetch == 0:
            layer.set_modules_to_backward_prefetch([layer])  # which is there already
    fully_shard(model, mesh=mesh)
    with attach(layers, case):
        step(model, rank)  # the first step gathers in another order, since it does not know it yet
        counts = Counts(layers)
        with counts.counting():
            step(model, rank)  # gradients are accumulated
    assert not any(group.is_unsharded for group in counts.groups)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"gradients": gradients, **{key: getattr(counts, key) for key in ("gathers", "unsharded", "gathered")}}


def on_rank() -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {name: run(case, *make_stack(), rank) for name, case in CASES.items()}
    return found | {f"llama {name}": run(case, *make_llama(), rank) for name, case in LLAMA.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(2, on_rank)


def one_process(model: nn.Module) -> dict[str, Tensor]:
    """The mean over the ranks of two accumulated steps."""
    for rank in (0, 1, 0, 1):
        step(model, rank)
    return {name: parameter.grad / 2 for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_sharded_stack(ranks: list[dict[str, Any]], name: str) -> None:
    expected = one_process(make_stack()[0])
    for found in ranks:
        for parameter, gradient in found[name]["gradients"].items():
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LLAMA)
def test_gradients_of_a_sharded_language_model(ranks: list[dict[str, Any]], name: str) -> None:
    expected = one_process(make_llama()[0])
    for found in ranks:
        for parameter, gradient in found[f"llama {name}"]["gradients"].items():
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*CASES, *(f"llama {name}" for name in LLAMA)])
def test_gathers_and_unsharded_layers_are_those_of_the_plan(ranks: list[dict[str, Any]], name: str) -> None:
    case = LLAMA[name.removeprefix("llama ")] if name.startswith("llama ") else CASES[name]
    for found in ranks:
        assert found[name]["gathers"] == [sum(case.sizes), case.gathers_in_backward]
        assert found[name]["unsharded"] == [1, case.unsharded]
        assert found[name]["gathered"] == [1, case.gathered]
