"""topk_kl in Triton: selection bit for bit as a stable sort, log-sum-exp and KL against float64, rules at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nova_kernels.topk_kl import reference, triton
from numerics import assert_as_accurate

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
# The interpreter computes with numpy, which warns where the hardware is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DIRECTIONS = pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])


def adversarial(vocabulary: int) -> Tensor:
    rows = 3 * torch.randn(9, vocabulary)
    rows[1] = 1.5
    rows[2] = torch.randint(-2, 3, (vocabulary,)).float()
    rows[3, torch.rand(vocabulary) < 0.5] = -INF
    rows[4] = -INF
    rows[5, [0, 5, vocabulary - 1]] = torch.tensor([NAN, -NAN, NAN])
    rows[5, 1::3] = INF
    rows[6] = rows[6].sort().values
    rows[7] = torch.where(torch.rand(vocabulary) < 0.5, 0.0, -0.0)
    rows[8, 3:] = -INF
    return rows


def assert_selects(logits: Tensor, k: int, temperature: float = 1.0) -> None:
    ids, values, lse = triton.topk_select(logits.to(DEVICE), k, temperature)
    expected_ids, expected_values = reference.topk_select(logits.float(), k)
    wrong = (ids.cpu() != expected_ids).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, f"rows {wrong}"
    torch.testing.assert_close(values.cpu(), expected_values, rtol=0, atol=0, equal_nan=True)
    truth = (logits.double() / temperature).logsumexp(-1)
    finite = truth.isfinite()
    peer = (logits.float() / temperature).logsumexp(-1)
    torch.testing.assert_close(lse.cpu()[~finite], peer[~finite], equal_nan=True)
    assert_as_accurate(lse.cpu()[finite], peer[finite], truth[finite])


# --- selection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocabulary", "k"), [(1271, 50), (4099, 500), (77, 77), (40, 37), (3, 2)])
def test_select_is_a_stable_sort(vocabulary: int, k: int, dtype: torch.dtype) -> None:
    if vocabulary < 100:
        rows = torch.cat([torch.randn(1, vocabulary), torch.zeros(1, vocabulary), torch.full((1, vocabulary), NAN)])
        rows[0, 1] = -INF
    else:
        rows = adversarial(vocabulary)
    assert_selects(rows.to(dtype), k, 0.7)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(128_256, torch.float32), (151_936, torch.bfloat16)], ids=str)
def test_select_from_large_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    assert_selects(adversarial(vocabulary)[[0, 2, 5]].to(dtype), 500)


def test_select_many_equal_to_nothing() -> None:
    """More NaN than k; infinities beside -inf; ties across zero; the smallest float32 apart."""
    rows = torch.zeros(5, 257)
    rows[0] = NAN
    rows[1, ::2], rows[1, 1::2] = INF, -INF
    rows[2] = torch.linspace(-1, 1, 257).round(decimals=1)
    rows[3] = torch.tensor([1e-45, -1e-45, 0.0, -0.0]).repeat(65)[:257]
    rows[4] = torch.linspace(-3e38, 3e38, 257)
    assert_selects(rows, 100)
    assert_selects(rows, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_select_padded_views(dtype: torch.dtype) -> None:
    """A row stride beyond the vocabulary; what lies behind it is larger than all."""
    padded = torch.full((3, 1300), 9e9, dtype=dtype)
    padded[:, :1271] = adversarial(1271)[[0, 2, 3]]
    assert_selects(padded[:, :1271], 40, 2.0)


def test_select_lse_of_large_logits() -> None:
    rows = torch.tensor([[1000.0, 999.0, -1000.0, -INF], [-1000.0, -1001.0, -2000.0, -INF], [3e38, -3e38, 0.0, 1.0]])
    assert_selects(rows[:2], 3, 0.5)
    assert_selects(rows, 3, 1.0)


def test_plan() -> None:
    for vocabulary in (3, 1271, 32_000, 128_256, 151_936, 262_144):
        for k in (2, 64, 500, 512, 4096):
            if k <= vocabulary:
                sizes = triton.plan(vocabulary, k)
                assert sizes.tiles * sizes.tile_groups * sizes.width >= vocabulary
                assert sizes.lanes >= sizes.tiles * sizes.tile_groups and sizes.slots >= k
                assert sizes.capacity >= min(k, sizes.slots * sizes.width)
                assert max(sizes.lanes, sizes.slots * sizes.width) <= triton.MAX_LANES
    with pytest.raises(ValueError, match="k = 20000 of a vocabulary of 151936 is beyond the 32768 values .*threshold"):
        triton.topk_select(torch.zeros(1, 151_936, device=DEVICE), 20_000, 1.0)


# --- KL


def kl_inputs(n: int, k: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    ref = -torch.log(-torch.log(torch.rand(n, k, dtype=torch.float64))) + 5
    return (ref + noise * torch.randn(n, k, dtype=torch.float64)).float(), ref.float()


def plain(policy: Tensor, ref: Tensor, temperature: float, direction: str) -> tuple[Tensor, Tensor]:
    """The textbook sum and its derivative, by autograd, in the dtype of the inputs."""
    z = policy.clone().requires_grad_()
    log_p, log_r = (z / temperature).log_softmax(-1), (ref / temperature).log_softmax(-1)
    a, b = (log_p, log_r) if direction == "policy_ref" else (log_r, log_p)
    kl = (a.exp() * (a - b)).sum(-1)
    return kl.detach(), torch.autograd.grad(kl.sum(), z)[0]


@DIRECTIONS
@pytest.mark.parametrize(("n", "k"), [(9, 50), (3, 500), (1, 2)])
def test_kl_accuracy(n: int, k: int, direction: str) -> None:
    for temperature, noise in ((1.0, 1.0), (0.6, 0.1), (1.0, 5.0)):
        policy, ref = kl_inputs(n, k, noise)
        kl, by_kept = triton.kl_terms(policy.to(DEVICE), ref.to(DEVICE), temperature, direction)
        truth = plain(policy.double(), ref.double(), temperature, direction)
        peer = plain(policy, ref, temperature, direction)
        assert by_kept is not None
        for actual, theirs, exact in zip((kl.cpu(), by_kept.cpu()), peer, truth, strict=True):
            assert_as_accurate(actual, theirs, exact)
        assert by_kept.sum(-1).abs().max() < 1e-5


@DIRECTIONS
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2, 0.1, 0.5])
def test_kl_is_never_negative_and_zero_at_equality(noise: float, direction: str) -> None:
    policy, ref = (x + 20 for x in kl_inputs(40, 100, noise))
    kl, none = triton.kl_terms(policy.to(DEVICE), ref.to(DEVICE), 1.0, direction, gradient=False)
    truth, _, _ = reference.kl_terms(policy.double(), ref.double(), direction)
    assert none is None and (kl >= 0).all()
    assert ((kl.cpu() - truth).norm() / truth.norm()) < 2e-3
    zero, flat = triton.kl_terms(ref.to(DEVICE), ref.to(DEVICE), 0.7, direction)
    assert not zero.any() and not flat.any()


@DIRECTIONS
def test_kl_edges_are_the_reference_s(direction: str) -> None:
    """Unused slots, a policy without a kept token, a reference that hardly has one, NaN; a row of nothing is NaN."""
    policy, ref = kl_inputs(7, 6)
    ref[0, 4:] = -INF
    policy[1, 2] = -INF
    policy[2], ref[2] = torch.tensor([0, -INF, -1, 1, 1, 1]), torch.tensor([0, -300.0, -1, 1, 1, 1])
    ref[3, 1] = NAN
    ref[4] = -INF
    policy[5] = torch.tensor([0, -200.0, 200, 0, 1, 1])
    policy[6] = -INF
    kl, by_kept = triton.kl_terms(policy.to(DEVICE), ref.to(DEVICE), 0.5, direction)
    masked = policy.masked_fill(ref == -INF, -INF).double()
    expected, slopes, _ = reference.kl_terms(masked / 0.5, ref.double() / 0.5, direction)
    torch.testing.assert_close(kl.cpu(), expected.float(), equal_nan=True)
    assert slopes is not None and by_kept is not None
    torch.testing.assert_close(by_kept.cpu(), (slopes / 0.5).float(), equal_nan=True, atol=1e-6, rtol=1e-5)
    assert kl.isnan().tolist() == [False, False, False, True, True, False, True]


def with_ids(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Padded policy [6, 300], reference [6, 300], its top 40 with a short row, a mask."""
    ref = (3 * torch.randn(6, 301))[:, :300].to(dtype)
    ref[2, 30:] = -INF
    policy = (ref.float().nan_to_num(neginf=0) + torch.randn(6, 300)).to(dtype)
    wide = torch.full((6, 320), NAN, dtype=dtype)
    wide[:, :300] = policy
    ids, values = reference.topk_select(ref.float(), 40)
    return wide[:, :300], ref, ids, values, torch.tensor([True, True, True, False, True, False])


