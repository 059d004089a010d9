from __future__ import annotations

import pytest
import torch

from nova_train import muon
from nova_train.muon import Muon, orthogonalize


def test_singular_values_go_to_one_and_vectors_stay() -> None:
    matrices = torch.randn(3, 24, 10)
    out = orthogonalize(matrices)
    for before, after in zip(matrices, out, strict=True):
        assert torch.linalg.svdvals(after).sub(1).abs().max() < 0.4
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        assert torch.nn.functional.cosine_similarity((u @ vh).flatten(), after.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
def test_steps_follow_torchs_muon(shape: tuple[int, int]) -> None:
    """torch rounds each Newton-Schulz step to bfloat16: the same rule, within that rounding."""
    start = torch.randn(2, *shape)
    ours = [torch.nn.Parameter(w.clone()) for w in start]
    theirs = [torch.nn.Parameter(w.clone()) for w in start]
    mine = Muon(ours, lr=0.05, momentum=0.95, weight_decay=0.1)
    peer = torch.optim.Muon(theirs, lr=0.05, momentum=0.95, weight_decay=0.1)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        peer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.03 * (b - w).norm()


def test_batching_over_shapes_changes_nothing() -> None:
    matrices = torch.randn(4, 6, 9)
    one_by_one = torch.cat([orthogonalize(m[None]) for m in matrices])
    assert torch.allclose(orthogonalize(matrices), one_by_one, atol=1e-5)


def test_zero_gradients_give_zero_updates_and_vectors_are_refused() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"expected 2-D weights, got one of shape \[5\]"):
        Muon([torch.nn.Parameter(torch.ones(5))], lr=0.1)


def test_few_matrices_at_a_time_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    results, sizes = [], []
    start, gradients = torch.randn(2, 5, 6, 4, dtype=torch.float64)

    def counted(matrices: torch.Tensor) -> torch.Tensor:
        sizes.append(len(matrices))
        return orthogonalize(matrices)

    monkeypatch.setattr(muon, "orthogonalize", counted)
    for together in (muon.TOGETHER, 2 * 6 * 4, 1):
        monkeypatch.setattr(muon, "TOGETHER", together)
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        for w, gradient in zip(weights, gradients, strict=True):
            w.grad = gradient.clone()
        Muon(weights, lr=0.1).step()
        results.append(torch.stack([w.detach() for w in weights]))
    assert sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)
