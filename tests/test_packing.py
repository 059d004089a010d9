from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_kernels.packing import pack_samples, plan_packs
from nova_kernels.packing.reference import lower_bound

LENGTHS = st.lists(st.integers(1, 12), max_size=9)


def chat_lengths(count: int) -> np.ndarray:
    return np.random.default_rng(1).lognormal(6.0, 1.0, count).clip(1, 8192).astype(np.int64)


def fewest_packs(lengths: list[int], capacity: int) -> int:
    """Exact answer: every item joins an open pack that takes it, or opens one."""
    best = len(lengths)

    def place(index: int, spaces: tuple[int, ...]) -> None:
        nonlocal best
        if len(spaces) >= best:
            return
        if index == len(lengths):
            best = len(spaces)
            return
        for pack in {space: at for at, space in enumerate(spaces) if space >= lengths[index]}.values():
            place(index + 1, (*spaces[:pack], spaces[pack] - lengths[index], *spaces[pack + 1 :]))
        place(index + 1, (*spaces, capacity - lengths[index]))

    place(0, ())
    return best


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lengths=LENGTHS,
    capacity=st.integers(12, 30),
    strategy=st.sampled_from(["auto", "sequential"]),
    seed=st.sampled_from([None, 0, 7]),
)
def test_every_sample_lands_in_exactly_one_pack_that_can_hold_it(
    lengths: list[int], capacity: int, strategy: str, seed: int | None
) -> None:
    plan = plan_packs(lengths, capacity, strategy=strategy, seed=seed)  # type: ignore[arg-type]
    packs = [plan.pack(index) for index in range(plan.num_packs)]
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(0 < plan.lengths[pack].sum() <= capacity for pack in packs)
    assert plan.waste == plan.num_packs * capacity - sum(lengths)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 12), max_size=8), capacity=st.integers(12, 20))
def test_the_lower_bound_is_never_above_the_optimum(lengths: list[int], capacity: int) -> None:
    optimum = fewest_packs(lengths, capacity)
    plan = plan_packs(lengths, capacity)
    assert plan.lower_bound <= optimum <= plan.num_packs


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        pytest.param([6, 6, 6], 10, 3, id="above-half-never-share"),
        pytest.param([7, 7, 4, 4], 10, 3, id="long-ones-leave-no-room"),
        pytest.param([5, 5, 5], 10, 2, id="exactly-half-shares"),
        pytest.param([80, 80, 80, 60, 45, 45], 100, 5, id="no-room-beside-the-long-ones"),
        pytest.param([10], 10, 1, id="full"),
        pytest.param([], 10, 0, id="nothing"),
    ],
)
def test_the_second_bound_sees_what_the_token_count_cannot(lengths: list[int], capacity: int, expected: int) -> None:
    assert lower_bound(np.array(lengths, dtype=np.int64), capacity) == expected == fewest_packs(lengths, capacity)


def test_chat_lengths_are_packed_to_the_bound() -> None:
    plan = plan_packs(chat_lengths(3000), 8192)
    assert plan.gap == 0 and plan.utilization > 0.98


def test_sequential_keeps_the_order() -> None:
    plan = plan_packs([4, 4, 4, 9, 1], 9, strategy="sequential")
    assert plan.order.tolist() == [0, 1, 2, 3, 4]
    assert plan.offsets.tolist() == [0, 2, 3, 4, 5]


def test_a_seed_changes_who_goes_where_but_not_how_many() -> None:
    lengths = chat_lengths(400) // 50 + 1
    plans = [plan_packs(lengths, 200, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(plans[0].order, plans[1].order)
    assert not np.array_equal(plans[0].order, plans[2].order)
    contents = [sorted(sorted(lengths[plan.pack(b)].tolist()) for b in range(plan.num_packs)) for plan in plans]
    assert contents[0] == contents[2]


def test_a_seeded_plan_is_the_same_on_every_platform() -> None:
    plan = plan_packs([3, 3, 3, 3, 2, 2, 1], 6, seed=5)
    assert (plan.order.tolist(), plan.offsets.tolist()) == ([3, 2, 4, 5, 6, 0, 1], [0, 2, 5, 7])


def test_overlong_samples_are_cut_or_dropped_only_when_asked() -> None:
    lengths = [5, 12, 3, 11]
    with pytest.raises(ValueError, match=r"sample 1 has 12 tokens, capacity is 10; .*overlong='truncate' or 'drop'"):
        plan_packs(lengths, 10)
    cut = plan_packs(lengths, 10, overlong="truncate")
    assert cut.lengths.tolist() == [5, 10, 3, 10] and cut.truncated.tolist() == [1, 3] and cut.lost_tokens == 3
    dropped = plan_packs(lengths, 10, overlong="drop")
    assert sorted(dropped.order.tolist()) == [0, 2] and dropped.dropped.tolist() == [1, 3]
    assert dropped.lost_tokens == 23 and dropped.waste == 2


def test_nothing_to_pack_is_an_empty_plan() -> None:
    plan = plan_packs([], 8)
    assert plan.num_packs == 0 and plan.gap == 0 and plan.utilization == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"lengths": [3, 0]}, r"sample 1 has 0 tokens", id="empty-sample"),
        pytest.param({"lengths": [1.5]}, r"expected integer lengths \[N\], got float64", id="float-lengths"),
        pytest.param({"capacity": 0}, r"capacity must be at least 1 token, got 0", id="capacity"),
        pytest.param({"strategy": "magic"}, r"strategy must be .*, got 'magic'", id="strategy"),
        pytest.param({"overlong": "keep"}, r"overlong must be .*, got 'keep'", id="overlong"),
    ],
)
def test_wrong_plans_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_packs(**({"lengths": [3, 2], "capacity": 4} | arguments))


