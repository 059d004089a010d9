"""Attention within the sequences of a packed row; no mask is built and nothing leaks from one to the next.

    out_i = sum over visible j of softmax_j(scale q_i . k_j) v_j

Visible are the tokens of the same sequence: up to i if causal, and nearer than `window` if there is one.
Gradients flow to q, k and v. Equations and limits: docs/kernels/attention.md.
"""

# Shape suffixes: T = packed tokens, S = sequences, Hq and Hkv = query and key heads, D = head width.

from __future__ import annotations

from torch import Tensor

from nova_kernels.attention.dispatch import attend
from nova_kernels.attention.flops import count_flops

__all__ = ["count_flops", "varlen_attention"]


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
        q: [T, Hq, D], any float dtype; under torch.autocast its dtype is used.
        k: [T, Hkv, D] with Hq a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
        v: [T, Hkv, Dv].
        cu_seqlens: int32 [S + 1], boundaries from 0 to T; on the CPU (best) or on the device of q. On the meta device
            they have no values, and shapes are all that comes out.
        max_seqlen: tokens of the longest sequence, or an upper bound of it; an int.
        causal: token i sees tokens j <= i only.
        window: tokens that a token sees on one side, itself included (1 = only itself). None = all.
        softmax_scale: positive factor on the scores; None is D ** -0.5.
        softcap: scores are softcap * tanh(scores / softcap). None = as they are.
        backend: "flash" (the flash-attn package), "torch_varlen" (torch's FlashAttention) or "reference" (PyTorch's
            attention, one sequence at a time); None takes the first of these that can run.

    Returns:
        [T, Hq, Dv] in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or boundaries disagree, or an option is out of range. Wrong values in boundaries that
            are on a GPU are an assertion there, so that nothing waits (the reference waits, and raises).
        TypeError: an option has another type; numbers are Python numbers, not tensors.
        RuntimeError: forward-mode derivatives were asked for (torch.func.jvp, dual tensors).
        BackendUnavailableError: the named backend cannot run these inputs.
    """
    return attend(
        q,
        k,
        v,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        softcap=softcap,
        backend=backend,
    )
