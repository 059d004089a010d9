"""The protocol of a measurement, the same for every op.

A case hands `measure` a call and a check. The call runs once, the check asserts that its result is right, then the call
is repeated (warm, one after the other, in one thread) until `seconds` are used: minimum and median count, first calls
(compilation, caches) do not. A case too slow to be repeated says `once`: one cold call, checked afterwards. `memory`
asks for the extra memory of one more call (memory.py), which is always measured on CUDA.

On CUDA the times are those of events around the call: the rounds are queued one behind the other and waited for once.
Before each one a buffer larger than the L2 cache is written, outside the events, so that inputs come from memory. Work
of the host is hidden behind the round before, as in training, unless the call itself waits for the device.

    share of the limit = limit / seconds_min     limit = the case's own `limit_seconds`, or bytes_moved / copy rate
    copy rate = (bytes read + bytes written) / seconds of a copy that no cache holds, same device, same run

What fails inside `attempt` is a result: of a peer it is recorded and the run goes on; our own failure is recorded and
fails the run. What is not installed, or cannot run here, is named in the record.
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.memory import extra_bytes
from nova_kernels import BackendUnavailableError

ROOT = Path(__file__).parent.parent
MEASURED = ("csrc", "nova_kernels", "benchmarks", ":!benchmarks/results")  # what a commit has to hold
MAX_ROUNDS = 1000
MAX_ROUNDS_CUDA = 100
COPIED = {"cpu": 2**28, "cuda": 2**32}  # bytes
FLUSHED = 2**28  # bytes, several times the L2 cache of any GPU
HOST_AHEAD = 2_000_000  # cycles, about a millisecond

COMMIT = pytest.StashKey[str]()
Measure = Callable[..., Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--quick", action="store_true", help="small sizes, a few rounds: does it work at all")
    parser.addoption("--commit", default=None, help="the commit that is measured, where git does not know")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.stash[COMMIT] = config.getoption("--commit") or commit()  # before the run: the code may change meanwhile


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
        machine_info.update(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda, **driver_and_triton())


def driver_and_triton() -> dict[str, str]:
    """What of the two can be found out."""
    found = {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["driver"] = "unknown"
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "unknown"
    return found


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
    device = request.config.getoption("--device")
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    return 2 * COPIED[device] / min(cuda_times(copy, 10) if device == "cuda" else host_times(copy, 5))


def host_times(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round by the clock."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


@lru_cache(maxsize=1)
def flushed() -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")


def cuda_times(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round by CUDA events, from a cold L2 cache; waits for the device once, at the end.

    The device sleeps before each round while the host prepares it: what is timed is the device's work, not the host's.
    """
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        flushed().zero_()
        torch.cuda._sleep(HOST_AHEAD)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def nothing() -> None:
    """What pytest-benchmark is given to time where the times come from elsewhere."""


class Attempt(AbstractContextManager[None]):
    """What goes wrong inside it is recorded as `left_out` (not here) or `failed`; only our own failure is raised."""

    def __init__(self, benchmark: Any, *, ours: bool, facts: Mapping[str, Any]) -> None:
        self._benchmark, self._ours, self._facts = benchmark, ours, facts

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._benchmark.extra_info.update(self._facts)
        left_out = not_here(error)
        self._benchmark.extra_info.update({"left_out": left_out} if left_out else {"failed": reason(error)})
        if self._benchmark.stats is None and not self._benchmark.has_error:
            self._benchmark.pedantic(nothing, rounds=1)
        return left_out is not None or not self._ours


def not_here(error: Exception) -> str | None:
    """Why something could not run on this machine at all; None where it could, and went wrong."""
    absent = isinstance(error, (ImportError, BackendUnavailableError))
    unknown = isinstance(error, ValueError) and "unknown backend" in str(error)
    return " ".join(str(error).split())[:120] if absent or unknown else None


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]


@pytest.fixture
def attempt(benchmark: Any) -> Callable[..., Attempt]:
    """`with attempt(ours=..., **facts): measure(...)`; the facts name the `case` and the `impl`."""
    return lambda *, ours, **facts: Attempt(benchmark, ours=ours, facts=facts)


@pytest.fixture
def measure(benchmark: Any, device: str, quick: bool, request: pytest.FixtureRequest) -> Measure:
    """`measure(call, check=..., **facts)` times the call; facts are recorded beside the times."""
    on_cuda = device == "cuda"
    if on_cuda:  # what earlier cases left in the allocator would count as used, or be in the way
        gc.collect()
        torch.cuda.empty_cache()

    def waited(call: Callable[[], Any]) -> Any:
        result = call()
        if on_cuda:
            torch.cuda.synchronize()
        return result

    def first_seconds(
        call: Callable[[], Any], check: Callable[[Any], Mapping[str, Any] | None], enough: float
    ) -> float:
        """Seconds of a call, not counting compilation; the first result is checked."""
        begin = time.perf_counter()
        result = waited(call)
        seconds = time.perf_counter() - begin
        benchmark.extra_info.update(check(result) or {})
        del result
        if seconds < enough:
            return seconds
        begin = time.perf_counter()
        waited(call)
        return min(seconds, time.perf_counter() - begin)

    def run(
        call: Callable[[], Any],
        *,
        check: Callable[[Any], Mapping[str, Any] | None],
        seconds: float = 1.0,
        once: bool = False,
        bytes_moved: int | None = None,
        limit_seconds: float | None = None,
        memory: bool = False,
        **facts: Any,
    ) -> None:
        info = benchmark.extra_info
        info.update(facts)
        if once:
            result = benchmark.pedantic(waited, args=(call,), rounds=1)
            info.update(check(result) or {})
            return
        budget = 0.02 if quick else seconds
        first = first_seconds(call, check, budget / 3)
        rounds = max(3, min(MAX_ROUNDS_CUDA if on_cuda else MAX_ROUNDS, int(budget / first)))
        if memory or on_cuda:
            info["extra_bytes"] = extra_bytes(call, device)
        if on_cuda:
            times = cuda_times(call, rounds)
            info.update(seconds_min=min(times), seconds_median=statistics.median(times), rounds=rounds)
            benchmark.pedantic(nothing, rounds=1)
        else:
            benchmark.pedantic(call, rounds=rounds, warmup_rounds=min(5, int(0.1 / first)))
        if benchmark.stats is None:  # --benchmark-disable
            return
        if bytes_moved is not None:
            limit_seconds = bytes_moved / request.getfixturevalue("copy_rate")
        if limit_seconds is not None:
            fastest = info.get("seconds_min", benchmark.stats.stats.min)
            info["limit_share"] = round(limit_seconds / fastest, 3)

    return run
