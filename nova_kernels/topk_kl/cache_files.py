"""The files of a cache of top-K references; cache.py has the layout and what it is for.

    record    lse f4 | maximum f4 (float16 only) | ids i4 [K] | values f4 or f2 [K]           little endian

A shard is its records and then the rows of each of its samples (int64). Its mark, a JSON file beside it, appears when
it is complete; header.json has the same form and lists all shards. Both are written under another name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from nova_kernels.topk_kl.entries import TopK, check_k, check_temperature

FORMAT, VERSION = "nova-kernels top-k reference cache", 1
HEADER = "header.json"
VALUE_TYPES = {"float32": "<f4", "float16": "<f2"}
LOWEST_HALF = -65504.0  # of float16
BLOCK = 1 << 22  # bytes read at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheHeader:
    """What a cache holds and what it was made from. Fingerprints are any texts that change with what they name."""

    k: int
    vocab_size: int
    temperature: float  # of the lse
    num_samples: int
    num_rows: int
    model: str
    tokenizer: str
    data: str
    dtype: str = "float32"  # of the values on disk: float32, or float16 of value - maximum

    def __post_init__(self) -> None:
        where = "CacheHeader"
        _check_counts(where, self, ("k", "vocab_size", "num_samples", "num_rows"))
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float):
            raise ValueError(f"{where}: temperature must be a number, got {self.temperature!r}")
        check_k(where, self.k, self.vocab_size)
        check_temperature(where, self.temperature)
        if self.vocab_size > 2**31:
            raise ValueError(f"{where}: ids are int32, so vocab_size is at most 2^31, got {self.vocab_size}")
        if self.dtype not in tuple(VALUE_TYPES):
            raise ValueError(f"{where}: dtype must be one of {', '.join(VALUE_TYPES)}, got {self.dtype!r}")
        for name in ("model", "tokenizer", "data"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{where}: {name} must be a text that is not empty, got {getattr(self, name)!r}")

    @property
    def record(self) -> np.dtype[np.void]:
        """The type of one row on disk."""
        maximum = [("maximum", "<f4")] if self.dtype == "float16" else []
        entries = [("ids", "<i4", (self.k,)), ("values", VALUE_TYPES[self.dtype], (self.k,))]
        return np.dtype([("lse", "<f4"), *maximum, *entries], align=True)

    @property
    def num_bytes(self) -> int:
        """Size of the shards on disk."""
        return self.num_rows * self.record.itemsize + 8 * self.num_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A complete range of samples, and its file."""

    first_sample: int
    num_samples: int
    num_rows: int
    sha256: str

    def __post_init__(self) -> None:
        _check_counts("Shard", self, ("first_sample", "num_samples", "num_rows"))
        if not isinstance(self.sha256, str):
            raise ValueError(f"Shard: sha256 must be a text, got {self.sha256!r}")

    @property
    def samples(self) -> range:
        return range(self.first_sample, self.first_sample + self.num_samples)

    @property
    def file(self) -> str:
        return shard_name(self.first_sample) + ".bin"

    def num_bytes(self, header: CacheHeader) -> int:
        return self.num_rows * header.record.itemsize + 8 * self.num_samples


