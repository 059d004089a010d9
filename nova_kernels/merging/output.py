"""Writing a merged model: shards byte after byte, and the whole folder at once.

A shard is a safetensors file: 8 bytes length of the header (little endian), the header (JSON, padded with spaces to a
multiple of 8), then the tensors in the header's order. Since shapes and dtypes are known beforehand, the header is
written first and tensors follow in pieces; nothing is buffered.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nova_kernels.merging.saved import DTYPE_NAMES, INDEX, WEIGHTS, TensorInfo

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
)


def write_shard(path: Path, infos: Mapping[str, TensorInfo], pieces: Iterable[Tensor]) -> None:
    """One safetensors file; `pieces` are consecutive parts of the tensors in the order of `infos`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.num_bytes],
        }
        end += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            _write_bytes(file, piece)
        file.flush()
        os.fsync(file.fileno())
        written = file.tell() - 8 - len(text)
    assert written == end, f"{path}: wrote {written} bytes of tensors, planned {end}"


def _write_bytes(file: IO[bytes], tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().view(-1)
    file.write(flat.view(torch.uint8).numpy().data)


def write_index(folder: Path, infos: Mapping[str, TensorInfo]) -> None:
    """model.safetensors.index.json, where there is more than one file."""
    if {info.file for info in infos.values()} <= {WEIGHTS}:
        return
    index = {
        "metadata": {"total_size": sum(info.num_bytes for info in infos.values())},
        "weight_map": {name: info.file for name, info in sorted(infos.items())},
    }
    write_json(folder / INDEX, index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Readable JSON in the order given."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation config and the like, next to the weights."""
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def holds_model(folder: Path) -> bool:
    """Whether a folder opens as a model; weights alone are what an interrupted merge leaves."""
    return (folder / "config.json").exists()


def publish(built: Path, out: Path) -> None:
    """Move a finished folder to its place.

    Where `out` has files already, the old model goes first and config.json comes last, so that `out` never opens as
    anything but a whole model.
    """
    if out.exists() and not any(out.iterdir()):
        out.rmdir()
    if not out.exists():
        built.rename(out)
        return
    (out / "config.json").unlink(missing_ok=True)
    for old in [*out.glob("model*.safetensors"), out / INDEX]:
        old.unlink(missing_ok=True)
    for path in sorted(built.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(out / path.name)
    built.rmdir()
