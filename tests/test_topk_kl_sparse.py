"""Kept logits of hidden states and their gradients, without the logits of the whole vocabulary: union and gather."""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import records
from nova_kernels import lm_head
from nova_kernels.backend import why_not_triton
from nova_kernels.topk_kl import gather, paths, union
from numerics import OpWatch, assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Gradients(NamedTuple):
    kept: Tensor
    hidden: Tensor | None
    weight: Tensor | None


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    by_kept: Tensor

    def double(self) -> Case:
        return Case(self.hidden.double(), self.weight.double(), self.ids, self.by_kept.double())


def triton_kernels() -> SimpleNamespace:
    """The kernels of gather on any device: interpreted where there is no GPU."""
    if reason := why_not_triton(torch.device(DEVICE)):
        pytest.skip(reason)
    kernels = importlib.import_module("nova_kernels.topk_kl.gather_kernels")

    def backward(*case: Tensor, needs_hidden: bool, needs_weight: bool) -> tuple[Tensor | None, Tensor | None]:
        by_hidden = kernels.hidden_gradient(*case) if needs_hidden else None
        if not needs_weight:
            return by_hidden, None
        pairs = gather.sorted_pairs(case[2], len(case[1]))
        return by_hidden, kernels.weight_gradient(case[0], case[1], case[3], *pairs)

    return SimpleNamespace(kept_logits=kernels.kept_logits, backward=backward)


WAYS = {"union": lambda: union, "gather": lambda: gather, "kernels": triton_kernels}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Any:
    return WAYS[request.param]()


def make(
    num: int,
    vocabulary: int,
    width: int,
    kept: int,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    unused: float = 0.0,
) -> Case:
    """Ids lean to low numbers, so that tokens share them; `unused` of the slots, anywhere in a row, have none."""
    hidden, weight = torch.randn(num, width), torch.randn(vocabulary, width)
    lean = torch.rand(num, vocabulary) + torch.linspace(1, 0, vocabulary)
    ids = lean.topk(kept, dim=1).indices.sort(dim=1).values.int()
    ids[torch.rand(num, kept) < unused] = -1
    by_kept = torch.randn(num, kept) * torch.logspace(-3, 1, num).unsqueeze(1)
    if torch.float64 in dtypes:
        by_kept = by_kept.double()
    return Case(hidden.to(DEVICE, dtypes[0]), weight.to(DEVICE, dtypes[1]), ids.to(DEVICE), by_kept.to(DEVICE))


def definition(case: Case) -> Gradients:
    """Plain PyTorch on all of [N, V], in float32 or float64."""
    dtype = lm_head.arithmetic_dtype(case.hidden, case.weight)
    hidden, weight = case.hidden.to(dtype), case.weight.to(dtype)
    used, places = case.ids >= 0, case.ids.long().clamp(min=0)
    kept = (hidden @ weight.t()).gather(1, places).where(used, 0.0)
    by_logits = hidden.new_zeros(len(hidden), len(weight))
    by_logits.scatter_add_(1, places, case.by_kept.where(used, 0.0))
    return Gradients(kept, by_logits @ weight, (by_logits.t() @ hidden).to(case.weight.dtype))


def run(way: Any, case: Case, needs_hidden: bool = True, needs_weight: bool = True) -> Gradients:
    by_hidden, by_weight = way.backward(*case, needs_hidden=needs_hidden, needs_weight=needs_weight)
    return Gradients(way.kept_logits(*case[:3]), by_hidden, by_weight)


def check(found: Gradients, case: Case, slack: float = 2.0) -> None:
    """Gradients in the dtype in which the model gets them: products of bfloat16 have a factor of that precision."""
    names = Gradients._fields
    for name, actual, peer, truth in zip(names, found, definition(case), definition(case.double()), strict=True):
        if name != "kept" and case.hidden.dtype == torch.bfloat16:
            actual, peer = actual.bfloat16(), peer.bfloat16()
        assert_as_accurate(actual, peer, truth, slack=slack)


DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.bfloat16, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float64 weight": (torch.float32, torch.float64),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_as_accurate_as_plain_pytorch(way: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The interpreter cuts float32 to bfloat16 where hardware rounds: twice the error of a rounding, and a bit."""
    case = make(34, 101, 24, 9, dtypes, unused=0.2)
    interpreted = DEVICE == "cpu" and way not in (union, gather)
    check(run(way, case), case, slack=2.5 if interpreted else 2.0)


