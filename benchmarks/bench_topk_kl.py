"""Top-K KL: selecting the K largest logits, the KL and its gradient from logits, and the same from hidden states.

Bytes that have to move, with e bytes per logit and s bytes fetched at least for one (CUDA: a sector of 32; CPU: a cache
line of 64), counted for the ids at hand (neighbours share a fetch):

    select      N V e + N (8 K + 4)                    read the logits; write ids, values, log-sum-exp
    forward     fetched logits s + 8 N K + 4 N         the reference's ids and values, the KL
    sparse      forward + 4 N K                        and dKL / d(kept logits)
    dense       forward + N V e                        and a dense gradient; the kept ones need not be held
    selected inside                                    the select's N V e besides, and the values stay inside

Products from hidden states, 2 N V H each: forward 1, gradients of hidden and weight 3, of hidden alone 2. `union` and
`gather` do less work than that, so that their share of the limit may exceed 1.

Steps: `forward`; `sparse`, the forward with its gradient by the kept logits, as training keeps it; `dense`, forward and
backward to a gradient of all logits; `both`, forward and backward to hidden and weight; `frozen`, to hidden alone.
Selections are equal to a stable sort on 64 rows and to torch.topk's values on all; everything else is within a
tolerance of float64, and its relative error is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import lm_inputs, topk_kl_peers
from benchmarks.lm_inputs import BF16, FP32, HEADS, LARGE, MEDIUM, SMALL, Size, distance, sizes, two_digits
from benchmarks.ways import Way, ours
from nova_kernels import TopK, linear_topk_kl_div, topk_kl_div, topk_kl_div_from_logits, topk_select

FETCHED = {"cpu": 64, "cuda": 32}  # bytes
STEPS = ("forward", "sparse", "dense")  # from logits
SECONDS = {"cpu": 0.2, "cuda": 0.3}
FULL_CHECK = 64  # rows

LOGITS = {  # rows, vocabulary, dtype; the first is the main one
    "cpu": [(64, SMALL, FP32), (64, SMALL, BF16), (32, LARGE, FP32)],
    "cuda": [(8192, LARGE, BF16), (8192, LARGE, FP32)]
    + [(n, LARGE, BF16) for n in (256, 2048, 32768)]
    + [(8192, v, BF16) for v in (SMALL, MEDIUM)],
}


SELECTORS = (*ours(topk_select, "cuda", "triton", "threshold", "reference"), *topk_kl_peers.SELECTORS)
DIVERGENCES = (*ours(topk_kl_div, "triton", "sparse", "reference"), *topk_kl_peers.DIVERGENCES)
FROM_LOGITS = (
    *ours(topk_kl_div_from_logits, "cuda", "triton", "sparse", "reference"),
    Way("torch.topk, gathered logits", topk_kl_peers.selected_inside, tolerance=0.05),
)
LINEAR = (*ours(linear_topk_kl_div, "dense", "union", "gather", "reference"), *topk_kl_peers.HEADS)


def select_cases(device: str, quick: bool) -> Iterator[tuple[Any, ...]]:
    for size, main in sizes(LOGITS, device, quick=quick):
        every = main or (device == "cuda" and size.rows == 8192 and size.vocabulary == LARGE)
        for kind in lm_inputs.LOGITS if every else lm_inputs.LOGITS[:1]:
            yield from ((way, kind, size) for way in SELECTORS if not way.main_only or (main and kind == "narrow"))


def divergence_cases(device: str, quick: bool) -> Iterator[tuple[Any, ...]]:
    for size, main in sizes(LOGITS, device, quick=quick):
        for way in DIVERGENCES:
            by_kept = way.ours or way.run is topk_kl_peers.gathered
            for step in STEPS if main else STEPS[1:]:
                if way.fits(0, main=main, dtype=size.dtype) and (step != "sparse" or by_kept):
                    yield way, step, size


def from_logits_cases(device: str, quick: bool) -> Iterator[tuple[Any, ...]]:
    for size, main in sizes(LOGITS, device, quick=quick):
        for way in FROM_LOGITS:
            for step in STEPS[2:] if way.main_only else STEPS if main else STEPS[:1]:
                if way.fits(0, main=main, dtype=size.dtype) and (step != "sparse" or way.ours):
                    yield way, step, size


def linear_cases(device: str, quick: bool) -> Iterator[tuple[Any, ...]]:
    for size, main in sizes(HEADS, device, quick=quick):
        for way in LINEAR:
            held = size.rows * size.k * size.hidden if way.run is topk_kl_peers.head_rows else 0
            if way.fits(held, main=main, dtype=size.dtype):
                steps = ("both", "frozen", "forward") if main else ("both", "frozen")
                yield from ((way, step, size) for step in (steps[:1] if way.main_only else steps))


CASES = {
    "bench_select": select_cases,
    "bench_divergence": divergence_cases,
    "bench_from_logits": from_logits_cases,
    "bench_linear": linear_cases,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.getoption
    cases = list(CASES[metafunc.function.__name__](options("--device"), options("--quick")))
    labels = [
        f"{size.rows}x{size.vocabulary}x{size.hidden}-{lm_inputs.name_of(size.dtype)}-{what}-{way.name}".replace(
            " ", "_"
        )
        for way, what, size in cases
    ]
    name = "kind" if metafunc.function is bench_select else "step"
    metafunc.parametrize(("way", name, "size"), cases, ids=labels)


def facts_of(case: str, way: Way, size: Size, **more: Any) -> dict[str, Any]:
    return {"case": case, "impl": way.name, "package": way.package, **more, **size.facts()}


# Selection


@lru_cache(maxsize=1)
def selected(kind: str, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are looked at closely, their ids by a stable sort, and all rows' values, descending."""
    x = logits_of(kind, size)
    rows = torch.cat([torch.arange(size.rows)[: FULL_CHECK // 2], torch.arange(size.rows)[-FULL_CHECK // 2 :]])
    rows = rows.unique().to(size.device)
    order = x[rows].float().sort(dim=-1, descending=True, stable=True).indices
    values = torch.cat([x[part].topk(size.k, dim=-1).values.float() for part in size.parts()])
    return rows, order[:, : size.k].sort(dim=-1).values, values


def logits_of(kind: str, size: Size) -> Tensor:
    return lm_inputs.logits(kind, size.rows, size.vocabulary, size.dtype, size.device)


def check_selection(found: TopK | tuple[Tensor, Tensor], kind: str, size: Size) -> None:
    x = logits_of(kind, size)
    rows, right, largest = selected(kind, size)
    ids, values = (found.ids, found.values) if isinstance(found, TopK) else found
    assert torch.equal(values.float().sort(dim=-1, descending=True).values, largest), "not the largest values"
    if isinstance(found, TopK):
        assert torch.equal(ids[rows].long(), right), "not the ids of a stable sort"
        assert torch.equal(x.gather(1, ids.long()).float(), values), "values of other ids"
        lse = x[rows].double().logsumexp(dim=-1)
        assert distance(found.lse[rows], lse) < 1e-5, "another log-sum-exp"


def bench_select(measure: Any, attempt: Any, way: Way, kind: str, size: Size) -> None:
    facts = facts_of("select", way, size, logits=kind)
    with attempt(ours=way.ours, **facts):
        x = logits_of(kind, size)
        measure(
            lambda: way.run(x, size.k),
            check=lambda found: check_selection(found, kind, size),
            seconds=SECONDS[size.device],
            memory=True,
            bytes_moved=size.rows * (size.vocabulary * x.element_size() + 8 * size.k + 4),
            **facts,
        )


# From logits


@lru_cache(maxsize=1)
def pair(size: Size) -> tuple[Tensor, Tensor, TopK, Tensor]:
    """Policy logits, the reference's close to them, its top K, upstream gradients."""
    policy = logits_of("zipf", size)
    random = lm_inputs.generator(size.device)
    near = torch.empty_like(policy)
    for part in size.parts():
        noise = torch.randn(policy[part].shape, generator=random, device=size.device)
        near[part].copy_(policy[part] + 0.3 * noise)
    upstream = torch.randn(size.rows, generator=random, device=size.device)
    return policy, near, topk_select(near, size.k), upstream


@lru_cache(maxsize=1)
def divergence_truth(size: Size) -> tuple[Tensor, Tensor]:
    """KL [N] and its gradient by the kept logits [N, K], before the upstream gradient, in float64."""
    policy, _, ref, _ = pair(size)
    kept = policy.gather(1, ref.ids.long()).double().requires_grad_()
    kl = topk_kl_peers.reverse_kl(kept, ref.values.double())
    return kl.detach(), torch.autograd.grad(kl.sum(), kept)[0]


def divergence_bytes(size: Size, step: str, *, selects: bool) -> int:
    policy, _, ref, _ = pair(size)
    width = policy.element_size()
    fetch = ref.ids // (FETCHED[size.device] // width)
    fetched = size.rows + int((fetch.diff(dim=1) != 0).sum())
    moved = fetched * FETCHED[size.device] + 8 * size.rows * size.k + 4 * size.rows
    moved += {"forward": 0, "sparse": 4 * size.rows * size.k, "dense": policy.numel() * width}[step]
    return moved + (policy.numel() * width - 4 * size.rows * size.k if selects else 0)


def square_norm(values: Tensor, size: Size) -> float:
    return sum(float(values[part].double().square().sum()) for part in size.parts())


def check_divergence(found: Any, size: Size, step: str, tolerance: float) -> dict[str, Any]:
    _, _, ref, upstream = pair(size)
    kl, by_kept = divergence_truth(size)
    if step != "dense":
        error = distance(found[0] if isinstance(found, tuple) else found, kl)
    else:
        right = by_kept * upstream.unsqueeze(1)
        inside = found[1].gather(1, ref.ids.long())
        error = distance(inside, right)
        outside = square_norm(found[1], size) - square_norm(inside, size)
        error += max(0.0, outside) ** 0.5 / float(right.norm())
        tolerance = lm_inputs.allowed(found[1], tolerance)
    assert error <= tolerance, f"error {error:.1e} relative to float64, above {tolerance}"
    return {"error": two_digits(error)}


def stepped(run: Callable[[Tensor], Tensor], policy: Tensor, step: str, upstream: Tensor) -> Callable[[], Any]:
    if step == "forward":
        return torch.no_grad()(lambda: run(policy))
    leaf = policy.detach().requires_grad_()
    if step == "sparse":
        return lambda: run(leaf)

    def call() -> tuple[Tensor, Tensor]:
        kl = run(leaf)
        return kl, torch.autograd.grad(kl, leaf, upstream)[0]

    return call


def bench_divergence(measure: Any, attempt: Any, way: Way, step: str, size: Size) -> None:
    facts = facts_of("kl", way, size, step=step)
    with attempt(ours=way.ours, **facts):
        policy, _, ref, upstream = pair(size)
        if step == "sparse" and not way.ours:
            call = partial(topk_kl_peers.by_kept, way.prepared(topk_kl_peers.reverse_kl), policy, ref)
        else:
            run = way.prepared()
            call = stepped(lambda x: run(x, ref), policy, step, upstream)
        measure_divergence(measure, call, way, step, size, facts, selects=False)


def bench_from_logits(measure: Any, attempt: Any, way: Way, step: str, size: Size) -> None:
    facts = facts_of("kl, selected inside", way, size, step=step)
    with attempt(ours=way.ours, **facts):
        policy, near, _, upstream = pair(size)
        run = way.prepared()
        call = stepped(lambda x: run(x, near, size.k), policy, step, upstream)
        measure_divergence(measure, call, way, step, size, facts, selects=True)


def measure_divergence(
    measure: Any, call: Callable[[], Any], way: Way, step: str, size: Size, facts: dict[str, Any], *, selects: bool
) -> None:
    measure(
        call,
        check=lambda found: check_divergence(found, size, step, way.tolerance),
        seconds=SECONDS[size.device],
        memory=True,
        bytes_moved=divergence_bytes(size, step, selects=selects),
        **facts,
    )


# From hidden states


@lru_cache(maxsize=1)
def linear_truth(size: Size) -> list[Tensor]:
    given = lm_inputs.layer(size)

    def terms(hidden: Tensor, weight: Tensor, part: slice) -> list[Tensor]:
        kept = (hidden @ weight.t()).gather(1, given.ref.ids[part].long())
        return [topk_kl_peers.reverse_kl(kept, given.ref.values[part].double())]

    return lm_inputs.truth(size, terms, [given.upstream])


def bench_linear(measure: Any, attempt: Any, way: Way, step: str, size: Size) -> None:
    facts = facts_of("linear kl", way, size, step=step)
    with attempt(ours=way.ours, **facts):
        given = lm_inputs.layer(size)
        run = way.prepared()
        call = lm_inputs.stepped(lambda h, w: [run(h, w, given.ref)], given, step, [given.upstream])
        forward, by_hidden, by_weight = lm_inputs.product_seconds(size)
        limits = {"forward": forward, "frozen": forward + by_hidden, "both": forward + by_hidden + by_weight}
        measure(
            call,
            check=lambda found: lm_inputs.check(found, linear_truth(size), way.tolerance),
            seconds=SECONDS[size.device],
            memory=True,
            limit_seconds=limits[step],
            union_share=given.union_share,
            **facts,
        )
