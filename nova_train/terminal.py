"""What whoever started a run sees of it and can do to it: a progress bar, and Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(name: str, step: int, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar with steps, rate and time left; yields a function to call with the tokens of each step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(name, total=total, completed=step, rate="")
        began, done = time.perf_counter(), 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            rate = done / (time.perf_counter() - began)
            bar.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")

        yield advance


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag (yields a function that reads it); a second Ctrl-C raises as usual.

    A second SIGTERM does not: schedulers send it to a launcher, which sends it on, and to its processes as well.
    """
    seen = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen = True

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    try:
        for number in signals:
            signal.signal(number, on_signal)
    except ValueError:  # not the main thread: signals are not ours to catch
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
