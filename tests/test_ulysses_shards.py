"""Packed rows in parts: every per-token field is cut at the same places, or the batch is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nova_kernels.packing import pack_samples
from nova_kernels.ulysses import SequenceShards, TokenPlan, shift_labels
from nova_kernels.varlen import cu_seqlens_from_lengths

LENGTHS = (5, 1, 14, 17)
PLAN = TokenPlan.build(37, 3)


def make_batch() -> Any:
    samples = [
        {"input_ids": torch.arange(1, length + 1) + 100 * index, "weights": torch.rand(length, 2)}
        for index, length in enumerate(LENGTHS)
    ]
    return pack_samples(samples)


def shards_of(batch: Any, plan: TokenPlan = PLAN, **declared: frozenset[str]) -> list[dict[str, Any]]:
    return [SequenceShards(plan, rank, **declared).shard(batch) for rank in range(plan.world_size)]


def test_a_packed_batch_is_cut_and_put_together() -> None:
    batch = make_batch()
    parts = shards_of(batch)
    whole = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "weights": batch.extra["weights"]}
    for name, values in whole.items():
        assert [part[name].shape[1] for part in parts] == list(PLAN.sizes)
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), values)
    for part in parts:
        assert part["cu_seqlens"] is batch.cu_seqlens and part["max_seqlen"] == 17 and part["padding"] == 0
        assert "labels" not in part
        assert set(part) == {*whole, "shift_labels", "cu_seqlens", "max_seqlen", "padding"}


def test_labels_are_those_of_the_next_token_also_across_shards() -> None:
    """Token by token: its label is the next id of its own sample, wherever the shard ends."""
    batch = make_batch()
    found = torch.cat([part["shift_labels"] for part in shards_of(batch)], dim=1)[0]
    bounds, ids = batch.cu_seqlens.tolist(), batch.input_ids[0]
    expected = [-100 if token + 1 in bounds else ids[token + 1].item() for token in range(37)]
    assert found.tolist() == expected
    edge = PLAN.bounds(0)[1] - 1
    assert expected[edge] != -100  # the label of a shard's last token is on the next rank


@pytest.mark.parametrize("shape", [(9,), (1, 9)])
def test_shift_labels_at_boundaries(shape: tuple[int, ...]) -> None:
    """Labels that were not ignored at a sample's first token, and samples without tokens."""
    labels = torch.arange(9).view(shape)
    shifted = shift_labels(labels, cu_seqlens_from_lengths([0, 4, 1, 0, 4, 0]))
    assert shifted.shape == shape
    assert shifted.flatten().tolist() == [1, 2, 3, -100, -100, 6, 7, 8, -100]
    assert labels.flatten().tolist() == list(range(9))


def test_a_mapping_with_flat_and_three_axis_fields() -> None:
    fields = {
        "input_ids": torch.arange(37),
        "position_ids": torch.arange(3 * 37).view(3, 1, 37),
        "scores": torch.rand(37, 2),
        "rewards": torch.rand(4),
        "cu_seq_lens_q": cu_seqlens_from_lengths(LENGTHS),
        "labels": torch.arange(37),
    }
    parts = shards_of(fields, per_token=frozenset({"scores"}), whole=frozenset({"rewards"}))
    assert torch.equal(torch.cat([part["position_ids"] for part in parts], dim=2), fields["position_ids"])
    assert torch.equal(torch.cat([part["scores"] for part in parts]), fields["scores"])
    assert all(part["rewards"] is fields["rewards"] for part in parts)
    assert [part["shift_labels"].shape[0] for part in parts] == [13, 12, 12]


def test_ranks_without_tokens() -> None:
    parts = shards_of({"input_ids": torch.arange(2)[None], "max_seqlen": 2}, TokenPlan.build(2, 4))
    assert [part["input_ids"].shape for part in parts] == [(1, 1), (1, 1), (1, 0), (1, 0)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"channel": torch.zeros(1, 37)}, r"nothing says whether \['channel'\] are per token; name each of them in"),
        ({"attention_mask": None}, r"nothing says whether \['attention_mask'\] are per token"),
        ({"position_ids": torch.zeros(1, 13)}, r"position_ids is per token, the token plan expects \[1, 37, ...\] or"),
        ({"input_ids": [1, 2]}, "input_ids is per token.*got a list"),
        ({"labels": torch.zeros(37)}, "labels are shifted within sequences; the batch needs cu_seqlens"),
        (
            {"labels": torch.zeros(37), "shift_labels": torch.zeros(37), "cu_seqlens": torch.zeros(1)},
            "the batch has labels and shift_labels; drop one",
        ),
        ({"labels": torch.zeros(13), "cu_seqlens": torch.zeros(1)}, r"labels is per token.*got \[13\]"),
    ],
)  # fmt: skip
def test_refused_batches(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SequenceShards(PLAN, 0).shard({"input_ids": torch.arange(37), **change})


def test_refused_declarations() -> None:
    with pytest.raises(ValueError, match=r"\['x'\] cannot be both per token and whole; declare each once"):
        SequenceShards(PLAN, 0, per_token=frozenset({"x"}), whole=frozenset({"x"}))
    with pytest.raises(ValueError, match=r"\['input_ids'\] cannot be both"):
        SequenceShards(PLAN, 0, whole=frozenset({"input_ids"}))
    with pytest.raises(ValueError, match="rank must be from 0 to 2, got 3"):
        SequenceShards(PLAN, 3)
    with pytest.raises(ValueError, match=r"expected labels \[T\] or \[1, T\] of one packed row, got \[2, 4\]"):
        shift_labels(torch.zeros(2, 4), cu_seqlens_from_lengths([8]))
    with pytest.raises(ValueError, match="must end at the token count 9, ends at 8"):
        shift_labels(torch.zeros(9), cu_seqlens_from_lengths([8]))
