"""What this machine offers: versions, threads, devices, and which backend each op would take."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from nova_kernels.backend import ENVIRONMENT_VARIABLE
from nova_train.mesh import usable_cpus

_REQUIRED = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "PyYAML", "tyro", "rich", "Jinja2")
_OPTIONAL = ("triton", "flash-attn", "vllm", "datasets", "pyarrow", "matplotlib", "wandb", "tensorboard", "trackio")


def environment_report() -> str:
    """Aligned lines of text; starts nothing and changes nothing."""
    rows = [
        ("nova-kernels", _version("nova-kernels")),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in (*_REQUIRED, *_OPTIONAL)),
        ("cpu", f"{len(usable_cpus())} usable; torch alone would take {torch.get_num_threads()} threads"),
        *_devices(),
        *((name, os.environ.get(name, "not set")) for name in (ENVIRONMENT_VARIABLE, "OMP_NUM_THREADS")),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    if torch.version.cuda is None:
        return [("cuda", "this torch is built without CUDA")]
    if not torch.cuda.is_available():
        return [("cuda", f"torch is built for CUDA {torch.version.cuda}, but finds no device")]
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        rows.append((f"cuda:{index}", f"{device.name}, {memory:.0f} GiB, sm_{device.major}{device.minor}"))
    return rows
