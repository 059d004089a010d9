from __future__ import annotations

import numpy as np
import pytest
import torch

from nova_kernels.varlen import check_cu_seqlens, cu_seqlens_from_lengths, cu_seqlens_from_positions, lengths_of


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([3, 1, 5], id="list"),
        pytest.param(np.array([7, 2], dtype=np.int32), id="numpy"),
        pytest.param(torch.tensor([4]), id="tensor"),
        pytest.param([2, 0, 2], id="with-an-empty-sequence"),
        pytest.param([], id="no-sequences"),
    ],
)
def test_boundaries_and_lengths_undo_each_other(lengths: object) -> None:
    cu_seqlens = cu_seqlens_from_lengths(lengths)  # type: ignore[arg-type]
    expected = [int(length) for length in lengths]  # type: ignore[attr-defined]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.device.type == "cpu"
    assert lengths_of(cu_seqlens) == expected
    check_cu_seqlens(cu_seqlens, sum(expected))


def test_positions_give_the_same_boundaries_as_lengths() -> None:
    lengths = [3, 1, 1, 4]
    positions = torch.cat([torch.arange(length) for length in lengths])
    for shaped in (positions, positions[None], positions.to(torch.int32)):
        assert torch.equal(cu_seqlens_from_positions(shaped), cu_seqlens_from_lengths(lengths))
    assert cu_seqlens_from_positions(torch.zeros(1, 0, dtype=torch.int64)).tolist() == [0]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        pytest.param([1, 2, 0, 1], r"token 0 has position 1", id="later-part-of-a-sequence"),
        pytest.param([0, 1, 1, 2], r"token 2 has position 1 after 1", id="left-padding"),
        pytest.param([0, 1, 3], r"token 2 has position 3 after 1", id="a-gap"),
    ],
)
def test_positions_without_clear_boundaries_are_refused(positions: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cu_seqlens_from_positions(torch.tensor(positions))


def test_a_batch_of_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected position_ids \[T\] or \[1, T\], got \[2, 3\]"):
        cu_seqlens_from_positions(torch.arange(3).expand(2, 3))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        pytest.param([2, -1], r"sequence 1 has length -1", id="negative"),
        pytest.param([1.5, 2.0], r"expected integers of shape \[S\], got float64", id="floats"),
        pytest.param([[1, 2]], r"expected integers of shape \[S\], got int64 \[1, 2\]", id="two-dimensional"),
        pytest.param([2**30, 2**30, 1], r"2147483649 tokens do not fit in int32", id="too-many-tokens"),
    ],
)
def test_wrong_lengths_are_refused(lengths: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cu_seqlens_from_lengths(lengths)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        pytest.param(torch.tensor([0, 4]), r"expected int32 of shape \[S \+ 1\], got torch.int64", id="int64"),
        pytest.param(torch.zeros(0, dtype=torch.int32), r"got torch.int32 \[0\]", id="no-entry"),
        pytest.param(torch.tensor([1, 4], dtype=torch.int32), r"must start at 0, starts at 1", id="start"),
        pytest.param(torch.tensor([0, 3, 2, 4], dtype=torch.int32), r"entry 2 is 2 after 3", id="decreasing"),
        pytest.param(torch.tensor([0, 3], dtype=torch.int32), r"end at the token count 4, ends at 3", id="end"),
    ],
)
def test_wrong_boundaries_are_refused(cu_seqlens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(cu_seqlens, 4)


def test_sequences_beyond_max_seqlen_are_refused() -> None:
    cu_seqlens = cu_seqlens_from_lengths([3, 5, 4])
    check_cu_seqlens(cu_seqlens, 12, 5)
    with pytest.raises(ValueError, match=r"sequence 1 has 5 tokens, more than max_seqlen=4; pass max_seqlen=5"):
        check_cu_seqlens(cu_seqlens, 12, 4)


def test_values_on_a_device_are_not_read() -> None:
    """The meta device has none; shapes are checked all the same."""
    check_cu_seqlens(cu_seqlens_from_lengths([3, 5]).to("meta"), 9, 4)
    with pytest.raises(ValueError, match=r"expected int32 of shape \[S \+ 1\]"):
        check_cu_seqlens(torch.zeros(3, 2, dtype=torch.int32, device="meta"), 6)
