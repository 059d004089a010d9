"""The ranks of one run: dp groups, each with its own micro-batches, of sp ranks that share every row of tokens.

    rank = dp_rank * sp + sp_rank                    world size = dp * sp

One process is a mesh of one rank, and nothing here then talks to anybody. More are started by torchrun, or anything
that sets its variables. What all ranks must agree on goes through here: which micro-batches are whose, sums of counts,
what the first rank alone reads or writes, and whether all were given the same.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nova_kernels.ulysses import TokenPlan
from nova_train.config import ConfigError, launched_ranks

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

# How long the others wait for what one rank does alone (a stage that runs on one rank, files of a slow disk). A rank
# that dies is noticed by the launcher, which ends the others; nobody waits for this time.
PATIENCE_DAYS = 7
# How long a rank that failed alone waits for the first one to fail in the same way, which would then tell of it.
WAIT_SECONDS = 3.0


class RankError(RuntimeError):
    """Another rank failed; its own message says why."""


@dataclass(frozen=True, slots=True)
class Repeat(Generic[ItemT]):
    """A micro-batch that another rank counts: it runs so that all ranks run equally many, and adds nothing."""

    item: ItemT


def mapped(function: Callable[[ItemT], ResultT], item: ItemT | Repeat[ItemT]) -> ResultT | Repeat[ResultT]:
    """The function's result; of a repeat, a repeat."""
    return Repeat(function(item.item)) if isinstance(item, Repeat) else function(item)


