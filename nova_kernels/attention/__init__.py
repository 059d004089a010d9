"""Attention within the sequences of a packed row; no mask is built and nothing leaks from one to the next.

    out_i = sum over visible j of softmax_j(scale q_i . k_j) v_j

Visible are the tokens of the same sequence: up to i if causal, and nearer than `window` if there is one.
Gradients flow to q, k and v. Equations and limits: docs/kernels/attention.md.
"""

# Shape suffixes: T = packed tokens, S = sequences, Hq and Hkv = query and key heads, D = head width.

from __future__ import annotations

from torch import Tensor

from nova_kernels.attention import reference
from nova_kernels.backend import choose
from nova_kernels.varlen import check_cu_seqlens, lengths_of

__all__ = ["varlen_attention"]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool = True,
    window: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each packed sequence to itself.

    Args:
        q: [T, Hq, D], any float dtype.
        k: [T, Hkv, D] with Hq a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
        v: [T, Hkv, Dv].
        cu_seqlens: int32 [S + 1], boundaries from 0 to T; on the CPU, or reading it waits for the device.
        max_seqlen: tokens of the longest sequence, or an upper bound of it.
        causal: token i sees tokens j <= i only.
        window: tokens that a token sees on one side, itself included (1 = only itself). None = all.
        softmax_scale: factor on the scores; None is D ** -0.5.
        softcap: scores are softcap * tanh(scores / softcap). None = as they are.
        backend: "reference"; None takes the fastest that can run.

    Returns:
        [T, Hq, Dv] in the dtype of q.

    Raises:
        ValueError: shapes or boundaries disagree, or an option is out of range.
        BackendUnavailableError: the named backend cannot run these inputs.
    """
    _check_shapes(q, k, v)
    check_cu_seqlens(cu_seqlens, q.shape[0])
    if window is not None and window < 1:
        raise ValueError(f"varlen_attention: window must be at least 1 token, got {window}; None = no window")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"varlen_attention: softcap must be positive, got {softcap}; None = no cap")
    choose("varlen_attention", backend, {"reference": None})
    lengths = lengths_of(cu_seqlens)
    if lengths and max(lengths) > max_seqlen:
        raise ValueError(
            f"varlen_attention: sequence {lengths.index(max(lengths))} has {max(lengths)} tokens, "
            f"more than max_seqlen={max_seqlen}"
        )
    return reference.varlen_attention(
        q,
        k,
        v,
        lengths,
        causal=causal,
        window=window,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        softcap=softcap,
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(
            "varlen_attention: expected q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    tokens, heads, width = q.shape
    if k.shape[0] != tokens or k.shape[2] != width or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"varlen_attention: q {list(q.shape)} needs k [{tokens}, Hkv, {width}] and v [{tokens}, Hkv, Dv], "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"varlen_attention: Hq must be a multiple of Hkv, got Hq = {heads}, Hkv = {k.shape[1]}")
