"""Plans: every backend gives the same one, nothing is lost, the bound holds."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_kernels import backend
from nova_kernels.packing import plan_packs
from nova_kernels.packing.reference import lower_bound

NATIVE = backend.why_not_native() is None
BACKENDS = ["reference", *(["native"] if NATIVE else [])]
STRATEGIES = ["auto", "best_fit", "search", "sequential"]


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


@st.composite
def problems(draw: st.DrawFn, max_size: int = 40) -> tuple[list[int], int]:
    """Lengths and a capacity; spread, clustered, or with samples that fill a pack alone."""
    capacity = draw(st.one_of(st.integers(1, 40), st.integers(41, 5000)))
    low = draw(st.integers(1, capacity))
    some = st.one_of(st.integers(low, capacity), st.just(capacity), st.integers(1, capacity))
    return draw(st.lists(some, max_size=max_size)), capacity


def test_a_compiler_means_the_extension_is_there() -> None:
    """Without this the C++ could stop compiling, and every other test would pass without it or with an older one."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = Path(__file__).parent.parent / "csrc"
    files = [
        folder / "bindings.cpp",
        *sorted((folder / "packing").glob("*.cpp")),
        *sorted((folder / "packing").glob("*.h")),
    ]
    source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert backend.native_extension().source == source, "built from other sources: install again"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    problem=problems(), strategy=st.sampled_from(STRATEGIES), seed=st.one_of(st.none(), st.integers(-(2**70), 2**70))
)
def test_every_sample_lands_in_exactly_one_pack_that_can_hold_it(
    problem: tuple[list[int], int], strategy: str, seed: int | None
) -> None:
    lengths, capacity = problem
    plans = [plan_packs(lengths, capacity, strategy=strategy, seed=seed, backend=b) for b in BACKENDS]  # type: ignore[arg-type]
    plan = plans[0]
    packs = [plan.pack(index) for index in range(plan.num_packs)]
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(0 < plan.lengths[pack].sum() <= capacity for pack in packs)
    assert plan.waste == plan.num_packs * capacity - sum(lengths) and plan.gap >= 0
    for other in plans[1:]:
        assert np.array_equal(plan.order, other.order) and np.array_equal(plan.offsets, other.offsets)
        assert plan.lower_bound == other.lower_bound


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems(max_size=8))
def test_the_lower_bound_is_never_above_the_optimum(problem: tuple[list[int], int]) -> None:
    optimum = fewest_packs(*problem)
    plan = plan_packs(*problem)
    assert plan.lower_bound <= optimum <= plan.num_packs


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        pytest.param([6, 6, 6], 10, 3, id="above-half-never-share"),
        pytest.param([7, 7, 4, 4], 10, 3, id="long-ones-leave-no-room"),
        pytest.param([5, 5, 5], 10, 2, id="exactly-half-shares"),
        pytest.param([80, 80, 80, 60, 45, 45], 100, 5, id="no-room-beside-the-long-ones"),
        pytest.param([34] * 7, 100, 4, id="above-a-third-only-two-share"),
        pytest.param([26] * 7, 100, 3, id="above-a-quarter-only-three-share"),
        pytest.param([25] * 8, 100, 2, id="exactly-a-quarter"),
        pytest.param([10], 10, 1, id="full"),
        pytest.param([], 10, 0, id="nothing"),
    ],
)
def test_the_bound_sees_what_the_token_count_cannot(
    lengths: list[int], capacity: int, expected: int, name: str
) -> None:
    assert plan_packs(lengths, capacity, backend=name).lower_bound == expected == lower_bound(lengths, capacity)


def test_chat_lengths_are_packed_to_the_bound() -> None:
    plan = plan_packs(chat_lengths(20_000 if NATIVE else 2_000), 8192)
    assert plan.gap <= 1 and plan.utilization > 0.98


def test_clustered_lengths_need_the_search() -> None:
    lengths = np.random.default_rng(1).normal(4096, 512, 3000).clip(100, 8192).astype(np.int64)
    best_fit, search, auto = (plan_packs(lengths, 16384, strategy=s) for s in ("best_fit", "search", "auto"))
    assert best_fit.utilization < 0.96 and search.utilization > 0.995
    assert auto.num_packs == min(best_fit.num_packs, search.num_packs)


