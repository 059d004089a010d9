"""The ways of doing one piece of work that a benchmark compares: ours, by backend, and what others use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Way:
    """One way of doing the work of a case."""

    name: str
    run: Callable[..., Any]
    package: str = "torch"
    main_only: bool = False  # at one size only, because it is slow to compile or adds little
    most: int = 2**62  # elements of what it holds; above it is not tried
    tolerance: float = 1e-3  # error relative to the float64 truth, above which something must be wrong
    compiled: bool = False
    sixteen_bit: bool = False  # where inputs are float32, it is another way's very work

    @property
    def ours(self) -> bool:
        return self.package == "nova-kernels"

    def fits(self, elements: int, *, main: bool, dtype: torch.dtype) -> bool:
        """Whether it belongs to a case that holds `elements` its way."""
        return (
            elements <= self.most and (main or not self.main_only) and not (self.sixteen_bit and dtype == torch.float32)
        )

    def prepared(self, part: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """What is called, or a part of it; compiled for this case alone where the way is."""
        run = part or self.run
        if not self.compiled:
            return run
        torch.compiler.reset()
        return torch.compile(run, dynamic=False)


def ours(run: Callable[..., Any], *backends: str, slow: tuple[str, ...] = ("reference",)) -> tuple[Way, ...]:
    """The automatic choice, and every backend by its name; those that are slow at the main size only."""
    named = (
        Way(f"nova_kernels, {b}", partial(run, backend=b), "nova-kernels", main_only=b in slow, tolerance=0.01)
        for b in backends
    )
    return (Way("nova_kernels", run, "nova-kernels", tolerance=0.01), *named)
