"""Streams: every sample once, none waits too long, a saved state continues the same way."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nova_kernels.packing import PackCollator, PackStream, StreamingPacker
from test_packing import BACKENDS, NATIVE, chat_lengths, problems


def as_lists(packs: list[np.ndarray]) -> list[list[int]]:
    return [pack.tolist() for pack in packs]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems(), window=st.integers(1, 20), data=st.data())
def test_every_sample_leaves_once_and_in_time(problem: tuple[list[int], int], window: int, data: st.DataObject) -> None:
    lengths, capacity = problem
    cut = data.draw(st.integers(0, len(lengths)))
    streams = []
    for name in BACKENDS:
        packer = StreamingPacker(capacity, window, backend=name)
        packs, born = [], {}
        for number, length in enumerate(lengths):
            born[number] = len(packs)
            packs += packer.push(length)
            assert len(packer) < window
            if number + 1 == cut:
                saved = packer.state_dict()
                packer = StreamingPacker(capacity, window, backend=data.draw(st.sampled_from(BACKENDS)))
                packer.load_state_dict(saved)
        packs += packer.flush()
        assert len(packer) == 0 and packer.pushed == len(lengths)
        for index, pack in enumerate(packs):
            assert sum(lengths[number] for number in pack.tolist()) <= capacity
            assert all(index - born[number] < window for number in pack.tolist())
            assert pack[0] == min(set(range(len(lengths))) - {n for earlier in packs[:index] for n in earlier.tolist()})
        streams.append(as_lists(packs))
        assert sorted(number for pack in streams[-1] for number in pack) == list(range(len(lengths)))
    assert all(stream == streams[0] for stream in streams)


@pytest.mark.parametrize("name", BACKENDS)
def test_many_pushes_are_as_many_single_ones(name: str) -> None:
    lengths = chat_lengths(300).clip(1, 2000)
    one, many = (StreamingPacker(2048, 16, backend=name) for _ in range(2))
    singles = [pack for length in lengths.tolist() for pack in one.push(length)]
    together = many.push_many(lengths[:120]) + many.push_many(lengths[120:])
    assert as_lists(singles + one.flush()) == as_lists(together + many.flush())


def test_what_is_left_is_carried_over_and_packs_are_full() -> None:
    lengths = chat_lengths(50_000 if NATIVE else 2_000)
    packer = StreamingPacker(8192, 1024 if NATIVE else 64)
    packs = packer.push_many(lengths)
    used = sum(int(lengths[pack].sum()) for pack in packs)
    assert used / (len(packs) * 8192) > 0.999


@pytest.mark.parametrize("name", BACKENDS)
def test_a_packer_can_be_pickled(name: str) -> None:
    packer = StreamingPacker(2048, 16, backend=name)
    lengths = chat_lengths(100).clip(1, 2048)
    packer.push_many(lengths[:60])
    copy = pickle.loads(pickle.dumps(packer))
    assert as_lists(copy.push_many(lengths[60:])) == as_lists(packer.push_many(lengths[60:]))
    assert copy.pushed == 100


@pytest.mark.skipif(not NATIVE, reason="no C++ extension")
def test_threads_may_share_a_packer() -> None:
    lengths = chat_lengths(20_000).tolist()
    packer = StreamingPacker(8192, 64)
    with ThreadPoolExecutor(4) as pool:
        packs = [pack for closed in pool.map(packer.push, lengths) for pack in closed] + packer.flush()
    assert sorted(number for pack in packs for number in pack.tolist()) == list(range(len(lengths)))


def test_a_window_of_one_packs_nothing_together() -> None:
    packer = StreamingPacker(10, 1)
    assert as_lists(packer.push_many([3, 4])) == [[0], [1]] and packer.flush() == []


def test_a_refused_length_changes_nothing() -> None:
    packer = StreamingPacker(10, 3)
    packer.push(4)
    before = packer.state_dict()
    for wrong, message in [
        ([2, 11], r"sample 2 has 11 tokens, expected 1 ... 10"),
        ([0], r"sample 1 has 0 tokens"),
        ([-3], r"sample 1 has -3 tokens"),
        ([2.5], r"expected integer lengths \[N\], got float64"),
        ([[1]], r"got int64 \[1, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            packer.push_many(wrong)
        assert packer.state_dict() == before
    assert packer.push_many([]) == [] and packer.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((0, 4), r"capacity must be 1 .* got 0", id="capacity"),
        pytest.param((2**31, 4), r"capacity must be 1", id="int32"),
        pytest.param((4, 0), r"window must be 1 .* got 0", id="window"),
    ],
)
def test_wrong_packers_are_refused(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingPacker(*arguments)


def test_another_packers_state_is_refused() -> None:
    state = StreamingPacker(10, 3).state_dict()
    with pytest.raises(ValueError, match=r"of capacity 10 and window 3, this packer has 10 and 4"):
        StreamingPacker(10, 4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"no samples wait"):
        StreamingPacker(10, 3).close()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_damaged_state_changes_nothing(name: str) -> None:
    packer = StreamingPacker(10, 3, backend=name)
    packer.push(4)
    before = packer.state_dict()
    for damage in (
        {"lengths": [0]},
        {"lengths": [11]},
        {"lengths": [1, 2]},
        {"waiting": [0, 1, 2], "lengths": [1, 1, 1]},
        {"waiting": [[0]], "lengths": [[4]]},
    ):
        with pytest.raises(ValueError, match=r"StreamingPacker: a state with"):
            packer.load_state_dict(before | damage)
        assert packer.state_dict() == before


class Sticky(list):
    """A source that begins every pass where the state it was last given says, as Hugging Face's datasets do."""

    first = read = 0

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.first, len(self)):
            self.read = number + 1
            yield self[number]

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = self.read = state["read"]


