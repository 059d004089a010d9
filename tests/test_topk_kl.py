"""topk_kl: selection against a sort in Python, KL against its plain formula in float64, every rule at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nova_kernels.topk_kl import (
    TopK,
    topk_kl_div,
    topk_kl_div_from_logits,
    topk_kl_metrics,
    topk_select,
)
from numerics import assert_as_accurate

INF = math.inf
BACKENDS = pytest.mark.parametrize("backend", ["threshold", "reference"])
DIRECTIONS = pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
TAILS = pytest.mark.parametrize("tail", ["none", "bucket"])
SHAPES = pytest.mark.parametrize(
    ("num_rows", "vocabulary", "k"),
    [
        pytest.param(40, 3, 2, id="narrowest"),
        pytest.param(1, 29, 4, id="one-row"),
        pytest.param(7, 41, 41, id="everything-kept"),
        pytest.param(5, 4097, 50, id="V-one-past-a-block"),
        pytest.param(31, 257, 17, id="odd"),
    ],
)


def make_inputs(num_rows: int, vocabulary: int, *, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Policy and reference logits, float64, Gumbel; the policy is the reference with noise."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_rows, vocabulary, generator=generator, dtype=torch.float64)
    ref = -torch.log(-torch.log(uniform))
    return ref + noise * torch.randn(num_rows, vocabulary, generator=generator, dtype=torch.float64), ref


def plain_kl(policy: Tensor, ref: Tensor, k: int, temperature: float, direction: str, tail: str) -> Tensor:
    """The textbook sum, by autograd, in the dtype of the inputs."""
    ids = ref.topk(k).indices
    log_p, log_r = (torch.log_softmax(z / temperature, -1) for z in (policy, ref))
    log_p, log_r = log_p.gather(-1, ids), log_r.gather(-1, ids)
    if tail == "none":
        log_p, log_r = log_p - log_p.logsumexp(-1, keepdim=True), log_r - log_r.logsumexp(-1, keepdim=True)
    else:
        log_p, log_r = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (log_p, log_r))
    if direction == "ref_policy":
        log_p, log_r = log_r, log_p
    return (log_p.exp() * (log_p - log_r)).sum(-1)


def select_by_sorting(row: list[float], k: int) -> list[int]:
    order = sorted((i for i, x in enumerate(row) if x != -INF), key=lambda i: (not math.isnan(row[i]), -row[i], i))
    kept = sorted(order[:k])
    return kept + [-1] * (k - len(kept))


# --- selection


@BACKENDS
@SHAPES
def test_select_is_the_sorted_top(backend: str, num_rows: int, vocabulary: int, k: int) -> None:
    _, logits = make_inputs(num_rows, vocabulary)
    for sample in (logits, logits.float(), logits.bfloat16(), logits.round()):  # bfloat16 and round: many ties
        top = topk_select(sample, k, temperature=0.7, backend=backend)
        assert top.ids.tolist() == [select_by_sorting(row, k) for row in sample.tolist()]
        assert top.values.dtype == top.lse.dtype == (torch.float64 if sample.dtype == torch.float64 else torch.float32)
        assert torch.equal(top.values.double(), sample.double().gather(1, top.ids.long()))
        assert_as_accurate(top.lse.float(), (sample.float() / 0.7).logsumexp(-1), (sample.double() / 0.7).logsumexp(-1))


@BACKENDS
@pytest.mark.parametrize(
    "row",
    [
        pytest.param([1.0] * 6, id="all-equal"),
        pytest.param([0.0, -0.0, 0.0, -0.0, -1.0, 5.0], id="signed-zeros-tie"),
        pytest.param([-INF, 2.0, -INF, 1.0, -INF, -INF], id="fewer-than-k"),
        pytest.param([-INF] * 6, id="nothing"),
        pytest.param([-INF, 1.0, 1.0, 1.0, 1.0, 1.0], id="ties-above-minus-infinity"),
        pytest.param([1.0, INF, math.nan, INF, INF, 2.0], id="nan-above-infinity"),
        pytest.param([math.nan] * 5 + [9.0], id="more-nan-than-k"),
    ],
)
def test_select_edges(backend: str, row: list[float]) -> None:
    """Also beside rows that have no edge, so that a count over the whole block proves nothing."""
    plain = [3.0, 2.0, 1.0, 0.0, -1.0, -2.0]
    for k in (4, 6):
        top = topk_select(torch.tensor([plain, row, plain]), k, backend=backend)
        assert top.ids.tolist() == [select_by_sorting(r, k) for r in (plain, row, plain)]
        expected = [row[i] if i >= 0 else -INF for i in top.ids[1].tolist()]
        torch.testing.assert_close(top.values[1], torch.tensor(expected), equal_nan=True, rtol=0, atol=0)


def test_select_counts_cancel_between_rows() -> None:
    """One row short by a NaN, the next long by a tie: K entries a row on average."""
    rows = [[math.nan, 5.0, 4.0, 3.0], [1.0, 1.0, 1.0, 0.0], [9.0, 8.0, 7.0, 6.0]]
    assert topk_select(torch.tensor(rows), 2).ids.tolist() == [[0, 1], [0, 1], [0, 1]]


def test_select_shapes_and_padding() -> None:
    logits = make_inputs(6, 12)[1].reshape(2, 3, 12)
    top = topk_select(logits, 4, vocab_size=9, temperature=2.0)
    assert top.ids.shape == (2, 3, 4) and top.lse.shape == (2, 3) and top.temperature == 2.0 and top.k == 4
    assert torch.equal(top.ids, topk_select(logits[..., :9], 4).ids)
    assert torch.equal(top[1].ids, top.reshape(6)[3:].ids)
    assert topk_select(logits[0, 0], 4).ids.shape == (4,)
    empty = topk_select(torch.zeros(0, 12), 4)
    assert empty.ids.shape == (0, 4) and empty.lse.shape == (0,)
    assert not topk_select(logits.requires_grad_(), 4).values.requires_grad


@pytest.mark.gpu
@BACKENDS
def test_select_on_a_gpu(backend: str) -> None:
    zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0, 5.0], [-INF, 2.0, -INF, 1.0, math.nan, -INF]])
    for logits, k in ((zeros, 4), (make_inputs(31, 257)[1].bfloat16(), 17)):
        actual, expected = topk_select(logits.cuda(), k, backend=backend), topk_select(logits, k)
        assert torch.equal(actual.ids.cpu(), expected.ids)


# --- KL from logits


@DIRECTIONS
@TAILS
@SHAPES
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_kl_accuracy(num_rows: int, vocabulary: int, k: int, direction: str, tail: str, temperature: float) -> None:
    if k == vocabulary and tail == "bucket":
        pytest.skip("the plain formula takes the logarithm of an empty bucket")
    policy, ref = make_inputs(num_rows, vocabulary)
    policy, ref = policy.float(), ref.float()
    upstream = torch.linspace(0.5, 1.5, num_rows)

    def run(dtype: torch.dtype, plain: bool) -> tuple[Tensor, Tensor]:
        z, v = policy.to(dtype).requires_grad_(), ref.to(dtype)
        if plain:
            kl = plain_kl(z, v, k, temperature, direction, tail)
        else:
            kl = topk_kl_div_from_logits(z, v, k, temperature=temperature, direction=direction, tail=tail)
        return kl.detach(), torch.autograd.grad((kl * upstream.to(dtype)).sum(), z)[0]

    truth = run(torch.float64, True)
    for actual, peer, exact in zip(run(torch.float32, False), run(torch.float32, True), truth, strict=True):
        # The bucket is what a log-sum-exp, rounded to float32 when it was stored, leaves: a digit the plain sum has.
        assert_as_accurate(actual, peer, exact, slack=2.0 if tail == "none" else 4.0)
    for actual, exact in zip(run(torch.float64, False), truth, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-12)


@DIRECTIONS
@TAILS
def test_kl_gradcheck(direction: str, tail: str) -> None:
    policy, ref = make_inputs(4, 9)
    top = topk_select(ref, 5, temperature=0.8)
    options = {"temperature": 0.8, "direction": direction, "tail": tail}
    policy[0, top.ids[0].long()] = ref[0, top.ids[0].long()] + torch.linspace(-0.004, 0.004, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: topk_kl_div(z, top, **options), policy.requires_grad_())


@DIRECTIONS
@TAILS
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_kl_is_never_negative_and_right_near_zero(noise: float, direction: str, tail: str) -> None:
    """Where the textbook sum in float32 is negative in half of the rows, and has lost every digit."""
    policy, ref = (x.float() for x in make_inputs(200, 300, noise=noise))
    ref += 20
    top = topk_select(ref, 100)
    kl = topk_kl_div(policy + 20, top, direction=direction, tail=tail)
    truth = topk_kl_div((policy + 20).double(), topk_select(ref.double(), 100), direction=direction, tail=tail)
    assert (kl >= 0).all()
    if tail == "none":
        assert ((kl - truth).norm() / truth.norm()) < 2e-3
    assert (topk_kl_div(ref, top, direction=direction, tail=tail) == 0).all()


def test_kl_invariances() -> None:
    policy, ref = make_inputs(6, 40)
    kl = topk_kl_div_from_logits(policy, ref, 10)
    shifted = topk_kl_div_from_logits(policy + 3, ref - 5, 10)
    torch.testing.assert_close(shifted, kl, rtol=1e-12, atol=0)
    order = torch.randperm(40)
    torch.testing.assert_close(topk_kl_div_from_logits(policy[:, order], ref[:, order], 10), kl, rtol=1e-12, atol=0)
    leaf = policy.clone().requires_grad_()
    (grad,) = torch.autograd.grad(topk_kl_div_from_logits(leaf, ref, 10).sum(), leaf)
    assert grad.sum(-1).abs().max() < 1e-14 and (grad != 0).sum(-1).eq(10).all()


@DIRECTIONS
def test_bucket_rises_to_the_full_kl(direction: str) -> None:
    """Merging tokens into a bucket loses information: the more tokens kept, the larger the KL."""
    policy, ref = make_inputs(20, 64)
    full = plain_kl(policy, ref, 64, 1.0, direction, "none")
    values = [topk_kl_div_from_logits(policy, ref, k, direction=direction, tail="bucket") for k in (2, 8, 32, 60)]
    for smaller, larger in zip(values, [*values[1:], full], strict=True):
        assert (smaller <= larger + 1e-12).all()


def test_mass_that_leaves_the_kept_ids_is_seen_by_the_bucket_alone() -> None:
    ref = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    policy = ref + torch.tensor([0.0, 0.0, 0.0, 9.0, 9.0])
    assert topk_kl_div_from_logits(policy, ref, 3).item() == 0
    assert topk_kl_div_from_logits(policy, ref, 3, tail="bucket").item() > 1
    metrics = topk_kl_metrics(policy, topk_select(ref, 3))
    assert metrics.policy_mass.item() < 0.01 and metrics.ref_mass.item() > 0.9
    assert metrics.overlap.item() == pytest.approx(1 / 3)


@DIRECTIONS
@TAILS
def test_policy_without_a_kept_token(direction: str, tail: str) -> None:
    """A policy logit of -inf: p = 0, term r, gradient 0; the other direction is infinite."""
    ref = torch.tensor([[2.0, 1.0, 0.0, -3.0]], dtype=torch.float64)
    policy = torch.tensor([[2.0, -INF, 0.5, -3.0]], dtype=torch.float64, requires_grad=True)
    kl = topk_kl_div_from_logits(policy, ref, 3, direction=direction, tail=tail)
    (grad,) = torch.autograd.grad(kl.sum(), policy)
    if direction == "ref_policy":
        assert kl.item() == INF
        return
    assert 0 < kl.item() < INF and grad.isfinite().all() and grad[0, 1] == 0
    limit = torch.tensor([[2.0, -50.0, 0.5, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(kl, topk_kl_div_from_logits(limit, ref, 3, direction=direction, tail=tail))


def test_policy_without_a_token_that_the_reference_hardly_has() -> None:
    ref = torch.tensor([[0.0, -300.0, -1.0]])
    policy = torch.tensor([[0.0, -INF, -1.0]])
    assert topk_kl_div_from_logits(policy, ref, 3, direction="ref_policy").item() == INF
    assert topk_kl_div_from_logits(policy, ref, 3).item() == 0


@DIRECTIONS
@TAILS
def test_unused_slots_count_nowhere(direction: str, tail: str) -> None:
    policy, ref = make_inputs(3, 8)
    ref[1, [0, 2, 3, 5, 6]] = -INF
    top = topk_select(ref, 5)
    assert top.ids[1].tolist() == [1, 4, 7, -1, -1]
    leaf = policy.clone().requires_grad_()
    kl = topk_kl_div(leaf, top, direction=direction, tail=tail)
    (grad,) = torch.autograd.grad(kl.sum(), leaf)
    alone = policy[1:2, [1, 4, 7]] if tail == "none" else policy[1:2]
    ids, values = (top.ids[1:2, :3], top.values[1:2, :3])
    ids = torch.arange(3, dtype=torch.int32).unsqueeze(0) if tail == "none" else ids
    short = TopK(ids=ids, values=values, lse=top.lse[1:2])
    torch.testing.assert_close(kl[1:2], topk_kl_div(alone, short, direction=direction, tail=tail))
    assert grad.isfinite().all() and (tail == "bucket" or not grad[1, [0, 2, 3, 5, 6]].any())


def test_nan_is_loud_and_stays_in_its_row() -> None:
    policy, ref = make_inputs(3, 8)
    ref[1, 3] = math.nan
    assert topk_kl_div_from_logits(policy, ref, 4).isnan().tolist() == [False, True, False]


@TAILS
def test_mask(tail: str) -> None:
    policy, ref = make_inputs(6, 20)
    policy[1], mask = math.nan, torch.tensor([True, False, True, True, False, True])
    leaf = policy.reshape(2, 3, 20).requires_grad_()
    ref = ref.reshape(2, 3, 20)
    kl = topk_kl_div_from_logits(leaf, ref, 5, tail=tail, mask=mask.reshape(2, 3))
    (grad,) = torch.autograd.grad(kl.sum(), leaf)
    assert kl.shape == (2, 3) and not kl.reshape(6)[~mask].any() and not grad.reshape(6, 20)[~mask].any()
    torch.testing.assert_close(kl[0, 2], topk_kl_div_from_logits(leaf[0, 2], ref[0, 2], 5, tail=tail))
    nothing = topk_kl_div_from_logits(leaf, ref, 5, tail=tail, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert not nothing.any()


def test_metrics() -> None:
    policy, ref = make_inputs(5, 30)
    ref[0, 4:] = -INF
    top = topk_select(ref, 6, temperature=0.5)
    metrics = topk_kl_metrics(policy.requires_grad_(), top, temperature=0.5)
    for row in range(5):
        ids = [i for i in top.ids[row].tolist() if i >= 0]
        own = policy[row].topk(6).indices.tolist()
        assert metrics.overlap[row].item() == pytest.approx(len(set(ids) & set(own)) / len(ids))
        for mass, logits in ((metrics.policy_mass, policy), (metrics.ref_mass, ref)):
            torch.testing.assert_close(mass[row], torch.softmax(logits[row] / 0.5, -1)[ids].sum())
    assert not any(x.requires_grad for x in metrics)


# --- refusals


def test_refusals() -> None:
    policy, ref = make_inputs(3, 8)
    top = topk_select(ref, 4)
    with pytest.raises(ValueError, match=r"topk_select: k must be at least 2 .* got 1"):
        topk_select(ref, 1)
    with pytest.raises(ValueError, match="topk_select: k must not exceed the vocabulary of 8, got 500"):
        topk_select(ref)
    with pytest.raises(ValueError, match="topk_select: vocab_size must lie between 1 and V = 8, got 9"):
        topk_select(ref, 4, vocab_size=9)
    with pytest.raises(ValueError, match=r"topk_select: expected logits float \[..., V\], got torch.int64"):
        topk_select(torch.ones(3, 8, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        topk_select(ref, 4, temperature=0)
    with pytest.raises(ValueError, match="direction must be 'policy_ref' or 'ref_policy', got 'forward'"):
        topk_kl_div(policy, top, direction="forward")
    with pytest.raises(ValueError, match="tail must be 'none' or 'bucket', got 'yes'"):
        topk_kl_div(policy, top, tail="yes")
    with pytest.raises(ValueError, match=r"expected a reference with rows \[2\], got \[3\]"):
        topk_kl_div(policy[:2], top)
    with pytest.raises(ValueError, match=r"expected mask bool \[3\], got torch.int64 \[3\]"):
        topk_kl_div(policy, top, mask=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="reference id . is beyond the policy's vocabulary of 4; both models need"):
        topk_kl_div(policy[:, :4], top)
    with pytest.raises(
        ValueError, match=r"unknown backend 'trion'; expected one of \['threshold', 'reference', 'cuda', 'triton'\]"
    ):
        topk_select(ref, 4, backend="trion")


def test_lse_of_another_temperature_is_refused_where_it_matters() -> None:
    policy, ref = make_inputs(3, 8)
    top = topk_select(ref, 4)
    same = topk_kl_div_from_logits(policy, ref, 4, temperature=0.5)
    assert torch.equal(topk_kl_div(policy, top, temperature=0.5), same)
    message = "lse was taken at temperature 1.0, asked for 0.5; select it again with temperature=0.5"
    with pytest.raises(ValueError, match=message):
        topk_kl_div(policy, top, temperature=0.5, tail="bucket")
    with pytest.raises(ValueError, match=message):
        topk_kl_metrics(policy, top, temperature=0.5)


def test_reference_with_gradient_is_refused() -> None:
    policy, ref = make_inputs(3, 8)
    top = topk_select(ref, 4)
    with pytest.raises(ValueError, match="ref_logits requires grad, but no gradient flows to it; detach it"):
        topk_kl_div_from_logits(policy, ref.clone().requires_grad_(), 4)
    with pytest.raises(ValueError, match="TopK: the reference requires grad"):
        TopK(ids=top.ids, values=top.values.clone().requires_grad_(), lse=top.lse)
    with pytest.raises(ValueError, match=r"TopK: expected ids and values \[..., K\]"):
        TopK(ids=top.ids, values=top.values[:2], lse=top.lse)
    with pytest.raises(ValueError, match="TopK: ids must be int32, got torch.int64"):
        TopK(ids=top.ids.long(), values=top.values, lse=top.lse)