@pytest.mark.parametrize(
    ("num", "vocabulary", "width", "kept"),
    [(1, 11, 5, 3), (3, 7, 4, 7), (5, 13, 3, 1), (2, 2, 1, 2), (65, 129, 8, 33), (2, 5, 300, 3), (1, 1, 1, 1)],
)
def test_shapes(way: Any, num: int, vocabulary: int, width: int, kept: int) -> None:
    case = make(num, vocabulary, width, kept)
    check(run(way, case), case)


def test_no_tokens(way: Any) -> None:
    case = make(0, 9, 4, 3)
    found = run(way, case)
    assert found.kept.shape == (0, 3) and found.kept.dtype == torch.float32
    assert found.hidden is not None and found.hidden.shape == (0, 4)
    assert found.weight is not None and torch.equal(found.weight, torch.zeros_like(case.weight))


def test_unused_slots_count_for_nothing(way: Any) -> None:
    """Wherever they are, whatever their gradient, and where a row has no other. Inputs stay as they were."""
    case = make(9, 31, 6, 5, unused=0.4)
    case.ids[4] = -1
    unused = case.ids < 0
    poisoned = case._replace(by_kept=case.by_kept.masked_fill(unused, torch.nan))
    copies = [tensor.clone() for tensor in poisoned]
    found = run(way, poisoned)
    check(found, case)
    assert unused.any() and torch.equal(found.kept[unused], torch.zeros_like(found.kept[unused]))
    assert found.hidden is not None and torch.equal(found.hidden[4], torch.zeros_like(found.hidden[4]))
    for tensor, copy in zip(poisoned, copies, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def test_all_slots_unused(way: Any) -> None:
    case = make(3, 31, 6, 5, unused=2.0)
    found = run(way, case)
    for tensor in found:
        assert tensor is not None and not tensor.any()


def test_only_what_is_needed(way: Any) -> None:
    case = make(6, 31, 6, 5)
    both, hidden, weight = run(way, case), run(way, case, True, False), run(way, case, False, True)
    assert hidden.weight is None and weight.hidden is None
    assert torch.equal(both.hidden, hidden.hidden) and torch.equal(both.weight, weight.weight)
    assert way.backward(*case, needs_hidden=False, needs_weight=False) == (None, None)


def test_the_same_bits_every_time(way: Any) -> None:
    case = make(12, 50, 16, 20, unused=0.1)
    once, again = run(way, case), run(way, case)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_rows_with_strides(way: Any) -> None:
    """Views into wider matrices, columns of a transposed one, ids of a longer list."""
    case = make(6, 31, 8, 5)
    hidden = torch.empty(6, 20, device=DEVICE)[:, 3:11].copy_(case.hidden)
    weight = case.weight.t().contiguous().t()
    ids, by_kept = (torch.cat([t, t], dim=1)[:, :5] for t in (case.ids, case.by_kept))
    check(run(way, Case(hidden, weight, ids, by_kept)), case)


@pytest.mark.parametrize("tokens", [1, 2, 5, 64])
@pytest.mark.parametrize("elements", [1, 100, 2000])
def test_any_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch, tokens: int, elements: int) -> None:
    """Blocks of a few tokens, pieces of a few rows, and neither divides anything."""
    monkeypatch.setitem(union.BLOCK_TOKENS, DEVICE, tokens)
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, DEVICE, elements)
    monkeypatch.setattr(gather, "_GATHERED", elements)
    case = make(23, 67, 10, 7, unused=0.1)
    for way in (union, gather):
        check(run(way, case), case)


def test_blocks() -> None:
    """Every token is in one block, and finds its ids in it; blocks shrink until their tile is small enough."""
    case = make(150, 67, 4, 7, unused=0.2)
    seen = 0
    for block in union.blocks(case.ids, 67):
        ids = case.ids[block.part]
        assert block.part.start == seen and len(ids) <= union.block_tokens(67, 7, ids.device)
        assert torch.equal(block.rows, ids[ids >= 0].unique().long())
        padded = torch.cat([block.rows, block.rows.new_tensor([-1])])
        assert torch.equal(padded[block.places], ids.long())
        assert block.width > len(block.rows) and block.width % 16 == 0
        seen = block.part.stop
    assert seen == 150
    cpu = torch.device("cpu")
    assert union.block_tokens(32_000, 500, cpu) == 64
    for vocabulary, kept in ((151_936, 500), (151_936, 4000), (32_000, 32_000), (10**8, 10**8)):
        tokens = union.block_tokens(vocabulary, kept, cpu)
        assert tokens == 1 or tokens * min(vocabulary, tokens * kept) <= lm_head.CHUNK_ELEMENTS["cpu"]


