"""Sources of optimiser steps: complete, the same when resumed, and whatever the micro-batch."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_kernels.packing import PackedBatch, PackSampler
from nova_train.datasets import DataError
from nova_train.loader import PackedLoader, ShuffledLoader


def make_samples(lengths: list[int]) -> list[dict[str, np.ndarray]]:
    """Sample i holds the ids 1000 i, 1000 i + 1, .."""
    return [{"input_ids": 1000 * i + np.arange(n), "labels": 1000 * i + np.arange(n)} for i, n in enumerate(lengths)]


LENGTHS = [7, 3, 3, 3, 12, 1, 5, 5, 9, 2, 2, 11, 4]


def packed(lengths: list[int] | None = None, **options: Any) -> PackedLoader:
    settings = {"capacity": 12, "packs_per_step": 3, "packs_per_micro_batch": 1, "epochs": 2, "seed": 0, **options}
    return PackedLoader(make_samples(LENGTHS if lengths is None else lengths), **settings)


def test_packs_are_those_of_the_sampler_in_its_order() -> None:
    loader = packed(list(range(1, 13)), packs_per_step=2, epochs=1)
    sampler = PackSampler(list(range(1, 13)), 12, packs_per_step=2, seed=0, window=1)
    assert [order(step) for step in everything(loader)] == [
        [int(sample) for pack in step for sample in pack] for step in sampler.steps(0)
    ]


def test_fewer_samples_than_packs_in_a_step_are_a_smaller_step() -> None:
    loader = packed([5, 4], packs_per_step=4, epochs=1)
    (step,) = everything(loader)
    assert sorted(batch.num_tokens for batch in step) == [4, 5]


def shuffled(items: list[int], **options: Any) -> ShuffledLoader[int]:
    return ShuffledLoader(items, **{"per_step": 4, "per_micro_batch": 2, "epochs": 2, "seed": 0, **options})


def samples_in(batch: PackedBatch) -> list[int]:
    starts = batch.cu_seqlens[:-1].long()
    return (batch.input_ids[0, starts] // 1000).tolist()


def order(step: list[PackedBatch]) -> list[int]:
    return [sample for batch in step for sample in samples_in(batch)]


def everything(loader: Any) -> list[Any]:
    return [loader.next_step() for _ in range(len(loader))]


def test_every_sample_once_per_epoch() -> None:
    loader = packed()
    for _ in range(2):
        seen: list[int] = []
        for _ in range(loader.steps_per_epoch):
            for batch in loader.next_step():
                assert batch.num_tokens <= 12
                seen += samples_in(batch)
        assert sorted(seen) == list(range(len(LENGTHS)))
    with pytest.raises(IndexError, match="all 4 steps are taken"):
        loader.next_step()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(0, 3),
    st.booleans(),
)
def test_steps_do_not_depend_on_the_micro_batch(
    lengths: list[int], per_step: int, per_micro: int, seed: int, packing: bool
) -> None:
    one = packed(lengths, packs_per_step=per_step, seed=seed, packing=packing)
    many = packed(lengths, packs_per_step=per_step, packs_per_micro_batch=per_micro, seed=seed, packing=packing)
    assert len(one) == len(many) == 2 * one.steps_per_epoch
    for ours, theirs in zip(everything(one), everything(many), strict=True):
        assert torch.equal(torch.cat([b.input_ids for b in ours], 1), torch.cat([b.input_ids for b in theirs], 1))
        assert len(theirs) == -(-len(ours) // per_micro)
        assert all(b.num_tokens <= 12 * per_micro for b in theirs)


def test_epochs_and_seeds_differ() -> None:
    first, second = map(order, everything(packed(packs_per_step=100)))
    assert first != second
    assert first != order(packed(packs_per_step=100, seed=1).next_step())
    assert first == order(packed(packs_per_step=100).next_step())


@pytest.mark.parametrize("taken", range(5))
@pytest.mark.parametrize("kind", ["packed", "unpacked", "shuffled"])
def test_a_resumed_source_goes_on_where_it_stopped(kind: str, taken: int) -> None:
    make = {
        "packed": lambda: packed(max_steps=5),
        "unpacked": lambda: packed(max_steps=5, packing=False, packs_per_step=5),
        "shuffled": lambda: shuffled(list(range(9)), max_steps=5),
    }[kind]
    whole, stopped, resumed = make(), make(), make()
    expected = everything(whole)[taken:]
    for _ in range(taken):
        stopped.next_step()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for step in expected:
        found = resumed.next_step()
        assert len(found) == len(step)
        for ours, theirs in zip(found, step, strict=True):
            same = torch.equal(ours.input_ids, theirs.input_ids) if isinstance(ours, PackedBatch) else ours == theirs
            assert same
    with pytest.raises(IndexError):
        resumed.next_step()


def test_another_micro_batch_may_resume_other_data_may_not() -> None:
    saved = packed().state_dict()
    packed(packs_per_micro_batch=3).load_state_dict(saved)
    other = make_samples(LENGTHS)
    other[4]["labels"][3] = -100
    changed = PackedLoader(other, capacity=12, packs_per_step=3, packs_per_micro_batch=1, epochs=2, seed=0)
    for loader in (packed(LENGTHS[::-1]), packed(seed=1), packed(packs_per_step=2), packed(capacity=13), changed):
        with pytest.raises(DataError, match="the data, the tokenizer or the batch changed since .* saved at step 0"):
            loader.load_state_dict(saved)
    with pytest.raises(DataError, match="ShuffledLoader: the data"):
        shuffled([1, 2]).load_state_dict(shuffled([1, 2, 3]).state_dict())


@pytest.mark.parametrize(
    ("epochs", "max_steps", "length"),
    [(1, None, 3), (2.0, None, 6), (0.3, None, 1), (1.5, None, 5), (7 / 3, None, 7), (1, 10, 10), (None, 2, 2)],
)
def test_length(epochs: float | None, max_steps: int | None, length: int) -> None:
    loader = shuffled(list(range(10)), epochs=epochs, max_steps=max_steps)
    assert len(loader) == length == len(everything(loader))
    assert loader.epoch == pytest.approx(length / 3)
    assert len(shuffled(list(range(100)), per_step=1, epochs=0.07)) == 7


def test_without_end() -> None:
    loader = shuffled([0, 1, 2], per_step=2, epochs=None)
    counts = Counter(item for _ in range(10) for micro in loader.next_step() for item in micro)
    assert counts == {0: 5, 1: 5, 2: 5}
    with pytest.raises(TypeError, match="epochs=None goes on for ever"):
        len(loader)


def test_the_last_step_of_an_epoch_may_be_smaller() -> None:
    steps = everything(shuffled(list(range(7)), epochs=1))
    assert [[len(micro) for micro in step] for step in steps] == [[2, 2], [2, 1]]
    assert sorted(item for step in steps for micro in step for item in micro) == list(range(7))


def test_collate_builds_the_micro_batch() -> None:
    loader = shuffled([1, 2, 3], per_step=3, collate=sum)
    first, second = loader.next_step()
    assert first + second == 6


def test_packing_fills_rows_and_can_be_switched_off() -> None:
    together, apart = packed(), packed(packing=False)
    assert together.num_packs == 6 and together.utilization == pytest.approx(sum(LENGTHS) / 72)
    assert apart.num_packs == len(LENGTHS)
    assert all(batch.num_samples == 1 for step in everything(apart) for batch in step)


def test_refusals() -> None:
    for loader in (lambda: packed([]), lambda: packed([], packing=False), lambda: shuffled([])):
        with pytest.raises(DataError, match="empty data set"):
            loader()
    with pytest.raises(ValueError, match=r"sample 4 has 12 tokens, capacity is 11"):
        packed(capacity=11)
    with pytest.raises(ValueError, match=r"sample 4 has 12 tokens, capacity is 11.*overlong"):
        packed(capacity=11, packing=False)
    with pytest.raises(ValueError, match="hold at least 1, got 0 and 2"):
        shuffled([1], per_step=0)
    with pytest.raises(ValueError, match=r"epochs must be positive .*got 0"):
        shuffled([1], epochs=0)
    with pytest.raises(ValueError, match=r"max_steps must be at least 1 or None, got 0"):
        shuffled([1], max_steps=0)