def test_a_resumed_stream_is_whole_in_its_next_pass() -> None:
    lengths = [5, 6, 7, 2, 9, 3]
    for stop in range(4):
        stream, resumed = (PackStream(Sticky(Source(lengths)), 12, 2) for _ in range(2))
        batches = iter(stream)
        seen = [next(batches).input_ids.tolist() for _ in range(stop)]
        resumed.load_state_dict(stream.state_dict())
        rest = [batch.input_ids.tolist() for batch in resumed]
        whole = [batch.input_ids.tolist() for batch in resumed]
        assert seen + rest == whole == [b.input_ids.tolist() for b in PackStream(list(Source(lengths)), 12, 2)]


def test_a_state_loaded_outside_of_the_worker_is_refused() -> None:
    stream = PackStream(list(Source([5, 6, 7])), 12, 2, collate=PackCollator())
    stream.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match=r"loaded in another process than the one that reads; use num_workers=0"):
        list(DataLoader(stream, batch_size=None, num_workers=1))


class Source:
    """Samples that remember where they are, like the iterable sets of Hugging Face's datasets."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.at = lengths, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.at < len(self.lengths):
            number, self.at = self.at, self.at + 1
            yield {"input_ids": np.full(self.lengths[number], number)}
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("stateful", [False, True], ids=["list", "source-with-state"])
def test_a_stream_of_batches_resumes_anywhere(stateful: bool) -> None:
    lengths = chat_lengths(60).clip(1, 700).tolist()

    def stream() -> PackStream:
        return PackStream(Source(lengths) if stateful else list(Source(lengths)), 1024, 8)

    whole = [batch.input_ids.tolist() for batch in stream()]
    assert sorted(number for row in whole for number in row[0]) == sorted(
        number for number, length in enumerate(lengths) for _ in range(length)
    )
    for stop in range(len(whole)):
        first = stream()
        batches = iter(first)
        seen = [next(batches).input_ids.tolist() for _ in range(stop)]
        second = stream()
        second.load_state_dict(first.state_dict())
        assert seen + [batch.input_ids.tolist() for batch in second] == whole
        assert second.counts["read"] == len(lengths)


def test_a_stream_starts_again_with_every_pass() -> None:
    stream = PackStream(list(Source([5, 6, 7])), 12, 2)
    assert [b.num_tokens for b in stream] == [b.num_tokens for b in stream] == [11, 7]
    assert stream.counts == {"read": 3, "dropped": 0, "truncated": 0, "lost_tokens": 0}


def test_overlong_samples_of_a_stream_are_counted() -> None:
    samples = [{"input_ids": [1] * 5, "labels": [2] * 5}, {"input_ids": [1] * 3, "labels": [2] * 3}]
    with pytest.raises(ValueError, match=r"sample 0 has 5 tokens, capacity is 4; .*'truncate' or 'drop'"):
        list(PackStream(samples, 4))
    cut, drop = (PackStream(samples, 4, overlong=overlong) for overlong in ("truncate", "drop"))  # type: ignore[arg-type]
    assert sorted(batch.num_tokens for batch in cut) == [3, 4]
    assert cut.counts == {"read": 2, "dropped": 0, "truncated": 1, "lost_tokens": 1}
    assert [batch.num_tokens for batch in drop] == [3]
    assert drop.counts == {"read": 2, "dropped": 1, "truncated": 0, "lost_tokens": 5}
    with pytest.raises(ValueError, match=r"sample 1 has no tokens; leave empty samples out"):
        list(PackStream([samples[0], {"input_ids": []}], 4, overlong="drop"))
    with pytest.raises(ValueError, match=r"overlong must be one of .*got 'keep'"):
        PackStream(samples, 4, overlong="keep")  # type: ignore[arg-type]


def test_a_stream_feeds_a_data_loader() -> None:
    stream = PackStream(list(Source([5, 6, 7])), 12, 2, collate=PackCollator())
    rows = list(DataLoader(stream, batch_size=None))
    assert [row["cu_seq_lens_q"].tolist() for row in rows] == [[0, 5, 11], [0, 7]]
    assert torch.equal(rows[1]["input_ids"], torch.full((1, 7), 2))


def test_a_stream_survives_another_process() -> None:
    stream = PackStream(list(Source([5, 6, 7])), 12, 2, collate=PackCollator())
    rows = list(DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn"))
    assert [row["cu_seq_lens_q"].tolist() for row in rows] == [[0, 5, 11], [0, 7]]


def test_workers_that_would_read_everything_twice_are_refused() -> None:
    stream = PackStream(list(Source([5, 6, 7])), 12, 2, collate=PackCollator())
    with pytest.raises(ValueError, match=r"2 workers would each read the whole source"):
        list(DataLoader(stream, batch_size=None, num_workers=2))