class ByteWatch(OpWatch):
    """OpWatch, and the bytes of the largest tensor."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return result


@pytest.mark.parametrize("way", [union, gather])
def test_memory(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of N V elements, none of V H beside the weight's gradient, and that one once in the weight's dtype."""
    num, vocabulary, width, kept = 1024, 6000, 128, 16
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, DEVICE, 2**17)
    monkeypatch.setattr(gather, "_GATHERED", 2**17)
    case = make(num, vocabulary, width, kept, (torch.bfloat16, torch.bfloat16))
    with ByteWatch() as watch:
        run(way, case, needs_weight=False)
    assert 0 < watch.elements <= 2**17 + 64 * 16 < vocabulary * width / 4
    with ByteWatch() as watch:
        run(way, case, needs_hidden=False)
    assert watch.elements <= vocabulary * width < num * vocabulary / 4
    assert watch.bytes <= vocabulary * width * (2 if way is gather else 4)


def test_autocast_changes_nothing(way: Any) -> None:
    case = make(9, 31, 6, 5)
    plain = run(way, case)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = run(way, case)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def path(num: int, vocabulary: int, kept: int, costs: paths.Costs, hidden: int = 4096, **more: Any) -> str:
    asked = {"block": 512 if costs is paths.CUDA else 64, "needs_weight": True} | more
    return paths.choose_path(num_tokens=num, vocabulary=vocabulary, hidden=hidden, kept=kept, costs=costs, **asked)


def test_the_rule_is_near_the_best_on_text() -> None:
    """Of the recorded times with gradients."""
    found = records.newest("topk_paths", records.ROOT / records.RESULTS)
    assert found is not None
    rows = [row for row in found[1]["rows"] if row["ids"] == "text" and row["case"] != "forward"]
    assert len(rows) > 15
    for row in rows:
        needs_weight = row["case"] == "all"
        chosen = path(row["tokens"], row["vocabulary"], 500, paths.CPU, row["hidden"], needs_weight=needs_weight)
        times = [row[name] for name in row if name.startswith("seconds_")]
        assert row[f"seconds_{chosen}"] < 1.5 * min(times), row


def test_the_path_that_measured_fastest() -> None:
    """benchmarks/results/topk_paths-*.json: gather, unless the vocabulary or the union is small."""
    for num in (16, 256, 4096):
        for hidden in (256, 1024):
            assert path(num, 32_000, 500, paths.CPU, hidden, union=11_900) == "gather"
            assert path(num, 151_936, 500, paths.CPU, hidden) == ("union" if num == 16 else "gather")
    assert path(4096, 32_000, 500, paths.CPU, 256, union=2000, needs_weight=False) == "union"
    assert path(2048, 1271, 64, paths.CPU, 128) == "gather"
    assert path(2048, 2000, 500, paths.CPU, 128) == "dense"
    assert path(0, 32_000, 500, paths.CPU) == path(1, 32_000, 500, paths.CPU)


def test_the_path_that_the_bandwidth_of_a_gpu_suggests() -> None:
    for needs_weight in (False, True):
        found = [path(num, 151_936, 500, paths.CUDA, needs_weight=needs_weight) for num in (16, 8192)]
        assert found == ["gather", "union"]
    assert path(8192, 151_936, 500, paths.CUDA, union=80_000) == "gather"  # a gathered row is as good as 260 columns
    assert path(8192, 100_000, 500, paths.CUDA, union=80_000) == "dense"
    assert path(8192, 32_000, 4000, paths.CUDA) == "dense"


def test_a_union_grows_to_the_vocabulary() -> None:
    assert [paths.expected_union(tokens, 32_000, 500) for tokens in (0, 1, 10**6)] == [500, 500, 32_000]
    assert 2000 < paths.expected_union(64, 32_000, 500) < 4000


@pytest.mark.gpu
@pytest.mark.parametrize(("way", "waits"), [(gather, 0), (union, 1)])
def test_the_host_waits_once_or_never(way: Any, waits: int) -> None:
    case = make(5000, 4000, 64, 50, (torch.bfloat16, torch.bfloat16))
    run(way, case)  # compiled and warm
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for call in (
            lambda: way.kept_logits(*case[:3]),
            lambda: way.backward(*case, needs_hidden=True, needs_weight=True),
        ):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
            assert len(caught) == waits, [str(warning.message) for warning in caught]
    finally:
        torch.cuda.set_sync_debug_mode("default")