def test_a_few_packs_in_a_thousand_are_worth_a_search() -> None:
    lengths = np.random.default_rng(1).normal(2730, 1024, 3000).clip(100, 16384).astype(np.int64)
    best_fit, search, auto = (plan_packs(lengths, 16384, strategy=s) for s in ("best_fit", "search", "auto"))
    assert 0.99 < best_fit.lower_bound / best_fit.num_packs < 0.999
    assert auto.num_packs == search.num_packs < best_fit.num_packs


@pytest.mark.skipif(not NATIVE, reason="no C++ extension")
def test_a_search_that_runs_out_of_tries_is_the_same_in_both() -> None:
    """Even lengths never fill an odd pack: every way of filling it counts as one more try."""
    lengths = 2 * np.random.default_rng(1).normal(2048, 256, 120).astype(np.int64)
    native, reference = (plan_packs(lengths, 16383, strategy="search", backend=b) for b in ("native", "reference"))
    assert np.array_equal(native.order, reference.order)


@pytest.mark.parametrize("name", BACKENDS)
def test_sequential_keeps_the_order(name: str) -> None:
    plan = plan_packs([4, 4, 4, 9, 1], 9, strategy="sequential", backend=name)
    assert plan.order.tolist() == [0, 1, 2, 3, 4]
    assert plan.offsets.tolist() == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("strategy", ["best_fit", "search"])
def test_a_seed_changes_who_goes_where_but_not_how_many(strategy: str) -> None:
    lengths = chat_lengths(400) // 50 + 1
    plans = [plan_packs(lengths, 200, strategy=strategy, seed=seed) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    assert np.array_equal(plans[0].order, plans[1].order)
    assert not np.array_equal(plans[0].order, plans[2].order)
    contents = [sorted(sorted(lengths[plan.pack(b)].tolist()) for b in range(plan.num_packs)) for plan in plans]
    assert contents[0] == contents[2]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems(), seed=st.integers(0, 5))
def test_the_order_of_the_samples_does_not_matter(problem: tuple[list[int], int], seed: int) -> None:
    lengths, capacity = np.array(problem[0], dtype=np.int64), problem[1]
    mixed = np.random.default_rng(seed).permutation(lengths.size)
    plans = [plan_packs(values, capacity) for values in (lengths, lengths[mixed])]
    packs = [sorted(sorted(plan.lengths[plan.pack(b)].tolist()) for b in range(plan.num_packs)) for plan in plans]
    assert packs[0] == packs[1]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_seeded_plan_is_the_same_on_every_platform(name: str) -> None:
    plan = plan_packs([3, 3, 3, 3, 2, 2, 1], 6, seed=5, backend=name)
    assert (plan.order.tolist(), plan.offsets.tolist()) == ([2, 3, 0, 1, 4, 5, 6], [0, 2, 4, 7])


def test_overlong_samples_are_cut_or_dropped_only_when_asked() -> None:
    lengths = [5, 12, 3, 11]
    with pytest.raises(ValueError, match=r"sample 1 has 12 tokens, capacity is 10; .*overlong='truncate' or 'drop'"):
        plan_packs(lengths, 10)
    cut = plan_packs(lengths, 10, overlong="truncate")
    assert cut.lengths.tolist() == [5, 10, 3, 10] and cut.truncated.tolist() == [1, 3] and cut.lost_tokens == 3
    dropped = plan_packs(lengths, 10, overlong="drop")
    assert sorted(dropped.order.tolist()) == [0, 2] and dropped.dropped.tolist() == [1, 3]
    assert dropped.lost_tokens == 23 and dropped.waste == 2 and dropped.lengths.tolist() == [5, 0, 3, 0]
    nothing = plan_packs([12, 11], 10, overlong="drop")
    assert nothing.num_packs == 0 and nothing.lost_tokens == 23


def test_nothing_to_pack_is_an_empty_plan() -> None:
    for strategy in STRATEGIES:
        plan = plan_packs([], 8, strategy=strategy)  # type: ignore[arg-type]
        assert plan.num_packs == 0 and plan.gap == 0 and plan.utilization == 1.0


