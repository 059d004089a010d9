"""Varlen attention as it is defined: every sequence attends within itself, one call per sequence.

    out_i = sum_j softmax_j(cap(scale q_i . k_j)) v_j        cap(x) = softcap tanh(x / softcap), or x

over the visible j: j <= i if causal, |i - j| < window if there is a window. Query head h reads key head
h // (Hq / Hkv). The row is split once, so that the backward pass concatenates gradients instead of adding S rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    *,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    softcap: float | None,
) -> Tensor:
    """[T, Hq, D], [T, Hkv, D], [T, Hkv, Dv] -> [T, Hq, Dv]; lengths sum to T."""
    rows = [x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)]
    outputs = []
    for q_s, k_s, v_s in zip(*rows, strict=True):
        length = q_s.shape[2]
        if length == 0:
            continue
        visible = None if window is None or window >= length else _visible(length, causal, window, q.device)
        if softcap is not None:
            outputs.append(_capped(q_s, k_s, v_s, visible, causal, softmax_scale, softcap))
        else:
            outputs.append(
                F.scaled_dot_product_attention(
                    q_s,
                    k_s,
                    v_s,
                    attn_mask=visible,
                    is_causal=causal and visible is None,
                    scale=softmax_scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            )
    if not outputs:
        return q.new_zeros(0, q.shape[1], v.shape[2])
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _visible(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: may token i (row) see token j (column)?"""
    token = torch.arange(length, device=device)
    distance = token[:, None] - token
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return visible if window is None else visible & (distance.abs() < window)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool, scale: float, softcap: float
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if visible is None and causal:
        visible = _visible(q.shape[2], causal, None, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    dtype = scores.dtype if scores.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=dtype).to(v.dtype) @ v
