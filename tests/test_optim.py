from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from nova_train.optim import Optimizers, learning_rate_factor
from nova_train.stages.sft import SFTConfig


def config(**options: object) -> SFTConfig:
    return SFTConfig(output_dir="-", model_name_or_path="-", dataset_name=["-"], **options)


@pytest.mark.parametrize(
    ("kind", "middle", "last"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_schedule_warms_up_to_the_peak_and_decays_to_the_floor(kind: str, middle: float, last: float) -> None:
    c = config(lr_scheduler_type=kind, warmup_steps=4, min_lr_rate=0.1)
    factors = [learning_rate_factor(step, 104, c) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[54] == pytest.approx(0.1 + 0.9 * middle)
    assert factors[104] == pytest.approx(0.1 + 0.9 * last)
    assert all(b <= a for a, b in pairwise(factors[4:]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)


def test_muon_takes_the_layer_matrices_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizers = Optimizers(net, config(optim="muon", muon_learning_rate=0.02, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizers.step(0.5)
    moved = {name: (p - before[name]).detach() for name, p in net.named_parameters()}
    assert moved["embed.weight"].abs().max() == pytest.approx(0.5e-5, rel=1e-2), "AdamW's first step is the rate"
    matrix = moved["layers.0.weight"]
    values = torch.linalg.svdvals(matrix)
    assert values.max() / values.min() < 2.5, "Muon's step is near orthogonal"
    assert all(p.grad is None for p in net.parameters())


def test_decay_spares_vectors() -> None:
    net = Net()
    optimizers = Optimizers(net, config(weight_decay=0.5, learning_rate=0.1))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    weight, norm = net.layers[0].weight.detach().clone(), net.norm.weight.detach().clone()
    optimizers.step(1.0)
    assert torch.equal(net.norm.weight, norm)
    assert torch.allclose(net.layers[0].weight, weight * 0.95)
