"""Attention of packed samples, each to itself: time and memory, forward and backward.

    pairs     sum over samples of L (L + 1) / 2: tokens and what they see
    forward   4 pairs Hq D FLOPs      scores and outputs
    both      14 pairs Hq D           and scores again, dv, dp, dq, dk

is what has to be computed; the limit is its time at 790 TFLOP/s on an H200 in bf16, and not stated elsewhere. What
computes pairs that nobody sees (a dense mask, padding) is charged for them by its time. Three rows of equally many
tokens: many short samples, a single long one, and a mixture, where half of the tokens are one sample's.

Extra memory is what a call needs beside its inputs and what it returns (memory.py). Outputs and gradients are within a
tolerance of float64 before they are timed, and their largest relative error is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention_peers, lm_inputs
from benchmarks.attention_peers import PADDED, Packed, cu_seqlens, pad, unpad
from benchmarks.ways import Way, ours
from nova_kernels import varlen_attention

SECONDS = {"cpu": 0.5, "cuda": 0.3}
STEPS = ("forward", "both")
FLOPS = {"forward": 4, "both": 14}  # per pair, query head and width
TOKENS = {"cpu": 2048, "cuda": 16384, "quick": 64}
HEADS = {"cpu": (8, 2, 64), "cuda": (32, 8, 128), "quick": (4, 2, 8)}  # queries, keys, width


def varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, **options: Any) -> Tensor:
    return varlen_attention(q, k, v, cu_seqlens=cu_seqlens(packed, "cpu"), max_seqlen=packed.longest, **options)


WAYS = (*ours(varlen, "flash", "torch_varlen", "reference", slow=()), *attention_peers.PEERS)


@dataclass(frozen=True)
class Problem:
    """One row of samples and the shapes of q [T, Hq, D], k and v [T, Hkv, D]."""

    row: str
    packed: Packed
    heads: int
    key_heads: int
    width: int
    dtype: torch.dtype

    def facts(self) -> dict[str, Any]:
        return {
            "case": self.row,
            "tokens": self.packed.tokens,
            "samples": len(self.packed.lengths),
            "heads": f"{self.heads} / {self.key_heads}",
            "width": self.width,
            "dtype": lm_inputs.name_of(self.dtype),
        }

    def limit_seconds(self, step: str) -> float | None:
        if self.packed.device != "cuda" or self.dtype != torch.bfloat16:
            return None
        peak = lm_inputs.PEAK.get(torch.cuda.get_device_name())
        return peak and FLOPS[step] * self.packed.pairs * self.heads * self.width / peak


def rows(tokens: int) -> dict[str, tuple[int, ...]]:
    """Lengths of the samples; the first is the main one."""
    halves = [tokens // 2**power for power in range(1, 7)]  # 1/2 .. 1/64
    return {
        "mixed": (*halves, tokens - sum(halves)),
        "many short": (tokens // 16,) * 16 if tokens < 16384 else (128,) * (tokens // 128),
        "one long": (tokens,),
    }


def problems(device: str, quick: bool) -> Iterator[Problem]:
    place = "quick" if quick else device
    heads, key_heads, width = HEADS[place]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for row, lengths in rows(TOKENS[place]).items():
        yield Problem(row, Packed(lengths, device), heads, key_heads, width, dtype)
    yield Problem("mixed", Packed(rows(TOKENS[place])["mixed"], device), heads, heads, width, dtype)


def cases(device: str, quick: bool) -> Iterator[tuple[Way, str, Problem]]:
    for problem in problems(device, quick):
        for way in WAYS:
            forward_only = way.run is attention_peers.flex and device == "cpu"  # it has no backward there
            yield from ((way, step, problem) for step in STEPS[: 1 if forward_only else 2])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.getoption
    found = list(cases(options("--device"), options("--quick")))
    labels = [
        f"{problem.row}-{problem.heads}x{problem.key_heads}-{step}-{way.name}".replace(" ", "_")
        for way, step, problem in found
    ]
    metafunc.parametrize(("way", "step", "problem"), found, ids=labels)


@lru_cache(maxsize=1)
def inputs(problem: Problem) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output."""
    random, device = lm_inputs.generator(problem.packed.device), problem.packed.device
    tokens, width = problem.packed.tokens, problem.width
    heads = (problem.heads, problem.key_heads, problem.key_heads, problem.heads)
    found = [torch.randn(tokens, count, width, generator=random, device=device).to(problem.dtype) for count in heads]
    return found[:3], found[3]


@lru_cache(maxsize=1)
def truth(problem: Problem) -> list[Tensor]:
    """The output and the gradients of q, k, v in float64, one head of one sample at a time."""
    given, upstream = inputs(problem)
    out, *gradients = (torch.zeros_like(x, dtype=torch.float64) for x in (upstream, *given))
    for part in problem.packed.parts:
        length = part.stop - part.start
        later = torch.ones(length, length, dtype=torch.bool, device=out.device).triu_(1)
        for head in range(problem.heads):
            key_head = head // (problem.heads // problem.key_heads)
            places = [(part, head), (part, key_head), (part, key_head)]
            q, k, v = (x[place].double().requires_grad_() for x, place in zip(given, places, strict=True))
            scores = (q @ k.t() * problem.width**-0.5).masked_fill(later, -torch.inf)
            found = scores.softmax(dim=-1) @ v
            by = torch.autograd.grad(found, (q, k, v), upstream[part, head].double())
            out[part, head] = found.detach()
            for gradient, place, one in zip(gradients, places, by, strict=True):
                gradient[place] += one
    return [out, *gradients]


def prepared(way: Way, step: str, problem: Problem) -> tuple[Callable[[], list[Tensor]], Callable[[Any], list[Tensor]]]:
    """The call of a step, and what brings its results back to the packed row."""
    given, upstream = inputs(problem)
    lay_out: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    back = lay_out
    if way.name.startswith(PADDED):
        lay_out, back = partial(pad, packed=problem.packed), partial(unpad, packed=problem.packed)
    leaves = [lay_out(x.detach()).requires_grad_(step == "both") for x in given]
    into = lay_out(upstream)

    def both() -> list[Tensor]:
        out = way.run(*leaves, problem.packed)
        return [out, *torch.autograd.grad(out, leaves, into)]

    call = both if step == "both" else torch.no_grad()(lambda: [way.run(*leaves, problem.packed)])
    return call, lambda found: [back(x) for x in found]


def bench_attention(measure: Any, attempt: Any, way: Way, step: str, problem: Problem) -> None:
    facts = {"impl": way.name, "package": way.package, "step": step, **problem.facts()}
    with attempt(ours=way.ours, **facts):
        call, back = prepared(way, step, problem)
        measure(
            call,
            check=lambda found: lm_inputs.check(back(found), truth(problem), way.tolerance),
            seconds=SECONDS[problem.packed.device],
            memory=True,
            limit_seconds=problem.limit_seconds(step),
            **facts,
        )
