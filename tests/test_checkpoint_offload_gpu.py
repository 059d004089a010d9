"""Offloaded boundaries on a GPU: gradients, memory, and races, which links that are too slow bring to light.

With a memory pool that the sanitizer can see, it finds uses of memory that was given back as well:

    PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync compute-sanitizer --tool memcheck \\
        --track-stream-ordered-races all python -m pytest -m gpu tests/test_checkpoint_offload_gpu.py
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nova_kernels.checkpoint as checkpoint
from nova_kernels.checkpoint.offload import CudaTransport, Offloader

pytestmark = pytest.mark.gpu

GPU = "cuda"
MILLISECOND = 2_000_000  # in clock cycles of a GPU, about


class SlowLink(CudaTransport):
    """Every copy takes a millisecond longer, so that whoever does not wait for it comes too early."""

    def _copy(self, source: Tensor, target: Tensor, compute: torch.cuda.Stream) -> torch.cuda.Event:
        with torch.cuda.stream(self._side):
            torch.cuda._sleep(MILLISECOND)
        return super()._copy(source, target, compute)


class NoWait(SlowLink):
    def wait(self, copied: torch.cuda.Event, compute: torch.cuda.Stream) -> None:
        return None


class NoSideWait(CudaTransport):
    def _copy(self, source: Tensor, target: Tensor, compute: torch.cuda.Stream) -> torch.cuda.Event:
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
        return self._side.record_event()


def differences(transport: CudaTransport) -> int:
    """Boundaries that came back with another bit, in 100 chains of random sizes while memory is reused all the time."""
    choice, offloader, width = random.Random(1), Offloader(transport), 96
    wrong = torch.zeros((), dtype=torch.int64, device=GPU)

    def reuse(tokens: int) -> None:
        for _ in range(4):
            torch.full((tokens, width), torch.nan, device=GPU)

    for _ in range(100):
        tokens, graph = choice.randint(1, 3000), []
        for _ in range(choice.randint(1, 6)):
            torch.cuda._sleep(MILLISECOND // 4)
            hidden = torch.randn(tokens, width, device=GPU)
            graph.append((offloader.store(hidden), hidden.clone()))
            del hidden
            reuse(tokens)
        while graph:
            stored, expected = graph.pop()
            fetched = stored.fetch()
            if graph:
                graph[-1][0].prefetch()
            wrong += (fetched.view(torch.int32) != expected.view(torch.int32)).any()
            del stored, fetched
            reuse(tokens)
    return int(wrong)


@pytest.mark.parametrize("transport", [CudaTransport, SlowLink])
def test_no_race_on_a_gpu(transport: type[CudaTransport]) -> None:
    assert differences(transport(torch.device(GPU, 0))) == 0


@pytest.mark.parametrize("transport", [NoWait, NoSideWait])
def test_a_race_on_a_gpu_is_seen(transport: type[CudaTransport]) -> None:
    assert differences(transport(torch.device(GPU, 0))) > 0


def blocks(count: int, width: int, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    parts = (
        nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(2 * width, width))
        for _ in range(count)
    )
    return nn.Sequential(*parts).to(GPU)


def gradients(layers: nn.Sequential, rows: list[Tensor]) -> list[Tensor]:
    """Of a sum over several forward passes, whose backward comes after all of them."""
    torch.manual_seed(4)
    loss = sum(layers(row).square().mean() for row in rows)
    return list(torch.autograd.grad(loss, [*layers.parameters(), *(row for row in rows if row.requires_grad)]))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("actions", ["offload", ["offload", "segment", "offload", "keep"]], ids=["all", "mixed"])
def test_gradients_on_a_gpu(actions: Any, dropout: float) -> None:
    layers = blocks(7, 64, dropout)
    for tokens in (1, 37, 2000):
        rows = [torch.randn(tokens, 64, device=GPU, requires_grad=index > 0) for index in range(3)]
        expected = gradients(layers, rows)
        plan = checkpoint.SegmentPlan.of(checkpoint.profile_layers(list(layers), rows[0]), [3, 2, 1, 1], actions)
        with checkpoint.checkpoint_segments(layers, plan):
            for _ in range(3):
                actual = gradients(layers, rows)
                assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_peak_memory_on_a_gpu() -> None:
    count, tokens, width = 16, 16_384, 256
    layers, hidden = blocks(count, width), torch.randn(tokens, width, device=GPU)
    profile = checkpoint.profile_layers(list(layers), hidden)
    peaks = {}
    for action in ("segment", "offload"):
        with checkpoint.checkpoint_segments(layers, checkpoint.SegmentPlan.of(profile, [1] * count, action)):
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats()
                layers(hidden).square().mean().backward()
            peaks[action] = torch.cuda.max_memory_allocated()
    # The caller holds the first boundary anyway, one is in use and one on its way.
    assert peaks["segment"] - peaks["offload"] > (count - 4) * hidden.nbytes
