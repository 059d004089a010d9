from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import conftest, memory, records
from nova_kernels import BackendUnavailableError

ROOT = Path(__file__).parent.parent


def quick_run(raw: Path, op: str, cases: str) -> dict[str, Any]:
    """The record of some cases, by pytest in a process of its own."""
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{op}.py", "--quick", f"--benchmark-json={raw}"]
    command += ["-q", "-k", cases]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not a worker
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return records.trim(json.loads(raw.read_text()), op, {})


def test_the_protocol_runs_and_names_no_host(tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    trimmed = quick_run(raw, "packing", "collate and nova_kernels-numpy")
    assert [row["kind"] for row in trimmed["rows"]] == ["numpy int32", "numpy int64"]
    assert all(0 < row["seconds_min"] <= row["seconds_median"] and row["limit_share"] > 0 for row in trimmed["rows"])
    assert trimmed["machine"]["threads"] == 1 and os.uname().nodename not in raw.read_text()


def test_the_protocol_measures_memory_and_names_what_cannot_run(tmp_path: Path) -> None:
    wanted = "24x1000x16-cross-entropy-both and (float32 or cut-cross-entropy) and not compile"
    trimmed = quick_run(tmp_path / "raw.json", "logprob", wanted)
    (row,) = trimmed["rows"]
    assert row["impl"] == "PyTorch, float32 logits" and row["limit_share"] > 0 and row["error"] < 1e-3
    assert row["extra_bytes"] < 8e6, "more than a tiny case can need"
    assert "cross-entropy: cut-cross-entropy" in trimmed["left_out"]


class Benchmark:
    """What `Attempt` needs of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats = self.has_error = None

    def pedantic(self, call: Callable[[], None], rounds: int) -> None:
        self.stats = call()


def attempted(error: Exception | None, *, ours: bool) -> dict[str, Any]:
    benchmark = Benchmark()
    with conftest.Attempt(benchmark, ours=ours, facts={"impl": "a"}):
        if error is not None:
            raise error
    return benchmark.extra_info


def test_a_peer_that_fails_is_a_result_and_our_own_failure_is_not() -> None:
    assert attempted(None, ours=False) == {}
    assert attempted(RuntimeError("no\nkernel"), ours=False) == {"impl": "a", "failed": "RuntimeError: no kernel"}
    assert attempted(torch.OutOfMemoryError("much"), ours=False)["failed"] == "out of memory"
    with pytest.raises(AssertionError, match="wrong"):
        attempted(AssertionError("wrong"), ours=True)
    for error in (ImportError("gone"), BackendUnavailableError("gone"), ValueError("f: unknown backend 'x'")):
        assert attempted(error, ours=True)["left_out"] == str(error)
    with pytest.raises(ValueError, match="unknown"):
        attempted(ValueError("unknown direction"), ours=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's parts are read from /proc")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_extra_memory_is_what_is_neither_given_nor_returned() -> None:
    lost = [torch.ones(2**18) for _ in range(64)]  # free heap, which must not hide what is used again
    del lost
    assert memory.extra_bytes(lambda: torch.ones(2**22), "cpu") < 2e6
    assert 16e6 < memory.extra_bytes(lambda: torch.ones(2**22).sum(), "cpu") < 20e6
    assert 32e6 < memory.extra_bytes(lambda: torch.cat([torch.ones(2**21)] * 4)[:1], "cpu") < 46e6


def test_times_on_a_gpu_are_those_of_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert order[-1] == "wait"
            return 3.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(conftest, "flushed", lambda: torch.ones(1))
    assert conftest.cuda_times(lambda: order.append("call"), 2) == [0.003, 0.003]
    assert order == ["call", *["sleep", "event", "call", "event"] * 2, "wait"]