def _check_counts(where: str, holder: object, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(holder, name)
        if type(value) is not int:
            raise ValueError(f"{where}: {name} must be an int, got {value!r}")
        if value < 0:
            raise ValueError(f"{where}: {name} must be at least 0, got {value}")


def shard_name(first_sample: int) -> str:
    """Without its suffix."""
    return f"shard-{first_sample:012d}"


def partial_of(path: Path) -> Path:
    """A name beside `path` that no other writer has, on this host or another."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")


def encode(top: TopK, header: CacheHeader) -> np.ndarray:
    """Records [n] of rows [n, K]."""
    ids, values, lse = top.ids.cpu().numpy(), top.values.cpu().float().numpy(), top.lse.cpu().float().numpy()
    if bool((np.isnan(lse) | (lse == np.inf)).any()):
        raise ValueError("CacheWriter.append: a log-sum-exp is NaN or +inf: the reference's logits are broken")
    if ids.size and (ids.min() < -1 or ids.max() >= header.vocab_size):
        raise ValueError(
            f"CacheWriter.append: ids must lie between -1 and {header.vocab_size - 1}, got {ids.min()} to {ids.max()}"
        )
    if bool((np.isnan(values) | (values == np.inf)).any()):
        raise ValueError("CacheWriter.append: a value is NaN or +inf: the reference's logits are broken")
    if ((ids < 0) != (values == -np.inf)).any():
        raise ValueError("CacheWriter.append: an unused slot has id -1 and value -inf, both or neither")
    before, after = ids[:, :-1], ids[:, 1:]
    if ((after >= 0) & ((before < 0) | (before >= after))).any():
        raise ValueError("CacheWriter.append: ids must ascend within a row, the unused slots (-1) at its end")
    records = np.zeros(len(ids), header.record)
    records["ids"], records["lse"], records["values"] = ids, lse, values if header.dtype == "float32" else 0
    if header.dtype == "float16":
        maximum = values.max(axis=1, initial=-np.inf)
        maximum[maximum == -np.inf] = 0.0
        below = np.subtract(values, maximum[:, None], dtype=np.float64)  # float32 would overflow
        records["maximum"] = maximum
        records["values"] = np.where(ids < 0, -np.inf, np.maximum(below, LOWEST_HALF))
    return records


def publish(path: Path, header: CacheHeader, shards: Sequence[Shard]) -> None:
    """Write a header or a shard's mark; the file appears whole or not at all."""
    found = {"format": FORMAT, "version": VERSION, **asdict(header), "shards": [asdict(shard) for shard in shards]}
    partial = partial_of(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(found, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_header(path: Path) -> tuple[CacheHeader, list[Shard]]:
    """A header file or a shard's mark."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged header, no JSON: {error}; remove it and write the cache again") from error
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: not the header of a {FORMAT}; check the path")
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path}: format version {found.get('version')!r}, this program reads {VERSION}; remove it and write the "
            "cache again"
        )
    try:
        header = CacheHeader(**{field.name: found[field.name] for field in fields(CacheHeader)})
        return header, [Shard(**shard) for shard in found["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged header: {error!r}; remove it and write the cache again") from error


def complete_shards(folder: Path) -> Iterator[tuple[Path, CacheHeader, Shard]]:
    """(mark, header, shard) of every shard that was written to its end and whose file is there, of its size.

    Raises:
        ValueError: a damaged mark.
    """
    for mark in sorted(folder.glob("shard-*.json")):
        try:
            header, shards = read_header(mark)
        except FileNotFoundError:  # removed by another writer
            continue
        if len(shards) != 1:
            raise ValueError(f"{mark}: damaged mark of {len(shards)} shards; remove it and write the shard again")
        if size_of(folder / shards[0].file) == shards[0].num_bytes(header):
            yield mark, header, shards[0]


def size_of(file: Path) -> int | None:
    """Its bytes, or None where it is missing."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def hash_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_shards(folder: Path, header: CacheHeader, shards: Sequence[Shard]) -> list[Shard]:
    """The shards, if they hold every sample once, every row, and every byte."""
    again = f"remove {folder} and write the cache again"
    cure = again if (folder / HEADER).exists() else "write their shard"
    done = 0
    for shard in shards:
        if shard.first_sample > done:
            raise ValueError(f"{folder}: samples {done} to {shard.first_sample - 1} are missing; {cure}")
        if shard.first_sample < done:
            raise ValueError(f"{folder}: {shard.file} holds samples before {done} that another shard holds; remove one")
        done = shard.samples.stop
        file = folder / shard.file
        size, found = shard.num_bytes(header), size_of(file)
        if found != size:
            there = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{file} {there}, expected {size} bytes; {again}")
    if done != header.num_samples:
        raise ValueError(f"{folder}: samples {done} to {header.num_samples - 1} are missing; {cure}")
    if (rows := sum(shard.num_rows for shard in shards)) != header.num_rows:
        raise ValueError(f"{folder}: the shards have {rows} rows, the header says {header.num_rows}; {again}")
    return list(shards)
