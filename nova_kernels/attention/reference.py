"""Varlen attention as it is defined: every sequence attends within itself, one call per sequence.

    s_ij = scale q_i . k_j        p_ij = softmax_j(cap(s_ij))        out_i = sum_j p_ij v_j
    cap(x) = softcap tanh(x / softcap), or x

over the visible j: j <= i if causal, |i - j| < window if there is a window. Query head h reads key head
h // (Hq / Hkv). The gradients, with g_i = dL/d out_i:

    dv_j = sum_i p_ij g_i         ds_ij = cap'(s_ij) p_ij (g_i . v_j - sum_l p_il g_i . v_l)
    dq_i = scale sum_j ds_ij k_j          dk_j = scale sum_i ds_ij q_i

The backward pass computes the p_ij again, for some queries of one sequence at a time: it holds neither a sequence's
length squared nor the keys of the other heads of a group.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries that the backward takes at once, and elements of their scores: on a CPU the scores stay in its cache.
CPU_QUERIES, CPU_SCORES = 64, 2**22
GPU_QUERIES, GPU_SCORES = 1024, 2**27


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
    outputs = [
        _alone(q_s, k_s, v_s, causal=causal, window=window, scale=softmax_scale, softcap=softcap)[0].transpose(0, 1)
        for q_s, k_s, v_s in zip(*rows, strict=True)
        if q_s.shape[2]
    ]
    return torch.cat(outputs) if outputs else q.new_zeros(0, q.shape[1], v.shape[2])


def _alone(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float, softcap: float | None
) -> Tensor:
    """One sequence of L tokens, [1, H, L, D] -> [1, Hq, L, Dv]."""
    hidden = None
    if (window is not None and window < q.shape[2]) or (causal and softcap is not None):
        token = torch.arange(q.shape[2], device=q.device)
        hidden = _hidden(token, token, causal, window)
    if softcap is not None:
        return _capped(q, k, v, hidden, scale, softcap)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if hidden is None else ~hidden,
        is_causal=causal and hidden is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _hidden(queries: Tensor, keys: Tensor, causal: bool, window: int | None) -> Tensor:
    """bool [queries, keys], true where the key at its place is not seen by the query at its place."""
    distance = queries[:, None] - keys
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    return hidden if window is None else hidden | (distance.abs() >= window)


def _capped(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, softcap: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    dtype = scores.dtype if scores.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=dtype).to(v.dtype) @ v


def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    *,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/d(q, k, v) from dL/d out [T, Hq, Dv], in their shapes and dtypes; computed in float32, or float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    groups = q.shape[1] // k.shape[1]
    queries = [x.unflatten(1, (-1, groups)).permute(1, 2, 0, 3) for x in (q, grad, dq)]  # [Hkv, group, T, D]
    keys = [x.transpose(0, 1) for x in (k, v, dk, dv)]  # [Hkv, T, D]
    token = torch.arange(max(lengths, default=0), dtype=torch.int32, device=q.device)
    for begin, finish in pairwise(accumulate(lengths, initial=0)):
        length = finish - begin
        step = _queries(q.shape[1], length, q.device)
        for start in range(0, length, step):
            end = min(start + step, length)
            first = 0 if window is None else max(0, start - window + 1)
            last = end if causal else length if window is None else min(length, end + window - 1)
            edge = start if window is None else first  # keys before it are seen by all these queries
            hidden = None
            if causal or window is not None:
                hidden = _hidden(token[start:end], token[edge:last], causal, window)
            _block_backward(
                *(x[:, :, begin + start : begin + end] for x in queries),
                *(x[:, begin + first : begin + last] for x in keys),
                hidden=hidden,
                scale=softmax_scale,
                softcap=softcap,
            )
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _block_backward(
    q: Tensor,
    g: Tensor,
    dq: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    hidden: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Some queries of one sequence and the keys they see: writes dq, adds to dk and dv.

    The heads of a group are further queries of their key head: [Hkv, group, n, D] is read as [Hkv, group * n, D].
    `hidden` is about the last of the keys.
    """
    shape = q.shape[1:3]
    q, g = (x.flatten(1, 2).to(dk.dtype) for x in (q, g))
    k, v = k.to(dk.dtype), v.to(dk.dtype)
    q = q * scale
    scores, slope = q @ k.transpose(1, 2), None
    if softcap is not None:
        tanh = scores.div_(softcap).tanh_()
        scores, slope = tanh * softcap, tanh.square_().neg_().add_(1)
    if hidden is not None:
        scores.unflatten(1, shape)[..., -hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
    p = scores.softmax(-1)
    dv.baddbmm_(p.transpose(1, 2), g)
    ds = torch._softmax_backward_data(g @ v.transpose(1, 2), p, -1, p.dtype)
    if slope is not None:
        ds = ds.mul_(slope)
    dk.baddbmm_(ds.transpose(1, 2), q)
    torch.mul((ds @ k).unflatten(1, shape), scale, out=dq)


def _queries(heads: int, length: int, device: torch.device) -> int:
    queries, scores = (CPU_QUERIES, CPU_SCORES) if device.type == "cpu" else (GPU_QUERIES, GPU_SCORES)
    return max(1, min(queries, scores // max(heads * length, 1)))
