"""Functions that several connected processes of this machine run at once, as torchrun would start them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

SECONDS = 240  # of a busy machine; after that they wait for each other


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the function returns on each of `count` ranks; fails if one of them does, or never ends.

    The store in which they meet is here, as torchrun's is, so that nobody else can take its port.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        started = (count, store.port, folder, function, args)
        processes = torch.multiprocessing.spawn(_entered, started, nprocs=count, join=False)
        try:
            deadline = time.monotonic() + SECONDS
            while not processes.join(timeout=5):
                assert time.monotonic() < deadline, f"the ranks still wait for each other after {SECONDS} s"
        finally:
            for process in processes.processes:
                process.kill()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(count)]


def _entered(rank: int, count: int, port: int, folder: str, function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # connect to the store above, do not make one
    )
    torch.set_num_threads(1)
    torch.save(function(*args), Path(folder, f"{rank}.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()
