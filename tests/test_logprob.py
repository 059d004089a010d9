"""logprob: every term against plain PyTorch in float64, and the bits that must not depend on how they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nova_kernels import BackendUnavailableError, lm_head
from nova_kernels.logprob import linear_cross_entropy, linear_logprobs, ops
from nova_kernels.topk_kl import TopK, linear_topk_kl_div, linear_topk_select, topk_kl_div, topk_kl_metrics
from numerics import OpWatch, assert_as_accurate, undecorate

BACKENDS = pytest.mark.parametrize("backend", ["chunked", "reference"])
DIRECTIONS = pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
TAILS = pytest.mark.parametrize("tail", ["none", "bucket"])
HEADS = pytest.mark.parametrize(
    "head",
    [
        pytest.param({}, id="plain"),
        pytest.param({"softcap": 2.0, "temperature": 0.7}, id="softcap-temperature"),
        pytest.param({"vocab_size": 90, "temperature": 1.3}, id="padded-vocabulary"),
    ],
)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_head.CHUNK_ELEMENTS, "cpu", 1000)


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    ref_hidden: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        return Case(*leaves, self.targets, self.ref_hidden.to(dtype))

    def ref(self, **head: object) -> TopK:
        k = min(9, self.weight.shape[0] - 1)
        mask = self.targets != -100
        return linear_topk_select(self.ref_hidden, self.weight, k, bias=self.bias, mask=mask, **head)

    def gradients(self, *terms: Tensor) -> tuple[Tensor, ...]:
        """Under upstream gradients that differ from row to row and from term to term."""
        upstream = [torch.linspace(0.5 + i, 1.5 - 2 * i, len(term), dtype=term.dtype) for i, term in enumerate(terms)]
        return torch.autograd.grad(terms, [self.hidden, self.weight, self.bias], upstream, retain_graph=True)


def make_case(
    num_rows: int = 23,
    vocabulary: int = 101,
    width: int = 7,
    *,
    ignore: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Half of the targets are ignored if `ignore`; the reference is near the policy."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((num_rows, width), (vocabulary, width), (vocabulary,), (num_rows, width))
    )
    targets = torch.randint(min(90, vocabulary), (num_rows,), generator=generator)
    if ignore:
        targets[torch.rand(num_rows, generator=generator) < 0.5] = -100
    return Case(hidden, weight, bias, targets, hidden + 0.3 * noise).to(dtype)


def plain_terms(case: Case, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy by autograd through log_softmax in the case's dtype; 0 where ignored."""
    keep = case.targets != -100
    log_p = torch.log_softmax((case.hidden @ case.weight.t() + case.bias) / temperature, -1)
    logprobs = log_p.gather(1, case.targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(keep, logprobs, 0), torch.where(keep, -(log_p.exp() * log_p).sum(-1), 0).detach()


@BACKENDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(make_case(1, 3, 1, ignore=False), id="smallest"),
        pytest.param(make_case(), id="several-chunks"),
        pytest.param(make_case(4, 4097, 16, ignore=False), id="a-chunk-per-row"),
    ],
)
def test_accuracy(backend: str, case: Case, dtype: torch.dtype, temperature: float) -> None:
    case = case.to(dtype)
    terms = linear_logprobs(
        case.hidden, case.weight, case.targets, bias=case.bias, temperature=temperature, backend=backend
    )
    single, double = case.to(torch.float32), case.to(torch.float64)
    peer, truth = plain_terms(single, temperature), plain_terms(double, temperature)
    assert terms.kl is None and terms.policy_mass is None and not terms.entropy.requires_grad
    assert_as_accurate(terms.logprobs, peer[0], truth[0])
    assert_as_accurate(terms.entropy, peer[1], truth[1])
    gradients = case.gradients(terms.logprobs)
    for actual, plain, exact in zip(gradients, single.gradients(peer[0]), double.gradients(truth[0]), strict=True):
        assert actual.dtype == dtype
        assert_as_accurate(actual, plain.to(dtype), exact)


