"""Varlen attention by one T x T mask for the whole row: the truth, and a stand-in for kernels that need a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def make_inputs(
    lengths: list[int], heads: int, kv_heads: int, width: int, dtype: torch.dtype, value_width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    widths = ((heads, width), (kv_heads, width), (kv_heads, value_width or width))
    q, k, v = (
        torch.randn(sum(lengths), *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in widths
    )
    return q, k, v


def one_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    *,
    causal: bool = True,
    window: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same maths for the whole row at once."""
    distance, visible = _same_sequence(lengths, q.device)
    if causal:
        visible = visible & (distance >= 0)
    if window is not None:
        visible = visible & (distance.abs() < window)
    return _masked(q, k, v, visible, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, softcap)


def kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: tuple[int, int], scale: float, softcap: float
) -> Tensor:
    """What FlashAttention makes of its arguments: window_size counts others to the left and right, -1 = all."""
    distance, visible = _same_sequence(cu_seqlens.diff().tolist(), q.device)
    left, right = window_size
    if left >= 0:
        visible = visible & (distance <= left)
    if right >= 0:
        visible = visible & (-distance <= right)
    return _masked(q, k, v, visible, scale, softcap or None)


def _same_sequence(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    token = torch.arange(sum(lengths), device=device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)).to(device)
    return token[:, None] - token, sequence[:, None] == sequence


def _masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(groups, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(groups, 1))
