"""How much memory a call needs beyond what it is given and what it gives back.

    extra = highest use during the call - use before it - bytes of the tensors it returns      (never below 0)

Inputs are there before; returned results and gradients are anybody's. Not returned, and so extra: logits, graphs,
buffers, gradients in another dtype than they are returned in.

    CUDA    bytes in PyTorch's allocator; what stays from the first call on (cuBLAS workspaces) was there before
    CPU     resident set of a process forked for the one call, sees every allocator. Its parent, forked as well, has
            given back its free heap, else freed memory would be used again unseen. What files are mapped for, code
            above all, is taken off
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

Call = Callable[[], Any]


def tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a nested result."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from tensors(item)
    elif is_dataclass(result):
        for field in fields(result):
            yield from tensors(getattr(result, field.name))


def size_of(result: Any) -> int:
    """Bytes of a result's elements; what a view keeps alive beside them is extra."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(result))


def extra_bytes(call: Call, device: str) -> int:
    """Peak extra memory of one call, by the formula above."""
    return max(0, _cuda_growth(call) if device == "cuda" else _forked_growth(call))


def _cuda_growth(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - size_of(result)


def _forked_growth(call: Call) -> int:
    """How far the peak of a forked process rises during the call."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        _leave(lambda: _measure_below(call, write))
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise MemoryError("the process that was to measure the memory ended without an answer")
    return int(text)


def _measure_below(call: Call, write: int) -> None:
    """A fresh process starts with the peak of what its parent holds: without the free heap, once that is trimmed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if (child := os.fork()) == 0:
        _leave(lambda: os.write(write, str(_growth(call)).encode()))
    os.waitpid(child, 0)


def _growth(call: Call) -> int:
    before = _peak() - _mapped()
    size = size_of(call())
    return _peak() - _mapped() - before - size


def _leave(work: Call) -> NoReturn:
    """End the process after its work, without the exit code that the parent has registered."""
    try:
        work()
    finally:
        os._exit(0)


def _peak() -> int:
    """ru_maxrss starts anew in a forked process; kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _mapped() -> int:
    """Resident bytes of mapped files."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:")), 0)
