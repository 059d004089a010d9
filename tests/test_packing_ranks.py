"""Ranks: equal steps, disjoint samples, balanced work; a sampler with an exact length that resumes anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nova_kernels.packing import PackCollator, PackSampler, Ragged, balance_ranks, plan_packs
from test_packing import NATIVE, chat_lengths, problems

REMAINDERS = ["split", "empty", "drop", "carry"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    problem=problems(),
    num_ranks=st.integers(1, 5),
    rounds=st.integers(1, 3),
    remainder=st.sampled_from(REMAINDERS),
    seed=st.sampled_from([None, 0, 3]),
    window=st.integers(1, 4),
)
def test_ranks_share_every_pack_once(
    problem: tuple[list[int], int], num_ranks: int, rounds: int, remainder: str, seed: int | None, window: int
) -> None:
    lengths, capacity = problem
    plan = plan_packs(lengths, capacity, seed=seed)
    options: dict[str, Any] = {"packs_per_step": num_ranks * rounds, "remainder": remainder, "seed": seed}
    shared = balance_ranks(plan, num_ranks, window=window, **options)
    again = balance_ranks(plan, num_ranks, window=window, **options)
    assert np.array_equal(shared.steps, again.steps) and shared.overhead >= 1.0
    assert shared.steps.shape[1:] == (num_ranks, rounds)
    used = [shared.plan.pack(pack) for pack in shared.steps.ravel().tolist() if pack >= 0]
    samples = [number for pack in used for number in pack.tolist()]
    left = shared.left_out_samples.tolist()
    assert sorted(samples + left) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in pack.tolist()) <= capacity for pack in used)
    empty = int((shared.steps < 0).sum())
    assert empty == 0 or (remainder in ("split", "empty") and empty < num_ranks * rounds)
    if remainder == "split" and empty:
        assert all(pack.size == 1 for pack in used)  # nothing was left to halve
    if remainder in ("drop", "carry"):
        assert shared.left_out.size == plan.num_packs % (num_ranks * rounds)
    else:
        assert not left
    if seed is None:
        other = balance_ranks(plan, 1, window=window, **options)  # a step is the same on another number of ranks
        assert np.array_equal(
            np.sort(other.steps.reshape(-1, num_ranks * rounds)), np.sort(shared.steps.reshape(-1, num_ranks * rounds))
        )


def test_work_is_balanced() -> None:
    plan = plan_packs(chat_lengths(100_000 if NATIVE else 4_000), 8192, seed=0)
    grouped, random = (balance_ranks(plan, 8, window=window, seed=0) for window in (16, 1))
    quadratic = balance_ranks(plan, 8, linear=0, seed=0)
    assert grouped.overhead < 1.02 < random.overhead and grouped.overhead < quadratic.overhead
    work = sum(24576 * int(n) + int(n) ** 2 for n in plan.lengths[plan.pack(0)])
    assert balance_ranks(plan, 1).work[0] == work


def test_rounds_alternate_between_the_ranks() -> None:
    plan = plan_packs([9, 8, 7, 6], 10)
    shared = balance_ranks(plan, 2, packs_per_step=4)
    assert shared.steps.tolist() == [[[0, 3], [1, 2]]]


def test_the_fullest_packs_are_halved_and_the_emptiest_left_out() -> None:
    plan = plan_packs([5, 5, 4, 4, 1], 10)
    split = balance_ranks(plan, 3)
    assert split.plan.num_packs == 3 and sorted(len(split.plan.pack(b)) for b in range(3)) == [1, 1, 3]
    left_out = balance_ranks(plan, 1, packs_per_step=1, remainder="drop").left_out
    assert left_out.size == 0
    assert balance_ranks(plan_packs([9, 10, 3], 10), 2, remainder="drop").left_out_samples.tolist() == [2]


def test_a_pack_is_halved_between_two_of_its_samples() -> None:
    plan = plan_packs([1, 9], 10, strategy="sequential")
    split = balance_ranks(plan, 2).plan
    assert [split.pack(b).tolist() for b in range(split.num_packs)] == [[0], [1]]
    even = balance_ranks(plan_packs([2] * 8, 16), 2).plan
    assert np.diff(even.offsets).tolist() == [4, 4]


def test_what_is_carried_over_comes_with_the_next_epoch() -> None:
    sampler = PackSampler([3] * 5, 3, packs_per_step=2, remainder="carry")
    first, second = list(sampler), list(sampler)
    assert (len(first), len(second)) == (4, 6)
    assert sorted(number for batch in first + second for number in batch) == sorted([*range(5), *range(5)])


def test_no_packs_are_no_steps() -> None:
    for remainder in REMAINDERS:
        shared = balance_ranks(plan_packs([], 4), 3, remainder=remainder)  # type: ignore[arg-type]
        assert shared.num_steps == 0 and shared.overhead == 1.0 and shared.left_out_samples.size == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"num_ranks": 0}, r"multiple of num_ranks, got 0 packs for 0 ranks", id="no-ranks"),
        pytest.param({"packs_per_step": 3}, r"got 3 packs for 2 ranks", id="not-a-multiple"),
        pytest.param({"linear": -1}, r"expected linear, quadratic >= 0", id="linear"),
        pytest.param({"window": 0}, r"window >= 1", id="window"),
        pytest.param({"remainder": "keep"}, r"remainder must be one of .*'keep'", id="remainder"),
        pytest.param({"linear": 2**62}, r"does not fit in 63 bits", id="overflow"),
    ],
)
def test_wrong_balances_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balance_ranks(plan_packs([3, 3, 2], 4), **({"num_ranks": 2} | options))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    problem=problems(),
    num_ranks=st.integers(1, 3),
    per_batch=st.integers(1, 2),
    remainder=st.sampled_from(REMAINDERS),
    data=st.data(),
)
def test_ranks_take_equal_numbers_of_batches_and_resume_anywhere(
    problem: tuple[list[int], int], num_ranks: int, per_batch: int, remainder: str, data: st.DataObject
) -> None:
    lengths, capacity = problem

    def sampler(rank: int, ranks: int = num_ranks) -> PackSampler:
        return PackSampler(
            lengths, capacity, num_ranks=ranks, rank=rank, packs_per_batch=per_batch,
            packs_per_step=6 * per_batch, remainder=remainder, seed=4,  # type: ignore[arg-type]
        )  # fmt: skip

    packs = plan_packs(lengths, capacity).num_packs
    if remainder in ("drop", "carry") and 0 < packs < 6 * per_batch:
        with pytest.raises(ValueError, match=rf"{packs} packs do not fill one step of {6 * per_batch}"):
            sampler(0)
        return
    epochs = []
    for rank in range(num_ranks):
        own = sampler(rank)
        epochs.append([list(own), list(own), list(own)])
    for number in range(3):
        counts = {len(ranks[number]) for ranks in epochs}
        assert len(counts) == 1
        held = sampler(0)
        held.set_epoch(number)
        assert len(held) == counts.pop()
        samples = sorted(s for ranks in epochs for batch in ranks[number] for s in batch)
        if remainder in ("split", "empty"):
            assert samples == list(range(len(lengths)))
        elif remainder == "drop":
            assert len(set(samples)) == len(samples)
    total = [s for number in range(3) for ranks in epochs for batch in ranks[number] for s in batch]
    if remainder == "carry":  # what three epochs lack is carried over to the fourth: less than a step
        missing = 3 * sum(lengths) - sum(lengths[s] for s in total)
        assert max(map(total.count, total), default=0) <= 3 and 0 <= missing < 6 * per_batch * capacity
    stop = data.draw(st.integers(0, len(epochs[0][0])))
    first, second = sampler(0), sampler(0)
    batches = iter(first)
    seen = [next(batches) for _ in range(stop)]
    second.load_state_dict(first.state_dict())
    whole = epochs[0][0] + epochs[0][1]
    assert seen + list(second) == whole[: len(epochs[0][0]) if stop < len(epochs[0][0]) else None]


def test_a_run_resumes_on_another_number_of_ranks_after_a_whole_step() -> None:
    lengths = chat_lengths(200).clip(1, 1000)

    def sampler(rank: int, ranks: int) -> PackSampler:
        return PackSampler(lengths, 1024, num_ranks=ranks, rank=rank, packs_per_step=4)

    def step(batches: list[Iterator[list[int]]], rounds: int) -> list[int]:
        return sorted(number for own in batches for _ in range(rounds) for number in next(own))

    first = sampler(0, 2)
    two, four = [iter(first), iter(sampler(1, 2))], [iter(sampler(rank, 4)) for rank in range(4)]
    assert step(two, 2) == step(four, 1)
    moved = [sampler(rank, 4) for rank in range(4)]
    for other in moved:
        other.load_state_dict(first.state_dict())
    assert step([iter(other) for other in moved], 1) == step(four, 1)
    next(two[0])
    with pytest.raises(ValueError, match=r"after 6 packs, inside a batch of 4 ranks x 1 packs"):
        moved[0].load_state_dict(first.state_dict())


def test_epochs_differ_and_can_be_chosen() -> None:
    sampler = PackSampler(chat_lengths(60).clip(1, 500), 1000, seed=1)
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) == second
    sampler.set_epoch(1)
    assert list(sampler) == second
    saved = PackSampler(chat_lengths(60).clip(1, 500), 1000, seed=1)
    saved.load_state_dict(sampler.state_dict(batches=1))
    saved.set_epoch(1)  # as trainers do: the position that was loaded is kept
    assert list(saved) == second[1:]


def test_batches_fetched_ahead_are_not_counted_as_done() -> None:
    lengths = [3] * 10
    sampler = PackSampler(lengths, 3)
    loader = DataLoader(range(10), batch_sampler=sampler, collate_fn=list, num_workers=2)  # type: ignore[arg-type, var-annotated]
    batches = list(loader)
    sampler.set_epoch(0)
    consumed = [batch for batch, _ in zip(loader, range(8), strict=False)]  # the workers have fetched all ten by now
    resumed = PackSampler(lengths, 3)
    resumed.load_state_dict(sampler.state_dict(batches=len(consumed)))
    assert consumed == batches[:8] and list(resumed) == batches[8:]


def test_a_pass_that_was_left_early_starts_again() -> None:
    sampler, whole = PackSampler([3] * 10, 3), PackSampler([3] * 10, 3)
    next(iter(sampler))
    assert list(sampler) == list(whole) and list(sampler) == list(whole)


def test_a_state_at_the_end_of_an_epoch_goes_on_with_the_next() -> None:
    sampler, resumed = PackSampler([3] * 10, 3), PackSampler([3] * 10, 3)
    list(sampler)
    state = sampler.state_dict()
    assert state == sampler.state_dict(batches=10) and (state["epoch"], state["packs"]) == (1, 0)
    resumed.load_state_dict(state)
    resumed.set_epoch(state["epoch"])
    assert resumed.epoch == 1 and list(resumed) == list(sampler)


def test_a_loop_that_counts_the_batches_itself_reaches_the_next_epoch() -> None:
    sampler, whole = PackSampler([3] * 10, 3), PackSampler([3] * 10, 3)
    for _ in range(3):
        assert [batch for _, batch in zip(range(len(sampler)), sampler, strict=False)] == list(whole)


def test_negative_epochs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"epoch must be at least 0, got -1"):
        PackSampler([3], 3).set_epoch(-1)


def test_one_batch_holds_as_many_packs_as_asked_for() -> None:
    lengths = [3] * 24
    own = [list(PackSampler(lengths, 3, num_ranks=2, rank=rank, packs_per_batch=3)) for rank in range(2)]
    assert [len(batches) for batches in own] == [4, 4] and all(len(b) == 3 for batches in own for b in batches)
    assert sorted(number for batches in own for batch in batches for number in batch) == list(range(24))
    sampler = PackSampler(lengths, 3, num_ranks=2, packs_per_batch=3)
    batches = iter(sampler)
    seen = [next(batches) for _ in range(2)]
    resumed = PackSampler(lengths, 3, num_ranks=2, packs_per_batch=3)
    resumed.load_state_dict(sampler.state_dict())
    assert seen + list(resumed) == own[0]


def test_the_seed_shuffles_the_steps() -> None:
    plan = plan_packs(np.arange(1, 41), 40)
    steps = [balance_ranks(plan, 2, seed=seed).steps[:, :, 0].tolist() for seed in (None, 0, 1)]
    assert steps[0] != steps[1] != steps[2] and sorted(steps[0]) == sorted(steps[1]) == sorted(steps[2])


def test_what_is_lost_can_be_seen() -> None:
    sampler = PackSampler([3, 9, 2], 5, overlong="drop")
    assert sampler.ranks.plan.dropped.tolist() == [1] and sampler.ranks.plan.lost_tokens == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"rank": 2, "num_ranks": 2}, r"rank must be 0 ... 1, got 2", id="rank"),
        pytest.param({"packs_per_batch": 0}, r"packs_per_batch must be at least 1, got 0", id="per-batch"),
        pytest.param(
            {"packs_per_step": 3, "num_ranks": 2}, r"multiple of num_ranks x packs_per_batch = 2 x 1, got 3", id="step"
        ),
        pytest.param({"capacity": 2}, r"sample 0 has 3 tokens, capacity is 2", id="overlong"),
    ],
)
def test_wrong_samplers_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackSampler(**({"lengths": [3, 1], "capacity": 4} | options))


def test_another_samplers_state_is_refused() -> None:
    state = PackSampler([3, 1], 4).state_dict()
    for other in (PackSampler([3, 2], 5), PackSampler([3, 1], 4, seed=1)):
        with pytest.raises(ValueError, match=r"of other lengths or options"):
            other.load_state_dict(state)


def test_a_data_loader_over_numbers_needs_no_samples() -> None:
    lengths = [3, 2, 4, 1]
    ids = Ragged(np.repeat(np.arange(4), lengths), np.cumsum([0, *lengths]))
    sampler = PackSampler(ids.lengths, 5, seed=2)
    loader = DataLoader(range(4), batch_sampler=sampler, collate_fn=PackCollator(fields={"input_ids": ids}))  # type: ignore[arg-type, var-annotated]
    rows = [row["input_ids"][0].tolist() for row in loader]
    assert len(rows) == len(loader) == 2 and sorted(number for row in rows for number in row) == sorted(
        np.repeat(np.arange(4), lengths).tolist()
    )
