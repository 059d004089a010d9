from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from nova_kernels.checkpoint import StorageTracker, checkpoint_segments, uniform_segments
from nova_kernels.integrations.transformers import use_varlen_attention
from nova_kernels.packing import pack_samples

WIDTH = 12


class Block(nn.Module):
    """A residual layer; may drop, may return a tuple, counts its forward passes."""

    def __init__(self, dropout: float = 0.0, as_tuple: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.as_tuple = as_tuple
        self.runs = 0

    def forward(self, hidden: Tensor, *, scale: Tensor | None = None, past_key_values: Any = None) -> Any:
        self.runs += 1
        inner = self.drop(torch.tanh(self.up(hidden)))
        out = hidden + self.down(inner) * (1.0 if scale is None else scale)
        return (out, None) if self.as_tuple else out


class Stack(nn.Module):
    def __init__(self, count: int, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(**options) for _ in range(count)])

    def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            output = layer(hidden, scale=scale)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


def make_stack(count: int, **options: Any) -> Stack:
    torch.manual_seed(2)
    return Stack(count, **options)


def gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Of a non-uniform sum of the output, to the parameters and the inputs that want them."""
    torch.manual_seed(9)
    output = model(*inputs)
    upstream = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    wanted = [x for x in [*model.parameters(), *inputs] if x.requires_grad]
    return list(torch.autograd.grad(output, wanted, upstream))


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@pytest.mark.parametrize("segments", [1, 2, 3, 7, 100, [4, 2, 1], [1, 6]])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"as_tuple": True}], ids=["plain", "dropout", "tuple"])
def test_gradients_are_those_of_the_ordinary_backward(segments: int | list[int], options: dict) -> None:
    model = make_stack(7, **options)
    hidden, scale = torch.randn(5, WIDTH, requires_grad=True), torch.rand(5, 1, requires_grad=True)
    expected = gradients(model, hidden, scale)
    with checkpoint_segments(model, segments):
        assert_same(gradients(model, hidden, scale), expected)


@pytest.mark.parametrize("segments", [1, 2, [3, 1]])
def test_every_layer_runs_twice_and_only_twice(segments: int | list[int]) -> None:
    model = make_stack(4)
    with checkpoint_segments(model, segments):
        gradients(model, torch.randn(2, WIDTH))
    assert [layer.runs for layer in model.layers] == [2] * 4
    with torch.no_grad(), checkpoint_segments(model, segments):
        model(torch.randn(2, WIDTH))
    assert [layer.runs for layer in model.layers] == [3] * 4


def test_frozen_inputs_and_frozen_layers() -> None:
    model, hidden = make_stack(4), torch.randn(3, WIDTH)
    model.layers[1].requires_grad_(False)
    model.layers[2].up.weight.requires_grad_(False)
    expected = gradients(model, hidden)
    with checkpoint_segments(model, 2):
        assert_same(gradients(model, hidden), expected)


def test_the_dropout_of_the_next_step_does_not_change() -> None:
    model, hidden = make_stack(3, dropout=0.5), torch.randn(3, WIDTH)
    gradients(model, hidden)
    expected = torch.rand(4)
    with checkpoint_segments(model, 2):
        gradients(model, hidden)
    assert torch.equal(torch.rand(4), expected)


def test_autocast_is_repeated_outside_of_its_context() -> None:
    model, hidden = make_stack(4), torch.randn(3, WIDTH)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(hidden).float().square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    expected = run()
    with checkpoint_segments(model, 2):
        assert_same(run(), expected)


def test_a_second_backward_computes_again() -> None:
    model, hidden = make_stack(3), torch.randn(2, WIDTH)
    with checkpoint_segments(model, 3):
        loss = model(hidden).square().sum()
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert_same(torch.autograd.grad(loss, list(model.parameters())), first)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_hidden_states_changed_between_layers_begin_a_segment(dropout: float) -> None:
    layers, hidden = list(make_stack(4, dropout=dropout).layers), torch.randn(2, WIDTH)

    def run() -> list[Tensor]:
        torch.manual_seed(8)
        x = hidden
        for index, layer in enumerate(layers):
            x = layer(x) if index != 2 else layer(nn.functional.dropout(x, dropout) * 1.5)
        return list(torch.autograd.grad(x.square().sum(), [p for layer in layers for p in layer.parameters()]))

    expected = run()
    with checkpoint_segments(layers, 4):
        assert_same(run(), expected)


def test_several_forwards_before_backward() -> None:
    model, rows = make_stack(4), torch.randn(3, 2, WIDTH)

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(sum(model(row).square().sum() for row in rows), list(model.parameters())))

    expected = run()
    with checkpoint_segments(model, 2):
        assert_same(run(), expected)


def memory(model: nn.Module, tokens: int = 64) -> tuple[float, float]:
    """(after forward, peak of forward and backward) in units of one layer's input; the input itself is not counted."""
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    with StorageTracker() as tracker:
        output = model(hidden).sum()
        kept = tracker.current - output.nbytes
        output.backward()
    assert tracker.current == sum(x.grad.nbytes for x in (hidden, *model.parameters()) if x.grad is not None) + 4
    model.zero_grad(set_to_none=True)
    return kept / hidden.nbytes, tracker.peak / hidden.nbytes


