"""The reference cache: what is written is read back, and nothing else is ever opened."""

from __future__ import annotations

import errno
import json
import multiprocessing
import pickle
import resource
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nova_kernels import TopK, topk_kl_div, topk_select
from nova_kernels.topk_kl import CacheHeader, TopKReferenceCache
from nova_kernels.topk_kl import cache as cache_module
from nova_kernels.topk_kl.cache_files import Shard, publish

FORKS = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12, where threads run
V, K = 300, 7
ROWS = [3, 0, 5, 1, 4, 2]  # of each sample


def header(**options: Any) -> CacheHeader:
    base = CacheHeader(
        k=K,
        vocab_size=V,
        temperature=0.7,
        num_samples=len(ROWS),
        num_rows=sum(ROWS),
        model="m",
        tokenizer="t",
        data="d",
    )
    return replace(base, **options)


def rows_of(scale: float = 4.0) -> TopK:
    logits = torch.randn(sum(ROWS), V, generator=torch.Generator().manual_seed(3)) * scale
    logits[4, 3:] = -torch.inf  # three entries above -inf: unused slots
    return topk_select(logits, K, temperature=0.7)


def write(path: Path, top: TopK, head: CacheHeader, shards: Sequence[range] | None = None) -> None:
    starts = np.cumsum([0, *ROWS]).tolist()
    for samples in shards or [range(len(ROWS))]:
        with TopKReferenceCache.write(path, head, samples) as writer:
            for sample in samples:
                writer.append(top[starts[sample] : starts[sample + 1]], [ROWS[sample]])


def finished(path: Path, top: TopK | None = None, head: CacheHeader | None = None, **more: Any) -> TopKReferenceCache:
    head = head or header()
    write(path, top or rows_of(), head, **more)
    return TopKReferenceCache.finish(path, head)


def assert_same(found: TopK, expected: TopK) -> None:
    """Bit for bit, -0 and unused slots included."""
    assert found.temperature == expected.temperature
    for name in ("ids", "values", "lse"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous(), name
        assert a.numpy().tobytes() == b.numpy().tobytes(), name


@pytest.mark.parametrize("shards", [None, [range(4, 6), range(0, 1), range(1, 4)], [range(2, 6), range(2)]])
def test_float32_comes_back_bit_for_bit(tmp_path: Path, shards: Any) -> None:
    top = rows_of()
    top.values[0, 0] = -0.0
    cache = finished(tmp_path, top, shards=shards)
    assert len(cache) == sum(ROWS) and cache.offsets.tolist() == np.cumsum([0, *ROWS]).tolist()
    assert_same(cache[:], top)
    assert_same(cache[2:11:3], top[2:11:3])
    assert_same(cache[-3:], top[-3:])
    assert_same(cache[5], TopK(ids=top.ids[5], values=top.values[5], lse=top.lse[5], temperature=0.7))
    for wanted in ([14, 0, 7, 7], [[1, 2], [9, 3]], []):
        index = torch.tensor(wanted, dtype=torch.int64)
        for asked in (index, wanted, index.int().numpy()):
            assert_same(cache[asked], top[index])
    assert cache.rows_of([4, 1, 0]).tolist() == [9, 10, 11, 12, 0, 1, 2]
    assert_same(cache[cache.rows_of(2)], top[3:8])
    assert cache.rows_of([]).tolist() == []
    cache.verify()


def test_float64_references_and_whole_blocks_are_taken(tmp_path: Path) -> None:
    wide = topk_select(torch.randn(sum(ROWS), V, dtype=torch.float64), K, temperature=0.7)
    with TopKReferenceCache.write(tmp_path, header()) as writer:
        writer.append(wide[:8], torch.tensor(ROWS[:3]))
        writer.append(wide[8:], ROWS[3:])
    found = TopKReferenceCache.finish(tmp_path, header())[:]
    assert_same(found, TopK(ids=wide.ids, values=wide.values.float(), lse=wide.lse.float(), temperature=0.7))


def test_float16_is_off_by_what_it_says(tmp_path: Path) -> None:
    top = rows_of(scale=9.0)
    shifted = TopK(ids=top.ids, values=top.values + 1000.0, lse=top.lse + 1000.0 / 0.7, temperature=0.7)
    found = finished(tmp_path, shifted, header(dtype="float16"))[:]
    assert torch.equal(found.ids, shifted.ids) and torch.equal(found.lse, shifted.lse)
    below = shifted.values.amax(1, keepdim=True) - shifted.values
    used = shifted.ids >= 0
    assert (found.values[~used] == -torch.inf).all() and (~used).any()
    error = (found.values - shifted.values).abs()
    assert float(below[used].max()) > 8 and float(error[used].max()) > 0
    assert (error[used] <= 2.0**-11 * below[used] + 1e-4).all(), "float32 itself rounds at 1000 by 6e-5"


def test_float16_moves_the_kl_by_less_than_its_bound(tmp_path: Path) -> None:
    count = sum(ROWS)
    logits = torch.randn(count, V, dtype=torch.float64) * 3
    policy = logits + torch.randn(count, V, dtype=torch.float64) * 0.03
    top = topk_select(logits.float(), K, temperature=0.7)
    found = finished(tmp_path, top, header(dtype="float16"))[:]
    below = (top.values.amax(1, keepdim=True) - top.values) / 0.7
    kept = policy.gather(1, top.ids.long()).float()
    spread = sum((torch.softmax(x / 0.7, 1) * below).sum(1) for x in (kept, top.values))
    kl = [topk_kl_div(policy, ref, temperature=0.7) for ref in (top, found)]
    assert ((kl[0] - kl[1]).abs() <= 2.0**-11 * spread + 1e-7).all()
    own = topk_kl_div(logits.float(), found, temperature=0.7)
    assert float(own.max()) < 1e-6, "the KL of an unchanged model is second order in the rounding"


def test_a_logit_far_below_the_maximum_stays_a_used_slot(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, -1e5, -1e30], [-torch.inf] * 3])
    ids = torch.tensor([[0, 1, 2], [-1] * 3], dtype=torch.int32)
    top = TopK(ids=ids, values=values, lse=torch.tensor([0.0, -torch.inf]))
    head = header(k=3, temperature=1.0, num_samples=1, num_rows=2, dtype="float16")
    with TopKReferenceCache.write(tmp_path, head) as writer:
        writer.append(top, [2])
    found = TopKReferenceCache.finish(tmp_path, head)[:]
    assert found.values.tolist() == [[0.0, -65504.0, -65504.0], [-torch.inf] * 3]


