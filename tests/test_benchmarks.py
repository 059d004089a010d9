from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    attention_tables,
    bench_attention,
    bench_checkpoint,
    bench_logprob,
    bench_packing,
    bench_topk_kl,
    checkpoint_tables,
    lm_inputs,
    logprob_tables,
    packing_lengths,
    packing_peers,
    packing_tables,
    records,
    topk_kl_tables,
)
from benchmarks.__main__ import main, ops, stale
from benchmarks.conftest import not_here
from benchmarks.ways import Way

ROOT = Path(__file__).parent.parent
MACHINE = {"cpu": "Quick(R) CPU", "cores": 2, "threads": 1, "torch": "2", "python": "3", "commit": "abc-dirty"}

PADDED = {"case": "utilization", "method": "padded", "list": "chat", "capacity": 8192, "utilization": 0.05}


def row(packer: str, samples: int, seconds: float, packs: int, **facts: Any) -> dict[str, Any]:
    known = {"case": "plan", "list": "chat", "capacity": 8192, "lower_bound": 10, "utilization": 0.99999, "rounds": 1}
    times = {"seconds_min": seconds, "seconds_median": seconds}
    return {**known, "packer": packer, "samples": samples, "packs": packs, **times, **facts}


def record(rows: list[dict[str, Any]], date: str = "2026-01-01T00:00:00Z", **machine: Any) -> dict[str, Any]:
    return {
        "op": "packing",
        "date": date,
        "machine": MACHINE | machine,
        "versions": {},
        "left_out": {},
        "rows": rows,
    }


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A repository with one page and one record."""
    (tmp_path / "docs" / "kernels").mkdir(parents=True)
    (tmp_path / "README.md").write_text("a\n<!-- benchmarks: packing-plan -->\nold\n<!-- /benchmarks -->\nz\n")
    records.save(record([row("nova_kernels", 10_000, 0.002, 10), PADDED]), tmp_path / records.RESULTS)
    return tmp_path


def test_a_run_is_trimmed_to_what_a_reader_needs() -> None:
    stats = {"min": 0.001234567, "median": 0.002, "rounds": 3, "data": [1.0, 2.0]}
    raw = {"machine_info": MACHINE, "benchmarks": [{"name": "x", "extra_info": {"case": "plan"}, "stats": stats}]}
    trimmed = records.trim(raw, "packing", {"trl": "1.0"})
    assert trimmed["rows"] == [{"case": "plan", "seconds_min": 0.001235, "seconds_median": 0.002, "rounds": 3}]
    assert trimmed["machine"] == MACHINE and trimmed["versions"] == {"trl": "1.0"}


def test_events_count_before_the_clock_and_what_failed_has_no_times() -> None:
    facts = {"case": "kl", "impl": "a"}
    infos = [
        {**facts, "seconds_min": 0.5, "seconds_median": 0.6, "rounds": 9},
        {**facts, "failed": "out of memory"},
        {**facts, "left_out": "No module named 'a'"},
    ]
    stats = {"min": 1e-6, "median": 1e-6, "rounds": 1}
    raw = {"machine_info": MACHINE, "benchmarks": [{"extra_info": info, "stats": stats} for info in infos]}
    trimmed = records.trim(raw, "topk_kl", {})
    assert trimmed["rows"] == infos[:2] and trimmed["left_out"] == {"kl: a": "No module named 'a'"}
    assert [line.split("  ")[0] for line in map(str.strip, records.lines(trimmed))][:2] == ["600 ms", "out of memory"]


def test_a_record_is_named_after_op_machine_and_commit(tmp_path: Path) -> None:
    saved = record([row("nova_kernels", 10, 1.0, 1)])
    path = records.save(saved, tmp_path)
    assert path.name == "packing-quick-r-cpu-2-cores-abc-dirty.json"
    assert json.loads(path.read_text()) == saved
    assert records.file_name(record([], gpu="NVIDIA H200")) == "packing-nvidia-h200-abc-dirty.json"


def test_the_newest_record_counts(tmp_path: Path) -> None:
    assert records.newest("packing", tmp_path) is None
    for commit, date in (("z", "2026-01-01T00:00:00Z"), ("a", "2026-01-02T00:00:00Z")):
        records.save(record([], date, commit=commit), tmp_path)
    found = records.newest("packing", tmp_path)
    assert found is not None and found[0].endswith("-a.json")
    assert records.newest("packing", tmp_path, "cuda") is None
    records.save(record([], "2026-01-01T00:00:00Z", device="cuda", gpu="G"), tmp_path)
    found = records.newest("packing", tmp_path, "cuda")
    assert found is not None and found[0] == "packing-g-abc-dirty.json"


def test_times_have_three_digits_and_ratios_compare_the_same_input() -> None:
    assert [records.duration(s) for s in (25.04, 0.00321, 0.0321, 3e-5)] == ["25.0 s", "3.21 ms", "32.1 ms", "30.0 µs"]
    rows = [
        row("nova_kernels", 10_000, 0.001, 10),
        row("nova_kernels", 100_000, 0.002, 10),
        row("slow", 10_000, 0.0035, 12),
        row("slow", 100_000, 4.0, 12, utilization=0.9876543),
    ]
    assert packing_tables.plan_table(record(rows)).splitlines()[-2:] == [
        "| nova_kernels | 1.00 ms | 2.00 ms |  |  | 0 | 99.999 % |",
        "| slow | 3.50 ms | 4.00 s |  | 2,000x | 2 | 98.765 % |",
    ]


def test_a_utilisation_is_never_rounded_up() -> None:
    assert [packing_tables.share({"utilization": u}) for u in (0.99999, 1.0, 0.29)] == [
        "99.99 %",
        "100.00 %",
        "29.00 %",
    ]


def test_blocks_are_rewritten_and_stale_ones_found(house: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = list(packing_tables.DRAWINGS)
    assert list(stale(house, write=False)) == [*drawn, "README.md"]
    assert list(stale(house, write=True)) == [*drawn, "README.md"]
    assert list(stale(house, write=False)) == []
    page = (house / "README.md").read_text()
    assert page.startswith("a\n<!-- benchmarks: packing-plan -->\nTime") and page.endswith("<!-- /benchmarks -->\nz\n")
    assert "| nova_kernels | 2.00 ms |" in page and "packing-quick-r-cpu-2-cores-abc-dirty.json" in page
    pictures = [(house / file).read_bytes() for file in drawn]
    for file in drawn:
        (house / file).unlink()
    assert list(stale(house, write=True)) == drawn and [(house / file).read_bytes() for file in drawn] == pictures
    newer = record([row("nova_kernels", 10_000, 0.003, 10), PADDED], "2026-01-02T00:00:00Z")
    records.save(newer, house / records.RESULTS)
    assert list(stale(house, write=False)) == [*drawn, "README.md"]


def test_a_page_that_asks_for_an_unknown_table_is_refused(house: Path) -> None:
    (house / "README.md").write_text("<!-- benchmarks: packing-plans -->\n<!-- /benchmarks -->\n")
    with pytest.raises(
        SystemExit, match=r"README\.md: no table 'packing-plans' in the records; there are attention-cpu, .*logprob-cr"
    ):
        list(stale(house, write=False))


def test_a_table_that_has_no_record_says_how_to_get_one(house: Path) -> None:
    (house / "README.md").write_text("<!-- benchmarks: logprob-kl-cuda -->\n<!-- /benchmarks -->\n")
    assert "README.md" in list(stale(house, write=True))
    assert "Not yet measured. `python -m benchmarks logprob --device cuda`" in (house / "README.md").read_text()


def test_the_documentation_is_what_the_records_say() -> None:
    assert main(["tables", "--check"]) == 0


def test_records_are_small_and_hold_only_numbers_and_names() -> None:
    for path in (ROOT / records.RESULTS).glob("*.json"):
        assert path.stat().st_size < 100_000, f"{path.name} is too large for a repository"
        saved = json.loads(path.read_text(encoding="utf-8"))
        assert all(isinstance(value, str | int | float) for row in saved["rows"] for value in row.values())
        assert not {"node", "host", "hostname"} & set(saved["machine"])


def test_the_command_line_names_every_op() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert ops() == ["attention", "checkpoint", "logprob", "packing", "topk_kl", "ulysses"]
    assert all(name in shown for name in [*ops(), "tables", "--check"])


def test_peers_that_are_missing_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prtpy", None)
    peer = next(peer for peer in packing_peers.PACKERS if peer.package == "prtpy")
    with pytest.raises(pytest.skip.Exception, match=r"prtpy first fit decreasing: import of prtpy halted"):
        bench_packing.prepared(peer, np.array([1]), 8)


def test_wrong_plans_and_rows_are_not_timed() -> None:
    lengths = np.array([3, 4, 5])
    with pytest.raises(AssertionError, match="12 tokens went in, 7 came out"):
        bench_packing.quality([7], lengths, 8)
    with pytest.raises(AssertionError, match="a pack of 9 tokens, capacity 8"):
        bench_packing.quality([9, 3], lengths, 8)
    with pytest.raises(AssertionError, match="a sample is missing, or in two packs"):
        bench_packing.sizes_of(lengths, [np.array([0, 1]), np.array([1])])


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def measure(rows: list[dict[str, Any]]) -> Callable[..., None]:
    """The protocol without the clock: the call, the check, the facts."""

    def run(call: Callable[[], Any], *, check: Callable[[Any], Any], **facts: Any) -> None:
        found = check(call()) or {}
        rows.append({**facts, **found, "seconds_min": 0.001, "seconds_median": 0.001, "rounds": 1})

    return run


def our_cases(measure: Callable[..., None]) -> Iterator[None]:
    for packer in bench_packing.OURS:
        for name, capacity in (("chat", 4096), ("chat", 8192), ("clustered", 8192), ("clustered", 16384)):
            yield bench_packing.bench_plan(measure, True, packer, name, 60, capacity)
    for method in bench_packing.METHODS:
        for capacity in (4096, 8192):
            yield bench_packing.bench_utilization(measure, True, method, "chat", capacity)
    for window in bench_packing.WINDOWS:
        yield bench_packing.bench_stream(measure, True, window, "chat", 60, 8192)
    for collator in bench_packing.COLLATORS:
        if collator.package in ("nova-kernels", "torch"):
            for kind in collator.kinds:
                yield bench_packing.bench_collate(measure, collator, kind)


def test_our_own_packing_cases_are_right_and_fill_every_table(
    measure: Callable[..., None], rows: list[dict[str, Any]]
) -> None:
    for _ in our_cases(measure):
        assert rows, "a case that measured nothing"
    whole = record(rows)
    for name, write in packing_tables.blocks("x.json", whole).items():
        if name not in ("packing-real", "packing-capacities"):  # need data, and 100,000 samples
            assert write().count("\n| ") > 1, f"{name} has no rows"
    utilization = {row["method"]: row["utilization"] for row in records.select(rows, case="utilization", capacity=8192)}
    assert utilization["packed, the whole set"] > 0.98 > 0.1 > utilization["padded to the capacity"]


def test_chat_lengths_are_those_of_the_documentation() -> None:
    lengths = packing_lengths.chat(20_000)
    assert lengths.min() >= 1 and lengths.max() == 8192 and abs(lengths.mean() - 400) < 10
    assert np.array_equal(lengths[:100], packing_lengths.chat(100)), "another count is another list"
    assert bench_packing.batch_of("lists")[0]["labels"][0] == -100


def runs_here(way: Way) -> bool:
    """Without a compiler, and not interpreted: that is what the kernels' own tests do."""
    plain = way.package == "torch" and not way.compiled
    return plain or (way.ours and not way.name.endswith(("triton", "cuda")))


