"""Packing of heads by Triton: the bits of the plain twin, on the CPU interpreted; with a rotation, as accurate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nova_kernels.ulysses import kernels, pack
from nova_kernels.ulysses.plan import HeadBlock
from numerics import assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EVEN = ((0, 4, 0, 1), (4, 8, 1, 2))
COPIES = ((0, 3, 0, 1), (3, 5, 0, 1), (5, 8, 0, 2), (8, 10, 1, 2))
CASES = [
    # tokens, D, query heads, key heads, blocks
    pytest.param(5, 64, 8, 2, EVEN, id="even"),
    pytest.param(37, 64, 10, 2, COPIES, id="uneven heads, three and two copies, tokens one past a block"),
    pytest.param(3, 80, 10, 2, COPIES, id="D is no power of two"),
    pytest.param(9, 256, 2, 1, ((0, 1, 0, 1), (1, 2, 0, 1)), id="wide heads"),
    pytest.param(4, 72, 2, 2, ((0, 0, 0, 0), (0, 2, 0, 2), (2, 2, 2, 2)), id="ranks without heads"),
    pytest.param(1, 8, 3, 1, tuple((h, h + 1, 0, 1) for h in range(3)), id="one token, more ranks than key heads"),
    pytest.param(6, 16, 7, 0, ((0, 4, 0, 0), (4, 7, 0, 0)), id="no keys: the output's way back"),
    pytest.param(0, 64, 8, 2, EVEN, id="no tokens"),
]
cases = pytest.mark.parametrize(("tokens", "width", "heads", "kv_heads", "blocks"), CASES)


def blocks_of(blocks: tuple[tuple[int, int, int, int], ...]) -> list[HeadBlock]:
    return [HeadBlock(*block) for block in blocks]


def fused(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as views of one projection that has more columns than they need."""
    whole = torch.randn(tokens, heads + 2 * kv_heads + 1, width).to(dtype).to(DEVICE)
    return list(whole.split([heads, kv_heads, kv_heads, 1], dim=1)[:3])


