"""Every action on every kind of layer: the gradients of the ordinary backward, bit for bit, and what it costs."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from nova_kernels.checkpoint import Chain, LayerCost, SegmentPlan, StorageTracker, checkpoint_segments
from nova_kernels.checkpoint.cost import Action
from nova_kernels.checkpoint.recompute import Frame
from nova_kernels.checkpoint.stack import hidden_of
from nova_kernels.integrations.transformers import use_varlen_attention
from nova_kernels.packing import pack_samples

WIDTH, COUNT = 12, 6
Plan = tuple[list[int], list[Action]]
PLANS: dict[str, Plan] = {
    "keep": ([6], ["keep"]),
    "segment": ([4, 2], ["segment", "segment"]),
    "nested": ([4, 2], ["nested", "nested"]),
    "offload": ([2, 3, 1], ["offload", "offload", "offload"]),
    "mixed": ([1, 3, 1, 1], ["offload", "nested", "segment", "keep"]),
    "kept-first": ([2, 1, 3], ["keep", "offload", "nested"]),
}
each_plan = pytest.mark.parametrize("name", PLANS)


def attach(layers: nn.Module | Sequence[nn.Module], plan: Plan, *, count: int = COUNT) -> Any:
    unit = LayerCost(boundary=1, saved=4, saves_input=True, forward=2, recompute=5, recompute_cut=5, backward=4)
    return checkpoint_segments(layers, SegmentPlan.of(Chain(layers=(unit,) * count), *plan))


class Block(nn.Module):
    """A residual layer that counts its runs and ends with an addition: nothing is saved behind `down`'s input."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.runs = 0

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Any:
        self.runs += 1
        inner = self.drop(torch.tanh(self.up(hidden_states)))
        return hidden_states + scale * self.down(inner if mask is None else inner * mask)


class Pair(Block):
    """Hands two streams on, both with gradients."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:  # type: ignore[override]
        other = hidden_states if residual is None else residual + hidden_states
        return super().forward(other.sin()), other


class LowRank(Block):
    """Frozen weights and a trained detour, as LoRA has them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, 2)), nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states) + self.drop(hidden_states) @ self.a @ self.b


class Swallows(Block):
    """Goes on after whatever an Exception is, as layers with a fallback do."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        try:
            return super().forward(hidden_states)
        except Exception:  # noqa: BLE001
            return self.down(self.up(hidden_states))


class Quiet(nn.Sequential):
    """Without a counter, on which a compiled layer would depend."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 3 * WIDTH), nn.Tanh(), nn.Linear(3 * WIDTH, WIDTH), nn.Tanh())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


def make(kind: Callable[..., nn.Module], **options: Any) -> nn.ModuleList:
    torch.manual_seed(2)
    return nn.ModuleList([kind(**options) for _ in range(COUNT)])


def by_name(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden_states=hidden)
    return hidden