class Attempt(AbstractContextManager[None]):
    """What goes wrong is raised, but for what cannot run here: nothing of ours, nor of PyTorch alone, may go wrong."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        return isinstance(error, Exception) and not_here(error) is not None


@pytest.fixture
def attempt() -> Callable[..., Attempt]:
    return lambda *, ours, **facts: Attempt()


def check_tables(tables: Any, whole: dict[str, Any]) -> None:
    for name, write in tables.blocks("x.json", whole).items():
        text = write()
        assert name.endswith("-cpu") and text.count("\n| ") > 2 and "nan" not in text, f"{name}:\n{text}"


def test_our_own_top_k_cases_are_right_and_fill_every_table(
    measure: Callable[..., None], attempt: Any, rows: list[dict[str, Any]]
) -> None:
    for name, cases in bench_topk_kl.CASES.items():
        for way, what, size in cases("cpu", True):
            if runs_here(way):
                getattr(bench_topk_kl, name)(measure, attempt, way, what, size)
    assert {row["step"] for row in records.select(rows, case="kl")} == {"forward", "sparse", "dense"}
    assert all(row["error"] < 0.01 for row in rows if "error" in row)
    check_tables(topk_kl_tables, record(rows))


def test_our_own_logprob_cases_are_right_and_fill_every_table(
    measure: Callable[..., None], attempt: Any, rows: list[dict[str, Any]]
) -> None:
    for work, way, step, size in bench_logprob.cases("cpu", True):
        if runs_here(way):
            bench_logprob.bench_logprob(measure, attempt, work, way, step, size)
    assert {row["case"] for row in rows} == set(bench_logprob.WORK)
    assert all(row["error"] < 1e-4 for row in rows)
    check_tables(logprob_tables, record(rows))


def test_our_own_attention_cases_are_right_and_fill_every_table(
    measure: Callable[..., None], attempt: Any, rows: list[dict[str, Any]]
) -> None:
    for way, step, problem in bench_attention.cases("cpu", True):
        if runs_here(way):
            bench_attention.bench_attention(measure, attempt, way, step, problem)
    assert {row["case"] for row in rows} == {"mixed", "many short", "one long"}
    assert all(row["error"] < 1e-5 for row in rows)
    assert {row["impl"] for row in rows} >= {"nova_kernels", "padded, SDPA", "SDPA, block-diagonal mask"}
    check_tables(attention_tables, record(rows))
    direct, entry = (
        {**records.select(rows, case="mixed", step="both")[0], "impl": name}
        for name in reversed(next(iter(attention_tables.DIRECT.items())))
    )
    gpu = record([{**direct, "seconds_median": 0.1}, {**entry, "seconds_median": 0.102}], device="cuda", gpu="G")
    assert "over the kernel called directly: mixed +2.0 %." in attention_tables.main_table(gpu)


def test_our_own_checkpoint_cases_are_right_and_fill_every_table(
    measure: Callable[..., None], attempt: Any, rows: list[dict[str, Any]]
) -> None:
    pytest.importorskip("transformers")
    for case, way, shape, tokens in bench_checkpoint.cases("cpu", True):
        bench_checkpoint.bench_checkpoint(measure, attempt, case, way, shape, tokens)
    assert {row["case"] for row in rows} == {"step", "blocks", "longest"}
    for row in records.select(rows, case="step"):
        assert row["recomputed"] == pytest.approx(row.get("predicted_recomputed", row["recomputed"]), abs=1e-3)
        assert row["peak_bytes"] == pytest.approx(row.get("predicted_bytes", row["peak_bytes"]), rel=0.03)
    check_tables(checkpoint_tables, record(rows))
    # one plan takes less than every k, and computes no more again than the best of them
    uniform = [row for row in rows if row["case"] == "blocks" and " k = " in row["impl"]]
    best = min(uniform, key=lambda row: row["peak_bytes"])
    (plan,) = records.select(rows, case="blocks", impl="nova_kernels, lowest peak, segments")
    assert plan["peak_bytes"] <= 0.85 * best["peak_bytes"] and plan["recomputed"] <= best["recomputed"]


def test_a_wrong_gradient_is_not_timed(measure: Callable[..., None], attempt: Any, rows: list[dict[str, Any]]) -> None:
    @contextmanager
    def doubled(subject: Any, tokens: int) -> Iterator[None]:
        with torch.no_grad():
            weight = next(subject.model.parameters())
            weight.mul_(1.5)
        yield
        with torch.no_grad():
            weight.div_(1.5)

    shape, tokens = bench_checkpoint.BLOCKS["quick"]
    with pytest.raises(AssertionError, match=r"another gradient of layers\.0\.up\.weight"):
        bench_checkpoint.bench_checkpoint(measure, attempt, "blocks", Way("wrong", doubled), shape, tokens)
    assert rows == []


def test_a_wrong_result_is_not_timed(measure: Callable[..., None], rows: list[dict[str, Any]], attempt: Any) -> None:
    size = lm_inputs.Size(8, 50, 4, torch.float32, "cpu", k=5)
    wrong = [
        (
            bench_topk_kl.bench_select,
            "five",
            lambda logits, k: (logits[:, :k].long(), logits[:, :k]),
            "not the largest",
        ),
        (
            bench_topk_kl.bench_divergence,
            "dense",
            lambda logits, ref: logits.sum(dim=1),
            "error .* relative to float64",
        ),
        (bench_topk_kl.bench_linear, "both", lambda h, w, ref: (h @ w.t()).sum(dim=1), "error .* relative to float64"),
    ]
    for bench, what, run, message in wrong:
        with pytest.raises(AssertionError, match=message):
            bench(measure, attempt, Way("wrong", run, "nova-kernels"), what, size)
    assert rows == []


def test_tables_of_a_gpu_say_what_failed_and_what_could_not_run() -> None:
    size = {"n": 8192, "v": 151_936, "h": 4096, "dtype": "bf16"}
    times = {"seconds_min": 0.05, "seconds_median": 0.06, "rounds": 5, "extra_bytes": 999_000_000, "limit_share": 0.86}
    rows = [
        {"case": work, "impl": impl, "step": "both", **size, **facts}
        for work in bench_logprob.WORK
        for impl, facts in (
            ("nova_kernels", {**times, "error": 0.0021}),
            ("PyTorch", {"failed": "out of memory"}),
            ("Liger", {**times, "seconds_median": 0.72, "error": 0.004}),
        )
    ]
    whole = record(rows, device="cuda", gpu="NVIDIA H200") | {"left_out": {"cross-entropy: CCE": "No module"}}
    text = logprob_tables.blocks("x.json", whole)["logprob-cross-entropy-cuda"]()
    assert "| nova_kernels |  |  | 60.0 ms |  | 86 % | 999 MB | 2e-03 |" in text
    assert "| PyTorch |  |  | out of memory |  | out of memory | out of memory | out of memory |" in text
    assert "| Liger |  |  | 720 ms | 12x | 86 % | 999 MB | 4e-03 |" in text
    assert "Not run here: CCE." in text and "NVIDIA H200; torch 2" in text
