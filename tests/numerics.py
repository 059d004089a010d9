"""How accurate is accurate enough (plain PyTorch's own error at the same dtype sets the budget), and what ops hold."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_as_accurate(actual: Tensor, peer: Tensor, truth: Tensor, *, slack: float = 2.0, floor: float = 1e-6) -> None:
    """`actual` may be at most `slack` times further from the float64 `truth` than `peer`.

    `peer` is the same maths in plain PyTorch, in the dtype of `actual`.
    Distances are norms relative to the truth's norm (absolute where that is 0); `floor` is added to the budget.
    """
    assert actual.shape == peer.shape == truth.shape, f"shapes {actual.shape}, {peer.shape}, {truth.shape}"
    assert actual.dtype == peer.dtype, f"dtypes {actual.dtype} and {peer.dtype}"
    assert truth.dtype == torch.float64, f"the truth must be float64, is {truth.dtype}"
    if truth.numel() == 0:
        return
    for name, value in (("actual", actual), ("peer", peer), ("truth", truth)):
        assert torch.isfinite(value).all(), f"{name} holds values that are not finite"
    size = truth.norm().item() or 1.0
    ours, theirs = ((value.double() - truth).norm().item() / size for value in (actual, peer))
    assert ours <= slack * theirs + floor, f"relative error {ours:.2e}, plain PyTorch has {theirs:.2e}"


class OpWatch(TorchDispatchMode):
    """Inside it: rows that matrix products were given, and elements of the largest tensor that an op gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.elements = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.rows += result.shape[0]
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def undecorate(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """The operators of these modules as plain functions with plain autograd: watches see nothing inside one."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.library.CustomOpDef):
                monkeypatch.setattr(module, name, _plain(value))


def _plain(operator: Any) -> Any:
    if operator._backward_fn is None:
        return operator._init_fn

    class Plain(torch.autograd.Function):
        forward = staticmethod(operator._init_fn)
        setup_context = staticmethod(operator._setup_context_fn)
        backward = staticmethod(operator._backward_fn)

    return Plain.apply


def distance(found: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest value; at least to 1."""
    assert found.shape == truth.shape
    size = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
    return (found.double() - truth.double()).abs().max().item() / size if truth.numel() else 0.0
