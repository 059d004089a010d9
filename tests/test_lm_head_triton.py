"""lm_head/triton: statistics and gradients of blocks of logits, as accurate as plain PyTorch; shards, odd values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nova_kernels.backend import why_not_triton
from nova_kernels.lm_head.rows import RowStats
from nova_kernels.lm_head.triton import COLUMNS, row_gradient, row_stats
from numerics import assert_as_accurate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(why_not_triton(DEVICE) is not None, reason="Triton kernels cannot run here")

HEADS = [
    pytest.param(4, 37, 5, None, None, 1.0, id="plain"),
    pytest.param(3, 2 * COLUMNS + 5, 7, torch.float32, None, 0.7, id="bias-temperature-three-ranges"),
    pytest.param(3, 4099, 600, torch.bfloat16, 12.5, 1.3, id="bias-softcap-temperature-ids-past-a-block"),
    pytest.param(2, 9, 9, None, 3, 2.0, id="softcap-every-column-kept"),
    pytest.param(3, 1, 1, torch.float32, None, 1.0, id="one-column"),
]


class Block(NamedTuple):
    """Arguments of row_stats, and the upstream of row_gradient."""

    products: Tensor
    bias: Tensor | None
    softcap: float | None
    temperature: float
    targets: Tensor
    ids: Tensor
    scale: Tensor
    by_target: Tensor
    by_kept: Tensor

    def stats(self) -> RowStats:
        return row_stats(*self[:6])

    def gradient(self, maximum: Tensor, out: Tensor, **changes: Any) -> Tensor:
        block = self._replace(**changes)
        return row_gradient(
            *block[:4], maximum, block.scale, block.by_target, block.targets, block.ids, block.by_kept, out
        )


def make_block(
    n: int, vocabulary: int, k: int, bias: torch.dtype | None, softcap: float | None, temperature: float
) -> Block:
    """Peaked rows; the targets of rows 0, 1, 2 (mod 4) are outside on the left, on the right, among the ids."""
    products = torch.randn(n, vocabulary) * 5 + 20 * torch.randn(n, 1)
    ids = torch.stack([torch.randperm(vocabulary)[:k].sort().values for _ in range(n)]).to(torch.int32)
    targets = torch.randint(0, vocabulary, (n,))
    targets[::4], targets[1::4], targets[2::4] = -3, vocabulary, ids[2::4, k // 2].long()
    vector = None if bias is None else torch.randn(vocabulary).to(bias).to(DEVICE)
    scale, by_target, by_kept = (torch.randn(shape).to(DEVICE) for shape in ((n,), (n,), (n, k)))
    products, targets, ids = products.to(DEVICE), targets.to(DEVICE), ids.to(DEVICE)
    return Block(products, vector, softcap, temperature, targets, ids, scale, by_target, by_kept)


def logits_of(block: Block, dtype: torch.dtype) -> Tensor:
    z = block.products.to(dtype)
    if block.bias is not None:
        z = z + block.bias.to(dtype)
    return z if block.softcap is None else block.softcap * torch.tanh(z / block.softcap)


def inside(columns: Tensor, vocabulary: int) -> Tensor:
    return (columns >= 0) & (columns < vocabulary)


def gathered(values: Tensor, columns: Tensor) -> Tensor:
    known = inside(columns, values.shape[1])
    return torch.where(known, values.gather(1, columns.where(known, columns.new_zeros(())).long()), 0)


def plain_stats(block: Block, dtype: torch.dtype) -> RowStats:
    z = logits_of(block, dtype)
    x = z / block.temperature
    maximum = x.amax(dim=1)
    exponentials = (x - maximum.unsqueeze(1)).exp()
    weighted = (exponentials * (x - maximum.unsqueeze(1)).clamp(min=-1e30)).sum(dim=1)
    target = gathered(x, block.targets.unsqueeze(1)).squeeze(1)
    return RowStats(maximum, exponentials.sum(dim=1), weighted, target, gathered(block.products.to(dtype), block.ids))


def plain_gradient(block: Block, maximum: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    z = logits_of(block, dtype)
    gradient = torch.zeros_like(z)
    if scale is not None:
        gradient = scale.to(dtype).unsqueeze(1) * (z / block.temperature - maximum.to(dtype).unsqueeze(1)).exp()
    columns = torch.arange(z.shape[1], device=z.device)
    gradient += torch.where(columns == block.targets.unsqueeze(1), block.by_target.to(dtype).unsqueeze(1), 0)
    if block.softcap is not None:
        gradient = gradient * (1 - (z / block.softcap).square())
    for row, (ids, by_kept) in enumerate(zip(block.ids, block.by_kept, strict=True)):
        known = inside(ids, z.shape[1])
        gradient[row, ids[known].long()] += by_kept[known].to(dtype)
    return gradient


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded once by a kernel; Triton's interpreter cuts bfloat16 off instead."""
    if dtype == torch.bfloat16 and values.device.type == "cpu":
        values = (values.view(torch.int32) & -65536).view(torch.float32)
    return values.to(dtype)