def test_samples_lie_side_by_side_with_their_boundaries() -> None:
    batch = pack_samples([{"input_ids": [5, 6, 7]}, {"input_ids": np.array([8], np.int32)}, {"input_ids": [9, 4]}])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, -100, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.num_tokens, batch.num_samples) == (3, 6, 3)
    assert {row.dtype for row in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}


def test_labels_and_further_fields_travel_along() -> None:
    samples = [
        {"advantage": np.array([1.5, 2.5]), "input_ids": [1, 2], "labels": [9, 2], "turn": torch.tensor([0, 1])},
        {"input_ids": [3], "labels": [3], "advantage": np.array([3.5]), "turn": [7]},
    ]
    batch = pack_samples(samples, pad_to=5)
    assert batch.labels.tolist() == [[-100, 2, -100, -100, -100]]
    assert batch.extra["advantage"].tolist() == [[1.5, 2.5, 3.5, 0.0, 0.0]]
    assert batch.extra["advantage"].dtype == torch.float64
    assert batch.extra["turn"].tolist() == [[0, 1, 7, 0, 0]]


def test_padding_is_one_segment() -> None:
    batch = pack_samples([{"input_ids": [1, 2]}, {"input_ids": [3]}], pad_to=9)
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 9]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0, 1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[-100, 2] + [-100] * 7]
    assert (batch.num_samples, batch.max_seqlen, batch.padding) == (2, 6, 6)


def test_the_caller_keeps_its_arrays() -> None:
    ids = np.array([4, 5], dtype=np.int64)
    labels = ids.copy()
    batch = pack_samples([{"input_ids": ids, "labels": labels}])
    batch.input_ids.fill_(0)
    assert ids.tolist() == labels.tolist() == [4, 5]


def test_the_batch_moves_and_speaks_to_a_model() -> None:
    batch = pack_samples([{"input_ids": [1, 2]}]).to("meta")
    assert batch.input_ids.device.type == batch.labels.device.type == batch.position_ids.device.type == "meta"
    assert batch.cu_seqlens.device.type == "cpu"
    kwargs = batch.attention_kwargs()
    assert kwargs["cu_seq_lens_q"] is kwargs["cu_seq_lens_k"] is batch.cu_seqlens
    assert kwargs["max_length_q"] == 2 and kwargs["use_cache"] is False


def test_no_samples_are_an_empty_row() -> None:
    batch = pack_samples([])
    assert batch.input_ids.shape == batch.labels.shape == (1, 0)
    assert batch.cu_seqlens.tolist() == [0] and batch.max_seqlen == 0 and batch.num_samples == 0


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        pytest.param([{"ids": [1]}], {}, r"sample 0 has no input_ids, only \['ids'\]", id="no-ids"),
        pytest.param([{"input_ids": []}], {}, r"sample 0 has no tokens", id="no-tokens"),
        pytest.param([{"input_ids": [1, 2], "labels": [1]}], {}, r"expected labels \[2\].*got \[1\]", id="ragged"),
        pytest.param([{"input_ids": [[1, 2]]}], {}, r"expected input_ids of shape \[l\], got \[1, 2\]", id="2-D"),
        pytest.param([{"input_ids": [0.5]}], {}, r"expected integer input_ids, got float64", id="float-ids"),
        pytest.param(
            [{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}],
            {},
            r"sample 1 has the fields \['input_ids', 'labels'\], sample 0 has \['input_ids'\]",
            id="fields-differ",
        ),
        pytest.param(
            [{"input_ids": [1], "attention_mask": [1]}], {}, r"attention_mask is computed from the lengths", id="mask"
        ),
        pytest.param([{"input_ids": [1, 2, 3]}], {"pad_to": 2}, r"3 tokens do not fit in pad_to=2", id="pad-to"),
    ],
)
def test_wrong_samples_are_refused(samples: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_samples(samples, **options)
