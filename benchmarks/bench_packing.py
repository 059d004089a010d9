"""Packing: how fast a plan is made and how few packs it needs, how much of a row is tokens, how fast rows are laid out.

    packs above the bound   packs - lower bound, for all packers that of nova_kernels/packing/reference.py
    utilisation             tokens / (rows x tokens per row)
    bytes of a row          T tokens: read ids and labels, write ids, labels and positions as int64: T (2 r + 24),
                            r = 4 or 8 bytes of an input token (not stated for lists, whose integers lie anywhere)

Lengths above the capacity are cut to it for everybody. Every plan is checked: all tokens are there, no pack is too
full; every row of a collator is bit-equal to pack_samples(backend="reference").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import packing_lengths, packing_peers
from benchmarks.packing_peers import Collator, Packer
from nova_kernels.packing import PackCollator, PackedBatch, PackPlan, Ragged, StreamingPacker, pack_samples, plan_packs

CASES = [
    *(("chat", count, 8192) for count in (10_000, 100_000, 1_000_000)),
    *(("chat", count, capacity) for capacity in (4096, 16384) for count in (10_000, 100_000, 1_000_000)),
    *(("clustered", 100_000, capacity) for capacity in (8192, 16384)),
    *((name, 0, 8192) for name in packing_lengths.REAL),
]
WINDOWS = (64, 256, 1024)
BATCH_SEED = 6  # 64 chat samples of 27,688 tokens


def plan(lengths: np.ndarray, capacity: int, **options: Any) -> tuple[Callable[[], PackPlan], Any]:
    return (
        lambda: plan_packs(lengths, capacity, **options),
        lambda found: sizes_of(lengths, (found.pack(b) for b in range(found.num_packs))),
    )


OURS = (
    Packer("nova_kernels", "nova-kernels", plan),
    Packer("nova_kernels, Python", "nova-kernels", lambda x, c: plan(x, c, backend="reference"), limit=30_000),
)


def sizes_of(lengths: np.ndarray, packs: Iterable[np.ndarray]) -> np.ndarray:
    """Tokens of each pack; every sample is in exactly one."""
    packs = list(packs)
    order = np.concatenate(packs)
    assert np.array_equal(np.sort(order), np.arange(lengths.size)), "a sample is missing, or in two packs"
    return np.add.reduceat(lengths[order], np.cumsum([0] + [len(pack) for pack in packs[:-1]]))


def lengths_for(name: str, count: int, capacity: int) -> np.ndarray:
    found = packing_lengths.named(name, count)
    if found is None:
        pytest.skip(f"{name}: not in the folder NOVA_DATA")
    return np.minimum(found, capacity)


def prepared(peer: Packer | Collator, *args: Any) -> Any:
    try:
        return peer.prepare(*args)
    except ImportError as error:
        pytest.skip(f"{peer.name}: {error}")


def quality(sizes: Any, lengths: np.ndarray, capacity: int) -> dict[str, Any]:
    """What a row says about its packs."""
    sizes = np.asarray(sizes)
    assert sizes.sum() == lengths.sum(), f"{lengths.sum()} tokens went in, {sizes.sum()} came out"
    assert sizes.max() <= capacity, f"a pack of {sizes.max()} tokens, capacity {capacity}"
    return {"packs": len(sizes), "utilization": round(float(sizes.sum()) / (len(sizes) * capacity), 6)}


def plan_cases() -> Iterator[Any]:
    for name, count, capacity in CASES:
        for packer in (*OURS, *packing_peers.PACKERS):
            elsewhere = count == 1_000_000 and capacity != 8192  # minutes for little: a few peers are enough
            if count <= packer.limit and not (elsewhere and packer.package not in ("nova-kernels", "lightbinpack")):
                label = f"{packer.name}-{name}-{count or 'all'}-{capacity}".replace(" ", "_")
                yield pytest.param(packer, name, count, capacity, id=label)


@pytest.mark.parametrize(("packer", "name", "count", "capacity"), list(plan_cases()))
def bench_plan(measure: Any, quick: bool, packer: Packer, name: str, count: int, capacity: int) -> None:
    if quick and count > 10_000:
        pytest.skip("--quick")
    lengths = lengths_for(name, count, capacity)
    call, sizes = prepared(packer, lengths, capacity)
    measure(
        call,
        check=lambda result: quality(sizes(result), lengths, capacity),
        once=lengths.size >= packer.once_from,
        case="plan",
        packer=packer.name,
        package=packer.package,
        list=name,
        samples=lengths.size,
        capacity=capacity,
        lower_bound=plan_packs(lengths, capacity).lower_bound,
    )


def in_batches(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    return [lengths[at : at + size] for at in range(0, lengths.size, size)]


def padded(batches: Iterable[np.ndarray]) -> int:
    return sum(int(batch.max()) * batch.size for batch in batches)


def streamed(lengths: np.ndarray, capacity: int, window: int) -> list[np.ndarray]:
    packer = StreamingPacker(capacity, window)
    return packer.push_many(lengths) + packer.flush()


def batch_by_batch(size: int) -> Callable[[np.ndarray, int], int]:
    return lambda x, c: sum(plan_packs(batch, c).num_packs for batch in in_batches(x, size)) * c


METHODS: dict[str, Callable[[np.ndarray, int], int]] = {  # lengths, capacity -> tokens of room that are computed
    "padded to the capacity": lambda x, c: x.size * c,
    "padded to the longest of 64": lambda x, c: padded(in_batches(x, 64)),
    "padded to the longest of 8": lambda x, c: padded(in_batches(x, 8)),
    "sorted by length, padded to the longest of 8": lambda x, c: padded(in_batches(np.sort(x), 8)),
    **{f"packed, {size} samples at a time": batch_by_batch(size) for size in (64, 256, 1000)},
    **{
        f"packed, {size} samples waiting": lambda x, c, w=size: len(streamed(x, c, w)) * c  # type: ignore[misc]
        for size in WINDOWS
    },
    "packed, the whole set": lambda x, c: plan_packs(x, c).num_packs * c,
}


@pytest.mark.parametrize("capacity", [4096, 8192])
@pytest.mark.parametrize("name", ["chat", *packing_lengths.REAL])
@pytest.mark.parametrize("method", METHODS)
def bench_utilization(measure: Any, quick: bool, method: str, name: str, capacity: int) -> None:
    lengths = lengths_for(name, 10_000 if quick else 100_000, capacity)
    tokens = int(lengths.sum())

    def check(room: int) -> dict[str, Any]:
        assert room >= tokens, f"{room} tokens of room for {tokens}"
        return {"utilization": round(tokens / room, 6)}

    measure(
        lambda: METHODS[method](lengths, capacity),
        check=check,
        once=True,
        case="utilization",
        method=method,
        list=name,
        samples=lengths.size,
        capacity=capacity,
    )


@pytest.mark.parametrize(
    ("name", "count", "capacity"),
    [("chat", 1_000_000, 4096), ("chat", 1_000_000, 8192), ("clustered", 100_000, 16384)]
    + [(name, 0, 8192) for name in packing_lengths.REAL],
)
@pytest.mark.parametrize("window", WINDOWS)
def bench_stream(measure: Any, quick: bool, window: int, name: str, count: int, capacity: int) -> None:
    lengths = lengths_for(name, 10_000 if quick else count, capacity)
    measure(
        lambda: streamed(lengths, capacity, window),
        check=lambda packs: quality(sizes_of(lengths, packs), lengths, capacity),
        case="stream",
        window=window,
        list=name,
        samples=lengths.size,
        capacity=capacity,
    )


def bench_stream_one_by_one(measure: Any) -> None:
    """`push` from a Python loop, as a data loader calls it."""
    lengths = packing_lengths.chat(10_000)

    def call() -> list[np.ndarray]:
        packer = StreamingPacker(8192, 1024)
        return [pack for length in lengths.tolist() for pack in packer.push(length)] + packer.flush()

    measure(
        call,
        check=lambda packs: quality(sizes_of(lengths, packs), lengths, 8192),
        case="stream, one by one",
        window=1024,
        list="chat",
        samples=lengths.size,
        capacity=8192,
    )


def batch_of(kind: str) -> list[dict[str, Any]]:
    """64 chat samples whose first third is a prompt, without labels."""
    samples = []
    random = np.random.default_rng(BATCH_SEED)
    for length in packing_lengths.chat(64, BATCH_SEED):
        ids = random.integers(1, 100_000, length)
        labels = np.where(np.arange(length) < length // 3, packing_peers.IGNORE_INDEX, ids)
        samples.append({"input_ids": as_kind(ids, kind), "labels": as_kind(labels, kind)})
    return samples


def as_kind(values: np.ndarray, kind: str) -> Any:
    if kind == "lists":
        return values.tolist()
    if kind == "torch int64":
        return torch.from_numpy(values)
    return values.astype(kind.split()[1])


def into_buffers(samples: list[dict[str, Any]]) -> Callable[[], PackedBatch]:
    """The same three tensors for every batch, as a ring of pinned buffers would be used."""
    out = {name: torch.empty(1, 2**15, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")}
    return lambda: pack_samples(samples, out=out)


def from_flat(samples: list[dict[str, Any]]) -> Callable[[], PackedBatch]:
    """Each field in one array with offsets, as Arrow and memory maps hold it; the samples are chosen by number."""
    offsets = np.cumsum([0] + [len(sample["input_ids"]) for sample in samples])
    fields = {name: Ragged(np.concatenate([sample[name] for sample in samples]), offsets) for name in samples[0]}
    index = np.arange(len(samples))
    return lambda: pack_samples(fields, index=index)


def collated(samples: list[dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    collate = PackCollator()
    return lambda: collate(samples)


COLLATORS = (
    Collator("nova_kernels", "nova-kernels", lambda samples: lambda: pack_samples(samples)),
    Collator("nova_kernels, caller's buffers", "nova-kernels", into_buffers),
    Collator("nova_kernels, from one flat array", "nova-kernels", from_flat, kinds=("numpy int32", "numpy int64")),
    Collator("nova_kernels PackCollator", "nova-kernels", collated),
    Collator(
        "nova_kernels, Python", "nova-kernels", lambda samples: lambda: pack_samples(samples, backend="reference")
    ),
    *packing_peers.COLLATORS,
)


def collate_cases() -> Iterator[Any]:
    for collator in COLLATORS:
        for kind in collator.kinds:
            yield pytest.param(collator, kind, id=f"{collator.name}-{kind}".replace(" ", "_"))


@pytest.mark.parametrize(("collator", "kind"), list(collate_cases()))
def bench_collate(measure: Any, collator: Collator, kind: str) -> None:
    samples = batch_of(kind)
    expected = pack_samples(samples, backend="reference")
    call = prepared(collator, samples)

    def check(found: Any) -> None:
        fields = vars_of(found) if isinstance(found, PackedBatch) else dict(found)
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(fields[name], getattr(expected, name)), f"{collator.name}: other {name}"
        if (bounds := fields.get("cu_seq_lens_q")) is not None:
            assert torch.equal(bounds, expected.cu_seqlens), f"{collator.name}: other boundaries"
            assert fields["max_length_q"] == expected.max_seqlen, f"{collator.name}: another longest sample"

    read = {"numpy int32": 4, "numpy int64": 8, "torch int64": 8}.get(kind)
    measure(
        call,
        check=check,
        bytes_moved=expected.num_tokens * (2 * read + 24) if read else None,
        case="collate",
        packer=collator.name,
        package=collator.package,
        kind=kind,
        samples=len(samples),
        tokens=expected.num_tokens,
    )


def vars_of(batch: PackedBatch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "labels": batch.labels, **batch.attention_kwargs()}
