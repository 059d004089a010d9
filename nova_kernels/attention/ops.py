"""The reference as operators of torch.library: plain tensors in and out, fake and autograd registered.

nova_kernels::varlen_attention             out [T, Hq, Dv]; keeps q, k, v for the backward, and nothing else
nova_kernels::varlen_attention_backward    dL/d(q, k, v)

A compiler sees one operator, whatever the boundaries are; they are read, and checked, when it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nova_kernels.attention import reference
from nova_kernels.varlen import check_cu_seqlens, lengths_of


@torch.library.custom_op("nova_kernels::varlen_attention", mutates_args=())
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    softcap: float | None,
) -> Tensor:
    """[T, Hq, D], [T, Hkv, D], [T, Hkv, Dv] -> [T, Hq, Dv]; reading cu_seqlens from a GPU waits for it."""
    cu_seqlens = cu_seqlens.cpu()
    check_cu_seqlens(cu_seqlens, q.shape[0], max_seqlen)
    with torch.autocast(q.device.type, enabled=False):
        return reference.varlen_attention(
            q,
            k,
            v,
            lengths_of(cu_seqlens),
            causal=causal,
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
        )


@varlen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


@torch.library.custom_op("nova_kernels::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/d(q, k, v), contiguous; the forward has checked the boundaries."""
    with torch.autocast(q.device.type, enabled=False):
        return reference.varlen_attention_backward(
            grad,
            q,
            k,
            v,
            lengths_of(cu_seqlens),
            causal=causal,
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
        )


@varlen_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, *options = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.options), *([None] * 6)


varlen_attention.register_autograd(_backward, setup_context=_save)