def test_only_boundaries_outlive_the_forward() -> None:
    model = make_stack(12)
    plain_kept, plain_peak = memory(model)
    assert plain_kept > 12 * 3  # tanh saves its output, three units wide
    for size in (1, 2, 3, 4, 6):
        with checkpoint_segments(model, size):
            kept, peak = memory(model)
        assert kept == 12 // size - 1
        assert peak < plain_peak
    with checkpoint_segments(model, 12):
        assert memory(model)[1] < plain_peak + 2  # what is computed again goes as backward uses it
    with checkpoint_segments(model, uniform_segments(12, 4.0)):
        assert memory(model)[1] < 0.6 * plain_peak


def hugging_face(name: str) -> nn.Module:
    torch.manual_seed(4)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes) if name == "qwen2" else LlamaConfig(**sizes)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
@pytest.mark.parametrize("segments", [1, 2, [3, 2]])
def test_hugging_face_models_as_they_are(name: str, segments: int | list[int]) -> None:
    model = hugging_face(name).train()
    batch = pack_samples([{"input_ids": torch.arange(1, length)} for length in (9, 4, 14)])

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits

    with use_varlen_attention(model):
        expected = gradients(Logits())
        with checkpoint_segments(model, segments):
            assert_same(gradients(Logits()), expected)
        assert_same(gradients(Logits()), expected)


def test_hidden_states_that_are_asked_for_are_right() -> None:
    model = hugging_face("llama").train()
    ids = torch.arange(1, 9)[None]
    expected = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    with checkpoint_segments(model, 3):
        assert_same(model(ids, use_cache=False, output_hidden_states=True).hidden_states, expected)


def test_a_cache_is_refused_where_it_would_be_filled_twice() -> None:
    model, ids = hugging_face("llama"), torch.arange(1, 6)[None]
    with checkpoint_segments(model, 2):
        with pytest.raises(ValueError, match=r"was given a KV cache \(past_key_values\).*pass use_cache=False"):
            model(ids, use_cache=True)
        with torch.no_grad():
            model(ids, use_cache=True)
        assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model, hidden = make_stack(4), torch.randn(2, WIDTH)
    expected = gradients(model, hidden)
    with checkpoint_segments(model, 2):
        boundary = hidden.clone()
        alive = weakref.ref(boundary)
        with pytest.raises(TypeError, match="wrong"):
            model.layers[1](model.layers[0](boundary), wrong=1)
        del boundary
        gc.collect()
        assert alive() is None
        assert_same(gradients(model, hidden), expected)


def test_a_copy_of_the_model_has_segments_of_its_own() -> None:
    model, hidden = make_stack(4), torch.randn(2, WIDTH)
    with checkpoint_segments(model, 2):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        ours, theirs = gradients(model, hidden), gradients(twin, hidden)
    assert_same(ours, gradients(model, hidden))
    assert not torch.equal(ours[0], theirs[0])
    assert [layer.runs for layer in twin.layers] == [2] * 4


