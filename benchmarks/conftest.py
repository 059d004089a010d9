"""The protocol of a measurement, the same for every op.

A case hands `measure` a call and a check. The call runs once, the check asserts that its result is right, then the call
is repeated (warm, one after the other, in one thread) until `seconds` are used: minimum and median count, first calls
(compilation, caches) do not. A case too slow to be repeated says `once`: one cold call, checked afterwards. On CUDA
every call is followed by a synchronisation, and CUDA events and peak memory are recorded beside the clock.

    share of the limit = bytes_moved / seconds_min / copy rate,   copy rate = (bytes read + bytes written) / seconds
                                                                  of a copy that no cache holds, same device, same run
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
MEASURED = ("csrc", "nova_kernels", "benchmarks", ":!benchmarks/results")  # what a commit has to hold
MAX_ROUNDS = 1000
COPIED = 2**28  # bytes

COMMIT = pytest.StashKey[str]()
Measure = Callable[..., Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--quick", action="store_true", help="small sizes, a few rounds: does it work at all")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.stash[COMMIT] = commit()  # before the run: the code may change meanwhile


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a reader needs to judge the numbers; no host name."""
    cpu = machine_info.pop("cpu", {})
    machine_info.clear()
    machine_info.update(
        commit=config.stash[COMMIT],
        device=config.getoption("--device"),
        cpu=cpu.get("brand_raw", platform.processor()),
        cores=cpu.get("count"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        threads=torch.get_num_threads(),
    )
    if machine_info["device"] == "cuda":
        machine_info.update(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda, triton=version("triton"))


def commit() -> str:
    """The commit, with "-dirty" if the code that is measured, or measures, is not as committed."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *MEASURED], capture_output=True, text=True, check=True
    )
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def copy_rate(request: pytest.FixtureRequest) -> float:
    """Bytes read and written per second by a copy."""
    on_gpu = request.config.getoption("--device") == "cuda"
    source = torch.ones(COPIED, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * COPIED / min(seconds)


@pytest.fixture
def measure(benchmark: Any, device: str, quick: bool, request: pytest.FixtureRequest) -> Measure:
    """`measure(call, check=..., **facts)` times the call; facts are recorded beside the times."""
    events: list[float] = []

    def on_cuda(call: Callable[[], Any]) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        events.append(start.elapsed_time(end) / 1000)
        return result

    def run(
        call: Callable[[], Any],
        *,
        check: Callable[[Any], Mapping[str, Any] | None],
        seconds: float = 1.0,
        once: bool = False,
        bytes_moved: int | None = None,
        **facts: Any,
    ) -> None:
        timed, args = (on_cuda, (call,)) if device == "cuda" else (call, ())
        benchmark.extra_info.update(facts)
        if once:
            result = benchmark.pedantic(timed, args=args, rounds=1)
            benchmark.extra_info.update(check(result) or {})
            return
        begin = time.perf_counter()
        result = timed(*args)
        first = time.perf_counter() - begin
        benchmark.extra_info.update(check(result) or {})
        del result
        rounds = max(3, min(MAX_ROUNDS, int((0.02 if quick else seconds) / first)))
        warmup = min(5, int(0.1 / first))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(timed, args=args, rounds=rounds, warmup_rounds=warmup)
        if device == "cuda":
            benchmark.extra_info["event_seconds_median"] = statistics.median(events[-rounds:])
            benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()
        if bytes_moved is not None and benchmark.stats is not None:
            rate = bytes_moved / benchmark.stats.stats.min
            benchmark.extra_info["limit_share"] = round(rate / request.getfixturevalue("copy_rate"), 3)

    return run
