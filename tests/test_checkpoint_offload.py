"""Offloaded boundaries: a transport in slow motion proves the order of copies, waits and releases, on a CPU."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nova_kernels.checkpoint.offload import CudaTransport, Offloader, Stored


class LazyTransport:
    """A side stream in slow motion: copies run when they are waited for, in order; until then their targets are NaN.

    It refers weakly to device tensors, as the memory pool does, so that it sees which of them were released before
    their copy ran. The wait with the number `forgotten` does nothing.
    """

    def __init__(self, forgotten: int | None = None) -> None:
        self.device = torch.device("cpu")
        self.forgotten = forgotten
        self.waits = 0
        self.most_on_device = 0
        self.begun: list[tuple[str, int]] = []  # the way of each copy, and the first number of the boundary's shape
        self._queue: list[tuple[object, weakref.ref[Tensor], Callable[[Tensor], Any]]] = []
        self._too_late = 0
        self._on_device: list[StorageWeakRef] = []
        self._on_host: list[weakref.ref[Tensor]] = []

    def stream(self) -> str:
        return "compute"

    def to_host(self, source: Tensor, compute: str) -> tuple[Tensor, object]:
        target = torch.full_like(source, torch.nan)
        self._on_host.append(weakref.ref(target))
        return target, self._begin("to host", source, target.copy_)

    def to_device(self, source: Tensor, compute: str) -> tuple[Tensor, object]:
        target = torch.full_like(source, torch.nan)
        return target, self._begin("to device", target, lambda device: device.copy_(source))

    def wait(self, copied: object, compute: str) -> None:
        assert compute == "compute"
        self.waits += 1
        while self.waits != self.forgotten and any(event is copied for event, *_ in self._queue):
            self._run_one()

    def finish(self) -> None:
        """Run the copies that nobody waited for, and see whether all came in time."""
        while self._queue:
            self._run_one()
        assert self._too_late == 0, "device memory was given back before its copy had run"

    def on_device(self) -> int:
        return len({storage.cdata for storage in self._on_device if not storage.expired()})

    def on_host(self) -> int:
        return sum(tensor() is not None for tensor in self._on_host)

    def _begin(self, way: str, device: Tensor, run: Callable[[Tensor], Any]) -> object:
        self._on_device.append(StorageWeakRef(device.untyped_storage()))
        self.most_on_device = max(self.most_on_device, self.on_device())
        self.begun.append((way, len(device)))
        copied = object()
        self._queue.append((copied, weakref.ref(device), run))
        return copied

    def _run_one(self) -> None:
        _, reference, run = self._queue.pop(0)
        if (device := reference()) is None:
            self._too_late += 1
        else:
            run(device)


Graph = list[tuple[Stored, Tensor]]


def forward(offloader: Offloader, lengths: list[int]) -> Graph:
    """One boundary of each length, with what it held."""
    graph = []
    for length in lengths:
        hidden = torch.randn(length, 3)
        graph.append((offloader.store(hidden), hidden.clone()))
    return graph


def backward(graph: Graph, *, retain: bool = False, stop: int = 0) -> None:
    """Fetch all but `stop` boundaries, the newest first, and each time prefetch the next; drop them unless retained."""
    for position in reversed(range(stop, len(graph))):
        stored, expected = graph[position] if retain else graph.pop()
        fetched = stored.fetch()
        if position > 0:
            graph[position - 1][0].prefetch()
        assert torch.equal(fetched, expected), "read before the copy was there"
        del stored, fetched


def everything(offloader: Offloader) -> None:
    """Every way in which copies can follow each other."""
    one, two, three = (forward(offloader, [5, 4, 3]) for _ in range(3))
    backward(two, retain=True)
    backward(two)
    backward(one, stop=1)
    forward(offloader, [2, 2])
    backward(three, stop=2)
    four = forward(offloader, [6, 5, 4])
    offloader.settle()
    backward(four, stop=1)
    backward(three)
    five = forward(offloader, [1, 1])
    five[0][0].prefetch()
    backward(five, stop=1)


def test_no_copy_is_read_or_overwritten_before_it_ran() -> None:
    transport = LazyTransport()
    everything(Offloader(transport))
    transport.finish()
    assert transport.most_on_device == 2
    assert transport.on_device() == transport.on_host() == 0


def test_each_wait_is_needed() -> None:
    transport = LazyTransport()
    everything(Offloader(transport))
    assert transport.waits > 15
    for number in range(1, transport.waits + 1):
        careless = LazyTransport(forgotten=number)
        with pytest.raises(AssertionError, match="before"):
            everything(Offloader(careless))
            careless.finish()


@pytest.mark.parametrize("seed", range(30))
def test_forward_and_backward_passes_in_any_order(seed: int) -> None:
    choice, transport = random.Random(seed), LazyTransport()
    offloader = Offloader(transport)
    graphs: list[Graph] = []
    for _ in range(30):
        what = choice.choice(["forward", "forward", "backward", "retain", "fail", "drop"])
        if what == "forward" or not graphs:
            graphs.append(forward(offloader, [choice.randint(1, 9) for _ in range(choice.randint(1, 5))]))
            continue
        graph = graphs.pop(choice.randrange(len(graphs)))
        if what != "drop":
            stop = choice.randrange(len(graph)) if what == "fail" else 0
            backward(graph, retain=what == "retain", stop=stop)
        if what == "retain":
            graphs.append(graph)
        graph = []
    assert transport.most_on_device <= 2
    under_way = 1
    assert transport.on_host() <= sum(map(len, graphs)) + under_way
    graphs.clear()
    assert transport.on_host() <= under_way and transport.on_device() <= under_way
    del offloader
    assert transport.on_host() == transport.on_device() == 0
    transport.finish()


def test_which_copies_are_made_and_when() -> None:
    transport = LazyTransport()
    offloader = Offloader(transport)

    def copies(action: Callable[[], Any]) -> list[tuple[str, int]]:
        transport.begun.clear()
        action()
        return list(transport.begun)

    graph: Graph = []
    assert copies(lambda: graph.extend(forward(offloader, [4, 3]))) == [("to host", 4), ("to host", 3)]
    first, newest = graph[0][0], graph[1][0]
    assert copies(newest.prefetch) == copies(newest.fetch) == []  # it was never let go
    assert copies(first.prefetch) == [("to device", 4)]
    assert copies(first.prefetch) == copies(first.fetch) == []
    assert copies(first.fetch) == [("to device", 4)]
    assert copies(newest.fetch) == [("to device", 3)]


def test_settle_lets_go_of_the_newest_boundary() -> None:
    transport = LazyTransport()
    offloader = Offloader(transport)
    graph = forward(offloader, [4, 3])
    assert transport.on_device() == 1
    offloader.settle()
    offloader.settle()
    assert transport.on_device() == 0 and transport.waits == 2
    backward(graph)
    assert transport.begun[2:] == [("to device", 3), ("to device", 4)]


LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 3),
    "transposed": lambda: torch.randn(2, 4, 3).transpose(0, 1),
    "gaps": lambda: torch.randn(4, 9)[:, ::3],
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "empty": lambda: torch.randn(0, 3),
    "offset": lambda: torch.randn(7, 3)[3:],
}


@pytest.mark.parametrize("lazy", [True, False], ids=["moved", "kept"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_boundary_comes_back_as_it_was(layout: str, dtype: torch.dtype, lazy: bool) -> None:
    offloader = Offloader(LazyTransport() if lazy else None)
    for requires_grad in (True, False):
        hidden = LAYOUTS[layout]().to(dtype).requires_grad_(requires_grad)
        passed_on = hidden * 1 if requires_grad else hidden
        older, newest = offloader.store(passed_on), offloader.store(passed_on)
        for stored in (newest, older, newest, older):
            fetched = stored.fetch()
            assert torch.equal(fetched, hidden) and fetched.dtype == dtype and fetched.device == hidden.device
            assert fetched.requires_grad == requires_grad and fetched.is_leaf
            assert fetched.stride() == (passed_on.clone() if lazy else passed_on).stride()


def test_on_a_cpu_the_boundary_itself_is_kept() -> None:
    hidden = torch.randn(4, 3)
    stored = Offloader().store(hidden)
    first, second = stored.fetch(), stored.fetch()
    assert first is not second and first.data_ptr() == second.data_ptr() == hidden.data_ptr()
    meta = torch.empty(4, 3, device="meta")
    assert Offloader().store(meta).fetch().shape == meta.shape


@pytest.mark.parametrize("lazy", [True, False], ids=["moved", "kept"])
def test_the_graph_is_not_kept_alive(lazy: bool) -> None:
    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    saved: list[weakref.ref[Saved]] = []

    def pack(tensor: Tensor) -> Saved:
        entry = Saved(tensor)
        saved.append(weakref.ref(entry))
        return entry

    weight = torch.randn(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor):
        stored = Offloader(LazyTransport() if lazy else None).store(weight * weight)
    assert saved and all(entry() is None for entry in saved)
    fetched = stored.fetch()
    fetched.sum().backward()
    assert fetched.grad is not None and weight.grad is None


def test_a_failed_backward_waits_before_memory_is_given_back() -> None:
    transport = LazyTransport()
    graph = forward(Offloader(transport), [3, 3])
    graph[1][0].fetch()
    graph[0][0].prefetch()
    graph.clear()
    gc.collect()
    assert transport.on_device() == transport.on_host() == 0
    transport.finish()


@pytest.mark.parametrize("lazy", [True, False], ids=["moved", "kept"])
def test_layers_that_write_to_their_input_are_found(lazy: bool) -> None:
    offloader, hidden = Offloader(LazyTransport() if lazy else None), torch.randn(4, 3)
    stored = offloader.store(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match=r"boundary of shape \[4, 3\] was changed in place; a layer must not write"):
        stored.fetch()
    assert torch.equal(offloader.store(hidden).fetch(), hidden)


def test_a_copy_begins_with_nothing_stored() -> None:
    transport = LazyTransport()
    offloader = Offloader(transport)
    stored = offloader.store(torch.ones(2))
    twin = copy.deepcopy({"first": offloader, "second": offloader})
    assert twin["first"] is twin["second"] is not offloader
    assert torch.equal(twin["first"].store(torch.zeros(2)).fetch(), torch.zeros(2))
    assert torch.equal(stored.fetch(), torch.ones(2)) and transport.waits == 1


@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        pytest.param(None, TypeError, "expected a tensor of hidden states, got NoneType", id="None"),
        pytest.param((torch.ones(2),), TypeError, "got tuple", id="tuple"),
        pytest.param(torch.ones(2, dtype=torch.long), ValueError, "floating-point.*got torch.int64", id="integers"),
        pytest.param(torch.ones(2, 2).to_sparse(), ValueError, "layout torch.sparse_coo", id="sparse"),
        pytest.param(
            torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), ValueError, "dense", id="nested"
        ),
    ],
)
def test_what_cannot_be_stored(hidden: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Offloader().store(hidden)


def test_a_stack_on_several_devices_is_refused() -> None:
    offloader = Offloader(LazyTransport())
    offloader.store(torch.ones(2))
    with pytest.raises(ValueError, match="are on meta, those before were on cpu; the layers of one stack run on one"):
        offloader.store(torch.ones(2, device="meta"))


def test_devices_without_offloading_are_refused() -> None:
    class Elsewhere(Tensor):
        device = torch.device("xpu:0")

    with pytest.raises(ValueError, match=r"cannot offload from 'xpu:0'.*action \"segment\""):
        Offloader().store(torch.ones(2).as_subclass(Elsewhere))


def test_too_little_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty_like", fail)
    transport = object.__new__(CudaTransport)
    with pytest.raises(RuntimeError, match=r"no 4,000 bytes of pinned host memory for a boundary of shape \[10, 100\]"):
        transport.to_host(torch.ones(10, 100), None)