@DIRECTIONS
@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_kl_from_ids_and_from_logits(dtype: torch.dtype, masked: bool, direction: str) -> None:
    policy, ref, ids, values, mask = with_ids(dtype)
    if masked:
        policy[3], ref[5] = NAN, NAN
    rows = mask if masked else torch.ones_like(mask)
    kept = reference.kept_logits(policy.float(), ids)[rows]
    expected, slopes = triton.kl_terms(kept.to(DEVICE), values[rows].to(DEVICE), 0.8, direction)
    policy, ref, mask = policy.to(DEVICE), ref.to(DEVICE), mask.to(DEVICE) if masked else None
    given = triton.topk_kl_div(policy, ids.to(DEVICE), values.to(DEVICE), 0.8, direction, mask)
    *fused, fused_ids = triton.topk_kl_div_from_logits(policy, ref, 40, 0.8, direction, mask)
    assert torch.equal(fused_ids.cpu(), ids.masked_fill(~rows[:, None], -1))
    for kl, by_kept in (given, fused):
        torch.testing.assert_close(kl[rows], expected)
        torch.testing.assert_close(by_kept[rows], slopes, atol=1e-6, rtol=1e-5)
        assert not kl[~rows].any() and not by_kept[~rows].any()
    kl, none, _ = triton.topk_kl_div_from_logits(policy, ref, 40, 0.8, direction, mask, gradient=False)
    assert none is None and torch.equal(kl, fused[0])
    kl, by_kept, _ = triton.topk_kl_div_from_logits(ref[:1], ref[:1], 40, 1.0, direction, None)
    assert not kl.any() and not by_kept.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scatter(dtype: torch.dtype) -> None:
    _, _, ids, _, _ = with_ids(torch.float32)
    by_kept, upstream = torch.randn(6, 40), torch.linspace(-1, 2, 6)
    actual = triton.scatter_kept(by_kept.to(DEVICE), upstream.to(DEVICE), ids.to(DEVICE), 300, dtype)
    expected = torch.zeros(6, 301).scatter_(1, ids.long().masked_fill(ids < 0, 300), by_kept * upstream[:, None])
    # The interpreter cuts bfloat16 off where the hardware rounds.
    torch.testing.assert_close(actual.cpu().float(), expected[:, :300].to(dtype).float(), rtol=2**-7, atol=0)


def test_no_rows() -> None:
    logits, ids = torch.zeros(0, 50, device=DEVICE), torch.zeros(0, 4, dtype=torch.int32, device=DEVICE)
    values, none = torch.zeros(0, 4, device=DEVICE), torch.zeros(0, dtype=torch.bool, device=DEVICE)
    assert [tuple(x.shape) for x in triton.topk_select(logits, 4, 1.0)] == [(0, 4), (0, 4), (0,)]
    results = triton.topk_kl_div_from_logits(logits, logits, 4, 1.0, "policy_ref", none)
    assert [tuple(x.shape) for x in results if x is not None] == [(0,), (0, 4), (0, 4)]
    for kl, by_kept in (
        triton.kl_terms(values, values, 1.0, "policy_ref"),
        triton.topk_kl_div(logits, ids, values, 1.0, "ref_policy", none),
    ):
        assert kl.shape == (0,) and by_kept is not None and by_kept.shape == (0, 4)
    assert triton.scatter_kept(values, values[:, 0], ids, 50, torch.bfloat16).shape == (0, 50)
