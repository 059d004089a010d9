"""A saved model as merging sees it: safetensors shards whose headers are read and whose tensors are read in slices.

Nothing but headers is read until a slice is asked for, so opening a model of any size is quick.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One entry of a safetensors header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str  # name of the shard

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SavedModel:
    """A folder with config.json and safetensors weights; a context manager that closes its files."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = self._read_config()
        self.files = self._shards()
        self.tensors: dict[str, TensorInfo] = {}
        headers = hashlib.sha256()
        for file in self.files:
            header = _read_header(self.folder / file)
            headers.update(json.dumps(header, sort_keys=True).encode())
            self.tensors.update(_infos(self.folder / file, header))
        self.header_sha256 = headers.hexdigest()
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def read(self, name: str, start: int | None = None, end: int | None = None) -> Tensor:
        """A tensor, or its rows from `start` to `end`."""
        file = self.tensors[name].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
        if start is None:
            tensor: Tensor = self._open[file].get_tensor(name)
        else:
            tensor = self._open[file].get_slice(name)[start:end]
        return tensor

    def __enter__(self) -> SavedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        self._open.clear()

    def _read_config(self) -> dict[str, Any]:
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"merge_state: no folder {self.folder}; sources are folders of saved models, download others first"
            )
        path = self.folder / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"merge_state: {self.folder} has no config.json, so it is not a saved model")
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config

    def _shards(self) -> list[str]:
        if (self.folder / INDEX).exists():
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        elif (self.folder / WEIGHTS).exists():
            files = [WEIGHTS]
        else:
            raise FileNotFoundError(
                f"merge_state: {self.folder} has neither {WEIGHTS} nor {INDEX}; save the model with "
                "save_pretrained (an adapter must be merged into its base model first)"
            )
        for file in files:
            if not (self.folder / file).exists():
                raise FileNotFoundError(f"merge_state: {self.folder} lacks the shard {file} that its index names")
        return files


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON at the start of a safetensors file, if the file is whole."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size:
            raise ValueError(f"merge_state: {path} is not a safetensors file, or it is cut off at {size} bytes")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise ValueError(f"merge_state: {path} should have {expected} bytes, it has {size}; was saving interrupted?")
    return header


def _infos(path: Path, header: dict[str, Any]) -> dict[str, TensorInfo]:
    infos = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"merge_state: {path}: {name} is {entry['dtype']}; merge models that are not quantised, "
                f"in one of {list(DTYPES)}"
            )
        infos[name] = TensorInfo(dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]), file=path.name)
    return infos