def test_one_sample_and_samples_as_long_as_the_pack() -> None:
    assert plan_packs([8], 8).order.tolist() == [0]
    plan = plan_packs([8, 8, 8], 8)
    assert plan.num_packs == 3 and plan.utilization == 1.0 and plan.gap == 0


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([3, 2, 4], id="list"),
        pytest.param(np.array([3, 2, 4], np.uint16), id="uint16"),
        pytest.param(np.array([3, 0, 2, 0, 4, 0], np.int64)[::2], id="strided"),
        pytest.param(torch.tensor([3, 2, 4]), id="tensor"),
        pytest.param(pa.array([3, 2, 4]), id="arrow"),
        pytest.param(pa.chunked_array([[3], [2, 4]]), id="arrow-chunks"),
    ],
)
def test_lengths_come_in_many_forms(lengths: object) -> None:
    plan = plan_packs(lengths, 5, seed=3)  # type: ignore[arg-type]
    assert np.array_equal(plan.order, plan_packs([3, 2, 4], 5, seed=3).order)


def test_the_plan_keeps_what_the_caller_changes_later() -> None:
    lengths = np.array([3, 2], np.int32)
    plan = plan_packs(lengths, 5)
    lengths[:] = 1
    assert plan.lengths.tolist() == [3, 2] and plan.waste == 0


def test_a_long_context_falls_to_the_plain_planner() -> None:
    plan = plan_packs([2**30, 2**30, 5], 2**31 - 1)
    assert plan.num_packs == 2 and plan.lower_bound == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"lengths": [3, 0]}, r"sample 1 has 0 tokens", id="empty-sample"),
        pytest.param({"lengths": [3, -2]}, r"sample 1 has -2 tokens", id="negative"),
        pytest.param({"lengths": [1.5]}, r"expected integer lengths \[N\], got float64", id="float-lengths"),
        pytest.param({"lengths": pa.array([1, None])}, r"got float64 \[2\]; are there missing values", id="missing"),
        pytest.param({"lengths": [[1], [2]]}, r"expected integer lengths \[N\], got int64 \[2, 1\]", id="2-D"),
        pytest.param({"capacity": 0}, r"capacity must be 1 ... 2147483647 tokens .*, got 0", id="capacity"),
        pytest.param({"capacity": 2**31}, r"capacity must be 1 ... 2147483647 tokens", id="int32"),
        pytest.param({"strategy": "magic"}, r"strategy must be .*, got 'magic'", id="strategy"),
        pytest.param({"overlong": "keep"}, r"overlong must be .*, got 'keep'", id="overlong"),
        pytest.param({"lengths": [3, 2**31], "overlong": "drop"}, r"sample 1 has 2147483648 tokens, more", id="huge"),
        pytest.param({"backend": "rust"}, r"unknown backend 'rust'; expected one of", id="backend"),
    ],
)
def test_wrong_plans_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_packs(**({"lengths": [3, 2], "capacity": 4} | arguments))


def test_integers_of_any_kind_are_taken_and_nothing_else() -> None:
    plan = plan_packs([3, 3, 2, 1], np.int32(4), seed=np.int64(-7))  # type: ignore[arg-type]
    assert np.array_equal(plan.order, plan_packs([3, 3, 2, 1], 4, seed=-7).order)
    for wrong in ({"capacity": 5.5}, {"capacity": 5, "seed": 0.5}):
        with pytest.raises(TypeError):
            plan_packs([3, 2], **wrong)  # type: ignore[arg-type]


def test_packs_are_counted_from_zero() -> None:
    with pytest.raises(IndexError, match=r"2 is not one of the 2 packs"):
        plan_packs([3, 3], 4).pack(2)


def test_a_missing_extension_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_native", lambda: "the C++ extension is not here")
    assert plan_packs([3, 1], 4).num_packs == 1
    with pytest.raises(backend.BackendUnavailableError, match=r"'native' cannot run: the C\+\+ extension is not here"):
        plan_packs([3, 1], 4, backend="native")
    with pytest.raises(backend.BackendUnavailableError, match=r"is not here"):
        backend.native_extension()


@pytest.mark.skipif(not NATIVE, reason="no C++ extension")
def test_the_extension_guards_its_memory() -> None:
    native = backend.native_extension()
    lengths = np.array([3, 9], np.int32)
    for arguments, message in [
        ((lengths, 4, "auto", None), "lengths must be"),
        ((lengths, 0, "auto", None), "capacity must be"),
        ((lengths, 2**25, "auto", None), "capacity must be"),
        ((lengths, 9, "magic", None), "unknown strategy"),
        ((lengths[None], 9, "auto", None), r"lengths must be \[N\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.plan(*arguments)
    with pytest.raises(TypeError):
        native.plan(lengths.astype(np.int64), 9, "auto", None)