def test_bytes_per_row_at_500_entries() -> None:
    sizes = [header(k=500, vocab_size=1000, dtype=dtype).record.itemsize for dtype in ("float32", "float16")]
    assert sizes == [4004, 3008]


def test_a_vocabulary_above_2_to_17(tmp_path: Path) -> None:
    ids = torch.tensor([[2**17 + 5, 299_998, 299_999]], dtype=torch.int32)
    top = TopK(ids=ids, values=torch.tensor([[1.0, 2.0, 3.0]]), lse=torch.tensor([4.0]))
    head = header(k=3, vocab_size=300_000, temperature=1.0, num_samples=1, num_rows=1)
    with TopKReferenceCache.write(tmp_path, head) as writer:
        writer.append(top, [1])
    assert_same(TopKReferenceCache.finish(tmp_path, head)[:], top)


OTHER: dict[str, object] = {
    "k": 8, "vocab_size": 301, "temperature": 1.0, "dtype": "float16", "num_samples": 7, "num_rows": 16,
    "model": "other", "tokenizer": "other", "data": "other",
}  # fmt: skip


@pytest.mark.parametrize("field", list(OTHER))
def test_every_field_of_the_header_is_checked(tmp_path: Path, field: str) -> None:
    assert set(OTHER) == set(CacheHeader.__slots__)
    finished(tmp_path)
    TopKReferenceCache.open(tmp_path, **asdict(header()))
    mine, theirs = OTHER[field], getattr(header(), field)
    with pytest.raises(ValueError, match=f"{field} is {theirs!r} in the cache, but {mine!r} here; .* write another"):
        TopKReferenceCache.open(tmp_path, **{field: mine})


def test_what_cannot_be_a_header_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"k": 1}, "k must be at least 2"),
        ({"k": 301}, "k must not exceed the vocabulary of 300, got 301"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"dtype": "bfloat16"}, "dtype must be one of float32, float16, got 'bfloat16'"),
        ({"num_rows": -1}, "num_rows must be at least 0, got -1"),
        ({"model": ""}, "model must be a text that is not empty, got ''"),
        ({"vocab_size": 2**31 + 1}, "vocab_size is at most 2.31"),
    ):
        with pytest.raises(ValueError, match=message):
            header(**options)
    finished(tmp_path)
    with pytest.raises(ValueError, match="no header field is called 'modell'"):
        TopKReferenceCache.open(tmp_path, modell="m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": lambda t: t[:, :6], "values": lambda t: t[:, :6]}, r"got \[15, 6\]"),
        ({"temperature": lambda t: 1.0}, "at temperature 0.7, got .* at 1.0"),
        ({"ids": lambda t: t + 200}, "ids must lie between -1 and 299, got 199 to "),
        ({"values": lambda t: t.clamp(min=-99)}, "an unused slot has id -1 and value -inf"),
        ({"lse": lambda t: t * torch.nan}, "a log-sum-exp is NaN or .inf"),
        ({name: lambda t: t[:14] for name in ("ids", "values", "lse")}, "rows .* must be counts that sum to 14"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path, change: Any, message: str) -> None:
    top = rows_of()
    top = replace(top, **{name: alter(getattr(top, name)) for name, alter in change.items()})
    with pytest.raises(ValueError, match=message), TopKReferenceCache.write(tmp_path, header()) as writer:
        writer.append(top, ROWS)
    assert list(tmp_path.iterdir()) == []


