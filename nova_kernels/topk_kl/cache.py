"""A reference's top K over a fixed data set, on disk: its KL then needs no reference model in memory.

A sample has one row per trained position; rows are numbered through the data set, sample after sample.

    path/
        shard-000000000000.bin     rows of samples 0, 1, .. as records, then int64 rows of each of these samples
        shard-000000000000.json    written when the shard is complete; named by its first sample
        header.json                written last: without it there is no cache

    record    lse f4 | maximum f4 (float16 only) | ids i4 [K] | values f4 or f2 [K]           little endian

Bytes per row at K = 500: 4004 in float32, which keeps every bit; 3008 in float16, which keeps value - maximum of the
row. That is off by at most 2^-11 (maximum - value), so a row's KL moves by at most 2^-11 (E_p + E_r)[maximum - value];
probable tokens lie near the maximum and lose next to nothing. Distances beyond 65504 become 65504 (probability 0 in
float32). bfloat16 would lose eight times as much: not offered. Values of float64 are kept as float32.

Shards are ranges of samples, written by any number of processes, each its own; `finish` publishes them all at once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nova_kernels.topk_kl.cache_files import (
    HEADER,
    CacheHeader,
    Shard,
    check_shards,
    complete_shards,
    encode,
    hash_of,
    partial_of,
    publish,
    read_header,
    shard_name,
)
from nova_kernels.topk_kl.entries import TopK

_AGAIN = "remove the cache and write it again"
_ELSEWHERE = "remove it or choose another path"


class CacheWriter:
    """Writes one shard; `TopKReferenceCache.write` makes it. Used in a `with`: what an error leaves is removed."""

    def __init__(self, folder: Path, header: CacheHeader, samples: range) -> None:
        self._folder, self._header, self._samples = folder, header, samples
        self._final = folder / f"{shard_name(samples.start)}.bin"
        self._partial = partial_of(self._final)
        self._file: BinaryIO | None = None
        self._counts: list[int] = []
        self._num_rows = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> CacheWriter:
        self._file = self._partial.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file = self._open_file()
        try:
            if kind is None:
                self._complete(file)
        finally:
            self._file = None
            file.close()
            self._partial.unlink(missing_ok=True)

    def append(self, top: TopK, rows: Sequence[int] | Tensor) -> None:
        """The next samples of the shard, in order.

        Args:
            top: [n, K], the rows of these samples laid end to end, on any device; unused slots allowed.
            rows: int [samples], number of rows of each of these samples; they sum to n.

        Raises:
            ValueError: another K or temperature than the header's, rows that are no integers or do not add up, ids
                outside the vocabulary or out of order, a value or log-sum-exp that is NaN or +inf (what broken logits
                leave), or a writer outside of its `with`.
        """
        where, header, file = "CacheWriter.append", self._header, self._open_file()
        given = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise ValueError(f"{where}: rows must be integers [samples], got {given.dtype} {list(given.shape)}")
        counts = [int(count) for count in given]
        if top.ids.ndim != 2 or top.k != header.k or top.temperature != header.temperature:
            raise ValueError(
                f"{where}: expected a TopK [n, {header.k}] at temperature {header.temperature}, got "
                f"{list(top.ids.shape)} at {top.temperature}"
            )
        if min(counts, default=0) < 0 or sum(counts) != len(top.ids):
            raise ValueError(f"{where}: rows {counts[:8]} must be counts that sum to {len(top.ids)}")
        self._write(file, encode(top, header).tobytes())
        self._counts += counts
        self._num_rows += len(top.ids)

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise ValueError("CacheWriter: not open; use it in a with: `with TopKReferenceCache.write(..) as writer:`")
        return self._file

    def _write(self, file: BinaryIO, block: bytes) -> None:
        file.write(block)
        self._digest.update(block)

    def _complete(self, file: BinaryIO) -> None:
        if len(self._counts) != len(self._samples):
            raise ValueError(
                f"{self._folder}: the shard is of {len(self._samples)} samples from {self._samples.start} on, but "
                f"{len(self._counts)} were appended; append each once"
            )
        self._write(file, np.asarray(self._counts, dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
        if (self._folder / HEADER).exists():  # another process wrote the same samples, and the cache is published
            if read_header(self._folder / HEADER)[0] != self._header:
                raise FileExistsError(f"{self._folder} holds another finished cache; {_ELSEWHERE}")
            return
        self._final.with_suffix(".json").unlink(missing_ok=True)
        os.replace(self._partial, self._final)
        shard = Shard(
            first_sample=self._samples.start,
            num_samples=len(self._samples),
            num_rows=self._num_rows,
            sha256=self._digest.hexdigest(),
        )
        publish(self._final.with_suffix(".json"), self._header, [shard])


class TopKReferenceCache:
    """The rows of a finished cache, memory-mapped: `cache[rows]` is a TopK on the CPU.

    Safe for any number of readers, after a fork, and in DataLoader workers (it pickles by its path).
    """

    def __init__(self, path: Path, header: CacheHeader, shards: Sequence[Shard]) -> None:
        self.path, self.header = path, header
        self._shards = list(shards)
        self._first_rows = _starts([shard.num_rows for shard in shards])
        self._offsets = _starts(np.concatenate([np.empty(0, np.int64), *(self._counts(shard) for shard in shards)]))
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def write(cls, path: str | Path, header: CacheHeader, samples: range | None = None) -> CacheWriter:
        """A writer of the shard with `samples` (None: all) of the cache in folder `path`.

        Several processes may write at once, each another range; of two that write the same one, the last counts.
        Shards that were never published and hold some of these samples are removed, whatever their header.

        Raises:
            FileExistsError: `path` holds a finished cache.
            ValueError: a range without samples, or outside of them.
        """
        folder = Path(path)
        samples = range(header.num_samples) if samples is None else samples
        inside = 0 <= samples.start <= samples.stop <= header.num_samples
        if samples.step != 1 or not inside or (not samples and header.num_samples > 0):
            raise ValueError(f"{folder}: samples must be a range of some of {header.num_samples}, got {samples}")
        if (folder / HEADER).exists():
            raise FileExistsError(f"{folder} holds a finished cache; {_ELSEWHERE}")
        folder.mkdir(parents=True, exist_ok=True)
        for mark, _, shard in complete_shards(folder):
            if shard.first_sample < samples.stop and samples.start < shard.samples.stop:
                mark.unlink(missing_ok=True)
                mark.with_suffix(".bin").unlink(missing_ok=True)
        return CacheWriter(folder, header, samples)

    @staticmethod
    def written(path: str | Path, header: CacheHeader) -> list[range]:
        """Samples of the complete shards of this header, in order; finished or not.

        Raises:
            ValueError: a damaged mark.
        """
        found = [shard for _, other, shard in complete_shards(Path(path)) if other == header]
        return [shard.samples for shard in sorted(found, key=lambda shard: shard.first_sample)]

    @classmethod
    def finish(cls, path: str | Path, header: CacheHeader) -> TopKReferenceCache:
        """Publish the shards that were written for `header`, all at once; doing it twice changes nothing.

        Shards that are no part of the cache, and what writers left half-done, are removed.

        Raises:
            ValueError: samples that no shard or several shards hold, rows that do not add up, or a damaged file.
        """
        folder = Path(path)
        if not (folder / HEADER).exists():
            shards = [shard for _, found, shard in complete_shards(folder) if found == header]
            shards = check_shards(folder, header, sorted(shards, key=lambda shard: shard.first_sample))
            publish(folder / HEADER, header, shards)
        cache = cls.open(folder, **asdict(header))
        names = {shard_name(shard.first_sample) for shard in cache._shards}
        kept = {f"{name}{suffix}" for name in names for suffix in (".bin", ".json")}
        for file in folder.glob("shard-*"):
            if file.name not in kept:
                file.unlink(missing_ok=True)
        return cache

    @classmethod
    def open(cls, path: str | Path, **expected: object) -> TopKReferenceCache:
        """Open a finished cache; of the shards only the number of rows of each sample is read.

        Args:
            expected: fields of CacheHeader by name, each compared with the cache's own.

        Raises:
            ValueError: no finished cache there, a damaged or foreign file, or a field that differs (both values are
                named).
        """
        folder = Path(path).resolve()
        header_path = folder / HEADER
        if not header_path.exists():
            waiting = len(list(folder.glob("shard-*.json")))
            state = f"{waiting} shards wait for the rest and for finish" if waiting else "nothing of a cache is there"
            raise ValueError(f"{folder}: no finished cache ({state}); write it first")
        header, shards = read_header(header_path)
        for name, value in expected.items():
            if name not in CacheHeader.__slots__:
                raise ValueError(f"{folder}: no header field is called {name!r}; they are {CacheHeader.__slots__}")
            if (found := getattr(header, name)) != value:
                raise ValueError(
                    f"{folder}: {name} is {found!r} in the cache, but {value!r} here; use the {name} it was written "
                    "for, or write another cache"
                )
        return cls(folder, header, check_shards(folder, header, shards))

    def __len__(self) -> int:
        return self.header.num_rows

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray | Tensor) -> TopK:
        """Rows by their numbers, of any shape and in any order: TopK [..., K], float32.

        Raises:
            IndexError: a row that the cache does not have, or an index that is no array of integers.
        """
        if isinstance(rows, slice):
            numbers = np.arange(*rows.indices(len(self)))
        else:
            numbers = _numbers(rows, len(self), "row")
        flat, record = numbers.reshape(-1), self.header.record
        columns = {name: np.empty((flat.size, *record[name].shape), record[name].base) for name in record.names or ()}
        shards = np.searchsorted(self._first_rows, flat, side="right") - 1
        for number in np.unique(shards):
            chosen = shards == number
            source = self._map(int(number))
            for name, column in columns.items():
                column[chosen] = source[name][flat[chosen] - self._first_rows[number]]
        values = columns["values"].astype(np.float32, copy=False)
        if "maximum" in columns:
            values += columns["maximum"][:, None]
        top = TopK(
            ids=torch.from_numpy(columns["ids"]),
            values=torch.from_numpy(values),
            lse=torch.from_numpy(columns["lse"]),
            temperature=self.header.temperature,
        )
        return top.reshape(*numbers.shape)

    @property
    def offsets(self) -> Tensor:
        """int64 [num_samples + 1]: sample s has the rows offsets[s] to offsets[s + 1]."""
        return torch.from_numpy(self._offsets.copy())

    def rows_of(self, samples: int | Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Numbers int64 [n] of all rows of these samples, in the order given."""
        numbers = _numbers(samples, self.header.num_samples, "sample").reshape(-1)
        starts, counts = self._offsets[numbers], self._offsets[numbers + 1] - self._offsets[numbers]
        before = np.cumsum(counts) - counts
        return torch.from_numpy(np.repeat(starts - before, counts) + np.arange(counts.sum()))

    def verify(self) -> None:
        """Read everything and compare it with the hashes taken when it was written.

        Raises:
            ValueError: a shard that changed since.
        """
        for shard in self._shards:
            if hash_of(self.path / shard.file) != shard.sha256:
                raise ValueError(f"{self.path / shard.file}: its bytes changed since it was written; {_AGAIN}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, asdict(self.header))

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            shard = self._shards[number]
            self._maps[number] = np.memmap(
                self.path / shard.file, self.header.record, mode="r", shape=(shard.num_rows,)
            )
        return self._maps[number]

    def _counts(self, shard: Shard) -> np.ndarray:
        """Rows of each sample of a shard."""
        place = shard.num_rows * self.header.record.itemsize
        counts = np.fromfile(self.path / shard.file, "<i8", offset=place, count=shard.num_samples)
        if int(counts.sum()) != shard.num_rows or (counts < 0).any():
            raise ValueError(f"{self.path / shard.file}: its numbers of rows are damaged; {_AGAIN}")
        return counts.astype(np.int64, copy=False)


def _reopen(path: Path, expected: dict[str, Any]) -> TopKReferenceCache:
    return TopKReferenceCache.open(path, **expected)


def _starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n consecutive parts begins, and the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(counts, dtype=np.int64))])


def _numbers(asked: Any, limit: int, what: str) -> np.ndarray:
    """int64 of any shape, each in [0, limit)."""
    try:
        numbers = np.asarray(asked.cpu() if isinstance(asked, Tensor) else asked)
    except ValueError as error:
        raise IndexError(f"TopKReferenceCache: {what} numbers must be an array: {error}") from error
    if numbers.size == 0:
        return numbers.astype(np.int64)
    if numbers.dtype.kind not in "iu":
        raise IndexError(f"TopKReferenceCache: {what} numbers must be integers, got {numbers.dtype}")
    if numbers.min() < 0 or numbers.max() >= limit:
        wrong = int(numbers.min() if numbers.min() < 0 else numbers.max())
        raise IndexError(f"TopKReferenceCache: no {what} {wrong}; they go from 0 to {limit - 1}")
    return numbers.astype(np.int64, copy=False)
