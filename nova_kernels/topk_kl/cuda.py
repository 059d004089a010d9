"""Top-K selection, and selection with the KL over the kept entries, by the CUDA kernels of csrc/cuda.

One thread block per row: a single read of the row leaves group maxima in shared memory and the log-sum-exp, K sectors
are read a second time; the KL reads K entries of the policy in the same block. Derivation: csrc/cuda/topk_select.cuh.
Plain tensors in and out, on one CUDA device, on its current stream; no autograd and no synchronisation.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from nova_kernels.backend import BackendUnavailableError, cuda_library, why_not_cuda

MAX_K = 4096  # kMaxK of topk_select.cuh
SHARED_BYTES = 113 * 1024  # at most what a block takes: two fit on an SM of compute capability 9.0
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(device: torch.device, dtype: torch.dtype = torch.float32, k: int = 2) -> str | None:
    """Why rows of `dtype` on `device` cannot be reduced to their top `k` here; None if they can."""
    if (reason := why_not_cuda(device)) is not None:
        return reason
    if dtype not in FORMATS:
        return f"the CUDA kernels take {[str(format) for format in FORMATS]}, not {dtype}"
    if not 2 <= k <= MAX_K:
        return f"the CUDA kernels keep 2 to {MAX_K} entries, not {k}"
    return _why_not_device(torch.cuda.current_device() if device.index is None else device.index)


@torch.no_grad()
def topk_select(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of each row; see reference.topk_select for ties, NaN and -inf.

    Args:
        logits: [n, V] float32, bfloat16 or float16; unit stride over V, any over n.
        k: 2 ... min(V, 4096).
        temperature: of the log-sum-exp alone.

    Returns:
        ids int32 [n, k], ascending, -1 unused; values float32 [n, k], -inf unused; lse float32 [n] of
        logits / temperature.

    Raises:
        BackendUnavailableError: no library, no GPU, or not for these inputs.
        ValueError: shapes, strides, k or temperature that do not fit.
        RuntimeError: CUDA refused the launch.
    """
    where = "topk_select"
    rows, vocabulary = _check_logits(where, logits, "logits", k, temperature)
    ids = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    values = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _launch(
        where, logits.device, _library().nova_topk_select, *_rows(logits), rows, vocabulary, k, temperature,
        ids.data_ptr(), values.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    return ids, values, lse


@torch.no_grad()
def topk_kl_div_from_logits(
    policy_logits: Tensor,
    ref_logits: Tensor,
    k: int,
    temperature: float,
    direction: str,
    mask: Tensor | None,
    *,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """KL over the reference's top k, selected in the same kernel; see reference.kl_terms for the formulas.

    Args:
        policy_logits, ref_logits: [n, V] float32, bfloat16 or float16, each with its own type and row stride.
        k: 2 ... min(V, 4096).
        temperature: divides both sides.
        direction: "policy_ref" or "ref_policy".
        mask: bool [n] or None; a row where it is False reads nothing: KL 0, derivatives 0, ids -1.
        gradient: False leaves the derivatives out.

    Returns:
        KL float32 [n], NaN in a row without any reference entry above -inf; its derivative by the policy's raw logits
        at the ids, float32 [n, k] (0 in unused slots) or None; ids int32 [n, k], ascending, -1 unused.

    Raises:
        As topk_select.
    """
    where = "topk_kl_div_from_logits"
    rows, vocabulary = _check_logits(where, ref_logits, "ref_logits", k, temperature)
    _check_logits(where, policy_logits, "policy_logits", k, temperature)
    if policy_logits.shape != ref_logits.shape or policy_logits.device != ref_logits.device:
        raise ValueError(
            f"{where}: expected policy_logits {list(ref_logits.shape)} on {ref_logits.device}, "
            f"got {list(policy_logits.shape)} on {policy_logits.device}"
        )
    if direction not in ("policy_ref", "ref_policy"):
        raise ValueError(f"{where}: direction must be 'policy_ref' or 'ref_policy', got {direction!r}")
    if mask is not None:
        if mask.shape != (rows,) or mask.dtype != torch.bool or mask.device != ref_logits.device:
            raise ValueError(
                f"{where}: expected mask bool [{rows}] on {ref_logits.device}, "
                f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
            )
        mask = mask.contiguous()
    kl = torch.empty(rows, dtype=torch.float32, device=ref_logits.device)
    by_kept = torch.empty(rows, k, dtype=torch.float32, device=ref_logits.device) if gradient else None
    ids = torch.empty(rows, k, dtype=torch.int32, device=ref_logits.device)
    _launch(
        where, ref_logits.device, _library().nova_topk_kl, *_rows(ref_logits), *_rows(policy_logits), rows, vocabulary,
        k, temperature, direction == "policy_ref", _address(mask), kl.data_ptr(), _address(by_kept), ids.data_ptr(),
    )  # fmt: skip
    return kl, by_kept, ids


def _check_logits(where: str, logits: Tensor, name: str, k: int, temperature: float) -> tuple[int, int]:
    if (reason := why_not(logits.device, logits.dtype, k)) is not None:
        raise BackendUnavailableError(f"{where}: backend 'cuda' cannot run: {reason}")
    if logits.ndim != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"{where}: expected {name} [n, V] with unit stride over V, got {list(logits.shape)} with strides "
            f"{list(logits.stride())}"
        )
    rows, vocabulary = logits.shape
    if not 2 <= k <= vocabulary:
        raise ValueError(f"{where}: k must lie between 2 and V = {vocabulary}, got {k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{where}: temperature must be positive and finite, got {temperature}")
    return rows, vocabulary


def _rows(logits: Tensor) -> tuple[int, int, int]:
    return FORMATS[logits.dtype], logits.data_ptr(), logits.stride(0)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The library, its functions told what they take; csrc/cuda/topk_select.h says what each argument means."""
    library = cuda_library()
    integer, number, real, address = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    library.nova_topk_select.argtypes = [
        integer, address,  # device, stream
        integer, address, number,  # logits: format, address, stride
        number, number, number, real,  # rows, vocabulary, k, temperature
        address, address, address,  # ids, values, lse
    ]  # fmt: skip
    library.nova_topk_kl.argtypes = [
        integer, address,  # device, stream
        integer, address, number,  # reference
        integer, address, number,  # policy
        number, number, number, real,  # rows, vocabulary, k, temperature
        integer, address,  # direction, mask
        address, address, address,  # KL, its derivative, ids
    ]  # fmt: skip
    library.nova_cuda_error.restype = ctypes.c_char_p
    library.nova_cuda_source.restype = ctypes.c_char_p
    return library


@lru_cache(maxsize=64)
def _why_not_device(index: int) -> str | None:
    with torch.cuda.device(index):
        code = _library().nova_cuda_check(index)
    shared = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 0)
    if shared < SHARED_BYTES:
        return f"the CUDA kernels need {SHARED_BYTES:,} bytes of shared memory a block, this GPU has {shared:,}"
    return None if code == 0 else f"the CUDA library cannot run on {torch.cuda.get_device_name(index)}: {_error(code)}"


def _launch(where: str, device: torch.device, function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    with torch.cuda.device(device):
        code = function(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream, *arguments)
    if code != 0:
        raise RuntimeError(f"{where}: CUDA refused the launch: {_error(code)}")


def _error(code: int) -> str:
    described: bytes = _library().nova_cuda_error(code)
    return described.decode()