@pytest.mark.parametrize(("n", "vocabulary", "k", "bias", "softcap", "temperature"), HEADS)
def test_stats_are_as_accurate_as_plain(
    n: int, vocabulary: int, k: int, bias: torch.dtype | None, softcap: float | None, temperature: float
) -> None:
    block = make_block(n, vocabulary, k, bias, softcap, temperature)
    for actual, peer, truth in zip(
        block.stats(), plain_stats(block, torch.float32), plain_stats(block, torch.float64), strict=True
    ):
        assert_as_accurate(actual, peer, truth, floor=2e-7)


@pytest.mark.parametrize(("n", "vocabulary", "k", "bias", "softcap", "temperature"), HEADS)
def test_gradient_is_as_accurate_as_plain(
    n: int, vocabulary: int, k: int, bias: torch.dtype | None, softcap: float | None, temperature: float
) -> None:
    block = make_block(n, vocabulary, k, bias, softcap, temperature)
    maximum = plain_stats(block, torch.float64).maximum
    rounded = maximum.float()
    for scale in (block.scale, None):
        truth = plain_gradient(block, rounded, torch.float64, scale)
        peer = plain_gradient(block, rounded, torch.float32, scale)
        whole = block.gradient(rounded, torch.full_like(block.products, float("nan")), scale=scale)
        assert_as_accurate(whole, peer, truth, floor=2e-7)
        for dtype in (torch.bfloat16, torch.float16):
            out = torch.full_like(block.products, float("nan"), dtype=dtype)
            assert block.gradient(rounded, out, scale=scale) is out
            assert torch.equal(out, stored(whole, dtype)), "rounded more than once"
        place = block.products.clone()
        block.gradient(rounded, place, products=place, scale=scale)
        assert torch.equal(place, whole), "in place differs"


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_gradient_is_that_of_the_softmax(softcap: float | None) -> None:
    """Of a log-probability and a function of the kept logits, by autograd in float64."""
    block = make_block(5, 53, 4, torch.float32, softcap, 0.8)
    block.targets[:] = torch.tensor([0, 52, 7, 7, 31])
    a = block.scale.double()
    leaf = block.products.double().requires_grad_()
    z = logits_of(block._replace(products=leaf), torch.float64)
    logprobs = torch.log_softmax(z / 0.8, dim=1).gather(1, block.targets.unsqueeze(1)).squeeze(1)
    kept = z.gather(1, block.ids.long())
    (expected,) = torch.autograd.grad((a * logprobs).sum() + kept.sin().sum(), leaf)
    slope = 1.0 if softcap is None else 1 - (kept / softcap).square()
    by_kept = (kept.cos() * slope).detach().float()

    stats = block.stats()
    scale, by_target = (-a / (0.8 * stats.total)).float(), (a / 0.8).float()
    actual = block.gradient(
        stats.maximum, torch.empty_like(block.products), scale=scale, by_target=by_target, by_kept=by_kept
    )
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("cut", [0, 2050, COLUMNS + 7])
def test_shards_merge_to_the_whole(cut: int) -> None:
    """Two blocks of columns, targets and ids counted from each one's start; the first may have no columns."""
    block = make_block(4, COLUMNS + 7, 6, torch.float32, 30.0, 1.1)
    assert block.bias is not None
    block.targets[:] = torch.tensor([cut, cut - 1, COLUMNS + 6, 0])
    whole, gradient = block.stats(), block.gradient(block.stats().maximum, torch.empty_like(block.products))
    parts, gradients = [], []
    for start, stop in ((0, cut), (cut, COLUMNS + 7)):
        shard = block._replace(
            products=block.products[:, start:stop],
            bias=block.bias[start:stop],
            targets=block.targets - start,
            ids=torch.where(block.ids >= 0, block.ids - start, -1).to(torch.int32),
        )
        parts.append(shard.stats())
        out = torch.empty(4, stop - start, device=DEVICE)
        gradients.append(shard.gradient(whole.maximum, out))
    maximum, total, weighted, target, kept = (torch.stack(x) for x in zip(*parts, strict=True))
    merged = maximum.amax(dim=0)
    distance = (maximum - merged).clamp(min=-1e30)
    assert torch.equal(merged, whole.maximum)
    torch.testing.assert_close((distance.exp() * total).sum(0), whole.total)
    torch.testing.assert_close((distance.exp() * (weighted + total * distance)).sum(0), whole.weighted)
    assert torch.equal(target.sum(0), whole.target)
    assert torch.equal(kept.sum(0), whole.kept)
    assert torch.equal(torch.cat(gradients, dim=1), gradient)


