"""Ulysses without ranks: plans of heads and tokens, bytes, buffers. On ranks: test_ulysses_ranks.py."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nova_kernels import BackendUnavailableError
from nova_kernels.ulysses import HeadBlock, HeadPlan, TokenPlan, allgather_kv_bytes, comm_bytes, pack
from nova_kernels.ulysses.collective import packing, schedule

NAMED = [(28, 7, 8), (14, 2, 4), (7, 1, 4), (40, 8, 12), (64, 8, 16), (6, 3, 4), (8, 2, 4), (2, 1, 5), (1, 1, 3)]


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Hq, Hkv, P"""
    kv_heads = draw(st.integers(1, 9))
    return kv_heads * draw(st.integers(1, 9)), kv_heads, draw(st.integers(1, 12))


@given(sizes())
def test_every_head_is_computed_once_with_its_key_head(numbers: tuple[int, int, int]) -> None:
    heads, kv_heads, ranks = numbers
    plan = HeadPlan.build(heads, kv_heads, ranks)
    assert [head for rank in range(ranks) for head in plan.q_heads(rank)] == list(range(heads))
    assert {len(plan.q_heads(rank)) for rank in range(ranks)} <= {heads // ranks, -(-heads // ranks)}
    for rank in range(ranks):
        needed = [head // plan.group_size for head in plan.q_heads(rank)]
        assert sorted(set(needed)) == list(plan.kv_heads(rank))
        assert [plan.kv_heads(rank)[i] for i in plan.kv_index(rank)] == needed


@given(sizes(), st.integers(1, 6))
def test_chunks_send_every_head_once_and_attend_in_equal_groups(numbers: tuple[int, int, int], chunks: int) -> None:
    plan = HeadPlan.build(*numbers)
    chunks = min(chunks, max(len(plan.q_heads(rank)) for rank in range(plan.world_size)))
    blocks = plan.split(chunks)
    assert len(blocks) == chunks
    for rank in range(plan.world_size):
        mine = [chunk[rank] for chunk in blocks]
        assert [h for b in mine for h in range(b.q_start, b.q_end)] == list(plan.q_heads(rank))
        assert [h for b in mine for h in range(b.kv_start, b.kv_end)] == list(plan.kv_heads(rank))
        for chunk, (block, runs) in enumerate(zip(mine, plan.runs(rank, chunks), strict=True)):
            heads = list(range(block.q_start, block.q_end))
            assert [h for run in runs for h in heads[run.q]] == heads
            for run in runs:
                assert run.source <= chunk
                source = mine[run.source]
                queries, keys = heads[run.q], list(range(source.kv_start, source.kv_end))[run.kv]
                assert len(queries) % len(keys) == 0
                ratio = len(queries) // len(keys)  # varlen_attention reads key head i // ratio
                assert [keys[i // ratio] for i in range(len(queries))] == [h // plan.group_size for h in queries]


@pytest.mark.parametrize("numbers", NAMED)
def test_fewest_copies_of_key_heads(numbers: tuple[int, int, int]) -> None:
    """Against every way to give some ranks one head more."""
    heads, kv_heads, ranks = numbers
    few, extra = divmod(heads, ranks)

    def copies(bounds: tuple[int, ...]) -> int:
        plan = HeadPlan(heads, kv_heads, bounds)
        return sum(len(plan.kv_heads(rank)) for rank in range(ranks))

    bounds = [(0,)]
    for _ in range(ranks):
        bounds = [(*b, b[-1] + few + more) for b in bounds for more in ((0, 1) if extra else (0,))]
    least = min(copies(b) for b in bounds if b[-1] == heads)
    assert copies(HeadPlan.build(*numbers).bounds) == least


def test_borders_of_groups_are_found() -> None:
    assert HeadPlan.build(14, 2, 4).bounds == (0, 4, 7, 11, 14)  # not 4, 4, 3, 3: it would cut through a group
    assert HeadPlan.build(14, 2, 4).kv_index(1) == (0, 0, 0)
    assert HeadPlan.build(28, 4, 3).kv_index(0) == (0,) * 7 + (1,) * 2


@given(st.integers(0, 50), st.integers(1, 9))
def test_tokens_are_held_once_in_order(tokens: int, ranks: int) -> None:
    plan = TokenPlan.build(tokens, ranks)
    bounds = [plan.bounds(rank) for rank in range(ranks)]
    assert bounds[0][0] == 0 and bounds[-1][1] == tokens == plan.num_tokens
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert max(plan.sizes) - min(plan.sizes) <= 1


def test_tokens_by_size() -> None:
    plan = TokenPlan((0, 30, 7))
    assert [plan.bounds(rank) for rank in range(3)] == [(0, 0), (0, 30), (30, 37)]


@given(sizes(), st.integers(0, 40))
def test_bytes_are_those_of_heads_that_leave(numbers: tuple[int, int, int], tokens: int) -> None:
    """Counted one head of one token at a time."""
    heads, token_plan = HeadPlan.build(*numbers), TokenPlan.build(tokens, numbers[2])
    qkv: Counter[int] = Counter()
    out: Counter[int] = Counter()
    for source in range(numbers[2]):
        for target in set(range(numbers[2])) - {source}:
            for _ in range(*token_plan.bounds(source)):
                qkv[source] += len(heads.q_heads(target)) + 2 * len(set(heads.kv_index(target)))
                out[target] += len(heads.q_heads(target))  # and comes back
    for rank in range(numbers[2]):
        found = comm_bytes(heads, token_plan, rank=rank, head_dim=6, element_size=2)
        assert found == (12 * qkv[rank], 12 * out[rank])
        assert found.total == found.qkv + found.out


@pytest.mark.parametrize(("ranks", "ratio"), [(8, 144 / 128), (16, 160 / 256)])
def test_bytes_of_a_70b_layer(ranks: int, ratio: float) -> None:
    """64 query and 8 key heads: more than gathering keys and values on 8 ranks, less on 16."""
    heads, tokens = HeadPlan.build(64, 8, ranks), TokenPlan.build(16384, ranks)
    ours = comm_bytes(heads, tokens, rank=0, head_dim=128, element_size=2).total
    copies = max(1, ranks // 8)
    assert ours == 16384 // ranks * (ranks - 1) * 128 * 2 * (64 + 2 * 8 * copies + 64) // ranks
    assert ours / allgather_kv_bytes(heads, tokens, rank=0, head_dim=128, element_size=2) == ratio


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("numbers", NAMED)
def test_a_buffer_has_the_heads_of_each_rank_in_turn(numbers: tuple[int, int, int]) -> None:
    heads, kv_heads, _ = numbers
    plan = HeadPlan.build(*numbers)
    q, k, v = random(3, heads + 2 * kv_heads, 4).split([heads, kv_heads, kv_heads], dim=1)
    expected = [
        x[token, head]
        for block in plan.split()[0]
        for token in range(3)
        for x, first, last in (
            (q, block.q_start, block.q_end),
            (k, block.kv_start, block.kv_end),
            (v, block.kv_start, block.kv_end),
        )
        for head in range(first, last)
    ]
    assert torch.equal(pack.pack_heads(q, k, v, plan.split()[0]), torch.cat(expected))


@pytest.mark.parametrize("numbers", NAMED)
@pytest.mark.parametrize("rotated", [False, True])
def test_unpacking_is_the_adjoint_of_packing(numbers: tuple[int, int, int], rotated: bool) -> None:
    heads, kv_heads, _ = numbers
    blocks = HeadPlan.build(*numbers).split()[0]
    x = [random(5, count, 4) for count in (heads, kv_heads, kv_heads)]
    angles = {"cos": random(5, 4), "sin": random(5, 4)} if rotated else {}
    packed = pack.pack_heads(*x, blocks, **angles)
    y = torch.randn_like(packed)
    counts = {"num_tokens": 5, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 4}
    widths = [[block.heads, block.kv_heads, block.kv_heads] for block in blocks]
    rows = y.split([5 * 4 * sum(width) for width in widths])
    joined = [part for row, width in zip(rows, widths, strict=True) for part in row.view(5, -1, 4).split(width, dim=1)]
    back = pack.unpack_heads(torch.cat([part.flatten() for part in joined]), blocks, **counts, **angles)
    there = (packed * y).sum()
    assert there.abs() > 1e-3
    torch.testing.assert_close(there, sum((a * b).sum() for a, b in zip(x, back, strict=True)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("apart", [False, True], ids=["contiguous", "heads first"])
def test_what_goes_back_is_joined_by_rank(apart: bool) -> None:
    """Of each rank all its tokens of the first tensor, then of the second; one alone is not copied."""
    first, second = (torch.arange(float(5 * heads * 2)).view(5, heads, 2) for heads in (3, 1))
    if apart:
        first, second = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (first, second))
    expected = [first[:2], second[:2], first[2:2], second[2:2], first[2:], second[2:]]
    found = pack.join_heads([first, second], (2, 0, 3))
    assert torch.equal(found, torch.cat([x.flatten() for x in expected]))
    assert pack.join_heads([second], (2, 0, 3)).data_ptr() == second.data_ptr()


def test_copies_are_rounded_once() -> None:
    """In bfloat16 256 + 1 = 256."""
    blocks = [HeadBlock(head, head + 1, 0, 1) for head in range(3)]
    buffer = torch.tensor([[0, 256, 256], [0, 1, 1], [0, 1, 1]], dtype=torch.bfloat16).flatten()
    _, k, v = pack.unpack_heads(buffer, blocks, num_tokens=1, num_heads=3, num_kv_heads=1, head_dim=1)
    assert k.item() == v.item() == 258 and k.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_rotation_is_a_product_of_complex_numbers(dtype: torch.dtype, tolerance: float) -> None:
    x, angles = random(7, 3, 8, dtype=dtype), random(7, 4)
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat([pairs.real, pairs.imag], dim=-1)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    turned = pack.rotate(x, cos, sin)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pack.rotate_back(turned, cos, sin), x, rtol=2 * tolerance, atol=2 * tolerance)


def test_rotations_have_a_gradient() -> None:
    """On one rank autograd goes through them; a rotation back is what it finds."""
    x, y, cos, sin = random(5, 2, 6).requires_grad_(), random(5, 2, 6), random(5, 6), random(5, 6)
    (gradient,) = torch.autograd.grad(pack.rotate(x, cos, sin), x, y)
    torch.testing.assert_close(gradient, pack.rotate_back(y, cos, sin), rtol=1e-14, atol=1e-14)


def test_plans_are_worked_out_once() -> None:
    """Layers of one model and steps of one size share them, however they were built."""
    plans = [(HeadPlan(8, 2, bounds), TokenPlan(sizes)) for bounds, sizes in (((0, 3, 8), (2, 5)), ([0, 3, 8], [2, 5]))]
    first, second = (schedule(*pair, 1, 16, keys=True) for pair in plans)
    assert first is second and first.out == ((5 * 16 * 5, 5 * 16 * 9),) and first.into == ((2 * 16 * 9, 5 * 16 * 9),)
    assert schedule(*plans[0], 1, 16, keys=False).out == ((5 * 16 * 3, 5 * 16 * 5),)
    assert plans[0][0].split(2) is plans[1][0].split(2) and plans[0][0].runs(1, 2) is plans[1][0].runs(1, 2)


def test_the_packing_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("NOVA_KERNELS_BACKEND", raising=False)
    cpu = torch.device("cpu")
    assert packing(cpu) is packing(cpu, "reference") is pack
    with pytest.raises(
        BackendUnavailableError, match="ulysses packing: backend 'triton' cannot run: .* packs anywhere"
    ):
        packing(cpu, "triton")
    with pytest.raises(ValueError, match=r"ulysses packing: unknown backend 'cuda'; expected one of \['reference', "):
        packing(cpu, "cuda")
    monkeypatch.setenv("NOVA_KERNELS_BACKEND", "triton")
    with pytest.raises(BackendUnavailableError, match="'reference' packs anywhere"):
        packing(cpu)


def test_refused() -> None:
    for numbers, says in (
        ((6, 4, 2), "num_heads must be a positive multiple of num_kv_heads, got 6 and 4; both count the heads of the"),
        ((0, 1, 2), "got 0 and 1"),
        ((4, 2, 0), "HeadPlan: world_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=says):
            HeadPlan.build(*numbers)
    with pytest.raises(ValueError, match=r"bounds must go from 0 to num_heads = 4 without decreasing, got \(0, 3\)"):
        HeadPlan(4, 2, (0, 3))
    with pytest.raises(ValueError, match=r"sizes must be one number >= 0 for every rank, got \(3, -1\)"):
        TokenPlan((3, -1))
    with pytest.raises(ValueError, match="num_tokens must be >= 0, got -1"):
        TokenPlan.build(-1, 2)
    with pytest.raises(ValueError, match="TokenPlan: world_size must be at least 1, got 0"):
        TokenPlan.build(1, 0)
    with pytest.raises(ValueError, match="chunks must be from 1 to 4, the heads of a rank; got 5"):
        HeadPlan.build(8, 2, 2).split(5)
    with pytest.raises(ValueError, match="the head plan is for 2 ranks, the token plan for 3"):
        comm_bytes(HeadPlan.build(8, 2, 2), TokenPlan.build(9, 3), rank=0, head_dim=4, element_size=2)