def test_restore_gives_everything_back() -> None:
    model, hidden = make_stack(4), torch.randn(2, WIDTH)
    handle = checkpoint_segments(model.layers, 3)
    assert handle.sizes == [3, 1]
    assert list(model.state_dict()) == list(make_stack(4).state_dict())
    handle.restore()
    handle.restore()
    gradients(model, hidden)
    assert [layer.runs for layer in model.layers] == [1] * 4
    assert not any("forward" in vars(layer) for layer in model.layers)


@pytest.mark.parametrize(
    ("again", "message"),
    [
        pytest.param(
            lambda x: x.tanh()[..., :5].tanh(), r"saved \[2, 36\] as tensor 1 when computed again; .*do", id="other"
        ),
        pytest.param(lambda x: x, r"of 1 layers saved 2 tensors in forward and 1 again; .*the same thing", id="fewer"),
    ],
)
def test_layers_that_change_between_the_two_runs_are_found(again: Callable[[Tensor], Tensor], message: str) -> None:
    class Fickle(Block):
        def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
            self.runs += 1
            wide = self.up(hidden)
            return wide[..., :WIDTH].tanh() if self.runs == 1 else again(wide)

    layers = [Fickle()]
    with checkpoint_segments(layers, 1), pytest.raises(RuntimeError, match=message):
        layers[0](torch.randn(2, WIDTH)).sum().backward()


@pytest.mark.parametrize(
    ("num_layers", "n", "expected"),
    [
        pytest.param(80, 5.0, [4] * 20, id="k-is-4"),
        pytest.param(11, 0.7, [4, 4, 3], id="longer-ones-first"),
        pytest.param(16, 24.0, [1] * 16, id="big-layers-stand-alone"),
        pytest.param(5, 0.01, [5], id="tiny-layers-go-together"),
        pytest.param(1, 3.0, [1], id="one-layer"),
    ],
)
def test_uniform_segments(num_layers: int, n: float, expected: list[int]) -> None:
    assert uniform_segments(num_layers, n) == expected


def test_uniform_segments_cost_the_least_of_all_equal_ones() -> None:
    for num_layers in range(1, 50):
        for n in (0.3, 1.0, 2.5, 7.0, 24.0):
            sizes = uniform_segments(num_layers, n)
            best = min(-(-num_layers // k) + k * n for k in range(1, num_layers + 1))
            assert sum(sizes) == num_layers and sizes == sorted(sizes, reverse=True)
            assert len(sizes) + sizes[0] * n <= best * 1.1


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        pytest.param(0, r"at least 1 layer per segment, got 0", id="zero"),
        pytest.param([2, 3], r"sizes \[2, 3\] must be positive and sum to the 4 layers", id="sum"),
        pytest.param([5, -1], r"sizes \[5, -1\] must be positive", id="negative"),
    ],
)
def test_wrong_segments_are_refused(segments: int | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint_segments(make_stack(4), segments)


def test_wrong_layers_are_refused() -> None:
    model = make_stack(2)
    with checkpoint_segments(model, 1), pytest.raises(ValueError, match="layer 0 has segments already"):
        checkpoint_segments(model, 1)
    two = nn.ModuleDict({"encoder": make_stack(2), "decoder": make_stack(2)})
    with pytest.raises(ValueError, match=r"found \['decoder.layers', 'encoder.layers'\]; pass the layers"):
        checkpoint_segments(two, 1)
    model.layers[1].gradient_checkpointing = True
    with pytest.raises(ValueError, match=r"layer 1 \(Block\) has the model's own gradient checkpointing"):
        checkpoint_segments(model, 1)
    for num_layers, n in ((0, 1.0), (3, 0.0), (3, float("nan"))):
        with pytest.raises(ValueError, match="uniform_segments: n"):
            uniform_segments(num_layers, n)
