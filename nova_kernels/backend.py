"""Which implementation of an op runs, and why.

Every op lists its candidates, fastest first, each with the reason it cannot run on these inputs, or None.
    asked for nothing     the first that can run; said once in the log, with what was skipped and why
    asked for by name     it runs, or BackendUnavailableError tells the reason; another one never steps in
    NOVA_KERNELS_BACKEND  counts as asked for by name, for those ops that have a backend of that name
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType

import torch

ENVIRONMENT_VARIABLE = "NOVA_KERNELS_BACKEND"

_log = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()  # (op, message) pairs that are in the log already


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for exists, but cannot run here or on these inputs."""


def choose(op: str, requested: str | None, reasons: Mapping[str, str | None]) -> str:
    """The backend that runs.

    Args:
        op: name of the op, for messages.
        requested: a backend's name, or None for the fastest that can run.
        reasons: candidates, fastest first; the value tells why it cannot run, or is None if it can.

    Returns:
        A key of `reasons` whose value is None.

    Raises:
        ValueError: `requested` is not among the candidates.
        BackendUnavailableError: the one asked for cannot run, or none can.
    """
    if requested is None:
        requested = _from_environment(op, reasons)
    if requested is not None:
        if requested not in reasons:
            raise ValueError(f"{op}: unknown backend {requested!r}; expected one of {list(reasons)}")
        if (reason := reasons[requested]) is not None:
            raise BackendUnavailableError(f"{op}: backend {requested!r} cannot run: {reason}")
        return requested
    skipped: list[str] = []
    for name, reason in reasons.items():
        if reason is None:
            _say_once(op, f"runs on backend {name!r}" + (f" ({'; '.join(skipped)})" if skipped else ""))
            return name
        skipped.append(f"not {name!r}: {reason}")
    raise BackendUnavailableError(f"{op}: no backend can run: {'; '.join(skipped)}")


@lru_cache(maxsize=1)
def _native() -> ModuleType | str:
    """The C++ extension, or why it cannot be loaded."""
    try:
        return importlib.import_module("nova_kernels._native")
    except ImportError as failure:
        return f"the C++ extension is not here ({failure}); reinstall where a C++17 compiler is installed"


def why_not_native() -> str | None:
    """Why the C++ extension cannot run; None if it can."""
    native = _native()
    return native if isinstance(native, str) else None


def native_extension() -> ModuleType:
    """nova_kernels._native, the C++ of csrc/.

    Raises:
        BackendUnavailableError: it was not built.
    """
    native = _native()
    if isinstance(native, str):
        raise BackendUnavailableError(native)
    return native


@lru_cache(maxsize=1)
def _cuda() -> ctypes.CDLL | str:
    """The CUDA library, or why it cannot be loaded."""
    found = importlib.util.find_spec("nova_kernels._cuda")
    if found is None or found.origin is None:
        return "the CUDA library was not built; reinstall with NOVA_KERNELS_CUDA=1 where nvcc is installed"
    try:
        return ctypes.CDLL(found.origin)
    except OSError as failure:
        return f"the CUDA library cannot be loaded ({failure}); reinstall with NOVA_KERNELS_CUDA=1"


def why_not_cuda(device: torch.device) -> str | None:
    """Why the CUDA library cannot run on tensors of this device; None if it is there and they are on a GPU."""
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA, the tensors are on {device.type}"
    return why_no_cuda_library()


def why_no_cuda_library() -> str | None:
    """Why the CUDA library is not here, whatever the device; None if it is."""
    library = _cuda()
    return library if isinstance(library, str) else None


def cuda_library() -> ctypes.CDLL:
    """nova_kernels._cuda, the kernels of csrc/cuda/; csrc/cuda/topk_select.h has its functions.

    Raises:
        BackendUnavailableError: it was not built.
    """
    library = _cuda()
    if isinstance(library, str):
        raise BackendUnavailableError(library)
    return library


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device; None if they can.

    On the CPU they run interpreted, for tests: TRITON_INTERPRET=1 has to be set before Triton is imported, and an op
    lists them last there.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"Triton kernels run on CUDA, the tensors are on {device.type}"


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a step inside an op takes its Triton kernel: where one can run, not interpreted, not in float64."""
    return device.type == "cuda" and dtype != torch.float64 and why_not_triton(device) is None


def fastest_first(
    device: torch.device, compiled: Mapping[str, str | None], plain: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Reasons of compiled kernels and of PyTorch's, in the order for `choose`.

    Kernels come last on the CPU: Triton's are interpreted there, for tests, by name.
    """
    return {**plain, **compiled} if device.type == "cpu" else {**compiled, **plain}


def asked_for(requested: str | None, name: str) -> bool:
    """Whether a backend of this name was asked for, by argument or environment."""
    return (requested or os.environ.get(ENVIRONMENT_VARIABLE)) == name


def _from_environment(op: str, reasons: Mapping[str, str | None]) -> str | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is None or name in reasons:
        return name
    _say_once(op, f"{ENVIRONMENT_VARIABLE}={name} is no backend of this op; it has {list(reasons)}")
    return None


def _say_once(op: str, message: str) -> None:
    if torch.compiler.is_compiling() or (op, message) in _said:
        return
    _said.add((op, message))
    _log.info("%s: %s", op, message)
