"""Log-probabilities and cross-entropy from hidden states: time and memory, forward and backward.

    forward   1 product of 2 N V H FLOP             logits
    both      4                                     logits, logits again, gradients of hidden and weight
    frozen    3                                     without that of the weight

is what has to be computed where [N, V] is not held; the limit is their time at the peak rate, or the rate measured for
the very shapes (lm_inputs.py). Who holds [N, V] saves one product, so that its share of the limit may exceed 1.

Extra memory is what a call needs beside its inputs and what it returns (memory.py): the gradients are returned, a
weight's gradient in float32 that is returned in bf16 is extra. Results and gradients are within a tolerance of float64
before they are timed, and their largest relative error is recorded: ways that round logits to 16 bits are that far off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import lm_inputs, logprob_peers
from benchmarks.lm_inputs import HEADS, Layer, Size, sizes
from benchmarks.topk_kl_peers import reverse_kl
from benchmarks.ways import Way, ours
from nova_kernels import linear_cross_entropy, linear_logprobs

SECONDS = {"cpu": 0.2, "cuda": 0.3}
STEPS = ("both", "frozen", "forward")


def mean(hidden: Tensor, weight: Tensor, given: Layer, **options: Any) -> list[Tensor]:
    return [linear_cross_entropy(hidden, weight, given.targets, **options).mean()]


def tokens(hidden: Tensor, weight: Tensor, given: Layer, **options: Any) -> list[Tensor]:
    return [linear_logprobs(hidden, weight, given.targets, **options).logprobs]


def with_kl(hidden: Tensor, weight: Tensor, given: Layer, **options: Any) -> list[Tensor]:
    terms = linear_logprobs(hidden, weight, given.targets, ref=given.ref, **options)
    assert terms.kl is not None, "a KL was asked for"
    return [terms.logprobs, terms.kl]


BACKENDS = ("triton", "chunked", "reference")
WORK: dict[str, tuple[Way, ...]] = {
    "cross-entropy": (*ours(mean, *BACKENDS), *logprob_peers.MEANS),
    "logprobs": (*ours(tokens, *BACKENDS), *logprob_peers.TOKENS, logprob_peers.GRPO),
    "logprobs + kl": (*ours(with_kl, *BACKENDS), *logprob_peers.WITH_KL),
}


def cases(device: str, quick: bool) -> Iterator[tuple[str, Way, str, Size]]:
    """Everything at the main size; elsewhere what training does."""
    for size, main in sizes(HEADS, device, quick=quick):
        for work, ways in WORK.items():
            for way in ways:
                if way.fits(0, main=main, dtype=size.dtype) and (main or work != "logprobs"):
                    yield from (
                        (work, way, step, size) for step in (STEPS if main and not way.main_only else STEPS[:1])
                    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.getoption
    found = list(cases(options("--device"), options("--quick")))
    labels = [
        f"{size.rows}x{size.vocabulary}x{size.hidden}-{work}-{step}-{way.name}".replace(" ", "_")
        for work, way, step, size in found
    ]
    metafunc.parametrize(("work", "way", "step", "size"), found, ids=labels)


@lru_cache(maxsize=1)
def truth(work: str, size: Size) -> list[Tensor]:
    """Results and gradients in float64."""
    given = lm_inputs.layer(size)

    def terms(hidden: Tensor, weight: Tensor, part: slice) -> list[Tensor]:
        logits = hidden @ weight.t()
        results = [logits.log_softmax(dim=-1).gather(1, given.targets[part].unsqueeze(1)).squeeze(1)]
        if work == "logprobs + kl":
            kept = logits.gather(1, given.ref.ids[part].long())
            results.append(reverse_kl(kept, given.ref.values[part].double()))
        return results

    if work != "cross-entropy":
        return lm_inputs.truth(size, terms, upstream_of(work, given))
    logprobs, *gradients = lm_inputs.truth(size, terms, [torch.full_like(given.upstream, -1 / size.rows)])
    return [-logprobs.mean(), *gradients]


def upstream_of(work: str, given: Layer) -> list[Tensor]:
    if work == "cross-entropy":
        return [torch.ones((), device=given.hidden.device)]
    return [given.upstream, given.upstream.flip(0)][: 1 + (work == "logprobs + kl")]


def prepared(way: Way, work: str, size: Size, given: Layer) -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    """What is called, what flows into its backward, and what is right."""
    right = truth(work, size)
    if way is not logprob_peers.GRPO:
        return way.prepared(), upstream_of(work, given), right
    run = partial(way.run, logprobs=right[0].float())
    return run, [torch.ones((), device=size.device)], [-(-given.upstream).sum().double(), *right[1:]]


def bench_logprob(measure: Any, attempt: Any, work: str, way: Way, step: str, size: Size) -> None:
    facts = {"case": work, "impl": way.name, "package": way.package, "step": step, **size.facts()}
    with attempt(ours=way.ours, **facts):
        given = lm_inputs.layer(size)
        run, upstream, right = prepared(way, work, size, given)
        forward, by_hidden, by_weight = lm_inputs.product_seconds(size)
        limits = {"forward": forward, "frozen": 2 * forward + by_hidden, "both": 2 * forward + by_hidden + by_weight}
        measure(
            lm_inputs.stepped(lambda hidden, weight: run(hidden, weight, given), given, step, upstream),
            check=lambda found: lm_inputs.check(found, right, way.tolerance),
            seconds=SECONDS[size.device],
            memory=True,
            limit_seconds=limits[step],
            **facts,
        )
