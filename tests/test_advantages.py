from __future__ import annotations

import pytest
import torch

from nova_train.advantages import RunningMoments, group_advantages


def test_group_mean_and_std_are_those_of_each_group() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    out = group_advantages(scores, eps=0.0)
    assert torch.allclose(out, torch.tensor([[1.1547005, -0.5773503, -0.5773503], [1.0, 0.0, -1.0]]).double())


def test_leave_one_out_compares_with_the_others() -> None:
    scores = torch.tensor([[1.0, 4.0, 7.0]], dtype=torch.float64)
    out = group_advantages(scores, baseline="leave_one_out", scale_rewards="none")
    assert torch.allclose(out, torch.tensor([[1 - 5.5, 4 - 4.0, 7 - 2.5]]).double())


def test_equal_scores_give_exactly_zero() -> None:
    scores = torch.full((2, 3), 0.1, dtype=torch.float32)
    for scale in ("group", "none"):
        assert (group_advantages(scores, scale_rewards=scale) == 0).all()


def test_the_floor_keeps_a_near_tie_small() -> None:
    near_tie = torch.tensor([[0.501, 0.5, 0.5]], dtype=torch.float64)
    assert group_advantages(near_tie).abs().max() > 0.9
    assert group_advantages(near_tie, spread_floor=0.5).abs().max() < 0.01


def test_batch_scale_divides_by_one_number() -> None:
    scores = torch.tensor([[0.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
    out = group_advantages(scores, scale_rewards="batch", eps=0.0)
    assert torch.allclose(out, (scores - scores.mean(1, keepdim=True)) / scores.std())


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.ones(2, 1), {}, r"n >= 2\], got \[2, 1\]"),
        (torch.ones(2, 3), {"baseline": "best"}, "baseline must be .* got 'best'"),
        (torch.ones(2, 3), {"scale_rewards": "row"}, "scale_rewards must be .* got 'row'"),
    ],
)
def test_refusals(scores: torch.Tensor, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(scores, **options)


def test_running_moments_equal_the_moments_of_everything_seen() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    moments = RunningMoments()
    for part in values.split([1, 0, 30, 19]):
        moments.update(part)
    moments.update(torch.tensor([float("nan")]))
    assert moments.mean == pytest.approx(float(values.mean()), abs=1e-12)
    assert moments.std == pytest.approx(float(values.std()), abs=1e-12)
    again = RunningMoments()
    again.load_state_dict(moments.state_dict())
    assert (again.count, again.mean, again.std) == (moments.count, moments.mean, moments.std)