def angles(tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Not the same in both halves: only then it shows whether the adjoint is one."""
    table = torch.rand(2, tokens, width, dtype=torch.float64) * 6.3
    return {"cos": table[0].cos().to(dtype).to(DEVICE), "sin": table[1].sin().to(dtype).to(DEVICE)}


def sizes(tokens: int, width: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {"num_tokens": tokens, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": width}


def joined(packed: Tensor, tokens: int, width: int, blocks: list[HeadBlock]) -> Tensor:
    """What pack_heads wrote, in the order that unpack_heads reads: q, k, v of each block one after the other."""
    pieces = packed.split([tokens * width * block.width for block in blocks])
    rows = [piece.view(tokens, block.width, width) for piece, block in zip(pieces, blocks, strict=True)]
    counts = [[block.heads, block.kv_heads, block.kv_heads] for block in blocks]
    return torch.cat([part.flatten() for row, many in zip(rows, counts, strict=True) for part in row.split(many, 1)])


def random_buffer(tokens: int, width: int, blocks: list[HeadBlock], dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens * width * sum(block.width for block in blocks)).to(dtype).to(DEVICE)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_is_bit_equal(tokens: int, width: int, heads: int, kv_heads: int, blocks: Any, dtype: torch.dtype) -> None:
    q, k, v = fused(tokens, heads, kv_heads, width, dtype)
    plan = blocks_of(blocks)
    assert_same(kernels.pack_heads(q, k, v, plan), pack.pack_heads(q, k, v, plan))


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpack_is_bit_equal(
    tokens: int, width: int, heads: int, kv_heads: int, blocks: Any, dtype: torch.dtype
) -> None:
    plan = blocks_of(blocks)
    buffer = random_buffer(tokens, width, plan, dtype)
    options = sizes(tokens, width, heads, kv_heads)
    q, *sums = kernels.unpack_heads(buffer, plan, **options)
    expected_q, *expected = pack.unpack_heads(buffer, plan, **options)
    assert_same(q, expected_q)
    for actual, right in zip(sums, expected, strict=True):
        if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts off instead of rounding
            torch.testing.assert_close(actual, right, rtol=2**-7, atol=0)
        else:
            assert_same(actual, right)


def test_what_is_copied_keeps_every_bit() -> None:
    """NaN with a payload, infinities, the smallest numbers; -0."""
    bits = torch.tensor([0x7FC1, 0x7F80, 0xFF80, 0x0001, 0x8000, 0x3F80, 0xFFFF, 0x8001], dtype=torch.int32)
    x = bits.to(torch.int16).view(torch.bfloat16).to(DEVICE).expand(3, 2, 8)
    buffer = kernels.pack_heads(x, x[:, :0], x[:, :0], blocks_of(((0, 1, 0, 0), (1, 2, 0, 0))))
    assert torch.equal(buffer.view(torch.int16), x.reshape(-1).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_rotations_are_accurate(dtype: torch.dtype, precision: torch.dtype) -> None:
    tokens, width, heads, kv_heads = 19, 96, 10, 2
    plan, turns = blocks_of(COPIES), angles(tokens, width, precision)
    inputs, buffer = fused(tokens, heads, kv_heads, width, dtype), random_buffer(tokens, width, plan, dtype)
    options = sizes(tokens, width, heads, kv_heads)

    def both(module: Any, exact: torch.dtype) -> list[Tensor]:
        packed = module.pack_heads(*(x.to(exact) for x in inputs), plan, **turns)
        return [packed, *module.unpack_heads(buffer.to(exact), plan, **options, **turns)]

    # The interpreter cuts bfloat16 off instead of rounding it: twice the error.
    slack = 4.0 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2.0
    for actual, peer, truth in zip(both(kernels, dtype), both(pack, dtype), both(pack, torch.float64), strict=True):
        assert_as_accurate(actual, peer, truth, slack=slack, floor=1e-7)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula of Hugging Face models: x cos + [-b, a] sin, x = [a, b] [t, H, D]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


def test_queries_and_keys_are_rotated_and_values_are_not() -> None:
    tokens, width = 5, 32
    q, k, v = fused(tokens, 8, 2, width, torch.float64)
    turns = angles(tokens, width, torch.float64)
    first, second = kernels.pack_heads(q, k, v, blocks_of(EVEN), **turns).view(2, tokens, 6, width)
    q, k = rotated(q, **turns), rotated(k, **turns)
    torch.testing.assert_close(first, torch.cat([q[:, :4], k[:, :1], v[:, :1]], dim=1), rtol=0, atol=1e-14)
    torch.testing.assert_close(second, torch.cat([q[:, 4:], k[:, 1:], v[:, 1:]], dim=1), rtol=0, atol=1e-14)


def adjoint_gap(run_pack: Callable[..., Tensor], run_unpack: Callable[..., tuple[Tensor, ...]], rotates: bool) -> float:
    """|<pack(x), y> - <x, unpack(y)>|, relative."""
    tokens, width, heads, kv_heads = 11, 48, 10, 2
    plan = blocks_of(COPIES)
    turns = angles(tokens, width, torch.float64) if rotates else {}
    inputs = fused(tokens, heads, kv_heads, width, torch.float64)
    buffer = random_buffer(tokens, width, plan, torch.float64)
    there = torch.dot(run_pack(*inputs, plan, **turns), buffer)
    found = run_unpack(joined(buffer, tokens, width, plan), plan, **sizes(tokens, width, heads, kv_heads), **turns)
    back = sum((x * y).sum() for x, y in zip(inputs, found, strict=True))
    return float(abs(there - back) / abs(there))


@pytest.mark.parametrize("rotates", [False, True])
def test_unpack_is_the_adjoint_of_pack(rotates: bool) -> None:
    assert adjoint_gap(kernels.pack_heads, kernels.unpack_heads, rotates) < 1e-13


def test_a_wrong_unpack_is_no_adjoint() -> None:
    """One that takes a single copy of each key head, one that does not undo the rotation."""

    def last_copy(buffer: Tensor, plan: list[HeadBlock], **options: Any) -> tuple[Tensor, ...]:
        q, *_ = kernels.unpack_heads(buffer, plan, **options)
        alone = [block._replace(kv_start=block.kv_end) for block in plan[:2]] + plan[2:]
        parts = buffer.split([11 * 48 * block.width for block in plan])
        kept = torch.cat([part[: 11 * 48 * b.width] for part, b in zip(parts, alone, strict=True)])
        return q, *kernels.unpack_heads(kept, alone, **options)[1:]

    def unturned(buffer: Tensor, plan: list[HeadBlock], *, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        return kernels.unpack_heads(buffer, plan, cos=cos, sin=-sin, **options)

    assert adjoint_gap(kernels.pack_heads, last_copy, False) > 1e-3
    assert adjoint_gap(kernels.pack_heads, unturned, True) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    """Heads before tokens, elements apart, one token for all: what is read is what a copy would say."""
    plan = blocks_of(EVEN)
    apart = torch.randn(64, 8, 6).to(dtype).to(DEVICE).permute(2, 1, 0)
    heads_first = torch.randn(2, 6, 64).to(dtype).to(DEVICE).transpose(0, 1)
    same = torch.randn(1, 2, 64).to(dtype).to(DEVICE).expand(6, 2, 64)
    expected = pack.pack_heads(apart, heads_first, same, plan)
    assert_same(kernels.pack_heads(apart, heads_first, same, plan), expected)
    turns = angles(6, 64, torch.float32)
    turned = {name: torch.stack([x, x], dim=-1).flatten(1)[:, ::2] for name, x in turns.items()}
    expected = kernels.pack_heads(apart, heads_first, same, plan, **turns)
    assert_same(kernels.pack_heads(apart, heads_first, same, plan, **turned), expected)


def test_nothing_outside_of_the_blocks_is_written() -> None:
    """Tokens beyond the last and columns beyond D lie in the same block of the kernel."""
    q, k, v = fused(3, 8, 2, 40, torch.float32)
    plan = blocks_of(EVEN)
    whole = torch.full((3 * 12 * 40 + 500,), 7.0, device=DEVICE)
    kernels._launch(kernels._pack, q, k, v, whole[:-500], plan, None, None)
    assert (whole[-500:] == 7.0).all() and torch.equal(whole[:-500], pack.pack_heads(q, k, v, plan))


def test_heads_of_odd_width_are_copied_and_not_rotated() -> None:
    q, k, v = fused(3, 8, 2, 7, torch.float32)
    plan = blocks_of(EVEN)
    assert_same(kernels.pack_heads(q, k, v, plan), pack.pack_heads(q, k, v, plan))
    with pytest.raises(ValueError, match="pairs the halves of a head, which an odd width 7 does not have"):
        kernels.pack_heads(q, k, v, plan, **angles(3, 7, torch.float32))
