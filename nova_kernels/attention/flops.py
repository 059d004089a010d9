"""Floating-point operations of varlen attention, for torch.utils.flop_counter.

    forward   2 L^2 Hq (D + Dv)       scores and outputs, for every sequence of L tokens
    backward  2 L^2 Hq (3 D + 2 Dv)   scores again, dv, dp, dq and dk

As torch counts its own attention, a causal mask or a window saves nothing. Boundaries that have no values (fake
tensors, the meta device) count as sequences of max_seqlen tokens that fill the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nova_kernels.attention import ops  # noqa: F401  defines the operators
from nova_kernels.varlen import lengths_of


def count_flops() -> None:
    """Tell torch's FlopCounterMode of the operators that varlen_attention runs on; call it before making a counter.

    use_varlen_attention does. Operators whose formula torch brings along (2.12 and newer, for its own) keep it.
    """
    from torch.nn.attention import varlen  # noqa: F401  its operators exist from here on
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.nova_kernels.varlen_attention: _forward,
        torch.ops.nova_kernels.varlen_attention_backward: _backward,
        torch.ops.torch_attn._varlen_attn: _forward,
        torch.ops.torch_attn._varlen_attn_backward: _torch_backward,
    }
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(formula)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *rest: Any, **_: Any) -> int:
    longest = next(x for x in rest if isinstance(x, int))
    return 2 * _pairs(cu_seqlens, longest, q.shape[0]) * q.shape[1] * (q.shape[2] + v.shape[2])


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *_rest: Any, **_: Any
) -> int:
    return 2 * _pairs(cu_seqlens, max_seqlen, q.shape[0]) * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])


def _torch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    *_rest: Any,
    **_: Any,
) -> int:
    return _backward(grad, q, k, v, cu_seq_q, max_q)


def _pairs(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> int:
    """Pairs of tokens of one sequence."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(cu_seqlens, FakeTensor) or cu_seqlens.device.type == "meta":
        return tokens * max_seqlen
    return sum(length**2 for length in lengths_of(cu_seqlens))
