"""The benchmark of Ulysses: our cases are right and fill every table, wrong ones are not timed; the model of links."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_ulysses, records, ulysses_links, ulysses_tables
from benchmarks.ulysses_groups import emulated
from benchmarks.ulysses_ways import OURS, PERMUTES, PLAIN, HeadWay, Problem, Shard, Truth, shard

MACHINE = {"cpu": "Quick(R) CPU", "cores": 2, "threads": 1, "torch": "2", "python": "3", "commit": "abc-dirty"}
QUICK = Problem("emulated", 8, 64, 16, 4, 8, torch.float32, "cpu")


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def measure(rows: list[dict[str, Any]]) -> Callable[..., None]:
    """The protocol without the clock: the call, the check, the facts."""

    def run(call: Callable[[], Any], *, check: Callable[[Any], Any], **facts: Any) -> None:
        found = check(call()) or {}
        share = {"limit_share": 0.5} if facts.pop("bytes_moved") else {}
        rows.append({**facts, **found, **share, "seconds_min": 0.001, "seconds_median": 0.001, "rounds": 1})

    return run


def attempt(*, ours: bool, **facts: Any) -> Any:
    return nullcontext()


def test_our_own_cases_are_right_and_fill_every_table(measure: Callable[..., None], rows: list[dict[str, Any]]) -> None:
    with bench_ulysses.group_finder() as groups:
        for way, step, problem in bench_ulysses.cases("cpu", True):
            bench_ulysses.bench_ulysses(measure, attempt, groups, way, step, problem)
    assert {(row["case"], row["ranks"]) for row in rows} == {("gloo", 2), *(("emulated", p) for p in (2, 4, 8, 16))}
    assert all(row["error"] < 1e-6 for row in rows)
    main = {"case": "emulated", "ranks": 8, "rotated": "no"}
    for impl, step, collectives in (
        ("nova_kernels", "forward", 2),
        ("nova_kernels", "both", 4),
        ("three permutes", "both", 8),
    ):
        (row,) = records.select(rows, impl=impl, step=step, **main)
        assert row["collectives"] == collectives
    sent = {row["impl"]: row["sent_bytes"] for row in records.select(rows, step="both", **main)}
    assert sent["nova_kernels"] == sent["three permutes"] > 0
    whole = {"op": "ulysses", "date": "", "machine": MACHINE, "versions": {}, "left_out": {}, "rows": rows}
    for name, write in ulysses_tables.blocks("x.json", whole).items():
        text = write()
        assert name.endswith("-cpu") and text.count("\n| ") > 2 and "nan" not in text, f"{name}:\n{text}"
        assert all(len(line) <= 120 or line.startswith("|") for line in text.splitlines()), text
    assert set(ulysses_tables.blocks("x.json", whole)) == {name.format(device="cpu") for name in ulysses_tables.BLOCKS}


def test_the_plain_twin_is_timed_in_parts_where_it_is_not_the_choice() -> None:
    cases = list(bench_ulysses.cases("cuda", False))
    assert {step for way, step, _ in cases if way is PLAIN} == {"pack", "unpack", "gradients"}
    assert {problem.where for *_, problem in cases} == {"emulated"}
    for step in ("pack", "unpack", "gradients"):
        call = bench_ulysses.prepare(PLAIN.name, step, QUICK, 0, None)  # type: ignore[arg-type]
        assert bench_ulysses.check(call(), PLAIN, step, QUICK)["error"] == pytest.approx(0.0, abs=1e-7)


def one_copy(found: list[Tensor], given: Shard, problem: Problem) -> list[Tensor]:
    """Gradients of the last copy of a key head alone."""
    dq, dk, dv = PERMUTES.gradients(found, given, replace(problem, kv_heads=problem.ranks))
    return [dq, dk[:, 1::2], dv[:, 1::2]]


def swapped(q: Tensor, k: Tensor, v: Tensor, given: Shard, problem: Problem) -> list[Tensor]:
    return OURS.pack(q, v, k, given, problem)


@pytest.mark.parametrize(
    ("way", "step"),
    [
        (replace(PERMUTES, name="wrong", gradients=one_copy), "gradients"),
        (replace(OURS, name="wrong", pack=swapped), "pack"),
        (replace(OURS, name="wrong", unpack=lambda out, given, problem: out.view(problem.held, -1, 8)), "unpack"),
        (replace(OURS, name="wrong", run=lambda *given: OURS.run(*given) * 1.01), "both"),
    ],
    ids=["one copy of a key head", "values as keys", "no permutation", "one per cent off"],
)
def test_a_wrong_result_is_not_timed(
    measure: Callable[..., None],
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    way: HeadWay,
    step: str,
) -> None:
    monkeypatch.setitem(bench_ulysses.WAYS, "wrong", way)
    with bench_ulysses.group_finder() as groups, pytest.raises(AssertionError, match=r"error .* relative to float64"):
        bench_ulysses.bench_ulysses(measure, attempt, groups, way, step, replace(QUICK, rotated=True))
    assert rows == []


def test_bytes_that_comm_bytes_does_not_know_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated(8) as group:
        call = bench_ulysses.prepare("nova_kernels", "forward", QUICK, 0, group)

        def twice() -> None:
            call()
            call()

        with pytest.raises(AssertionError, match="bytes sent, comm_bytes says"):
            bench_ulysses.travelled(twice, OURS, "forward", QUICK, group)  # type: ignore[arg-type]


def test_what_is_right_of_two_processes_and_of_one_that_stands_for_them() -> None:
    """Of other ranks' tokens: theirs, where there are others."""
    real, alone = Truth(replace(QUICK, where="gloo", ranks=2)), Truth(replace(QUICK, ranks=2))
    q = shard(real.problem, 1).inputs[0]
    assert torch.equal(real.arrived[0][32:], q[:, :8].double())
    assert torch.equal(alone.arrived[0][32:], shard(alone.problem, 0).inputs[0][:, 8:].double())


def test_the_model_of_links() -> None:
    """66 MB per layer and pass of 16,384 tokens of Llama 3 70B on 8 ranks; within a node nothing is far."""
    layer = replace(ulysses_links.LAYER, tokens=16_384)
    found = ulysses_links.traffic(layer, 8)
    assert found.sent_bytes == 2 * (2048 * 70 + 8 * 14_336) * 128 * 2
    assert found.seconds == pytest.approx(4 * 10e-6 + found.sent_bytes / 450e9)
    assert found.permutes_seconds - found.seconds == pytest.approx(4 * 10e-6)
    sixteen = ulysses_links.traffic(layer, 16)
    assert sixteen.seconds == pytest.approx(4 * 25e-6 + sixteen.sent_bytes * 8 / 15 / 50e9)
    assert ulysses_links.exchange_seconds(10**9, 4, 1) == 0.0
    assert found.all_gather_bytes == 2 * 2 * 2048 * 7 * 8 * 128 * 2
