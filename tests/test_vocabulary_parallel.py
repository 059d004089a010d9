"""A vocabulary split over two processes gives what one process gives: values, gradients, selection, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nova_kernels import (
    TopK,
    linear_cross_entropy,
    linear_logprobs,
    linear_topk_kl_div,
    linear_topk_select,
    topk_select,
)
from nova_kernels.lm_head import parallel
from processes import on_ranks

ROWS, WIDTH, VOCABULARY, SPLIT, K = 13, 7, 41, 17, 20  # K is more than the first rank has
TARGETS = torch.arange(ROWS) * 3 % 16
TARGETS[[2, 5]] = -100
MASK = TARGETS != -100
HEADS: dict[str, dict[str, float]] = {
    "plain": {},
    "softcap": {"softcap": 2.0, "temperature": 0.7},
    "padded": {"vocab_size": 37},
    "second-rank-empty": {"vocab_size": SPLIT - 1, "temperature": 1.3},
}


def make() -> tuple[Tensor, ...]:
    """hidden, weight, bias, the reference's hidden; ties across the ranks and an id that is impossible."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,), (ROWS, WIDTH))
    hidden, weight, bias, other = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    weight[SPLIT + 1], bias[SPLIT + 1] = weight[4], bias[4]
    bias[SPLIT + 2] = -math.inf
    return hidden, weight, bias, other


def results(
    part: slice, group: dist.ProcessGroup | None, head: dict[str, float], tail: str, direction: str
) -> list[Tensor]:
    """Every op on these rows of the weight; gradients of weight and bias are those of the part."""
    hidden, weight, bias, other = make()
    weight, bias = weight[part].clone(), bias[part].clone()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    split = {"bias": bias, "group": group, "vocab_start": part.start, **head}
    k = min(K, int(head.get("vocab_size", VOCABULARY)) - 1)
    ref = linear_topk_select(other, weight, k, mask=MASK, **split)
    terms = linear_logprobs(hidden, weight, TARGETS, ref=ref, direction=direction, tail=tail, **split)
    loss = linear_cross_entropy(hidden, weight, TARGETS, **split)
    found: list[Tensor] = [ref.ids, ref.values, ref.lse, *(term for term in terms if term is not None), loss]
    upstream = torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)
    for term in (terms.logprobs, terms.kl, loss):
        assert term is not None
        found += torch.autograd.grad(term, leaves, upstream, retain_graph=True)
    for backend in ("dense", "union", "gather") if tail == "none" else ("dense",):
        options = {"mask": MASK, "direction": direction, "tail": tail, "backend": backend}
        kl = linear_topk_kl_div(hidden, weight, ref, **options, **split)
        found += [kl, *torch.autograd.grad(kl, leaves, upstream)]
    return [x.detach() for x in found]