def by_place(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    """Other arguments for every layer: masks, none, and a number."""
    for index, layer in enumerate(layers):
        mask = None if index % 3 == 2 else (torch.arange(3 * WIDTH) % (index + 2) > 0).float()
        hidden = layer(hidden, mask, scale=1 / (1 + index))
    return hidden


def in_pairs(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    residual = None
    for layer in layers:
        hidden, residual = layer(hidden, residual)
    return hidden * residual


def with_noise_between(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    """Random numbers are drawn between the layers, as layer drop does; what flows on stays the same tensor."""
    for layer in layers:
        torch.rand(3)
        hidden = layer(hidden)
    return hidden


def changed_in_place(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for index, layer in enumerate(layers):
        hidden = layer(hidden)
        if index in (0, 3):
            hidden.mul_(1.5)
    return hidden


def cut(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for index, layer in enumerate(layers):
        hidden = layer(hidden if index != 2 else hidden.detach())
    return hidden


def in_part_autocast(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        for index, layer in enumerate(layers):
            with torch.autocast("cpu", enabled=index != 2):
                hidden = layer(hidden)
    return hidden.float()


def frozen(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for index in (0, 1, 4):
        layers[index].requires_grad_(False)
    return by_name(layers, hidden)


def several(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    return by_name(layers, hidden) + by_name(layers, hidden * 2) * 0.5


RUNS: dict[str, tuple[Callable[..., nn.Module], Callable[[nn.ModuleList, Tensor], Tensor]]] = {
    "names": (Block, by_name),
    "arguments": (Block, by_place),
    "two-streams": (Pair, in_pairs),
    "noise-between": (Block, with_noise_between),
    "changed-in-place": (Block, changed_in_place),
    "detached": (Block, cut),
    "autocast": (Block, in_part_autocast),
    "low-rank": (LowRank, by_name),
    "frozen": (Block, frozen),
    "several-forwards": (Block, several),
    "swallows": (Swallows, by_name),
}


def gradients(run: Callable[..., Tensor], layers: nn.ModuleList, hidden: Tensor, steps: int = 1) -> list[Tensor]:
    """Output and gradients, which are accumulated over the steps."""
    torch.manual_seed(9)
    layers.zero_grad()
    leaf = hidden.detach().requires_grad_(hidden.requires_grad)
    for _ in range(steps):
        output = run(layers, leaf)
        output.backward(torch.linspace(0.5, 1.5, output.numel()).view_as(output))
    return [output.detach(), *(x.grad.clone() for x in (leaf, *layers.parameters()) if x.grad is not None)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@each_plan
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("wants_gradient", [True, False], ids=["input", "no-input"])
def test_gradients_are_those_of_the_ordinary_backward(name: str, run: str, wants_gradient: bool) -> None:
    kind, forward = RUNS[run]
    layers, hidden = make(kind, dropout=0.5), torch.randn(5, WIDTH, requires_grad=wants_gradient)
    expected = gradients(forward, layers, hidden)
    assert len(expected) > 2
    following = torch.rand(3)
    with attach(layers, PLANS[name]):
        assert_same(gradients(forward, layers, hidden), expected)
        assert torch.equal(torch.rand(3), following)  # the random numbers of the next step
        assert_same(gradients(forward, layers, hidden, steps=2), gradients(forward, layers, hidden, steps=2))
    assert_same(gradients(forward, layers, hidden), expected)


@each_plan
def test_backward_twice_and_through_the_gradient(name: str) -> None:
    layers, hidden = make(Block, dropout=0.3), torch.randn(4, WIDTH, requires_grad=True)

    def penalty() -> list[Tensor]:
        torch.manual_seed(9)
        loss = by_name(layers, hidden).square().sum()
        first = torch.autograd.grad(loss, [hidden], retain_graph=True)
        second = torch.autograd.grad(loss, [hidden], create_graph=True)
        assert_same(first, second)
        return [second[0].detach(), *torch.autograd.grad(second[0].square().sum(), list(layers.parameters())[:-1])]

    expected = penalty()
    with attach(layers, PLANS[name]):
        assert_same(penalty(), expected)


RUNS_OF = {"keep": [1] * 6, "segment": [2] * 6, "nested": [3, 3, 3, 2, 3, 2], "mixed": [2, 3, 3, 2, 2, 1]}


@pytest.mark.parametrize("name", RUNS_OF)
@pytest.mark.parametrize("kind", [Block, Swallows])
def test_how_often_layers_run(name: str, kind: type[Block]) -> None:
    layers = make(kind)
    with attach(layers, PLANS[name]):
        gradients(by_name, layers, torch.randn(2, WIDTH))
    assert [layer.runs for layer in layers] == RUNS_OF[name]
    with torch.no_grad(), attach(layers, PLANS[name]):
        by_name(layers, torch.randn(2, WIDTH))
    assert [layer.runs for layer in layers] == [runs + 1 for runs in RUNS_OF[name]]


def flops(layers: nn.ModuleList, run: Callable[..., Tensor] = by_name) -> int:
    """Matrix products of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        gradients(run, layers, torch.randn(4, WIDTH, requires_grad=True))
    return counter.get_total_flops() // (2 * 4 * WIDTH * 3 * WIDTH)


def test_what_lies_behind_the_last_saved_tensor_is_not_computed_again() -> None:
    def torchs(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
        for layer in layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return hidden

    layers = make(Block)
    assert flops(layers) == 36  # two products per layer, and twice that in backward
    expected = gradients(torchs, layers, torch.ones(3, WIDTH))
    alone = flops(layers, torchs)
    for size, tails in ((1, 6), (2, 3), (3, 2), (6, 1)):
        with checkpoint_segments(layers, size):
            assert flops(layers) == 36 + 12 - tails
            assert_same(gradients(by_name, layers, torch.ones(3, WIDTH)), expected)
    assert alone == 36 + 12 - 6
    with attach(layers, ([6], ["nested"])):
        assert flops(layers) == 36 + 10 + 12 - 6  # inputs of five layers, then six layers without their tails


def test_only_boundaries_are_alive_and_nothing_afterwards() -> None:
    layers, hidden = make(Block, dropout=0.5), torch.randn(32, WIDTH)
    for sizes, action in itertools.product(([6], [1] * 6, [3, 2, 1]), ("segment", "nested", "offload")):
        with attach(layers, (sizes, [action] * len(sizes))), StorageTracker() as tracker:
            output = by_name(layers, hidden)
            assert tracker.current == (len(sizes) - 1) * hidden.nbytes + output.nbytes
            loss = output.square().sum()
            del output
            torch.autograd.grad(loss, list(layers.parameters()))
            del loss
            assert tracker.current == 0


@pytest.mark.parametrize("run", ["names", "two-streams", "detached"])
@each_plan
def test_frames_end_without_the_garbage_collector(name: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Frame] = weakref.WeakSet()
    begin = Frame.__init__
    monkeypatch.setattr(Frame, "__init__", lambda self, *args: (begin(self, *args), alive.add(self))[0])
    kind, forward = RUNS[run]
    layers, hidden = make(kind, dropout=0.5), torch.randn(4, WIDTH)
    with attach(layers, PLANS[name]):
        output = forward(layers, hidden)
        assert len(alive) > 0 or name == "keep"
        del output  # no backward at all
        assert len(alive) == 0
        loss = forward(layers, hidden).sum()
        loss.backward()
        assert len(alive) == 0
        with pytest.raises(TypeError, match="wrong"):
            layers[1](hidden_of(layers[0](hidden)), wrong=1)
        assert len(alive) == 0


@each_plan
def test_a_copy_has_segments_of_its_own(name: str) -> None:
    layers, hidden = make(Block, dropout=0.5), torch.randn(4, WIDTH)
    with attach(layers, PLANS[name]):
        gradients(by_name, layers, hidden)
        twin = copy.deepcopy(layers)
        for layer in (*layers, *twin):
            layer.runs = 0
        assert_same(gradients(by_name, twin, hidden), gradients(by_name, layers, hidden))
        assert [layer.runs for layer in twin] == [layer.runs for layer in layers]


def test_what_cannot_be_computed_again_is_refused() -> None:
    class Wraps(Block):
        def forward(self, hidden_states: Any) -> Any:  # type: ignore[override]
            given = hidden_states["hidden"] if isinstance(hidden_states, dict) else hidden_states
            return {"hidden": super().forward(given)}

    layers, hidden = make(Wraps), torch.randn(4, WIDTH)

    def run(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
        carried: Any = hidden
        for layer in layers:
            carried = layer(carried)
        return carried["hidden"]

    expected = gradients(run, layers, hidden)
    with checkpoint_segments(layers, 4):
        assert_same(gradients(run, layers, hidden), expected)
    for sizes, action, what in (([6], "nested", "computed again"), ([3, 3], "offload", "offloaded")):
        with (
            attach(layers, (sizes, [action] * len(sizes))),
            pytest.raises(ValueError, match=f"the input of Wraps is no tensor of its own, so it cannot be {what}; use"),
        ):
            gradients(run, layers, hidden)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of dynamo itself
@pytest.mark.parametrize("how", ["compile", "forward"])
@pytest.mark.parametrize("action", ["segment", "nested", "offload"])
def test_compiled_layers(how: str, action: Action) -> None:
    torch._dynamo.reset()
    layers, hidden = make(Quiet), torch.randn(4, WIDTH)
    for layer in layers:
        if how == "compile":
            layer.compile(backend="aot_eager", fullgraph=True)
        else:
            layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    expected = gradients(by_name, layers, hidden)
    torch._dynamo.utils.counters.clear()
    with attach(layers, ([4, 2], [action] * 2)):
        with pytest.raises(ValueError, match="layer 0 has segments already"):
            checkpoint_segments(layers, 1)
        assert_same(gradients(by_name, layers, hidden), expected)
        with torch.no_grad():
            by_name(layers, hidden)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same(gradients(by_name, layers, hidden), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_model_compiled_around_its_segments_is_refused() -> None:
    torch._dynamo.reset()
    model, hidden = nn.Sequential(*make(Quiet)), torch.randn(4, WIDTH)
    around = torch.compile(model, backend="aot_eager")
    with checkpoint_segments(model, 3):
        with pytest.raises(RuntimeError, match=r"Quiet has segments and is being compiled; compile each layer before"):
            around(hidden)
        with torch.no_grad():
            torch.testing.assert_close(around(hidden), model(hidden))
        model[1].compile(backend="aot_eager")
        with pytest.raises(RuntimeError, match="Quiet has segments and is being compiled"):
            model(hidden)


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
@each_plan
def test_packed_rows_of_a_language_model(name: str, family: type) -> None:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": COUNT}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.0}
    if family is Qwen2Config:  # the upper layers see a window only
        sizes |= {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(family(**sizes)).train()
    model.get_input_embeddings().requires_grad_(False)
    batch = pack_samples([{"input_ids": torch.arange(1, length)} for length in (9, 4, 14)])
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> list[Tensor]:
        logits = model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits
        return [logits, *torch.autograd.grad(logits.logsumexp(-1).square().sum(), wanted)]

    with use_varlen_attention(model):
        expected = run()
        with attach(model, PLANS[name]):
            assert_same(run(), expected)
