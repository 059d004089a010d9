"""The groups that heads are exchanged in.

    gloo         P processes of this machine: this one is rank 0, the others follow what it measures, call by call
    device copy  one process that stands for rank 0 of P; an all-to-all copies what it sends to what it receives, so
                 that the work of a rank and the bytes it receives are those of P ranks, and nothing travels

`Copies` counts what would have travelled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(seconds=60)
COPY = "nova_benchmark_copy"  # the name of its backend

Call = Callable[[], Any]
Prepare = Callable[..., Call]  # a function of a module and what it is given, the same on all ranks -> what is timed


class Done(dist.Work):
    def wait(self, timeout: timedelta = TIMEOUT) -> bool:
        return True


class Copies(dist.ProcessGroup):
    """Rank 0 of P, alone."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.collectives = 0
        self.sent_bytes = 0  # to other ranks

    def getBackendName(self) -> str:
        return COPY

    def alltoall_base(
        self, received: Tensor, sent: Tensor, received_splits: list[int], sent_splits: list[int], options: Any
    ) -> Done:
        """Equal blocks: what is sent to rank p is as if it came from rank p."""
        received.copy_(sent)
        elements = sent.numel() // self.size() if not sent_splits else sent_splits[0]
        self.collectives += 1
        self.sent_bytes += (sent.numel() - elements) * sent.element_size()
        return Done()


def _copies(store: Any, rank: int, size: int, timeout: timedelta) -> Copies:
    return Copies(rank, size)


@contextmanager
def emulated(ranks: int) -> Iterator[dist.ProcessGroup]:
    """The group of this process and ranks - 1 that are not there."""
    if not hasattr(dist.Backend, COPY.upper()):
        dist.Backend.register_backend(COPY, _copies, devices=["cpu", "cuda"])
    dist.init_process_group(COPY, rank=0, world_size=ranks, store=dist.HashStore())
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


def _join(folder: str, rank: int, ranks: int) -> dist.ProcessGroup:
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None
    return group


def _follow(folder: str, rank: int, ranks: int, orders: Connection) -> None:
    """What rank 0 says: (prepare, arguments) makes a call ready, None runs it, the end of the pipe ends it."""
    torch.set_num_threads(1)
    group = _join(folder, rank, ranks)
    call: Call = lambda: None  # noqa: E731
    while True:
        try:
            order = orders.recv()
        except EOFError:
            break
        if order is None:
            call()
        else:
            prepare, arguments = order
            call = prepare(*arguments, rank, group)
    dist.destroy_process_group()


class Ranks:
    """This process as rank 0, and its followers."""

    def __init__(self, group: dist.ProcessGroup, orders: list[Connection]) -> None:
        self.group, self._orders = group, orders

    def together(self, prepare: Prepare, *arguments: Any) -> Call:
        """A call that all ranks run at once: prepare(*arguments, rank, group) of each."""
        for pipe in self._orders:
            pipe.send((prepare, arguments))
        call = prepare(*arguments, 0, self.group)

        def run() -> Any:
            for pipe in self._orders:
                pipe.send(None)
            return call()

        return run


@contextmanager
def gloo(ranks: int) -> Iterator[Ranks]:
    """So many processes of this machine, one thread each."""
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [spawn.Pipe(duplex=False) for _ in range(1, ranks)]
        processes = [
            spawn.Process(target=_follow, args=(folder, rank, ranks, pipe), daemon=True)
            for rank, (pipe, _) in enumerate(pipes, 1)
        ]
        for process, (theirs, _) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        try:
            yield Ranks(_join(folder, 0, ranks), [ours for _, ours in pipes])
        finally:
            for _, ours in pipes:
                ours.close()
            if dist.is_initialized():
                dist.destroy_process_group()
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
