"""Varlen attention by torch.nn.attention.varlen: PyTorch's own copy of FlashAttention.

What it can do has grown: torch 2.10 knows causal and not, 2.11 a window and a scale, 2.12 asks to be told of grouped
heads, which the kernel always had. On the meta device it computes shapes, for those who plan memory. Its backward is
deterministic under torch.use_deterministic_algorithms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nova_kernels.attention import kernels


def why_not(q: Tensor, v: Tensor, *, window: int | None, softmax_scale: float, softcap: float | None) -> str | None:
    """Why it cannot run on these inputs; None if it can."""
    if q.device.type not in ("cuda", "meta"):
        return f"it runs on CUDA, the tensors are on {q.device.type}"
    if softcap is not None:
        return "it has no softcap; install flash-attn, which has"
    if reason := kernels.why_not(q, v):
        return reason
    options = _options()
    if window is not None and "window_size" not in options:
        return f"it has no window in torch {torch.__version__}; install torch 2.11 or newer"
    if softmax_scale != q.shape[-1] ** -0.5 and "scale" not in options:
        return f"its scale is D ** -0.5 in torch {torch.__version__}; install torch 2.11 or newer"
    # A compiler cannot follow questions to the device; it compiles for a GPU that ran before.
    return None if q.device.type == "meta" or torch.compiler.is_compiling() else _why_not_device(q.device)


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
) -> Tensor:
    """[T, Hq, D], [T, Hkv, D], [T, Hkv, D] -> [T, Hq, D]; cu_seqlens is on their device, or on the CPU for meta."""
    from torch.nn.attention.varlen import varlen_attn

    options = _options()
    how: dict[str, Any] = {}
    if "window_size" in options:
        how["window_size"] = kernels.window_size(causal, window)
    else:
        how["is_causal"] = causal
    if "scale" in options:
        how["scale"] = softmax_scale
    if "enable_gqa" in options:
        how["enable_gqa"] = q.shape[1] != k.shape[1]
    entry: Any = varlen_attn  # its type changes with torch's version
    bound = kernels.longest(max_seqlen)
    rows = [kernels.readable(x) for x in (q, k, v)]
    out: Tensor = entry(*rows, cu_seqlens, cu_seqlens, bound, bound, **how)
    return out


def _options() -> frozenset[str]:
    """Names of the options that this version of torch takes by keyword alone."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(varlen_attn.__kwdefaults__ or ())


def _why_not_device(device: torch.device) -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer, this one has {capability[0]}.{capability[1]}"
    return None