@HEADS
@DIRECTIONS
@TAILS
@pytest.mark.parametrize("ignore", [False, True])
def test_chunked_equals_reference(head: dict[str, float], direction: str, tail: str, ignore: bool) -> None:
    case = make_case(ignore=ignore)
    ref = case.ref(**head)
    runs = [
        linear_logprobs(
            *(case.hidden, case.weight, case.targets),
            **{"bias": case.bias, "ref": ref, "direction": direction, "tail": tail, "backend": backend, **head},
        )
        for backend in ("chunked", "reference")
    ]
    for actual, expected in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
        assert actual is not None and not actual[case.targets == -100].any()
    for names in (("logprobs", "kl"), ("logprobs",), ("kl",)):
        pairs = [case.gradients(*(getattr(run, name) for name in names)) for run in runs]
        for actual, expected in zip(*pairs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@DIRECTIONS
@TAILS
def test_gradcheck(direction: str, tail: str) -> None:
    case = make_case(5, 11, 3)
    head = {"softcap": 3.0, "temperature": 0.8}
    ref = case.ref(**head)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        options = {"bias": bias, "ref": ref, "direction": direction, "tail": tail, **head}
        terms = linear_logprobs(hidden, weight, case.targets, **options)
        return terms.logprobs, terms.kl

    assert torch.autograd.gradcheck(run, (case.hidden, case.weight, case.bias))


@TAILS
def test_kl_and_mass_are_those_of_topk_kl(tail: str) -> None:
    case = make_case(ignore=False)
    ref = case.ref(temperature=0.7)
    options = {"temperature": 0.7, "tail": tail}
    terms = linear_logprobs(case.hidden, case.weight, case.targets, bias=case.bias, ref=ref, **options)
    logits = case.hidden @ case.weight.t() + case.bias
    assert terms.kl is not None and terms.policy_mass is not None
    torch.testing.assert_close(terms.kl, topk_kl_div(logits, ref, **options))
    torch.testing.assert_close(terms.policy_mass, topk_kl_metrics(logits, ref, temperature=0.7).policy_mass)
    alone = linear_topk_kl_div(case.hidden, case.weight, ref, bias=case.bias, backend="dense", **options)
    assert torch.equal(terms.kl, alone) and not terms.policy_mass.requires_grad


@DIRECTIONS
@TAILS
@HEADS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_first_inner_step_is_exact(head: dict[str, float], dtype: torch.dtype, direction: str, tail: str) -> None:
    """Ratio 1 and KL 0, to the bit: with or without gradient, with or without a reference, frozen or not."""
    case = make_case(dtype=dtype)
    with torch.no_grad():
        old = linear_logprobs(case.hidden, case.weight, case.targets, bias=case.bias, **head)
    options = {"bias": case.bias, "direction": direction, "tail": tail, **head}
    own = linear_topk_select(case.hidden, case.weight, 9, bias=case.bias, mask=case.targets != -100, **head)
    for weight in (case.weight, case.weight.detach()):
        new = linear_logprobs(case.hidden, weight, case.targets, ref=own, **options)
        assert new.kl is not None and (new.kl == 0).all()
        assert (torch.exp(new.logprobs - old.logprobs) == 1).all()
        assert torch.equal(new.entropy, old.entropy)
    gradients = case.gradients(linear_logprobs(case.hidden, case.weight, case.targets, ref=own, **options).kl)
    assert not any(gradient.any() for gradient in gradients)


@BACKENDS
def test_cross_entropy(backend: str) -> None:
    case = make_case()
    options = {"bias": case.bias, "softcap": 4.0, "vocab_size": 90, "temperature": 0.9, "backend": backend}
    loss = linear_cross_entropy(case.hidden, case.weight, case.targets, **options)
    terms = linear_logprobs(case.hidden, case.weight, case.targets, **options)
    assert torch.equal(loss, -terms.logprobs) and not torch.signbit(loss).any()
    for actual, expected in zip(case.gradients(loss), case.gradients(-terms.logprobs), strict=True):
        assert torch.equal(actual, expected)
    assert not case.gradients(loss)[1][90:].any()
    plain = make_case()
    logits = plain.hidden @ plain.weight.t() + plain.bias
    expected = torch.nn.functional.cross_entropy(logits, plain.targets, reduction="none")
    loss = linear_cross_entropy(plain.hidden, plain.weight, plain.targets, bias=plain.bias, backend=backend)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("num_rows", [9, 23])
def test_backward_twice_gives_the_same(num_rows: int) -> None:
    """Whether the forward's exponentials are kept (a single chunk) or computed again."""
    case = make_case(num_rows)
    terms = linear_logprobs(case.hidden, case.weight, case.targets, bias=case.bias, ref=case.ref(), tail="bucket")
    assert terms.kl is not None
    first, second = (case.gradients(terms.logprobs, terms.kl) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_only_what_requires_grad_gets_one() -> None:
    case = make_case()
    full = case.gradients(linear_logprobs(case.hidden, case.weight, case.targets, bias=case.bias).logprobs)
    for index in range(3):
        leaves = [x.detach() for x in (case.hidden, case.weight, case.bias)]
        leaves[index].requires_grad_()
        terms = linear_logprobs(leaves[0], leaves[1], case.targets, bias=leaves[2])
        upstream = torch.linspace(0.5, 1.5, 23, dtype=torch.float64)
        (alone,) = torch.autograd.grad(terms.logprobs, leaves[index], upstream)
        assert torch.equal(alone, full[index])


@TAILS
def test_memory_is_bounded_and_ignored_rows_cost_nothing(monkeypatch: pytest.MonkeyPatch, tail: str) -> None:
    undecorate(monkeypatch, ops)
    case = make_case(400, 101, 2)
    kept = int((case.targets != -100).sum())
    ref = case.ref()
    with OpWatch() as forward:
        terms = linear_logprobs(case.hidden, case.weight, case.targets, bias=case.bias, ref=ref, tail=tail)
    assert forward.rows == kept < 300
    with OpWatch() as backward:
        case.gradients(terms.logprobs, terms.kl)
    for seen in (forward, backward):
        assert seen.elements <= max(1000, ref.values.numel())  # [N, V] has 40,400 elements, N K 3,600


@BACKENDS
def test_nothing_to_do(backend: str) -> None:
    case = make_case(ignore=False)
    none = torch.full_like(case.targets, -100)
    ref = case.ref()
    terms = linear_logprobs(case.hidden, case.weight, none, bias=case.bias, ref=ref, backend=backend)
    assert not any(term is None or term.any() for term in terms)
    assert not any(gradient.any() for gradient in case.gradients(terms.logprobs, terms.kl))
    empty = linear_logprobs(case.hidden[:0], case.weight, none[:0], ref=ref[:0], backend=backend)
    assert all(term is not None and term.shape == (0,) for term in empty)
    assert linear_cross_entropy(case.hidden[:0], case.weight, none[:0], backend=backend).shape == (0,)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ref = case.ref()
            terms = linear_logprobs(case.hidden, case.weight, case.targets, bias=case.bias, ref=ref, backend=backend)
        assert terms.logprobs.dtype == torch.float32
        results.append((*terms, *case.gradients(terms.logprobs, terms.kl)))
    for plain, cast in zip(*results, strict=True):
        assert plain is not None and cast is not None and torch.equal(plain, cast)


def test_backward_under_autocast() -> None:
    case = make_case(dtype=torch.float32)
    loss = linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias)
    outside = case.gradients(loss)
    with torch.autocast("cpu", torch.bfloat16):
        inside = case.gradients(loss)
    for one, other in zip(outside, inside, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@BACKENDS
def test_mixed_dtypes(backend: str) -> None:
    """What a model under autocast hands over: hidden states in bfloat16, the weight in float32."""
    case = make_case(dtype=torch.float32)
    hidden = case.hidden.detach().bfloat16().requires_grad_()
    terms = linear_logprobs(hidden, case.weight, case.targets, bias=case.bias, backend=backend)
    gradients = torch.autograd.grad(terms.logprobs.sum(), [hidden, case.weight])
    assert terms.logprobs.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]
    upcast = linear_logprobs(hidden.float(), case.weight, case.targets, bias=case.bias, backend=backend)
    assert torch.equal(terms.logprobs, upcast.logprobs)


@BACKENDS
def test_token_that_cannot_be(backend: str) -> None:
    """A bias of -inf takes a token away; the other log-probabilities, the entropy and the gradients stand."""
    case = make_case(4, 9, 3, ignore=False)
    with torch.no_grad():
        case.bias[8] = -math.inf
    targets = torch.tensor([0, 1, 2, 8])
    terms = linear_logprobs(case.hidden, case.weight, targets, bias=case.bias, backend=backend)
    fewer = linear_logprobs(
        case.hidden, case.weight, targets.clamp(max=7), bias=case.bias, vocab_size=8, backend=backend
    )
    assert terms.logprobs[3] == -math.inf
    torch.testing.assert_close(terms.logprobs[:3], fewer.logprobs[:3])
    torch.testing.assert_close(terms.entropy, fewer.entropy)
    gradient, expected = (torch.autograd.grad(x.logprobs[:3].sum(), case.hidden)[0] for x in (terms, fewer))
    torch.testing.assert_close(gradient, expected)


def test_refusals() -> None:
    case = make_case(ignore=False)
    hidden, weight, targets, ref = case.hidden, case.weight, case.targets, case.ref()
    with pytest.raises(
        ValueError, match=r"linear_logprobs: expected targets int64 \[N\] = \[23\], got torch.int64 \[2\]"
    ):
        linear_logprobs(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match=r"linear_cross_entropy: expected targets .* got torch.int32 \[23\]"):
        linear_cross_entropy(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="target -100 is outside the vocabulary of 101; rows to skip bear -1"):
        linear_logprobs(hidden, weight, torch.full_like(targets, -100), ignore_index=-1)
    with pytest.raises(ValueError, match="target 95 is outside the vocabulary of 90; rows to skip bear -100"):
        linear_cross_entropy(hidden, weight, torch.full_like(targets, 95), vocab_size=90)
    with pytest.raises(ValueError, match="linear_logprobs: temperature must be positive and finite, got -1"):
        linear_logprobs(hidden, weight, targets, temperature=-1)
    with pytest.raises(ValueError, match=r"linear_logprobs: expected a reference with rows \[22\], got \[23\]"):
        linear_logprobs(hidden[1:], weight, targets[1:], ref=ref)
    with pytest.raises(ValueError, match="lse was taken at temperature 1.0, asked for 0.5"):
        linear_logprobs(hidden, weight, targets, ref=ref, temperature=0.5, tail="bucket")
    with pytest.raises(ValueError, match=r"linear_logprobs: expected hidden \[N, H\] and weight \[V, H\]"):
        linear_logprobs(hidden.unsqueeze(0), weight, targets)
    with pytest.raises(
        ValueError, match=r"unknown backend 'trion'; expected one of \['chunked', 'reference', 'triton'\]"
    ):
        linear_logprobs(hidden, weight, targets, backend="trion")
    with pytest.raises(BackendUnavailableError, match="backend 'triton' cannot run: it has no float64"):
        linear_logprobs(hidden, weight, targets, backend="triton")


@pytest.mark.gpu
@TAILS
def test_on_a_gpu(tail: str) -> None:
    case = make_case(300, 1001, 32, dtype=torch.float32)
    on_cpu = linear_logprobs(case.hidden, case.weight, case.targets, ref=case.ref(), tail=tail)
    hidden, weight, targets = (x.detach().cuda() for x in (case.hidden, case.weight, case.targets))
    ref = linear_topk_select(hidden, weight, 9, mask=targets != -100)
    own = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets, ref=ref, tail=tail)
    assert own.kl is not None and (own.kl == 0).all()
    terms = linear_logprobs(hidden, weight, targets, ref=case.ref().to("cuda"), tail=tail)
    for actual, expected in zip(terms, on_cpu, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(terms.logprobs.sum() + terms.kl.sum(), [hidden, weight])
    expected_gradients = torch.autograd.grad(on_cpu.logprobs.sum() + on_cpu.kl.sum(), [case.hidden, case.weight])
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)
