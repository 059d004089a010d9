"""The frozen reference of the KL: its top K by a forward, or from a cache of a fixed data set.

A cache belongs to one model (its config and weight files, and the arithmetic they run in), one tokenizer with its chat
template, and one list of samples in order (ids and labels). All three go into its header as hashes, and a cache of
anything else is refused. Every sample carries the numbers of its rows as one more field per token, so that packs may
hold any samples in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from nova_kernels.packing import IGNORE_INDEX, PackedBatch
from nova_kernels.topk_kl import CacheHeader, TopK, TopKReferenceCache, linear_topk_select
from nova_train.chat import Chat
from nova_train.config import ConfigError
from nova_train.datasets import read_rows
from nova_train.loader import samples_fingerprint
from nova_train.losses import predicted_tokens
from nova_train.model import Arithmetic, hidden_states, lm_head, load_model_config, own_tokens
from nova_train.samples import OnBadRow, Overlong, Sample, sft_samples

ROWS = "reference_rows"  # per token: the cache's row at the position that predicts it, -1 where it is not trained


class ReferenceOptions(Arithmetic, Protocol):
    """The keys that decide what a reference's top K over supervised data is."""

    @property
    def model_name_or_path(self) -> str | None: ...
    @property
    def kl_top_k(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def max_length(self) -> int: ...
    @property
    def overlong(self) -> Overlong: ...
    @property
    def on_bad_row(self) -> OnBadRow: ...
    @property
    def dataset_columns(self) -> dict[str, str]: ...


@torch.no_grad()
def top_k_of(model: PreTrainedModel, packed: PackedBatch, k: int, temperature: float) -> TopK:
    """The model's top K at every trained position of a packed row, [R, K] on the model's device."""
    head = lm_head(model)
    own = own_tokens(model, packed.num_tokens)
    hidden, _ = predicted_tokens(hidden_states(model, packed), packed.labels, own)
    return linear_topk_select(hidden, head.weight, k, temperature=temperature, **head.kwargs())


def cached_top_k(cache: TopKReferenceCache, packed: PackedBatch, own: slice | None = None) -> TopK:
    """The same of samples from `with_cache_rows`, from the cache, on the CPU; of the predictions `own` (None: all)."""
    rows = packed.extra[ROWS][0, 1:]
    rows = rows[rows >= 0]
    return cache[rows if own is None else rows[own]]


def supervised_samples(names: Sequence[str], config: ReferenceOptions, chat: Chat) -> list[Sample]:
    """The samples of the KL on supervised data."""
    rows = read_rows(names, kind="sft", on_bad_row=config.on_bad_row, columns=config.dataset_columns)
    return sft_samples(rows, chat, config.max_length, config.overlong, on_bad_row=config.on_bad_row)


def rows_of_samples(samples: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """int64 [S]: trained positions of each sample; its first token is predicted by nothing."""
    return np.array([np.count_nonzero(sample["labels"][1:] != IGNORE_INDEX) for sample in samples], dtype=np.int64)


def with_cache_rows(samples: Sequence[Sample], cache: TopKReferenceCache) -> list[Sample]:
    """The samples, each with its rows of the cache beside its tokens."""
    numbered = []
    for sample, first in zip(samples, cache.offsets[:-1].tolist(), strict=True):
        rows = np.full(len(sample["labels"]), -1, dtype=np.int64)
        places = 1 + np.flatnonzero(sample["labels"][1:] != IGNORE_INDEX)
        rows[places] = first + np.arange(len(places))
        numbered.append({**sample, ROWS: rows})
    return numbered


def cache_header(
    samples: Sequence[Sample], config: ReferenceOptions, tokenizer: Any, *, dtype: str = "float32"
) -> CacheHeader:
    """What the cache of these samples must say; reads all of the model's files once.

    Args:
        dtype: of the values on disk.
    """
    model = str(config.model_name_or_path)
    return CacheHeader(
        k=config.kl_top_k,
        vocab_size=load_model_config(model).vocab_size,
        temperature=config.temperature,
        num_samples=len(samples),
        num_rows=int(rows_of_samples(samples).sum()),
        model=f"{model_fingerprint(model)} in {config.dtype}{' under bfloat16 autocast' if config.bf16 else ''}",
        tokenizer=tokenizer_fingerprint(tokenizer),
        data=samples_fingerprint(samples),
        dtype=dtype,
    )


def open_cache(path: str, header: CacheHeader) -> TopKReferenceCache:
    """The cache at `path`, if it is the one of this header; the dtype on disk may be any.

    Raises:
        ConfigError: no cache there, a damaged one, or one of something else; it names the field and both values.
    """
    expected = {name: value for name, value in asdict(header).items() if name != "dtype"}
    try:
        return TopKReferenceCache.open(path, **expected)
    except ValueError as error:
        raise ConfigError(
            f"ptx_reference_cache: {error} (nova-train cache-reference writes it; the model, dtype, bf16, kl_top_k, "
            "temperature, the data, dataset_columns, max_length and overlong must be the same there)"
        ) from error


def check_top_k(model_path: str, k: int) -> None:
    """Refuse a kl_top_k that the vocabulary cannot serve, before anything is loaded.

    Raises:
        ConfigError: k below 2 or above the vocabulary.
    """
    vocabulary = load_model_config(model_path).vocab_size
    if not 2 <= k <= vocabulary:
        raise ConfigError(f"kl_top_k must lie in [2, {vocabulary}] (the vocabulary of {model_path}), got {k}")


def check_top_k_early(model_path: str | None, k: int) -> None:
    """`check_top_k` while a configuration is read: where the model is a folder that is there already."""
    if k < 2:
        raise ConfigError(f"kl_top_k must be at least 2, got {k}")
    if model_path is not None and (Path(model_path) / "config.json").is_file():
        check_top_k(model_path, k)


def model_fingerprint(path: str) -> str:
    """SHA-256 of a saved model's config.json and weight files, read as a stream.

    Raises:
        ConfigError: no weights there.
    """
    folder = Path(path) if Path(path).is_dir() else Path(str(cached_file(path, "config.json"))).parent
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise ConfigError(f"model {path}: no *.safetensors or pytorch_model*.bin in {folder}")
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weights]:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary and rules, and of its chat template."""
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}\n{template}".encode()).hexdigest()