def _write_part(path: Path, samples: range) -> None:
    torch.set_num_threads(1)
    write(path, rows_of(), header(), [samples])


@FORKS
def test_processes_write_shards_side_by_side(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    parts = [range(0, 3), range(3, 6)]
    processes = [fork.Process(target=_write_part, args=(tmp_path, part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert TopKReferenceCache.written(tmp_path, header()) == parts
    assert TopKReferenceCache.written(tmp_path, header(data="other")) == []
    assert_same(TopKReferenceCache.finish(tmp_path, header())[:], rows_of())
    TopKReferenceCache.finish(tmp_path, header())


def test_a_cache_is_published_only_when_it_is_whole(tmp_path: Path) -> None:
    for state in ("nothing of a cache is there", "2 shards wait for the rest and for finish"):
        with pytest.raises(ValueError, match=f"no finished cache .{state}"):
            TopKReferenceCache.open(tmp_path)
        write(tmp_path, rows_of(), header(), [range(0, 2), range(3, 6)])
    with pytest.raises(ValueError, match="samples 2 to 2 are missing"):
        TopKReferenceCache.finish(tmp_path, header())
    write(tmp_path, rows_of(), header(), [range(2, 3)])
    with pytest.raises(ValueError, match="the shards have 15 rows, the header says 16"):
        write(tmp_path / "b", rows_of(), header(num_rows=16))
        TopKReferenceCache.finish(tmp_path / "b", header(num_rows=16))
    assert_same(TopKReferenceCache.finish(tmp_path, header())[:], rows_of())
    with pytest.raises(FileExistsError, match="holds a finished cache; remove it or choose another path"):
        TopKReferenceCache.write(tmp_path, header())


def test_shards_that_overlap_are_refused(tmp_path: Path) -> None:
    write(tmp_path, rows_of(), header(), [range(0, 3)])
    write(tmp_path / "b", rows_of(), header(), [range(2, 6)])
    for file in (tmp_path / "b").iterdir():
        file.rename(tmp_path / file.name)
    with pytest.raises(ValueError, match="holds samples before 3 that another shard holds"):
        TopKReferenceCache.finish(tmp_path, header())
    for samples in (range(5, 7), range(3, 3), range(0, 6, 2)):
        with pytest.raises(ValueError, match="samples must be a range of some of 6, got range"):
            TopKReferenceCache.write(tmp_path, header(), samples)
    short = TopKReferenceCache.write(tmp_path / "c", header())
    with pytest.raises(ValueError, match="is of 6 samples from 0 on, but 1 were appended"), short as writer:
        writer.append(rows_of()[:3], [3])


def test_a_second_run_replaces_what_a_crash_left(tmp_path: Path) -> None:
    write(tmp_path, rows_of(), header(data="old"), [range(0, 4)])
    write(tmp_path, rows_of(), header(), [range(0, 2), range(4, 6)])
    stale = tmp_path / "shard-000000000002.bin.99999.partial"
    stale.write_bytes(b"half")  # of a process that was killed
    with pytest.raises(KeyboardInterrupt), TopKReferenceCache.write(tmp_path, header(), range(2, 4)) as writer:
        writer.append(rows_of()[3:8], [5])
        raise KeyboardInterrupt
    assert list(tmp_path.glob("*.partial")) == [stale]
    assert TopKReferenceCache.written(tmp_path, header()) == [range(0, 2), range(4, 6)]
    write(tmp_path, rows_of(), header(), [range(1, 6)])  # overlaps both
    write(tmp_path, rows_of(), header(), [range(0, 1)])
    assert_same(TopKReferenceCache.finish(tmp_path, header())[:], rows_of())
    assert not stale.exists()


def test_a_full_disk_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(cache_module.os, "fsync", full)
        write(tmp_path, rows_of(), header())
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, rows_of(), header())
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(cache_module.os, "fsync", full)
        TopKReferenceCache.finish(tmp_path, header())
    with pytest.raises(ValueError, match="no finished cache"):
        TopKReferenceCache.open(tmp_path)
    assert_same(TopKReferenceCache.finish(tmp_path, header())[:], rows_of())


def test_damage_is_noticed(tmp_path: Path) -> None:
    cache = finished(tmp_path)
    shard, head = tmp_path / "shard-000000000000.bin", tmp_path / "header.json"
    whole, text = shard.read_bytes(), head.read_text()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TopKReferenceCache.open(tmp_path)
        shard.write_bytes(whole)
        head.write_text(text)

    shard.write_bytes(whole[:-1])
    refused(f"shard-000000000000.bin has {len(whole) - 1} bytes, expected {len(whole)} bytes; remove .* and write")
    shard.unlink()
    refused("shard-000000000000.bin is missing")
    shard.write_bytes(whole[:-8] + (77).to_bytes(8, "little"))
    refused("its numbers of rows are damaged")
    head.write_text(text[: len(text) // 2])
    refused("damaged header, no JSON")
    head.write_bytes(b"\xff\xfe")
    refused("damaged header, no JSON")
    for foreign in ('{"format": "something else"}', "[]"):
        head.write_text(foreign)
        refused("not the header of a nova-kernels top-k reference cache")
    found = json.loads(text)
    for change, message in (
        ({"version": 2}, "format version 2, this program reads 1"),
        ({"k": None}, "damaged header: ValueError.*k must be an int, got None"),
        ({"num_samples": 5}, "the header says|samples .* are missing|damaged"),
        ({"shards": []}, "samples 0 to 5 are missing"),
    ):
        head.write_text(json.dumps({**found, **change}))
        refused(message)
    del found["tokenizer"]
    head.write_text(json.dumps(found))
    refused("damaged header: KeyError")
    cache.verify()
    shard.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(ValueError, match="its bytes changed since it was written"):
        TopKReferenceCache.open(tmp_path).verify()


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    cache = finished(tmp_path)
    for rows, message in (
        (15, "no row 15; they go from 0 to 14"),
        (torch.tensor([0, -1]), "no row -1"),
        (torch.tensor([0.5]), "row numbers must be integers, got float32"),
        (torch.tensor([True, False]), "row numbers must be integers, got bool"),
    ):
        with pytest.raises(IndexError, match=message):
            cache[rows]
    with pytest.raises(IndexError, match="no sample 6; they go from 0 to 5"):
        cache.rows_of([6])


def test_a_data_set_without_rows(tmp_path: Path) -> None:
    empty = header(num_samples=0, num_rows=0)
    with TopKReferenceCache.write(tmp_path, empty) as writer:
        writer.append(rows_of()[:0], [])
    cache = TopKReferenceCache.finish(tmp_path, empty)
    assert len(cache) == 0 and cache[:].ids.shape == (0, K) and cache.offsets.tolist() == [0]


def test_opening_and_reading_a_row_do_not_read_the_file(tmp_path: Path) -> None:
    rows = 2**21  # 8.4 GB, all of it a hole but the last sixteen bytes
    big = header(k=500, vocab_size=2**18, num_samples=2, num_rows=rows)
    with (tmp_path / "shard-000000000000.bin").open("wb") as file:
        file.seek(rows * big.record.itemsize)
        file.write(np.array([rows - 3, 3], dtype="<i8").tobytes())
    publish(tmp_path / "header.json", big, [Shard(first_sample=0, num_samples=2, num_rows=rows, sha256="unread")])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = TopKReferenceCache.open(tmp_path)
    assert cache.rows_of(1).tolist() == [rows - 3, rows - 2, rows - 1]
    assert not cache[torch.tensor([rows - 1, 0, rows // 2])].ids.any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB"


def values_of(cache: TopKReferenceCache, sample: int) -> torch.Tensor:
    return cache[cache.rows_of(sample)].values


@FORKS
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_it(tmp_path: Path, method: str) -> None:
    cache = finished(tmp_path)
    cache[0]  # a map is open before the fork
    read = partial(values_of, cache)
    loader = DataLoader(range(6), batch_size=None, collate_fn=read, num_workers=1, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), rows_of().values)


def test_it_pickles_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = finished(Path("cache"))
    cache[0]
    text = pickle.dumps(cache)
    assert len(text) < 1000
    monkeypatch.chdir("/")
    assert_same(pickle.loads(text)[:], rows_of())
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    finished(tmp_path / "cache", head=header(data="another"))
    with pytest.raises(ValueError, match="data is 'another' in the cache, but 'd' here"):
        pickle.loads(text)