def selections(part: slice, group: dist.ProcessGroup | None) -> list[Tensor]:
    """topk_select of logits with ties, NaN and -inf across the ranks."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(0, 4, (6, VOCABULARY), generator=generator).float()
    logits[1], logits[2, 3:30], logits[3, [5, 33]] = 1.0, -math.inf, math.nan
    found: list[Tensor] = []
    for vocab_size in (None, SPLIT + 1, SPLIT) if group is not None else (VOCABULARY, SPLIT + 1, SPLIT):
        k = K if vocab_size in (None, VOCABULARY) else 9  # the second rank has one column, or none
        top: TopK = topk_select(
            logits[:, part].contiguous(), k, group=group, vocab_start=part.start, vocab_size=vocab_size
        )
        found += [top.ids, top.values, top.lse]
    return found


def refusals(part: slice, group: dist.ProcessGroup) -> list[str]:
    """What is said of values that no rank has."""
    hidden, weight, _, other = make()
    said = []
    ref = linear_topk_select(other, weight[part], K, group=group, vocab_start=part.start)
    beyond = TopK(ids=ref.ids + 5, values=ref.values, lse=ref.lse)
    calls: list[Callable[[], object]] = [
        lambda: linear_logprobs(
            hidden, weight[part], TARGETS + 30, ignore_index=-70, group=group, vocab_start=part.start
        ),
        lambda: linear_topk_kl_div(hidden, weight[part], beyond, group=group, vocab_start=part.start),
        lambda: linear_topk_select(hidden, weight[part], 200, group=group, vocab_start=part.start),
        lambda: linear_logprobs(hidden, weight[part], TARGETS, vocab_start=3),
        lambda: linear_topk_kl_div(hidden, weight[part], ref, group=group, vocab_start=part.start, vocab_size=13),
        # all of the second rank is padding
        lambda: linear_logprobs(hidden, weight[part], TARGETS, group=group, vocab_start=part.start, vocab_size=9),
    ]
    for call in calls:
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def cases() -> list[tuple[str, str, str]]:
    return [
        (name, tail, direction)
        for name in HEADS
        for tail, direction in (("none", "policy_ref"), ("bucket", "ref_policy"))
    ]


def on_rank() -> dict:
    dist.init_process_group("gloo")
    part = slice(0, SPLIT) if dist.get_rank() == 0 else slice(SPLIT, VOCABULARY)
    group = dist.group.WORLD
    assert group is not None
    found = {case: results(part, group, HEADS[case[0]], *case[1:]) for case in cases()}
    return {"results": found, "selections": selections(part, group), "refusals": refusals(part, group)}


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return on_ranks(2, on_rank)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_two_processes_equal_one(ranks: list[dict], case: tuple[str, str, str]) -> None:
    expected = results(slice(0, VOCABULARY), None, HEADS[case[0]], *case[1:])
    for rank, found in enumerate(ranks):
        part = slice(0, SPLIT) if rank == 0 else slice(SPLIT, VOCABULARY)
        for actual, wanted in zip(found["results"][case], expected, strict=True):
            own = wanted[part] if len(wanted) == VOCABULARY else wanted
            torch.testing.assert_close(actual, own, rtol=1e-10, atol=1e-12)


def test_selection_over_ranks_is_the_stable_sort(ranks: list[dict]) -> None:
    expected = selections(slice(0, VOCABULARY), None)
    for rank in ranks:
        for index, (found, wanted) in enumerate(zip(rank["selections"], expected, strict=True)):
            exact = {} if index % 3 == 2 else {"rtol": 0, "atol": 0}  # the log-sum-exp is merged
            torch.testing.assert_close(found, wanted, equal_nan=True, **exact)


def test_refusals_over_ranks(ranks: list[dict]) -> None:
    for found in ranks:
        outside, beyond, k, start, too_many, padding = found["refusals"]
        assert "target 44 is outside the vocabulary of 41" in outside
        assert "reference id 45 is beyond the policy's vocabulary of 41" in beyond
        assert "k must not exceed the vocabulary of 41, got 200" in k and "vocab_start 3 without a group" in start
        assert "k must not exceed the vocabulary of 13, got 20" in too_many
        assert "is outside the vocabulary of 9" in padding


def test_parts_of_a_vocabulary_merge() -> None:
    """Also where a part is empty, or all of it is impossible."""
    logits = torch.randn(3, 20, dtype=torch.float64)
    logits[1, 7:12], logits[2] = -math.inf, -math.inf
    parts = [logits[:, :7], logits[:, 7:12], logits[:, 12:]]
    maximum = torch.stack([part.amax(1) for part in parts])
    shifted = [
        part - peak.masked_fill(peak == -math.inf, 0).unsqueeze(1) for part, peak in zip(parts, maximum, strict=True)
    ]
    total = torch.stack([part.exp().sum(1) for part in shifted])
    weighted = torch.stack([(part.exp() * part.clamp(min=-1e300)).sum(1) for part in shifted])
    m, s, w = parallel.merge_blocks(maximum, total, weighted)
    log_p = logits[:2].log_softmax(1)
    torch.testing.assert_close((m + s.log())[:2], logits[:2].logsumexp(1))
    entropy = -(log_p.exp() * log_p.clamp(min=-1e300)).sum(1)
    torch.testing.assert_close((s.log() - w / s)[:2], entropy)
    assert m[2] == -math.inf and s[2] == 0 and w[2] == 0
