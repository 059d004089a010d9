"""From a call to the backend that serves it: what is checked, and what is chosen."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from nova_kernels.attention import flash, ops, torch_varlen
from nova_kernels.backend import choose
from nova_kernels.varlen import check_cu_seqlens


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    softmax_scale: float | None,
    softcap: float | None,
    backend: str | None,
    on_device: Tensor | None = None,
) -> Tensor:
    """nova_kernels.attention.varlen_attention, which says what the arguments are.

    `on_device` is a copy of cu_seqlens on the device of q whose values were checked, for callers that attend many times
    within the same boundaries; None checks and copies here.
    """
    check_options(
        max_seqlen=max_seqlen,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        softcap=softcap,
        backend=backend,
    )
    _check_shapes(q, k, v)
    _check_dtypes(q, k, v)
    _check_derivatives(q, k, v)
    check_boundaries(q, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = autocast(q, k, v)
    window = None if window is None or window >= max_seqlen else window
    name = choose(
        "varlen_attention",
        backend,
        {
            "flash": flash.why_not(q, v),
            "torch_varlen": torch_varlen.why_not(q, v, window=window, softmax_scale=scale, softcap=softcap),
            "reference": None,
        },
    )
    if name == "reference":
        if on_device is None and q.device.type == "meta":  # elsewhere the operator checks
            boundaries_on(q.device, cu_seqlens, q.shape[0], max_seqlen)
        return ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen, causal, window, scale, softcap)
    bounds = on_device
    if bounds is None or (bounds.device != q.device and q.device.type != "meta"):
        bounds = boundaries_on(q.device, cu_seqlens, q.shape[0], max_seqlen)
    if name == "flash":
        return flash.varlen_attention(
            q, k, v, bounds, max_seqlen, causal=causal, window=window, softmax_scale=scale, softcap=softcap
        )
    return torch_varlen.varlen_attention(q, k, v, bounds, max_seqlen, causal=causal, window=window, softmax_scale=scale)


def boundaries_on(device: torch.device, cu_seqlens: Tensor, num_tokens: int, max_seqlen: int) -> Tensor:
    """The boundaries where a kernel reads them, checked; nothing waits for the device.

    Values on the CPU are checked there, unless a compiler is tracing, which has none. The meta device has no values at
    all: its boundaries stay on the CPU.
    """
    copy = cu_seqlens if device.type == "meta" else cu_seqlens.to(device, non_blocking=True).contiguous()
    if not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, num_tokens, max_seqlen)
    elif copy.device.type != "cpu":
        check_cu_seqlens(copy, num_tokens, max_seqlen)
    return copy


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast, in its dtype, as PyTorch's own attention does; float64 stays as it is."""
    dtype = _autocast_dtype(q.device)
    if dtype is None or q.dtype == torch.float64:
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What torch.autocast casts to on this device; None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


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
        raise ValueError(
            f"varlen_attention: Hq must be a multiple of Hkv, got Hq = {heads}, Hkv = {k.shape[1]}; "
            "lay out the heads as q [T, Hq, D] and k, v [T, Hkv, D]"
        )
    if width == 0 or v.shape[2] == 0:
        raise ValueError(f"varlen_attention: heads need a width, got D = {width}, Dv = {v.shape[2]}")


def check_boundaries(q: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse boundaries that are no tensor, or on a third device."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.device.type not in ("cpu", q.device.type):
        place = f"on {cu_seqlens.device}" if isinstance(cu_seqlens, Tensor) else f"a {type(cu_seqlens).__name__}"
        raise ValueError(
            f"varlen_attention: cu_seqlens must be a tensor on the CPU or on {q.device}, it is {place}; "
            "cu_seqlens_from_lengths makes one"
        )


def check_options(
    *,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    softmax_scale: float | None,
    softcap: float | None,
    backend: str | None,
) -> None:
    """Refuse options of other types, tensors among them, which a kernel could not read without waiting; and ranges.

    Raises:
        TypeError: an option has another type.
        ValueError: an option is out of range.
    """
    _check_type("max_seqlen", max_seqlen, int, "an int", "compute it on the CPU, with the boundaries")
    _check_type("causal", causal, bool, "True or False", "False = both ways")
    if window is not None:
        _check_type("window", window, int, "an int, a number of tokens", "None = no window")
    if softmax_scale is not None:
        _check_type("softmax_scale", softmax_scale, (int, float), "a Python number", "None = D ** -0.5")
    if softcap is not None:
        _check_type("softcap", softcap, (int, float), "a Python number", "None = no cap")
    if backend is not None:
        _check_type("backend", backend, str, "a name", "None = the fastest that can run")
    if window is not None and window < 1:
        raise ValueError(f"varlen_attention: window must be at least 1 token, got {window}; None = no window")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"varlen_attention: softcap must be positive, got {softcap}; None = no cap")
    # Kernels scale scores that are masked with -inf already: a scale of 0 or less makes NaN of them.
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(
            f"varlen_attention: softmax_scale must be positive and finite, got {softmax_scale}; None = D ** -0.5"
        )


def _check_type(name: str, value: object, kind: type | tuple[type, ...], wanted: str, way_out: str) -> None:
    """True is an int to Python, not to us."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"varlen_attention: {name} must be {wanted}, got {value!r}; {way_out}")


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.device == k.device == v.device:
        raise ValueError(f"varlen_attention: q, k, v are on {q.device}, {k.device}, {v.device}; move them to one")
    dtypes = (q.dtype, k.dtype, v.dtype)
    cast = _autocast_dtype(q.device) is not None and torch.float64 not in dtypes  # autocast leaves float64 alone
    if not all(dtype.is_floating_point for dtype in dtypes) or not (q.dtype == k.dtype == v.dtype or cast):
        raise ValueError(
            f"varlen_attention: q, k, v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}; "
            "cast them to one (torch.autocast does, but never float64)"
        )


def _check_derivatives(*inputs: Tensor) -> None:
    """An operator of torch.library drops tangents without a word: a derivative would be zero."""
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            "varlen_attention: forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors) are not defined; "
            "use reverse mode (backward, torch.autograd.grad)"
        )
