"""The planner against brute force over all plans, and the shape of what it finds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from nova_kernels.checkpoint import (
    ACTIONS,
    FSDP,
    Action,
    Chain,
    Host,
    InfeasibleBudgetError,
    LayerCost,
    SegmentPlan,
    plan_segments,
    simulate,
    uniform_segments,
)
from nova_kernels.checkpoint.cost import SegmentCost, segment_cost

NOTHING = LayerCost(
    boundary=0, saved=0, saves_input=False, forward=0, recompute=0, recompute_cut=0, backward=0, gradients=0, sent=0
)
SLOW_LINK = {"flops_per_second": 1e6, "bytes_per_second": 1e6, "latency_seconds": 1e-6}


def random_layer(rng: random.Random) -> LayerCost:
    flops = rng.randint(1, 100)
    return LayerCost(
        boundary=rng.randint(1, 20),
        saved=(saved := rng.randint(0, 100)),
        copies=rng.choice([0, saved // 2]),
        saves_input=rng.random() < 0.5,
        forward=rng.randint(0, 40),
        recompute=rng.randint(60, 120),
        recompute_cut=rng.randint(0, 60),
        backward=rng.randint(0, 60),
        weights=(weights := rng.randint(0, 30)),
        gradients=(gradients := rng.choice([None, 0, weights])),
        sent=None if gradients is None else rng.choice([1, 2]) * gradients,  # twice in another dtype
        backward_sharded=rng.choice([None, 60 + rng.randint(0, weights)]),
        flops=flops,
        tail_flops=rng.randint(0, flops),
    )


def uneven_layer(rng: random.Random) -> LayerCost:
    """Frozen or trained; some with far larger weights than others, or far dearer to compute again."""
    recompute, trained = rng.choice([0, 0, 300]), rng.random() < 0.6
    layer = replace(random_layer(rng), saved=0, copies=0, backward=0, backward_sharded=0, forward=recompute // 2)
    layer = replace(layer, recompute=recompute, recompute_cut=rng.choice([0, recompute]))
    weights, sent = (rng.choice([0, rng.randint(0, most)]) for most in (100, 200))
    return replace(layer, weights=weights, gradients=None if trained else 0, sent=sent * trained)


def random_chain(rng: random.Random, num_layers: int, layer: Callable[..., LayerCost] = random_layer) -> Chain:
    layers = [layer(rng) for _ in range(num_layers)]
    for index in range(min(num_layers, rng.choice([0, 0, 1, 3]))):  # frozen ones at the bottom
        layers[index] = replace(layers[index], saves=False, saved=0, saves_input=False, copies=0, backward=0)
    return Chain(
        layers=tuple(layers),
        loss=rng.randint(0, 100),
        under_autocast=rng.randint(0, 150),
        after_loss=rng.randint(-10, 10),
        embedding=rng.randint(0, 60),
        fixed=rng.randint(0, 9),
        held=0 if layers[0].saves else layers[0].boundary,
    )


def block_chain(num_layers: int, n: float, *, backward: float = 8.0) -> Chain:
    """Equal layers that keep n units in all, as transformer blocks do; a unit is 1,000 bytes."""
    layer = LayerCost(
        boundary=1000,
        saved=round(1000 * (n - 1)),
        saves_input=True,
        forward=4000,
        recompute=round(1000 * (n - 2)),
        recompute_cut=round(1000 * (n - 2)),
        backward=round(1000 * backward),
        flops=100,
        tail_flops=27,
    )
    return Chain(layers=(layer,) * num_layers, num_tokens=64)


def outcomes(chain: Chain, allow: tuple[Action, ...], fsdp: FSDP | None, host: Host | None) -> list[tuple[int, int]]:
    """(peak, time) of every plan there is: every way to cut the layers, every action for every segment."""
    num_layers, limit = len(chain.layers), None if host is None else host.host_bytes
    cost = cache(lambda start, stop, action: segment_cost(chain, start, stop, action, fsdp=fsdp, host=host))
    found = []

    def extend(start: int, kept: int, copies: int, flight: int, peak: int, time: int, hosted: int) -> None:
        if start == num_layers:
            if limit is None or hosted <= limit:
                loss = kept + chain.held + max(chain.loss, chain.under_autocast - copies)
                found.append((chain.fixed + max(peak, loss, chain.embedding), time))
            return
        for stop in range(start + 1, num_layers + 1):
            for action in allow:
                one = cost(start, stop, action)
                backward = kept + flight + one.backward + chain.after_loss
                extend(
                    stop,
                    kept + one.kept,
                    copies + one.copies,
                    flight if action == "keep" else one.in_flight,
                    max(peak, kept - copies + one.forward, backward),
                    time + one.time_flops,
                    hosted + one.host_bytes,
                )

    extend(0, 0, 0, 0, 0, 0, 0)
    return found


def assert_optimal(
    chain: Chain, allow: tuple[Action, ...] = ACTIONS, fsdp: FSDP | None = None, host: Host | None = None
) -> None:
    plans = outcomes(chain, allow, fsdp, host)
    floor = min(peak for peak, _ in plans)
    leanest = plan_segments(chain, allow=allow, fsdp=fsdp, host=host)
    assert leanest.predicted_peak_bytes == floor
    assert leanest.cost.time_flops == min(time for peak, time in plans if peak == floor)
    assert (leanest.predicted_peak_bytes, leanest.cost.time_flops) in plans
    before = leanest.cost.time_flops
    for budget in (floor, floor + 5, floor + 20, 2 * floor, 4 * floor):
        plan = plan_segments(chain, budget_bytes=budget, allow=allow, fsdp=fsdp, host=host)
        assert plan.predicted_peak_bytes <= budget
        assert plan.cost.time_flops == min(time for peak, time in plans if peak <= budget)
        assert plan.cost.time_flops <= before, "more memory never costs time"
        before = plan.cost.time_flops
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_segments(chain, budget_bytes=floor - 1, allow=allow, fsdp=fsdp, host=host)
    assert caught.value.nearest.predicted_peak_bytes == floor


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_brute_force_over_every_plan(seed: int) -> None:
    rng = random.Random(seed)
    allow: tuple[Action, ...] = rng.choice(
        [ACTIONS, ("keep", "segment"), ("segment", "nested"), ("segment", "offload")]
    )
    host = rng.choice([None, Host(**SLOW_LINK, host_bytes=rng.randint(0, 60))])
    fsdp = rng.choice([None, FSDP(), FSDP(prefetch=0), FSDP(reshard=True)])
    assert_optimal(random_chain(rng, rng.randint(1, 5)), allow, fsdp, host)


@pytest.mark.parametrize("seed", range(160))
def test_equal_to_brute_force_with_sharded_layers_of_unequal_size(seed: int) -> None:
    rng = random.Random(seed)
    allow: tuple[Action, ...] = rng.choice([("segment",), ("nested",), ("segment", "nested")])
    chain = random_chain(rng, rng.randint(3, 6), uneven_layer)
    assert_optimal(chain, allow, FSDP(prefetch=rng.randint(1, 3), reshard=rng.random() < 0.5))


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_a_longer_segment_may_need_far_less(prefetch: int) -> None:
    """The first layer needs an input of 30 and 1,000 when it is computed again; the rest depends on the segment's end.

    Behind its p + 1 neighbours a gradient of 30 waits, sums of 100 leave, and those neighbours of 50 each are whole.
    One layer before the end there is nothing of that. The last layer adds its own weights of 1.
    """
    light = replace(NOTHING, boundary=30)
    heavy, sums = replace(light, weights=50), replace(light, sent=100)
    first, last = replace(light, recompute=1000, recompute_cut=1000), replace(NOTHING, weights=1)
    chain = Chain(layers=(first, *[heavy] * (prefetch + 1), sums, *[light] * prefetch, last))
    stops = prefetch + 2, len(chain.layers) - 1, len(chain.layers)
    needed = [segment_cost(chain, 0, stop, "segment", fsdp=FSDP(prefetch=prefetch)).backward for stop in stops]
    assert needed == [1030 + 30 + 100 + 50 * (prefetch + 1), 1030, 1030 + 1]
    assert plan_segments(chain, allow=["segment"], fsdp=FSDP(prefetch=prefetch)).bounds == (0, *stops[1:])


def test_a_trained_layer_behind_large_frozen_ones() -> None:
    layer = replace(NOTHING, boundary=5, saved=10, forward=20, backward_sharded=20)
    costs = (60, 100, 0), (5, 300, 0), (20, 20, 20)  # weights, recompute, gradients
    layers = (replace(layer, weights=w, recompute=r, recompute_cut=r, gradients=g, sent=2 * g) for w, r, g in costs)
    chain = Chain(layers=tuple(layers))
    for allow in (("segment",), ("segment", "nested")):
        assert_optimal(chain, allow, FSDP(reshard=True))
        assert plan_segments(chain, allow=allow, fsdp=FSDP(reshard=True)).predicted_peak_bytes == 345


def test_a_plan_is_found_however_large_the_gradients() -> None:
    """The host holds one input. As the last layer ends: two inputs, two layers, its gradients and their buffer."""
    chain = Chain(layers=(replace(NOTHING, boundary=8, weights=10, gradients=200, sent=200),) * 3)
    plan = plan_segments(chain, allow=("offload",), fsdp=FSDP(), host=Host(host_bytes=8))
    assert (plan.bounds, plan.predicted_peak_bytes) == ((0, 3), 2 * 8 + 2 * 10 + 200 + 200)


@pytest.mark.parametrize("allow", [("segment",), ("keep", "segment")], ids="+".join)
def test_equal_to_brute_force_on_ten_layers(allow: tuple[Action, ...]) -> None:
    chain = random_chain(random.Random(3), 10)
    layers = chain.layers[:4] * 2 + chain.layers[:2] if "keep" in allow else chain.layers
    assert_optimal(Chain(layers=layers, loss=40), allow)


@pytest.mark.slow
def test_equal_to_brute_force_on_ten_layers_with_every_action() -> None:
    assert_optimal(random_chain(random.Random(5), 10), fsdp=FSDP())


@pytest.mark.parametrize(
    ("n", "best", "uniform"),
    [
        pytest.param(24.52, 75.3, 88.0, id="modules-of-transformers"),
        pytest.param(13.27, 52.8, 65.5, id="fused-modules"),
    ],
)
def test_long_segments_first_beat_equal_ones_at_no_more_work(n: float, best: float, uniform: float) -> None:
    """The continuous optimum is sqrt(2 n L + n^2) units, against 2 sqrt(n L) for equal segments."""
    chain = block_chain(80, n, backward=0.0)
    plan = plan_segments(chain, allow=("segment",))
    equal = [SegmentPlan.of(chain, [k] * (80 // k) + [80 % k] * (80 % k > 0)) for k in range(1, 12)]
    assert plan.sizes == sorted(plan.sizes, reverse=True)
    assert plan.predicted_peak_bytes / 1000 == pytest.approx(best, abs=0.4)
    assert min(each.predicted_peak_bytes for each in equal) / 1000 == pytest.approx(uniform, abs=1.1)
    assert plan.predicted_peak_bytes / 1000 == pytest.approx((2 * n * 80 + n * n) ** 0.5, rel=0.15)
    assert plan.predicted_recompute <= 1.0


def test_reversed_segments_are_worse() -> None:
    chain = block_chain(48, 3.0, backward=3.0)
    plan = plan_segments(chain, allow=("segment",))
    reversed_plan = SegmentPlan.of(chain, plan.sizes[::-1])
    assert reversed_plan.predicted_peak_bytes > 1.2 * plan.predicted_peak_bytes
    assert reversed_plan.cost.recompute_flops == plan.cost.recompute_flops


def test_layers_are_kept_last_and_more_of_them_with_more_memory() -> None:
    chain = block_chain(40, 13.0)
    kept = []
    for budget in (60_000, 150_000, 300_000, 540_000):
        plan = plan_segments(chain, budget_bytes=budget)
        assert plan.predicted_peak_bytes <= budget
        kept.append(sum(size for size, action in zip(plan.sizes, plan.actions, strict=True) if action == "keep"))
    assert kept == sorted(kept) and kept[-1] == 40 and 0 < kept[1] < kept[2]
    assert plan_segments(chain, budget_bytes=540_000).predicted_recompute == 0.0


def test_one_segment_of_all_layers_saves_nothing() -> None:
    chain = block_chain(16, 24.0)
    everything = SegmentPlan.of(chain, [16], "keep")
    one = SegmentPlan.of(chain, [16])
    assert one.predicted_peak_bytes >= everything.predicted_peak_bytes
    assert plan_segments(chain).predicted_peak_bytes < 0.2 * one.predicted_peak_bytes


def test_nested_and_offloaded_boundaries_go_below_any_segments() -> None:
    chain = block_chain(80, 24.52)
    segments, nested, offload = (
        plan_segments(chain, allow=("segment", extra)) for extra in ("keep", "nested", "offload")
    )
    assert offload.predicted_peak_bytes < nested.predicted_peak_bytes < segments.predicted_peak_bytes
    assert nested.predicted_recompute > 1.4 > 0.8 > offload.predicted_recompute
    assert offload.cost.host_bytes >= 78 * 1024 and nested.cost.host_bytes == 0


def test_nothing_is_offloaded_without_need_and_nothing_beyond_the_host() -> None:
    chain = block_chain(80, 24.52)
    plenty = plan_segments(chain, budget_bytes=120_000)
    assert plenty.predicted_peak_bytes <= 120_000 and "offload" not in plenty.actions
    tight = plan_segments(chain, budget_bytes=60_000, allow=("segment", "offload"), host=Host(host_bytes=60 * 1024))
    assert tight.predicted_peak_bytes <= 60_000 and 0 < tight.cost.host_bytes <= 60 * 1024
    with pytest.raises(ValueError, match=r"no plan with offload stays within host_bytes=10;"):
        plan_segments(chain, allow=("offload",), host=Host(host_bytes=10))


def test_unsharded_layers_count() -> None:
    """A segment's k layers, two at least (one is gathered ahead), and two buffers; two or three layers if resharded.

    Behind the last layer nothing is being reduced, so that the peak lies one boundary lower, in the segment before.
    """
    layer = block_chain(1, 5.0).layers[0]
    chain = Chain(layers=(replace(layer, weights=10_000),) * 12)
    for k in (1, 2, 3, 4, 6):
        plain = SegmentPlan.of(chain, [k] * (12 // k))
        hold = SegmentPlan.of(chain, [k] * (12 // k), fsdp=FSDP())
        again = SegmentPlan.of(chain, [k] * (12 // k), fsdp=FSDP(reshard=True))
        more = hold.predicted_peak_bytes - plain.predicted_peak_bytes
        assert more == (max(k, 2) + 2) * 10_000 - chain.layers[0].boundary
        assert again.predicted_peak_bytes - plain.predicted_peak_bytes <= (min(max(k, 2), 3) + 2) * 10_000
        assert (hold.all_gathers, hold.unsharded_layers) == ((12, 12), max(k, 2))
        assert (again.all_gathers, again.unsharded_layers) == ((12, 12 + 12 - 12 // k), min(max(k, 2), 3))
        assert again.reshard and not hold.reshard


def test_gradients_on_their_way_count() -> None:
    """Three layers, each a segment: weights of 10, gradients of 8 that leave in a buffer of 16, nothing else.

    When the backward of a layer begins: itself, the buffer it came in, and the gradients of the one above on their way.
    While it runs: the next one in place of the buffer, and half of its gradients. At its end: the next one, its
    gradients and their buffer. Frozen weights are gathered and leave nothing.
    """
    trained = replace(NOTHING, saves_input=True, weights=10, gradients=8, sent=16, backward_sharded=4)

    def needed(*layers: LayerCost) -> list[int]:
        plan = SegmentPlan.of(Chain(layers=layers), [1] * len(layers), fsdp=FSDP())
        return [segment.backward for segment in plan.cost.segments]

    assert needed(trained, trained, trained) == [10 + 10 + 16, 10 + 10 + 4 + 16, 10 + 8 + 16]
    frozen = replace(trained, gradients=0, sent=0, backward_sharded=0)
    assert needed(trained, frozen, trained) == [8 + 16, 10 + 10 + 16, 10 + 8 + 16]


def test_the_worst_moment_of_a_sharded_segment() -> None:
    """Inputs of 3 and weights of 40; what else a layer needs makes one moment the worst."""
    layer = replace(NOTHING, boundary=3, weights=40)

    def cost(action: Action, *layers: LayerCost) -> SegmentCost:
        return segment_cost(Chain(layers=layers), 0, len(layers), action, fsdp=FSDP())

    # In forward: the input, what the layer needs, its weights, and the buffer in which they came.
    assert [cost(a, replace(layer, forward=5, recompute=7)).forward for a in ACTIONS] == [90, 88, 88, 88]
    # When backward begins: what is kept, the gradient, weights, and the buffer in which they came.
    assert [cost(a, layer).backward for a in ACTIONS] == [83, 86, 86, 86]
    # The first of two layers is computed again: its input, the gradient, both layers, and the buffer it came in.
    slow = replace(layer, forward=100, recompute=100)
    assert [cost(a, slow, layer).backward for a in ACTIONS[1:]] == [3 + 100 + 3 + 80 + 40] * 3
    # At the end: the input, its gradient, the layer's gradients, and the buffer in which they are summed.
    assert [cost(a, replace(layer, gradients=80, sent=160)).backward for a in ACTIONS] == [243, 246, 246, 246]


def test_work_beyond_64_bits_is_planned_the_same() -> None:
    plans = []
    for factor in (1, 10**19):
        layer = replace(block_chain(1, 5.0).layers[0], flops=100 * factor, tail_flops=27 * factor)
        plans.append(plan_segments(Chain(layers=(layer,) * 20), budget_bytes=40_000, allow=("keep", "segment")))
    assert plans[0].bounds == plans[1].bounds and plans[0].actions == plans[1].actions


def test_frozen_layers_at_the_bottom_cost_no_boundary() -> None:
    layer = block_chain(1, 5.0).layers[0]
    frozen = replace(layer, saves=False, saved=0, saves_input=False, backward=0)
    chain = Chain(layers=(frozen,) * 3 + (layer,) * 2)
    apart, together = (SegmentPlan.of(chain, sizes) for sizes in ([1, 1, 1, 1, 1], [1, 3, 1]))
    assert [segment.kept for segment in apart.cost.segments] == [0, 0, 0, 1000, 1000]
    assert [segment.kept for segment in together.cost.segments] == [0, 1000, 1000]
    assert apart.predicted_recompute == 2 * 0.73 / 5, "only layers in the graph are computed again"
    assert together.predicted_recompute == (2 + 2 * 0.73) / 5, "frozen ones, too, in a segment with others"
    nested = SegmentPlan.of(chain, [5], "nested")
    assert nested.predicted_recompute == (4 + 2 * 0.73) / 5


def test_the_report_s_rule_is_one_of_the_plans() -> None:
    chain = block_chain(80, 5.0)
    sizes = uniform_segments(80, 5.0)
    assert SegmentPlan.of(chain, sizes).cost == simulate(chain, range(0, 81, 4), ["segment"] * 20)


def test_the_table_names_runs_peak_and_work() -> None:
    plan = SegmentPlan.of(block_chain(6, 4.0), [2, 2, 1, 1], ["segment", "segment", "nested", "keep"])
    lines = plan.table().splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["layers", "0-3", "4", "5"]
    assert "2 x 2" in lines[1] and "nested" in lines[2] and "keep" in lines[3]
    assert lines[4].startswith("peak 1") and "backward of segment" in lines[4]
    assert lines[5].startswith("computed again: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"budget_bytes": 9_000},
            r"budget_bytes=9,000 \(8.8 KiB\) is below the lowest peak of 6 layers at 64 tokens",
            id="floor",
        ),
        pytest.param({"budget_bytes": 0}, r"budget_bytes must be positive, got 0", id="zero"),
        pytest.param({"budget_bytes": float("nan")}, r"budget_bytes must be positive, got nan", id="nan"),
        pytest.param({"budget_bytes": "5GiB"}, r"budget_bytes must be positive, got '5GiB'", id="text"),
        pytest.param({"allow": ()}, r"allow is empty", id="nothing"),
        pytest.param({"allow": ("segments",)}, r"unknown action 'segments'", id="unknown"),
        pytest.param({"tokens": 65}, r"a Chain holds for 64 tokens, not for 65", id="tokens"),
    ],
)
def test_impossible_wishes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_segments(block_chain(6, 4.0), **arguments)


@pytest.mark.parametrize(
    ("sizes", "actions", "message"),
    [
        ([3, 2], "segment", r"bounds must rise from 0 to the 6 layers, got \[0, 3, 5\]"),
        ([6, 0], "segment", r"bounds must rise"),
        ([3, 3], ["segment"], r"one action for each of 2 segments, got 1"),
        ([3, 3], "drop", r"unknown action 'drop'"),
    ],
)
def test_plans_that_do_not_fit_are_refused(sizes: list[int], actions: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentPlan.of(block_chain(6, 4.0), sizes, actions)
    with pytest.raises(ValueError, match="at least one layer"):
        Chain(layers=())