def counted(item: ItemT | Repeat[ItemT]) -> tuple[ItemT, bool]:
    """The item to run, and whether it counts here."""
    return (item.item, False) if isinstance(item, Repeat) else (item, True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """This process among the ranks of a run."""

    dp: int = 1  # groups that have micro-batches of their own
    sp: int = 1  # ranks that share a row
    rank: int = 0
    devices: DeviceMesh | None = None  # [dp, sp]; None: one process
    patient: Any = None  # a group for what one rank does alone
    splits_rows: bool = True  # False: every rank runs whole rows of its own, whatever sp is

    @property
    def size(self) -> int:
        return self.dp * self.sp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    @property
    def sequence_group(self) -> Any:
        """The ranks that share this rank's rows; None: it has them to itself."""
        return None if self.devices is None or self.sp == 1 or not self.splits_rows else self.devices["sp"].get_group()

    @property
    def all_ranks(self) -> DeviceMesh | None:
        """One dimension of all ranks, over which weights are sharded; None: one process."""
        return None if self.devices is None else self.devices._flatten("ranks")

    def share(self, items: Sequence[ItemT]) -> list[ItemT | Repeat[ItemT]]:
        """This rank's part of the items of a step: every dp-th one, with repeats so that all get equally many."""
        rounds = -(-len(items) // self.dp)
        places = [turn * self.dp + self.dp_rank for turn in range(rounds)]
        return [items[place] if place < len(items) else Repeat(items[0]) for place in places]

    def own_tokens(self, num_tokens: int) -> slice:
        """Where this rank's tokens lie in a row of T."""
        if self.sequence_group is None:
            return slice(0, num_tokens)
        return slice(*TokenPlan.build(num_tokens, self.sp).bounds(self.sp_rank))

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the dp groups; all ranks give the same names."""
        if self.devices is None:
            return dict(values)
        mine = torch.tensor([value if self.sp_rank == 0 else 0.0 for value in values.values()], dtype=torch.float64)
        dist.all_reduce(mine)
        return dict(zip(values, mine.tolist(), strict=True))

    def spread(self, items: Sequence[ItemT], function: Callable[[Sequence[ItemT]], Sequence[ResultT]]) -> list[ResultT]:
        """The function's results for all items, on all ranks; each rank computes those of every size-th item."""
        own = range(self.rank, len(items), self.size)
        results = list(function([items[place] for place in own])) if own else []
        parts = self.gather(results)
        return [parts[place % self.size][place // self.size] for place in range(len(items))]

    def sum_over_sequence(self, values: Tensor) -> Tensor:
        """Sum over the ranks that share a row; differentiable: the loss is the sum of what all of them make of it."""
        summed: Tensor = values if self.sequence_group is None else _Sum.apply(values, self.sequence_group)
        return summed

    def gather(self, value: ItemT) -> list[ItemT]:
        """Every rank's value, in their order, on all ranks."""
        if self.devices is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.devices is None:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def cpu_threads(self, wanted: int) -> int:
        """Threads of this process: ranks that may run on the same CPUs divide them, and are told so."""
        if self.devices is None:
            return wanted
        own = socket.gethostname(), usable_cpus()
        sharing = self.gather(own).count(own)
        threads = max(1, min(wanted, len(own[1]) // sharing))
        if threads < wanted and self.is_main:
            log.warning("num_threads %d: %d, since %d ranks share %d CPUs", wanted, threads, sharing, len(own[1]))
        return threads

    def on_main(self, function: Callable[..., ResultT], *args: Any, **kwargs: Any) -> ResultT:
        """What the first rank alone does; all get its result, and all fail where it does.

        Raises:
            RankError: on the other ranks, whatever it was; only Ctrl-C is the same everywhere.
        """
        if self.devices is None:
            return function(*args, **kwargs)
        answer: list[Any] = [None, None]
        try:
            if self.is_main:
                answer[0] = function(*args, **kwargs)
        except BaseException as error:
            answer[1] = type(error).__name__  # the others wait to hear of it
            raise
        finally:
            dist.broadcast_object_list(answer, src=0, group=self.patient)
        if answer[1] == KeyboardInterrupt.__name__:
            raise KeyboardInterrupt
        if answer[1] is not None:
            raise RankError(f"rank 0 stopped with {answer[1]}")
        result: ResultT = answer[0]
        return result

    def require_same(self, what: str, value: object) -> None:
        """Refuse ranks that were given different things; of mappings, the message has the entries that differ.

        Raises:
            ConfigError: on every rank, naming the first that differs.
        """
        found = self.gather(value)
        for rank, theirs in enumerate(found):
            if theirs != (ours := found[0]):
                if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
                    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
                    theirs, ours = ({name: one.get(name) for name in names} for one in (theirs, ours))
                raise ConfigError(
                    f"{what}: rank {rank} has {theirs!r}, rank 0 has {ours!r}; all ranks need the same files, keys and "
                    "versions"
                )


def join(sequence_parallel_size: int = 1, *, device: str = "cpu") -> Mesh:
    """The mesh of this process: of one rank, or of all that the launcher started.

    Raises:
        ConfigError: sequence_parallel_size does not divide the number of ranks; more ranks than GPUs on this machine;
            a torch that cannot connect GPUs.
    """
    size, sp = launched_ranks(), sequence_parallel_size
    if size % sp:
        raise ConfigError(
            f"sequence_parallel_size {sp} does not divide the {size} ranks that were started; "
            "start a multiple of it (torchrun --nproc-per-node), or choose another"
        )
    if size == 1:
        return Mesh()
    if device == "cuda":
        _take_gpu()
    connection = connect()
    assert connection is not None, "several ranks were started"
    if (device, sp) not in connection.meshes:
        connection.meshes[device, sp] = init_device_mesh(device, (size // sp, sp), mesh_dim_names=("dp", "sp"))
    devices = connection.meshes[device, sp]
    return Mesh(dp=size // sp, sp=sp, rank=dist.get_rank(), devices=devices, patient=connection.patient)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Connection:
    """What this process and the other ranks share from the first meeting to the end."""

    store: Any  # of the launcher: lives on when a rank is gone
    patient: Any  # group for what one rank does alone
    meshes: dict[tuple[str, int], DeviceMesh] = field(default_factory=dict)  # by device and sequence_parallel_size


_connection: _Connection | None = None


def connect() -> _Connection | None:
    """Meet the other ranks, if there are any and it has not been done; `leave` is its counterpart."""
    global _connection
    if launched_ranks() > 1 and _connection is None:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise ConfigError(
                f"WORLD_SIZE is {launched_ranks()}, but {', '.join(missing)} is not set; start with torchrun, set all "
                "of them, or unset WORLD_SIZE for one process"
            )
        # A recipe may have stages on GPUs and on CPUs: both can be used where there are GPUs for all.
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() and _missing_gpus() == 0 else "gloo"
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(_attempt(), store)
        dist.init_process_group(backend, store=dist.PrefixStore("groups", store), rank=rank, world_size=size)
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=PATIENCE_DAYS))
        _connection = _Connection(store=store, patient=patient)
    return _connection


def _attempt() -> str:
    """Which start of the ranks this is.

    On one machine torchrun may keep its store when it starts them again, with the addresses of those that are gone. On
    several it makes a new one, and their counts of restarts differ.
    """
    environment = os.environ
    one_machine = environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]
    return f"attempt {environment.get('TORCHELASTIC_RESTART_COUNT', 0) if one_machine else 0}"


def usable_cpus() -> frozenset[int]:
    """CPUs that this process may run on."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def leave() -> None:
    """Take leave of the others, at the end of a process."""
    global _connection
    _connection = None
    if dist.is_initialized():
        dist.destroy_process_group()


def tells(failure: str) -> bool:
    """Whether this rank tells of a failure that ends its run; its text is the same on ranks that fail alike.

    Of ranks that fail alike the first rank tells it, and nobody else. Once a rank has failed, others fail in other
    ways, because they lose it: nobody tells of that.
    """
    if _connection is None:
        return True
    store, rank = _connection.store, dist.get_rank()
    try:
        store.set(f"failure/{rank}", failure)
        if store.compare_set("failure/first", "", failure).decode() != failure:
            return False
        if rank > 0 and _heard(store, "failure/0") == failure:
            return False
        return bool(store.compare_set("failure/told", "", str(rank)).decode() == str(rank))
    except dist.DistError:  # the store is gone, and with it the launcher: better told twice than never
        return True


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error is what the others meet when a rank ends without a word."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _heard(store: Any, key: str) -> str | None:
    """A text of the store, or None if none comes in time."""
    end = time.monotonic() + WAIT_SECONDS
    while not store.check([key]):
        if time.monotonic() > end:
            return None
        time.sleep(0.05)
    return str(store.get(key).decode())


def _missing_gpus() -> int:
    """How many more GPUs than there are the ranks of this machine need."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, ranks - torch.cuda.device_count())


def _take_gpu() -> None:
    if not dist.is_nccl_available():
        raise ConfigError("device: cuda on several ranks needs a torch with NCCL; install one, or use device: cpu")
    if _missing_gpus():
        gpus = torch.cuda.device_count()
        raise ConfigError(
            f"device: cuda: {gpus + _missing_gpus()} ranks were started on this machine, which has {gpus} GPUs; start "
            "one rank per GPU (torchrun --nproc-per-node), or use device: cpu"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


class _Sum(torch.autograd.Function):
    """All-reduce; its adjoint is itself."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