def test_unused_slots_count_for_nothing() -> None:
    block = make_block(3, 40, 6, None, None, 1.0)
    ids, by_kept = block.ids.clone(), block.by_kept.clone()
    ids[:, 4:] = -1
    by_kept[:, 4:] = float("nan")
    stats = block._replace(ids=ids).stats()
    short = block._replace(ids=block.ids[:, :4].contiguous(), by_kept=block.by_kept[:, :4].contiguous())
    assert stats.kept is not None
    assert torch.equal(stats.kept, torch.cat([short.stats().kept, torch.zeros(3, 2, device=DEVICE)], dim=1))
    out, expected = torch.empty_like(block.products), torch.empty_like(block.products)
    block.gradient(stats.maximum, out, ids=ids, by_kept=by_kept)
    assert torch.equal(out, short.gradient(stats.maximum, expected))


def test_parts_that_are_not_asked_for() -> None:
    block = make_block(3, 40, 6, None, 5.0, 1.0)
    everything = block.stats()
    bare = row_stats(*block[:4], None, None)
    assert bare.target is None
    assert bare.kept is None
    assert all(torch.equal(bare[i], everything[i]) for i in range(3))
    out = torch.empty_like(block.products)
    block.gradient(bare.maximum, out, by_target=None, by_kept=None)
    none = block.by_target * 0, block.by_kept * 0
    torch.testing.assert_close(
        out, plain_gradient(block._replace(by_target=none[0], by_kept=none[1]), bare.maximum, out.dtype, block.scale)
    )
    assert not block.gradient(bare.maximum, out, scale=None, targets=None, ids=None).any()


