"""Ulysses: heads to the ranks that compute them and back, without the attention in between; time, bytes, collectives.

    pack        q, k, v [t, H, D] to what is sent: 1 buffer, or 3
    exchange    the all-to-all of q, k, v
    unpack      the received output to [t, Hq, D]
    gradients   those of q, k, v [T, h, D], joined into what is sent where it is one buffer; then from what is received
                to [t, H, D], copies of key heads summed
    forward     pack, exchange, exchange of the output, unpack; `both`: and all of it backward

    least bytes of a rank:  pack, gradients  t D e (Hq + 2 Hkv + W)     unpack  2 t D e Hq     (+ 2 t D e with angles)
    W = sum over ranks of hq + 2 hkv, e bytes per element; their limit is the rate of a copy, same device, same run

`gloo` is two processes of one machine (CPU only): all-to-alls through its memory. `emulated` is rank 0 of P = 2 .. 16
alone, an all-to-all being a copy on the device (ulysses_groups.py): all that a rank computes, and no network; what a
network would add is modelled, not measured (ulysses_links.py). Results and gradients are those of float64 before they
are timed; the bytes that ours sends are comm_bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import lm_inputs, ulysses_groups
from benchmarks.ulysses_groups import Copies
from benchmarks.ulysses_ways import COMPILED, OURS, PERMUTES, PLAIN, HeadWay, Problem, Truth, shard
from nova_kernels.ulysses import comm_bytes

SECONDS = {"cpu": 0.4, "cuda": 0.2}
PARTS = ("pack", "exchange", "unpack", "gradients")
LAYER = ("forward", "both")
SHAPES = {  # T, Hq, Hkv, D
    "cpu": (8192, 16, 4, 64),
    "cuda": (16384, 64, 8, 128),  # a layer of Llama 3 70B
    "quick": (64, 16, 4, 8),
}
RANKS = (8, 2, 4, 16)  # the first is the main one
GLOO_RANKS, GLOO_TOKENS = 2, 2048
WAYS = {way.name: way for way in (OURS, PLAIN, PERMUTES, COMPILED)}


def problems(device: str, quick: bool) -> Iterator[Problem]:
    tokens, heads, kv_heads, width = SHAPES["quick" if quick else device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (heads, kv_heads, width, dtype, device)
    if device == "cpu":
        for keys in (kv_heads, 1):
            yield Problem("gloo", GLOO_RANKS, min(tokens, GLOO_TOKENS), heads, keys, width, dtype, device)
    for ranks in RANKS:
        yield Problem("emulated", ranks, tokens, *shape)
    yield Problem("emulated", RANKS[0], tokens, *shape, rotated=True)


def cases(device: str, quick: bool) -> Iterator[tuple[HeadWay, str, Problem]]:
    for problem in problems(device, quick):
        for way in WAYS.values():
            if device == "cpu" and way.parts_only:
                continue  # the automatic choice is PyTorch's; what is compiled for a CPU moves no faster
            parts = ("exchange",) if problem.where == "gloo" else PARTS
            for step in (*parts, *LAYER):
                if not (way.parts_only and step in (*LAYER, "exchange")):
                    yield way, step, problem


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.getoption
    found = list(cases(options("--device"), options("--quick")))
    labels = [
        f"{problem.where}-{problem.ranks}-{problem.heads}x{problem.kv_heads}"
        f"{'-rotated' * problem.rotated}-{step}-{way.name}".replace(" ", "_")
        for way, step, problem in found
    ]
    metafunc.parametrize(("way", "step", "problem"), found, ids=labels)


@lru_cache(maxsize=1)
def truth(problem: Problem) -> Truth:
    return Truth(problem)


def prepare(name: str, step: str, problem: Problem, rank: int, group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """What a rank does in a step."""
    way, given = WAYS[name], shard(problem, rank)
    if step == "pack":
        run = way.prepared(way.pack)
        return lambda: run(*given.inputs, given, problem)
    if step == "exchange":
        buffers = way.pack(*given.inputs, given, problem)
        received = [torch.empty_like(buffer) for buffer in buffers]

        def exchange() -> list[Tensor]:
            for into, buffer in zip(received, buffers, strict=True):
                dist.all_to_all_single(into, buffer, group=group)
            return received

        return exchange
    if step == "unpack":
        run = way.prepared(way.unpack)
        return lambda: [run(given.out, given, problem)]
    if step == "gradients":
        run = way.prepared(way.gradients)
        return lambda: run(given.by_heads, given, problem)
    leaves = [x.detach().requires_grad_(step == "both") for x in given.inputs]

    def both() -> list[Tensor]:
        seen: list[Tensor] = []
        result = way.run(*leaves, given, problem, group, seen)
        gradients = torch.autograd.grad(result, leaves, given.by_out) if step == "both" else ()
        return [result, *seen, *gradients]

    return both if step == "both" else torch.no_grad()(both)


def check(found: list[Tensor], way: HeadWay, step: str, problem: Problem) -> dict[str, Any]:
    right = truth(problem)
    if step in ("pack", "exchange"):
        return lm_inputs.check(way.arrived(found, problem), right.arrived, way.tolerance)
    expected = {
        "unpack": [right.output],
        "gradients": right.gradients,
        "forward": [right.output, *right.arrived],
        "both": [right.output, *right.arrived, right.by_arrived, *right.gradients],
    }[step]
    return lm_inputs.check(found, expected, way.tolerance)


def least_bytes(step: str, problem: Problem) -> int | None:
    """Read and written by a rank, at least; None where it is more than one pass."""
    unit = problem.held * problem.width * problem.element
    sent = sum(block.width for block in problem.blocks)
    heads = problem.heads + 2 * problem.kv_heads
    if step in ("pack", "gradients"):
        return unit * (heads + sent + (2 if problem.rotated else 0))
    return {"exchange": 2 * unit * sent, "unpack": 2 * unit * problem.heads}.get(step)


def travelled(call: Callable[[], Any], way: HeadWay, step: str, problem: Problem, group: Copies) -> dict[str, int]:
    """Collectives of a call and the bytes they send to other ranks, as the group counts them."""
    group.collectives = group.sent_bytes = 0
    call()
    facts = {"collectives": group.collectives, "sent_bytes": group.sent_bytes}
    if way is OURS and step in LAYER:
        plans = problem.plan, problem.token_plan
        forward = comm_bytes(*plans, rank=0, head_dim=problem.width, element_size=problem.element).total
        expected = forward * (1 if step == "forward" else 2)
        assert group.sent_bytes == expected, f"{group.sent_bytes} bytes sent, comm_bytes says {expected}"
    return facts if step in ("exchange", *LAYER) else {}


@contextmanager
def group_finder() -> Iterator[Callable[[Problem], Any]]:
    """The group of a problem: one at a time, kept while problems ask for it."""
    with ExitStack() as stack:
        now: dict[str, Any] = {}

        def find(problem: Problem) -> Any:
            key = f"{problem.where} {problem.ranks}"
            if key not in now:
                now.clear()
                stack.close()
                make = ulysses_groups.gloo if problem.where == "gloo" else ulysses_groups.emulated
                now[key] = stack.enter_context(make(problem.ranks))
            return now[key]

        yield find


@pytest.fixture(scope="module")
def groups() -> Iterator[Callable[[Problem], Any]]:
    with group_finder() as find:
        yield find


def bench_ulysses(
    measure: Any, attempt: Any, groups: Callable[[Problem], Any], way: HeadWay, step: str, problem: Problem
) -> None:
    facts = {"impl": way.name, "package": way.package, "step": step, **problem.facts()}
    with attempt(ours=way.ours, **facts):
        group = groups(problem)
        if problem.where == "gloo":
            call = group.together(prepare, way.name, step, problem)
        else:
            call = prepare(way.name, step, problem, 0, group)
            facts |= travelled(call, way, step, problem, group)
        measure(
            call,
            check=lambda found: check(found, way, step, problem),
            seconds=SECONDS[problem.device],
            memory=problem.where != "gloo",
            bytes_moved=least_bytes(step, problem) if problem.where != "gloo" else None,
            **facts,
        )
