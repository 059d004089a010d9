"""Varlen attention by the flash-attn package, where it is installed.

The package is imported at the first call. Its backward is deterministic where torch's algorithms are asked to be.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import lru_cache

import torch
from torch import Tensor

from nova_kernels.attention import kernels


def why_not(q: Tensor, v: Tensor) -> str | None:
    """Why it cannot run on these inputs; None if it can."""
    if q.device.type != "cuda":
        return f"it runs on CUDA, the tensors are on {q.device.type}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    # A compiler cannot follow the import; it compiles what ran before.
    return kernels.why_not(q, v) or (None if torch.compiler.is_compiling() else _why_not_import())


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    window: int | None,
    softmax_scale: float,
    softcap: float | None,
) -> Tensor:
    """[T, Hq, D], [T, Hkv, D], [T, Hkv, D] -> [T, Hq, D]; cu_seqlens is on their device."""
    from flash_attn import flash_attn_varlen_func

    bound = kernels.longest(max_seqlen)
    out: Tensor = flash_attn_varlen_func(
        *(kernels.readable(x) for x in (q, k, v)),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=bound,
        max_seqlen_k=bound,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=kernels.window_size(causal, window),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


@lru_cache(maxsize=1)
def _why_not_import() -> str | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as failure:
        return f"flash-attn cannot be imported ({failure}); reinstall it for torch {torch.__version__}"
    if "softcap" not in inspect.signature(flash_attn_varlen_func).parameters:
        return "this flash-attn is too old; install 2.6 or newer"
    return None