def test_masked_columns_have_probability_zero() -> None:
    """A bias of -inf; a row of nothing else has maximum -inf and no NaN."""
    block = make_block(3, 2100, 5, torch.float32, None, 0.9)
    assert block.bias is not None
    block.bias[::2] = -math.inf
    block.products[1, 1::2] = -math.inf
    block.targets[:] = torch.tensor([3, 2, 4])
    stats, truth = block.stats(), plain_stats(block, torch.float64)
    assert (stats.maximum[1], stats.total[1], stats.weighted[1]) == (-math.inf, 0, 0)
    finite = torch.tensor([0, 2], device=DEVICE)
    for actual, expected in zip(stats[:3], truth[:3], strict=True):
        torch.testing.assert_close(actual[finite].double(), expected[finite], rtol=1e-6, atol=1e-6)
    assert torch.equal(stats.target == -math.inf, torch.tensor([False, True, True], device=DEVICE))
    maximum = stats.maximum.nan_to_num(neginf=0.0)
    out = block.gradient(maximum, torch.empty_like(block.products), by_target=None, by_kept=None)[finite]
    assert not out[:, ::2].any()
    assert out[:, 1::2].isfinite().all()
    capped = block._replace(softcap=4.0)
    torch.testing.assert_close(
        capped.stats().total.double(), plain_stats(capped, torch.float64).total, rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_infinity_are_loud(value: float) -> None:
    """They end in the total of their own row, and of no other."""
    block = make_block(3, COLUMNS + 9, 5, None, None, 1.0)
    clean = block.stats()
    block.products[1, COLUMNS + 2] = value
    stats = block.stats()
    assert torch.equal(stats.total.isnan(), torch.tensor([False, True, False], device=DEVICE))
    assert torch.equal(stats.total[::2], clean.total[::2])
    if math.isnan(value):
        assert stats.maximum[1].isnan()
        assert block.gradient(clean.maximum, torch.empty_like(block.products))[1].isnan().sum() == 1


def test_far_maximum_at_the_end() -> None:
    """Each entry raises the maximum, by little or by more than float32 can exponentiate."""
    for step in (0.01, 300.0, 1e33):
        products = torch.arange(-2200.0, 2200.0, device=DEVICE).mul(step).expand(2, -1).contiguous()
        stats = row_stats(products, None, None, 1.0, None, None)
        x = products.double() - products.double().amax(dim=1, keepdim=True)
        assert torch.equal(stats.maximum, products.amax(dim=1)), step
        torch.testing.assert_close(stats.total.double(), x.exp().sum(1), rtol=2e-6, atol=0.0)
        torch.testing.assert_close(stats.weighted.double(), (x.exp() * x).sum(1), rtol=2e-6, atol=1e-30)


def test_softcap_is_accurate_at_every_size() -> None:
    """tanh from where it is x to where it is 1, each entry to a few units in the last place."""
    sizes = torch.logspace(-30, 3, 3000, dtype=torch.float64)
    y = torch.cat([sizes, -sizes, torch.linspace(-40, 40, 2001, dtype=torch.float64), torch.tensor([-math.inf])])
    y = y[::101]
    products = y.float().unsqueeze(1).to(DEVICE)
    target = row_stats(products, None, 20.0, 1.0, torch.zeros(len(y), dtype=torch.int64, device=DEVICE), None).target
    assert target is not None
    truth = 20 * torch.tanh(products[:, 0].double() / 20)
    error = (target.double() - truth).abs() / truth.abs().clamp(min=1e-37)
    assert error.max() < 1e-6, f"at y = {y[error.argmax()]}: {error.max()}"


def test_strides_and_memory_between_rows_are_respected() -> None:
    block = make_block(4, 45, 5, torch.float32, None, 1.0)
    wide = torch.full((4, 64), float("nan"), device=DEVICE)
    wide[:, 3:48] = block.products
    view = wide[:, 3:48]
    for actual, expected in zip(block._replace(products=view).stats(), block.stats(), strict=True):
        assert torch.equal(actual, expected)
    maximum = block.stats().maximum
    expected = block.gradient(maximum, torch.empty_like(block.products))
    other = torch.full((9, 50), 7.0, device=DEVICE, dtype=torch.bfloat16)
    block.gradient(maximum, other[1::2, :45], products=view)
    assert torch.equal(other[1::2, :45], stored(expected, torch.bfloat16))
    assert (other[::2] == 7).all()
    assert (other[:, 45:] == 7).all()
    block.gradient(maximum, view, products=view)
    assert torch.equal(view, expected)
    assert wide[:, :3].isnan().all()
    assert wide[:, 48:].isnan().all()


def test_a_row_has_the_same_bits_in_any_company() -> None:
    block = make_block(3, COLUMNS + 100, 5, None, None, 0.7)
    alone = block._replace(products=block.products[1:2], targets=block.targets[1:2], ids=block.ids[1:2]).stats()
    for actual, expected in zip(alone, block.stats(), strict=True):
        assert torch.equal(actual, expected[1:2])


@pytest.mark.parametrize(("n", "vocabulary", "k"), [(0, 7, 3), (3, 0, 2), (3, 7, 0), (0, 0, 0)])
def test_empty(n: int, vocabulary: int, k: int) -> None:
    products = torch.randn(n, vocabulary, device=DEVICE)
    targets = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    ids = torch.zeros(n, k, dtype=torch.int32, device=DEVICE)
    stats = row_stats(products, products.new_zeros(vocabulary), 5.0, 1.0, targets, ids)
    assert [tuple(x.shape) for x in stats if x is not None] == [(n,)] * 4 + [(n, k)]
    if vocabulary == 0:
        assert (stats.maximum == -math.inf).all()
        assert not any(x.any() for x in stats[1:] if x is not None)
    rows, kept = products.new_ones(n), products.new_ones(n, k)
    out = row_gradient(products, None, None, 1.0, stats.maximum, rows, rows, targets, ids, kept, products)
    assert out.isfinite().all()


def test_refusals() -> None:
    block = make_block(4, 12, 3, None, None, 1.0)
    maximum, out = torch.zeros(4, device=DEVICE), torch.empty_like(block.products)
    with pytest.raises(ValueError, match=r"row_stats: expected float32 products, got torch.bfloat16"):
        block._replace(products=block.products.bfloat16()).stats()
    with pytest.raises(ValueError, match=r"unit stride in V, got \[12, 4\] with strides \[1, 12\]; call .contiguous"):
        block._replace(products=block.products.t()).stats()
    with pytest.raises(ValueError, match=r"expected targets contiguous with 4 rows, got \[3\]"):
        block._replace(targets=block.targets[:3]).stats()
    with pytest.raises(ValueError, match=r"expected ids contiguous with 4 rows, got \[4, 2\] with strides \[3, 1\]"):
        block._replace(ids=block.ids[:, :2]).stats()
    with pytest.raises(ValueError, match=r"row_gradient: expected scale contiguous with 4 rows, got \[2\]"):
        block.gradient(maximum, out, scale=block.scale[:2])
    with pytest.raises(ValueError, match=r"expected out \[4, 12\] of float32, bfloat16 or float16, got \[4, 11\]"):
        block.gradient(maximum, out[:, :11])
    with pytest.raises(ValueError, match=r"got \[4, 12\] of torch.float64"):
        block.gradient(maximum, out.double())
    with pytest.raises(ValueError, match=r"pass products themselves or other memory"):
        block.gradient(maximum, block.products.view(torch.bfloat16)[:, :12])


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_full_size(softcap: float | None) -> None:
    """The block of the forward at Qwen's vocabulary: as accurate as PyTorch, the same bits twice."""
    block = make_block(883, 151_936, 500, torch.bfloat16, softcap, 0.7)
    stats, again = block.stats(), block.stats()
    truth, peer = plain_stats(block, torch.float64), plain_stats(block, torch.float32)
    for actual, repeated, plain, exact in zip(stats, again, peer, truth, strict=True):
        assert torch.equal(actual, repeated)
        assert_as_accurate(actual, plain, exact, floor=2e-7)
    exact = plain_gradient(block, stats.maximum, torch.float64, block.scale)
    plain = plain_gradient(block, stats.maximum, torch.float32, block.scale)
    half = block.gradient(stats.maximum, torch.empty_like(block.products, dtype=torch.bfloat16))
    whole = block.gradient(stats.maximum, block.products)
    assert_as_accurate(whole, plain, exact, floor=2e-7)
    assert torch.equal(half, whole.to(torch.bfloat16))
