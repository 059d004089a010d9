"""What must not happen twice, or must happen the same way twice, when layers are computed again."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from nova_kernels.checkpoint import checkpoint_segments

SEGMENTS = [1, 2, 4]


class Noisy(nn.Module):
    """Draws random numbers without a dropout that could be found."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden)) * torch.rand_like(hidden)


def gradients(layers: nn.ModuleList, hidden: Tensor) -> list[Tensor]:
    torch.manual_seed(4)
    for layer in layers:
        hidden = layer(hidden)
    return list(torch.autograd.grad(hidden.square().sum(), list(layers.parameters())))


def make_layers() -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList([Noisy() for _ in range(4)])


@pytest.mark.parametrize("segments", SEGMENTS)
def test_random_numbers_of_any_layer_repeat(segments: int) -> None:
    layers, hidden = make_layers(), torch.randn(3, 6)
    expected = gradients(layers, hidden)
    with checkpoint_segments(layers, segments):
        assert all(map(torch.equal, gradients(layers, hidden), expected))


@pytest.mark.parametrize("segments", SEGMENTS)
def test_hooks_in_front_of_a_layer_change_its_input_once(segments: int) -> None:
    layers, hidden = make_layers(), torch.randn(3, 6)
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: (args[0].tanh() + 1,))
    expected = gradients(layers, hidden)
    with checkpoint_segments(layers, segments):
        assert all(map(torch.equal, gradients(layers, hidden), expected))


def test_a_layer_stands_in_the_list_once() -> None:
    layers = make_layers()
    with pytest.raises(ValueError, match="layer 2 is in the list twice"):
        checkpoint_segments([layers[0], layers[1], layers[0]], 1)
    with pytest.raises(TypeError, match=r"expected layers per segment, sizes or a plan, got True"):
        checkpoint_segments(layers, True)
    with pytest.raises(ValueError, match="expected at least one layer, got none"):
        checkpoint_segments([], 1)
    with pytest.raises(TypeError, match=r"expected layers \(nn.Module\), got int"):
        checkpoint_segments([1, 2], 1)  # type: ignore[list-item]


def test_a_model_with_segments_can_be_saved_after_a_pass() -> None:
    layers, hidden = make_layers(), torch.randn(3, 6)
    with checkpoint_segments(layers, 2):
        layers[0](hidden)
        copied = pickle.loads(pickle.dumps(layers))
    assert all(map(torch.equal, copied.state_dict().values(), layers.state_dict().values()))
