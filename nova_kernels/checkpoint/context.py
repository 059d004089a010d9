"""What surrounds a forward pass and has to surround its repetition: autocast, and random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


class Surroundings:
    """Autocast and the random generators as they are now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._autocast = [_autocast_state(kind) for kind in sorted({"cpu", device.type} - {"meta"})]
        self._generators = _generator_states(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Gradients on, autocast as it was; the generators as they were, and afterwards as they are now."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for kind, dtype, enabled, cache in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            stack.enter_context(_generators_set_to(self._generators, self.device))
            yield


def being_compiled() -> bool:
    """Whether torch.compile traces this, or runs it eagerly because it could not trace it."""
    return torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def _autocast_state(kind: str) -> tuple[str, torch.dtype, bool, bool]:
    return (
        kind,
        torch.get_autocast_dtype(kind),
        torch.is_autocast_enabled(kind),
        torch.is_autocast_cache_enabled(),
    )


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _generators_set_to(states: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """The random generators as they were when the call began; afterwards as they are now."""
    on_cpu, on_device = states
    with torch.random.fork_rng(devices=[device] if on_device is not None else []):
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        yield
