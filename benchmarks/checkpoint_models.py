"""The models that checkpointing is measured on, one training step of them, and how many bytes it takes.

    Llama      from its config, as Hugging Face builds it, with varlen attention for every way of checkpointing
    blocks     residual MLPs x + W2 tanh(W1 x), W1 [3 H, H]: each keeps n = 3 times its input

A step is forward and backward into gradients that are there already, as in every step but the first. The peak is what
is alive above weights, gradients and token ids at the worst moment, to the byte: by StorageTracker on a CPU, by
PyTorch's allocator on CUDA. Vocabularies are small, so that layers decide the peak and not the logits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nova_kernels.checkpoint import Profile, StorageTracker, profile_layers

SEED = 3
PROFILED = {"cpu": 64, "cuda": 1024}  # tokens of the sample; the profile holds for any number


@dataclass(frozen=True)
class Shape:
    """A stack of decoder layers, or of MLP blocks where there are no heads."""

    hidden: int
    layers: int
    intermediate: int
    heads: int = 0
    key_heads: int = 0
    vocabulary: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def facts(self) -> dict[str, Any]:
        return {"layers": self.layers, "h": self.hidden, "dtype": str(self.dtype).removeprefix("torch.")}


class Block(nn.Module):
    """Keeps tanh(W1 x), which is 3 times as large as x, beside x."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Blocks(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Subject:
    """A model that is trained: one step of it, its profile, the gradients that are right."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        torch.manual_seed(SEED)
        with torch.device(shape.device):
            self.model = llama(shape) if shape.heads else Blocks(shape).to(shape.dtype)
        self.model.train()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    @property
    def fixed_bytes(self) -> int:
        """Weights and gradients."""
        return 2 * sum(gradient.numel() * gradient.element_size() for gradient in self.gradients)

    @cached_property
    def profile(self) -> Profile:
        return profile_layers(self.model, self.sample(PROFILED[self.shape.device]), loss=loss_of)

    def sample(self, tokens: int) -> Any:
        shape = self.shape
        if shape.heads:
            ids = torch.arange(tokens, device=shape.device)[None] * 7 % shape.vocabulary
            return {"input_ids": ids, "labels": ids, "use_cache": False}
        random = torch.Generator(shape.device).manual_seed(SEED)
        size = (1, tokens, shape.hidden)
        return torch.randn(size, generator=random, device=shape.device, dtype=shape.dtype)

    def step(self, sample: Any) -> None:
        """Forward and backward into gradients that begin at 0."""
        torch._foreach_zero_(self.gradients)
        loss_of(self.model, sample).backward()

    def peak_bytes(self, tokens: int) -> int:
        """Most bytes alive above weights, gradients and token ids; the hidden states that blocks are given count."""
        sample = self.sample(tokens)
        given = sample.nbytes if isinstance(sample, Tensor) else 0
        if self.shape.device != "cuda":
            with StorageTracker() as tracker:
                self.step(sample)
            return given + tracker.peak
        release()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(sample)
        torch.cuda.synchronize()
        return given + torch.cuda.max_memory_allocated() - before

    def total_bytes(self, tokens: int) -> int:
        """Most bytes alive, with weights, gradients, ids and labels."""
        return self.fixed_bytes + 2 * 8 * tokens + self.peak_bytes(tokens)

    def forward_flops(self, tokens: int) -> int:
        """Of the layers, without the head."""
        with FlopCount() as count, torch.no_grad():
            loss_of(self.model, self.sample(tokens))
        return count.total - 2 * tokens * self.shape.hidden * self.shape.vocabulary * bool(self.shape.heads)


class FlopCount(TorchDispatchMode):
    """What torch's FlopCounterMode counts, without its hooks on modules, which keep tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def loss_of(model: nn.Module, sample: Any) -> Tensor:
    if isinstance(sample, Tensor):
        output: Tensor = model(sample)
        return output.float().square().mean()
    loss: Tensor = model(**sample).loss
    return loss


def llama(shape: Shape) -> nn.Module:
    """An untrained Llama with varlen attention."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from nova_kernels.integrations.transformers import use_varlen_attention

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=2**20,
        use_cache=False,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
    use_varlen_attention(model)
    return model


@lru_cache(maxsize=1)
def subject(shape: Shape) -> Subject:
    """One at a time: on a GPU the next one needs the room."""
    return Subject(shape)


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def longest(total_bytes: Callable[[int], int], budget: int, first: int, step: float = 1.05) -> tuple[int, int]:
    """The most tokens that fit, by measurement, and the fewest that do not: neighbours on a grid of 5 % steps.

    Two short runs tell where to look, since bytes are affine in the number of tokens.
    """
    at_first, at_second = total_bytes(first), total_bytes(2 * first)
    guess = first + (budget - at_first) * first / (at_second - at_first)
    grid = [first]
    while grid[-1] < 4 * guess:
        grid.append(max(grid[-1] + 8, round(grid[-1] * step / 8) * 8))
    place = max(index for index, tokens in enumerate(grid) if tokens <= max(guess, first))
    if total_bytes(grid[place]) > budget:
        while place and total_bytes(grid[place - 1]) > budget:
            place -= 1
        assert place, f"not even {first} tokens fit into {budget:,} bytes"
        return grid[place - 1], grid[place]
    while total_bytes(grid[place + 1]) <= budget:
        place += 1
    return grid[place], grid[place + 1]
