"""Files of the reference cache: damage, leftovers, two writers of one range, and rows that are no reference."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nova_kernels import TopK, topk_select
from nova_kernels.topk_kl import CacheHeader, TopKReferenceCache
from nova_kernels.topk_kl.cache_files import Shard, encode, partial_of

HEADER = CacheHeader(k=4, vocab_size=50, temperature=1.0, num_samples=4, num_rows=8, model="m", tokenizer="t", data="d")
FIRST, SECOND = range(0, 2), range(2, 4)


def rows_of(samples: range = range(4)) -> TopK:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    logits[0, 3:] = -torch.inf  # an unused slot
    return topk_select(logits, 4)[2 * samples.start : 2 * samples.stop]


def write(path: Path, *shards: range, head: CacheHeader = HEADER) -> None:
    for samples in shards:
        with TopKReferenceCache.write(path, head, samples) as writer:
            writer.append(rows_of(samples), [2] * len(samples))


@pytest.mark.parametrize("harm", ["missing", "short"])
def test_a_shard_counts_only_with_its_file(tmp_path: Path, harm: str) -> None:
    write(tmp_path, FIRST, SECOND)
    file = tmp_path / "shard-000000000002.bin"
    file.unlink() if harm == "missing" else file.write_bytes(file.read_bytes()[:-1])
    assert TopKReferenceCache.written(tmp_path, HEADER) == [FIRST]
    with pytest.raises(ValueError, match="samples 2 to 3 are missing; write their shard"):
        TopKReferenceCache.finish(tmp_path, HEADER)
    write(tmp_path, SECOND)
    cache = TopKReferenceCache.finish(tmp_path, HEADER)
    assert torch.equal(cache[:].ids, rows_of().ids)
    file.unlink()
    with pytest.raises(ValueError, match=f"is missing, expected .*; remove {tmp_path} and write the cache again"):
        TopKReferenceCache.open(tmp_path)


def test_two_writers_of_one_range_do_not_touch_each_other(tmp_path: Path) -> None:
    assert partial_of(tmp_path / "x") != partial_of(tmp_path / "x")
    with TopKReferenceCache.write(tmp_path, HEADER, FIRST) as one:
        one.append(rows_of(FIRST), [2, 2])
        with TopKReferenceCache.write(tmp_path, HEADER, FIRST) as two:
            assert len(list(tmp_path.glob("*.partial"))) == 2
            two.append(rows_of(FIRST), [2, 2])
        assert TopKReferenceCache.written(tmp_path, HEADER) == [FIRST]
    assert TopKReferenceCache.written(tmp_path, HEADER) == [FIRST]
    with TopKReferenceCache.write(tmp_path, HEADER, SECOND) as late:
        late.append(rows_of(SECOND), [2, 2])
        write(tmp_path, SECOND)
        TopKReferenceCache.finish(tmp_path, HEADER)
        published = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == published, "a late writer changes nothing"
    TopKReferenceCache.open(tmp_path).verify()


def test_what_is_no_part_of_the_cache_is_removed_when_it_is_finished(tmp_path: Path) -> None:
    orphan = tmp_path / "shard-000000000003.bin"  # of a writer that ended between its two renames
    mark = tmp_path / "shard-000000000001.json"  # and one whose file is lost
    orphan.write_bytes(b"rows")
    write(tmp_path, range(1, 2))
    mark.with_suffix(".bin").unlink()
    write(tmp_path, FIRST, SECOND)
    assert orphan.exists() and mark.exists()
    TopKReferenceCache.finish(tmp_path, HEADER)
    expected = {f"shard-{first:012d}.{end}" for first in (0, 2) for end in ("bin", "json")} | {"header.json"}
    assert {file.name for file in tmp_path.iterdir()} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": []}, "damaged mark of 0 shards"),
        ({"shards": 5}, "damaged header: TypeError"),
        ({"shards": [5]}, "damaged header: TypeError"),
        ({"k": 4.0}, "damaged header: .*k must be an int, got 4.0"),
    ],
)
def test_a_damaged_mark_is_a_value_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, FIRST)
    mark = tmp_path / "shard-000000000000.json"
    found = json.loads(mark.read_text())
    mark.write_text(json.dumps({**found, **change}))
    for use in (TopKReferenceCache.written, TopKReferenceCache.finish, TopKReferenceCache.write):
        with pytest.raises(ValueError, match=message):
            use(tmp_path, HEADER)
    for name, value in (("num_rows", "5"), ("num_samples", 2.0), ("first_sample", -1), ("sha256", 7)):
        mark.write_text(json.dumps({**found, "shards": [{**found["shards"][0], name: value}]}))
        with pytest.raises(ValueError, match=f"damaged header: .*{name} must be"):
            TopKReferenceCache.written(tmp_path, HEADER)


@pytest.mark.parametrize("name", ["k", "vocab_size", "num_samples", "num_rows"])
@pytest.mark.parametrize("value", [50.0, "5", True, None, np.int64(5)])
def test_counts_of_a_header_are_ints(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"CacheHeader: {name} must be an int, got "):
        replace(HEADER, **{name: value})


def test_other_fields_of_a_header_have_their_types() -> None:
    for options, message in (
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"dtype": []}, r"dtype must be one of float32, float16, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            CacheHeader(**{**asdict(HEADER), **options})
    with pytest.raises(ValueError, match="Shard: num_rows must be an int"):
        Shard(first_sample=0, num_samples=1, num_rows=1.0, sha256="")  # type: ignore[arg-type]


def changed(name: str, place: tuple[int, int], value: float) -> TopK:
    top = rows_of()
    tensor = getattr(top, name).clone()
    tensor[place] = value
    return replace(top, **{name: tensor})


@pytest.mark.parametrize(
    ("top", "rows", "message"),
    [
        (rows_of(), [2.0, 2, 2, 2], "rows must be integers .samples., got float64 .4."),
        (rows_of(), [[2, 2], [2, 2]], r"rows must be integers .samples., got int64 .2, 2."),
        (rows_of(), torch.tensor([2.7, 2, 2, 1.3]), "rows must be integers"),
        (rows_of(), [True] * 4, "rows must be integers"),
        (changed("values", (1, 2), torch.nan), [2] * 4, "a value is NaN or .inf"),
        (changed("values", (1, 2), torch.inf), [2] * 4, "a value is NaN or .inf"),
        (changed("ids", (1, 1), 49), [2] * 4, "ids must ascend within a row, the unused slots"),
        (changed("ids", (1, 1), int(rows_of().ids[1, 0])), [2] * 4, "ids must ascend within a row"),
    ],
)
def test_rows_that_are_no_reference_are_refused(tmp_path: Path, top: TopK, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), TopKReferenceCache.write(tmp_path, HEADER) as writer:
        writer.append(top, rows)
    assert not list(tmp_path.iterdir())


def test_an_unused_slot_before_a_used_one_is_refused() -> None:
    top = TopK(
        ids=torch.tensor([[-1, 3, 4, 5]], dtype=torch.int32),
        values=torch.tensor([[-torch.inf, 1.0, 2.0, 3.0]]),
        lse=torch.ones(1),
    )
    with pytest.raises(ValueError, match="the unused slots .-1. at its end"):
        encode(top, HEADER)


def test_a_writer_outside_its_with_says_so(tmp_path: Path) -> None:
    writer = TopKReferenceCache.write(tmp_path, HEADER)
    with pytest.raises(ValueError, match="not open; use it in a with"):
        writer.append(rows_of(), [2] * 4)
    with writer:
        writer.append(rows_of(), [2] * 4)
    with pytest.raises(ValueError, match="not open; use it in a with"):
        writer.append(rows_of(), [2] * 4)


def test_an_index_of_ragged_rows_is_an_index_error(tmp_path: Path) -> None:
    write(tmp_path, range(4))
    cache = TopKReferenceCache.finish(tmp_path, HEADER)
    for wrong in ([[1, 2], [3]], None, "a"):
        with pytest.raises(IndexError, match="row numbers must be"):
            cache[wrong]  # type: ignore[index]
    with pytest.raises(IndexError, match="sample numbers must be"):
        cache.rows_of([[1, 2], [3]])  # type: ignore[list-item]


def test_float16_never_overflows_on_the_way() -> None:
    ids = torch.arange(4, dtype=torch.int32)[None]
    top = TopK(ids=ids, values=torch.tensor([[3e38, -3e38, 3e38 - 1e32, 0.0]]), lse=torch.tensor([3e38]))
    with np.errstate(all="raise"):
        found = encode(top, replace(HEADER, dtype="float16"))
    assert found["values"].tolist() == [[0.0, -65504.0, -65504.0, -65504.0]]
