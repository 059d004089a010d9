"""What people pack and collate with today, each behind one small function. Every peer is an optional import.

A packer gets (lengths int64 [n], capacity) and returns (call, sizes): call() does the work from the input that the peer
takes natively, which is made beforehand, and sizes(result) are the tokens of each pack. A collator gets a list of
samples and returns the call that lays them out. Left out, because the packing module does not import without the
package's other dependencies: OLMo-core (the algorithm of TRL), llm-foundry; without an installable release: seqpacker,
NeMo, multipack_sampler. ms-swift calls `binpacking` on 1000 rows at a time, which is repeated here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch

IGNORE_INDEX = -100
Sizes = Callable[[Any], Any]
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Packer:
    name: str
    package: str  # the distribution
    prepare: Callable[[np.ndarray, int], tuple[Callable[[], Any], Sizes]]
    limit: int = 1_000_000  # samples; more of them takes minutes
    once_from: int = 2_000_000  # samples, from here on one cold call: tens of seconds


@dataclass(frozen=True)
class Collator:
    name: str
    package: str
    prepare: Callable[[Sequence[Sample]], Callable[[], Any]]
    kinds: tuple[str, ...] = ("numpy int32", "numpy int64", "torch int64", "lists")


def alone(module: str) -> ModuleType:
    """Import one module of a package without running the __init__ files above it, which may need what is missing."""
    package, *parts = module.split(".")[:-1]
    if package not in sys.modules:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"No module named {package!r}")
        _bare(package, spec.submodule_search_locations[0])
    for depth, part in enumerate(parts):
        above = sys.modules[".".join([package, *parts[:depth]])]
        _bare(f"{above.__name__}.{part}", f"{above.__path__[0]}/{part}")
    return import_module(module)


def _bare(name: str, folder: str) -> None:
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [folder]


def trl_default(lengths: np.ndarray, capacity: int) -> tuple[Callable[[], Any], Sizes]:
    """Best fit decreasing on each 1000 rows, the default of `map`; moves the tokens as well, as its interface does."""
    return _trl(lengths, capacity, {})


def trl_whole(lengths: np.ndarray, capacity: int) -> tuple[Callable[[], Any], Sizes]:
    return _trl(lengths, capacity, {"batch_size": len(lengths)})


def _trl(lengths: np.ndarray, capacity: int, options: dict) -> tuple[Callable[[], Any], Sizes]:
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = pa.array(np.zeros(offsets[-1], dtype=np.int32))
    table = datasets.Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, tokens)}))
    options = {"load_from_cache_file": False, "keep_in_memory": True, **options}

    def sizes(packed: Any) -> np.ndarray:
        column = packed.with_format("arrow")[:].column("seq_lengths").combine_chunks()
        ends = np.concatenate([[0], np.cumsum(column.flatten().to_numpy())])
        return np.diff(ends[column.offsets.to_numpy() - column.offsets[0].as_py()])

    return lambda: pack_dataset(table, capacity, strategy="bfd", map_kwargs=options), sizes


def axolotl_multipack(lengths: np.ndarray, capacity: int) -> tuple[Callable[[], Any], Sizes]:
    """First fit in the order given, in groups of 100,000, at most 200 samples per pack (the defaults), one process."""
    from axolotl.utils.samplers.multipack import pack_parallel

    def call() -> Any:
        return pack_parallel(lengths, capacity, group_size=100_000, bin_size=200, num_processes=1)

    return call, lambda packs: [lengths[np.array(pack)].sum() for pack in packs]


def axolotl_sequential(lengths: np.ndarray, capacity: int) -> tuple[Callable[[], Any], Sizes]:
    """Next fit."""
    from axolotl.utils.samplers.multipack import allocate_sequentially

    return (
        lambda: allocate_sequentially(lengths, 0, capacity, 1),
        lambda result: [lengths[np.array(pack)].sum() for pack in result[0]],
    )


def torchtune_packed(lengths: np.ndarray, capacity: int) -> tuple[Callable[[], Any], Sizes]:
    """Next fit; builds every padded row as it goes, and has no other interface."""
    alone("torchtune.data._common")
    packed = alone("torchtune.datasets._packed")
    packed.tqdm = lambda *args, **options: _Quiet()
    samples = [{"tokens": [1] * length, "labels": [1] * length} for length in lengths.tolist()]
    return (
        lambda: packed.PackedDataset(samples, max_seq_len=capacity, padding_idx=0),
        lambda result: [int((pack["tokens"] != 0).sum()) for pack in result.packs],
    )


class _Quiet:
    def update(self) -> None:
        """A progress bar that nobody sees."""


def llamafactory_knapsack(lengths: np.ndarray, capacity: int) -> tuple[Callable[[], Any], Sizes]:
    """The longest that fits, on each 1000 rows, the default of `map`."""
    module = alone("llamafactory.data.processor.processor_utils")
    rows = lengths.tolist()

    def call() -> list[list[int]]:
        return [
            pack for at in range(0, len(rows), 1000) for pack in module.greedy_knapsack(rows[at : at + 1000], capacity)
        ]

    return call, lambda packs: [sum(pack) for pack in packs]


def swift_binpacking(lengths: np.ndarray, capacity: int) -> tuple[Callable[[], Any], Sizes]:
    """`binpacking` on 1000 rows at a time, the last pack carried over: the default of ms-swift."""
    from binpacking import to_constant_volume

    rows = list(enumerate(lengths.tolist()))

    def call() -> list[list[tuple[int, int]]]:
        packs, carried = [], []
        for at in range(0, len(rows), 1000):
            found = to_constant_volume(carried + rows[at : at + 1000], capacity, weight_pos=1)
            carried = found.pop() if at + 1000 < len(rows) else []
            packs += found
        return packs

    return call, lambda packs: [sum(length for _, length in pack) for pack in packs]


def prtpy_ffd(lengths: np.ndarray, capacity: int) -> tuple[Callable[[], Any], Sizes]:
    import prtpy

    rows = lengths.tolist()
    return (
        lambda: prtpy.pack(algorithm=prtpy.packing.first_fit_decreasing, binsize=capacity, items=rows),
        lambda packs: [sum(pack) for pack in packs],
    )


def lightbinpack_obfd(lengths: np.ndarray, capacity: int) -> tuple[Callable[[], Any], Sizes]:
    """Best fit decreasing in C++; takes a list."""
    from lightbinpack import obfd

    rows = lengths.tolist()
    return lambda: obfd(rows, capacity), lambda packs: [lengths[pack].sum() for pack in packs]


PACKERS = (
    Packer("TRL pack_dataset", "trl", trl_default, once_from=100_000),
    Packer("TRL pack_dataset, one batch of all rows", "trl", trl_whole, limit=100_000, once_from=100_000),
    Packer("axolotl multipack", "axolotl", axolotl_multipack),
    Packer("axolotl sequential", "axolotl", axolotl_sequential),
    Packer("torchtune PackedDataset", "torchtune", torchtune_packed, limit=30_000, once_from=10_000),
    Packer("LLaMA-Factory knapsack", "llamafactory", llamafactory_knapsack),
    Packer("binpacking, as ms-swift calls it", "binpacking", swift_binpacking, once_from=1_000_000),
    Packer("prtpy first fit decreasing", "prtpy", prtpy_ffd, limit=30_000, once_from=10_000),
    Packer("lightbinpack obfd", "lightbinpack", lightbinpack_obfd),
)


def transformers_flattening(samples: Sequence[Sample], **options: bool) -> Callable[[], Any]:
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(**options)
    return lambda: collate(samples)


def trl_padding_free(samples: Sequence[Sample]) -> Callable[[], Any]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return lambda: collate.torch_call(samples)


def torch_cat(samples: Sequence[Sample]) -> Callable[[], Any]:
    """What one would write by hand for tensors."""

    def collate() -> dict[str, Any]:
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        labels = torch.cat([sample["labels"] for sample in samples])
        labels[starts] = IGNORE_INDEX
        total = int(ends[-1])
        positions = torch.arange(total) - torch.repeat_interleave(starts, lengths, output_size=total)
        bounds = torch.cat([torch.zeros(1, dtype=torch.int32), ends.to(torch.int32)])
        return {
            "input_ids": torch.cat([sample["input_ids"] for sample in samples])[None],
            "labels": labels[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": bounds,
            "max_length_q": int(lengths.max()),
        }

    return collate


COLLATORS = (
    Collator("transformers DataCollatorWithFlattening", "transformers", transformers_flattening),
    Collator(
        "transformers, with cu_seq_lens and seq_idx",
        "transformers",
        lambda samples: transformers_flattening(samples, return_flash_attn_kwargs=True, return_seq_idx=True),
    ),
    # torch.tensor(tensor) warns and copies: TRL hands its collator lists
    Collator("TRL, padding-free", "trl", trl_padding_free, kinds=("lists",)),
    Collator("torch.cat by hand", "torch", torch_cat, kinds=("torch int64",)),
)
