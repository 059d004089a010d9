from __future__ import annotations

import math

import torch

from nova_train.losses import bradley_terry, clipped_policy_loss, next_token_targets, predicted_tokens, score_error


def test_bradley_terry_is_the_negative_log_of_the_preference_probability() -> None:
    chosen = torch.tensor([1.0, -2.0, 50.0], dtype=torch.float64)
    rejected = torch.tensor([0.5, 1.0, -50.0], dtype=torch.float64)
    expected = [-math.log(1 / (1 + math.exp(-d))) for d in (0.5, -3.0, 100.0)]
    assert torch.allclose(bradley_terry(chosen, rejected), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert bradley_terry(torch.tensor([-400.0]), torch.tensor([400.0])).item() == 800.0


def test_rows_without_a_score_add_nothing() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    errors = score_error(rewards, torch.tensor([0.0, float("nan"), 5.0]))
    assert errors.tolist() == [1.0, 0.0, 4.0]
    errors.sum().backward()
    assert rewards.grad is not None and rewards.grad.tolist() == [2.0, 0.0, -4.0]


def test_ratio_is_exactly_one_and_the_gradient_that_of_the_score_function() -> None:
    logprobs = torch.tensor([-1.3, -0.2], requires_grad=True)
    advantages = torch.tensor([2.0, -0.5])
    out = clipped_policy_loss(logprobs, logprobs.detach(), advantages, epsilon=0.2)
    assert (out.ratio == 1).all()
    out.loss.sum().backward()
    assert logprobs.grad is not None and torch.equal(logprobs.grad, -advantages)


def test_the_clip_binds_only_where_it_lowers_the_objective() -> None:
    old = torch.zeros(4, dtype=torch.float64)
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    logprobs = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    out = clipped_policy_loss(logprobs, old, advantages, epsilon=0.2, epsilon_high=0.3)
    assert torch.allclose(out.loss, torch.tensor([-1.3, 1.5, -0.5, 0.8]).double())
    assert out.clipped_high.tolist() == [True, False, False, False]
    assert out.clipped_low.tolist() == [False, False, False, True]
    out.loss.sum().backward()
    assert logprobs.grad is not None and (logprobs.grad[[0, 3]] == 0).all() and (logprobs.grad[[1, 2]] != 0).all()


def test_overflow_of_the_ratio_stays_finite() -> None:
    out = clipped_policy_loss(torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([1.0]), epsilon=0.2)
    assert torch.isfinite(out.loss).all()


def test_targets_are_the_labels_of_the_next_position() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, 8]])
    assert next_token_targets(labels).tolist() == [5, 6, -100, 8, -100]
    hidden = torch.arange(10.0).view(5, 2).requires_grad_()
    kept, tokens = predicted_tokens(hidden, labels)
    assert torch.equal(kept, hidden[[0, 1, 3]]) and tokens.tolist() == [5, 6, 8]
    kept.sum().backward()
    assert hidden.grad is not None and hidden.grad[:, 0].tolist() == [1, 1, 0, 1, 0]
    none, nothing = predicted_tokens(hidden, torch.full_like(labels, -100))
    assert none.shape == (0, 2) and nothing.shape == (0,)
