"""The reference's top-K of supervised data, written once, for GRPO's `ptx_reference_cache`.

    nova-train cache-reference --model_name_or_path MERGED --dataset_name sft.jsonl --output_dir runs/reference

The frozen model runs over the samples in their order, as many as fit into `max_length` tokens at a time. Shards are
ranges of samples of about equal rows. One process writes all of them and leaves out those that are complete, so the
same command continues; with `num_shards` and `shard` each process writes one, and the last to end publishes the cache.
A finished cache is opened as GRPO would: one that does not fit is an error, never written over.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nova_kernels.packing import pack_samples
from nova_kernels.topk_kl import CacheHeader, TopKReferenceCache
from nova_train import state
from nova_train.chat import Chat
from nova_train.config import ConfigError, fingerprint, identity
from nova_train.model import check_head, load_causal_lm, load_tokenizer
from nova_train.reference_topk import (
    cache_header,
    check_top_k,
    check_top_k_early,
    rows_of_samples,
    supervised_samples,
    top_k_of,
)
from nova_train.samples import Sample

log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30  # of a shard, where num_shards is not given: what an interruption can cost


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheReferenceConfig:
    """Keys of `nova-train cache-reference`; those that GRPO has too must be the same there."""

    output_dir: str  # the cache: grpo's ptx_reference_cache
    model_name_or_path: str  # grpo's: the policy that reinforcement learning starts from
    dataset_name: list[str]  # grpo's ptx_dataset_name
    dataset_columns: dict[str, str] = field(default_factory=dict)  # our column name -> theirs
    on_bad_row: Literal["error", "skip"] = "error"
    max_length: int = 4096  # tokens per sample, and per forward
    overlong: Literal["error", "truncate", "drop"] = "error"  # a sample longer than max_length
    kl_top_k: int = 500  # entries kept per trained token
    temperature: float = 1.0  # of the log-sum-exp
    cache_dtype: Literal["float32", "float16"] = "float32"  # of the logits on disk; float16 is rounded
    num_shards: int | None = None  # files; None: one per GiB
    shard: int | None = None  # write this one alone, from 0 on
    verify: bool = False  # read the finished cache and compare its hashes
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"  # of the weights
    bf16: bool = False  # bfloat16 autocast
    attention_backend: str | None = None  # None: the fastest that can run
    num_threads: int = 1  # CPU threads
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    disable_progress: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):
            object.__setattr__(self, "dataset_name", [self.dataset_name])
        for key in ("max_length", "temperature", "num_threads"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"{key} must be positive, got {getattr(self, key)}")
        if self.num_shards is not None and self.num_shards < 1:
            raise ConfigError(f"num_shards must be at least 1, got {self.num_shards}")
        if self.shard is not None and (self.num_shards is None or not 0 <= self.shard < self.num_shards):
            raise ConfigError(f"shard {self.shard} needs num_shards above it, got num_shards {self.num_shards}")
        check_top_k_early(self.model_name_or_path, self.kl_top_k)


def run(config: CacheReferenceConfig) -> Path:
    """Write the shards that are missing, and publish the cache when all are there; returns its folder.

    Raises:
        ConfigError: the folder holds a finished cache that is damaged or of another header, or damaged shards.
        StateError: it belongs to other keys.
    """
    folder = Path(config.output_dir)
    state.claim_folder(config, "cache-reference")
    torch.set_num_threads(config.num_threads)
    check_top_k(config.model_name_or_path, config.kl_top_k)
    chat = Chat(load_tokenizer(config.model_name_or_path))
    samples = supervised_samples(config.dataset_name, config, chat)
    header = cache_header(samples, config, chat.tokenizer, dtype=config.cache_dtype)
    published = (folder / "header.json").exists() or state.finished_fingerprint(folder) is not None
    if not published:
        shards = plan_shards(rows_of_samples(samples), header, config.num_shards)
        mine = shards if config.shard is None else shards[config.shard : config.shard + 1]
        if missing := _unwritten(folder, header, mine):
            _check_space(folder, header, sum(map(len, missing)) / max(len(samples), 1))
            try:
                _write(folder, header, samples, missing, config)
            except FileExistsError as error:  # another process published another cache meanwhile
                raise ConfigError(f"output_dir: {error}") from error
        if waiting := _unwritten(folder, header, shards):
            log.info("cache-reference: %d of %d shards are written", len(shards) - len(waiting), len(shards))
            return folder
    with _refusals_as_config_errors(folder):
        if not published:
            TopKReferenceCache.finish(folder, header)
        cache = TopKReferenceCache.open(folder, **asdict(header))
        if config.verify:
            cache.verify()
            log.info("cache-reference: verified, %d rows are as they were written", len(cache))
    state.mark_finished(folder, fingerprint(identity(config)), samples=header.num_samples, rows=header.num_rows)
    return folder


@contextmanager
def _refusals_as_config_errors(folder: Path) -> Iterator[None]:
    """What the cache says of its folder, with the way out."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"output_dir: {error}; remove {folder} and run again") from error


def _unwritten(folder: Path, header: CacheHeader, shards: Sequence[range]) -> list[range]:
    with _refusals_as_config_errors(folder):
        written = TopKReferenceCache.written(folder, header)
    return [shard for shard in shards if shard not in written]


def plan_shards(rows: np.ndarray, header: CacheHeader, num_shards: int | None) -> list[range]:
    """Consecutive samples, about equally many rows each; fewer shards where there are fewer samples.

    Args:
        rows: int64 [S], of each sample.
        num_shards: None: one per SHARD_BYTES.
    """
    count = num_shards or -(-header.num_bytes // SHARD_BYTES) or 1
    goals = np.arange(1, count) * (rows.sum() / count)
    inner = np.searchsorted(np.cumsum(rows), goals).tolist()
    bounds = [0, *inner, len(rows)]
    return [range(start, stop) for start, stop in pairwise(bounds) if start < stop]


def in_order(samples: Sequence[Sample], chosen: range, max_length: int) -> Iterator[range]:
    """Consecutive samples of `chosen`, as many as fit into `max_length` tokens at a time."""
    first, tokens = chosen.start, 0
    for number in chosen:
        length = len(samples[number]["input_ids"])
        if tokens + length > max_length and number > first:
            yield range(first, number)
            first, tokens = number, 0
        tokens += length
    if first < chosen.stop:
        yield range(first, chosen.stop)


def _write(
    folder: Path,
    header: CacheHeader,
    samples: Sequence[Sample],
    shards: Sequence[range],
    config: CacheReferenceConfig,
) -> None:
    model = load_causal_lm(config.model_name_or_path, config, frozen=True)
    check_head(model)
    rows = rows_of_samples(samples)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=config.disable_progress) as bar:
        task = bar.add_task("tokens of the reference", total=sum(int(rows[shard].sum()) for shard in shards))
        for shard in shards:
            if not _unwritten(folder, header, [shard]):  # by now another process wrote it
                bar.advance(task, int(rows[shard].sum()))
                continue
            with TopKReferenceCache.write(folder, header, shard) as writer:
                for some in in_order(samples, shard, config.max_length):
                    packed = pack_samples([samples[number] for number in some])
                    writer.append(top_k_of(model, packed, config.kl_top_k, config.temperature), rows[some].tolist())
                    bar.advance(task, int(rows[some].sum()))


def _check_space(folder: Path, header: CacheHeader, share: float) -> None:
    needed, free = int(header.num_bytes * share), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"output_dir {folder}: the cache needs {needed / 2**30:.1f} GiB more, the disk has {free / 2**30:.1f} "
            "free; take another disk, a smaller kl_top_k or cache_dtype: float16"
        )
