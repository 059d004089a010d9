"""The placements of the KL penalty against the true gradient of equation (2), by enumeration of a small policy.

The policy is a table: hidden states are one-hot prefixes and the LM head is the table of logits, so that the test runs
the production objective (`PolicyObjective`), its log-probabilities, KL, advantages and clipping, on exact expectations.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from nova_kernels.topk_kl import topk_select
from nova_train.advantages import group_advantages
from nova_train.experience import RolloutBatch
from nova_train.kl import kl_to_go, token_advantages
from nova_train.stages.grpo import GRPOConfig, PolicyObjective

V, T, BETA = 3, 3, 0.7  # token 0 ends an answer
PREFIXES = [p for n in range(T) for p in itertools.product(range(1, V), repeat=n)]
ANSWERS = [*[(*p, 0) for p in PREFIXES], *itertools.product(range(1, V), repeat=T)]


class Table(torch.nn.Module):
    """Logits of every prefix as the weight of an LM head over one-hot hidden states."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.head = torch.nn.Linear(len(PREFIXES), V, bias=False, dtype=torch.float64)
        self.head.weight.data = torch.randn(V, len(PREFIXES), generator=generator, dtype=torch.float64)
        self.config = SimpleNamespace()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def logprobs(self) -> torch.Tensor:
        return self.head.weight.T.log_softmax(-1)


def states_of(answer: tuple[int, ...]) -> list[int]:
    return [PREFIXES.index(answer[:t]) for t in range(len(answer))]


def probability(table: Table, answer: tuple[int, ...]) -> torch.Tensor:
    logp = table.logprobs()
    return torch.exp(sum(logp[s, a] for s, a in zip(states_of(answer), answer, strict=True)))


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    policy, ref = Table(0), Table(1)
    scores = torch.rand(len(ANSWERS), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kls = lambda: (policy.logprobs().exp() * (policy.logprobs() - ref.logprobs().detach())).sum(-1)  # noqa: E731
    return SimpleNamespace(policy=policy, ref=ref, scores=scores, kls=kls)


def gradient(value: torch.Tensor, table: Table) -> torch.Tensor:
    return torch.autograd.grad(value, table.head.weight, retain_graph=True)[0]


def true_parts(world: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of E[score], of E[sum KL] through KL itself, and of E[sum KL] through the states visited."""
    p = torch.stack([probability(world.policy, a) for a in ANSWERS])
    kl = world.kls()
    sums = torch.stack([kl[states_of(a)].sum() for a in ANSWERS])
    return (
        gradient((p * world.scores).sum(), world.policy),
        gradient((p.detach() * sums).sum(), world.policy),
        gradient((p * sums.detach()).sum(), world.policy),
    )


def production_gradient(world: SimpleNamespace, placement: str, **options: object) -> torch.Tensor:
    """Expected gradient of the production loss over all groups of three answers, per answer."""
    n = 3
    groups = list(itertools.product(range(len(ANSWERS)), repeat=n))
    p = torch.stack([probability(world.policy, a) for a in ANSWERS]).detach()
    chance = p[torch.tensor(groups)].prod(1)
    answers = [ANSWERS[i] for group in groups for i in group]
    lengths = torch.tensor([len(a) for a in answers])
    states = torch.tensor([s for a in answers for s in states_of(a)])
    targets = torch.tensor([t for a in answers for t in a])
    config = GRPOConfig(
        output_dir="-",
        model_name_or_path="-",
        dataset_name=["-"],
        reward_funcs=["-"],
        beta=BETA,
        kl_top_k=V,
        kl_placement=placement,
    )
    advantages = group_advantages(world.scores[torch.tensor(groups)], **options)
    batch = RolloutBatch(
        packed=None,
        lengths=lengths,
        advantages=advantages.reshape(-1),
        token_weights=chance.repeat_interleave(n).repeat_interleave(lengths),
        count=1.0,
        ref=topk_select(world.ref.head.weight.detach().T[states], k=V),
    )
    objective = PolicyObjective(world.policy, config, {"policy": 1.0, "kl": BETA, "ptx": 0.0})
    hidden = torch.eye(len(PREFIXES), dtype=torch.float64)[states]
    terms = objective._policy_terms(hidden, targets, batch)
    loss = sum(objective.weights[name] * value for name, value in terms.sums.items())
    return gradient(loss, world.policy) / n


UNBIASED = {"baseline": "leave_one_out", "scale_rewards": "none"}


def test_split_is_the_true_gradient(world: SimpleNamespace) -> None:
    score, direct, visited = true_parts(world)
    truth = -(score - BETA * (direct + visited))
    ours = production_gradient(world, "split", **UNBIASED)
    assert (ours - truth).norm() / truth.norm() < 1e-6


def test_reward_placement_lacks_the_direct_term(world: SimpleNamespace) -> None:
    score, direct, visited = true_parts(world)
    ours = production_gradient(world, "reward", **UNBIASED)
    assert (ours - -(score - BETA * visited)).norm() / score.norm() < 1e-6
    assert (BETA * direct).norm() / score.norm() > 0.1, (
        "the missing part must be visible for this test to mean anything"
    )


def test_loss_placement_lacks_the_visited_states(world: SimpleNamespace) -> None:
    score, direct, visited = true_parts(world)
    ours = production_gradient(world, "loss", **UNBIASED)
    assert (ours - -(score - BETA * direct)).norm() / score.norm() < 1e-6
    assert (BETA * visited).norm() / score.norm() > 0.1


def test_group_mean_shrinks_the_score_part_to_two_thirds(world: SimpleNamespace) -> None:
    score, direct, visited = true_parts(world)
    ours = production_gradient(world, "split", baseline="group_mean", scale_rewards="none")
    truth = -(2 / 3 * score - BETA * (direct + visited))
    assert (ours - truth).norm() / truth.norm() < 1e-6


def test_dividing_by_the_group_std_changes_the_direction(world: SimpleNamespace) -> None:
    score, direct, visited = true_parts(world)
    truth = -(score - BETA * (direct + visited))
    ours = production_gradient(world, "split", baseline="group_mean", scale_rewards="group")
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), truth.flatten(), dim=0)
    assert 0.5 < cosine < 0.9999


def test_kl_to_go_stays_inside_each_answer() -> None:
    kl = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    lengths = torch.tensor([3, 0, 2])
    assert kl_to_go(kl, lengths, include_present=False).tolist() == [6.0, 4.0, 0.0, 16.0, 0.0]
    assert kl_to_go(kl, lengths, include_present=True).tolist() == [7.0, 6.0, 4.0, 24.0, 16.0]
    assert kl_to_go(kl[:0], lengths[:0], include_present=False).numel() == 0


def test_token_advantages_are_constants() -> None:
    kl = torch.ones(3, dtype=torch.float64, requires_grad=True)
    out = token_advantages(torch.tensor([2.0]), kl, torch.tensor([3]), beta=0.5, placement="split")
    assert not out.requires_grad
    assert out.tolist() == [1.0, 1.5, 2.0]


def test_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="kl_placement must be one of .* got 'advantage'"):
        token_advantages(torch.ones(1), torch.ones(1), torch.ones(1).long(), beta=0.1, placement="advantage")
