"""The collator: one packed row with the keys of Hugging Face models, from samples or from their numbers."""

from __future__ import annotations

import pyarrow as pa
import pytest

from nova_kernels.packing import PackCollator


def test_the_collator_speaks_as_hugging_face_models_listen() -> None:
    batch = [
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "completion_mask": [0, 0, 1]},
        {"input_ids": [4, 5], "attention_mask": [1, 1], "completion_mask": [0, 1]},
    ]
    row = PackCollator(seq_idx=True)(batch)
    assert sorted(row) == sorted(
        [
            "input_ids",
            "labels",
            "position_ids",
            "cu_seq_lens_q",
            "cu_seq_lens_k",
            "max_length_q",
            "max_length_k",
            "seq_idx",
        ]
    )
    assert row["labels"].tolist() == [[-100, -100, 3, -100, 5]]
    assert row["cu_seq_lens_q"].tolist() == [0, 3, 5] and row["max_length_k"] == 3
    assert row["seq_idx"].tolist() == [[0, 0, 0, 1, 1]]
    cut = PackCollator(max_length=2, pad_to_multiple_of=8)(batch)
    assert cut["input_ids"].tolist() == [[1, 2, 4, 5, 0, 0, 0, 0]] and cut["cu_seq_lens_q"].tolist() == [0, 2, 4, 8]
    assert batch[0]["completion_mask"] == [0, 0, 1]


@pytest.mark.parametrize("held", [True, False], ids=["numbers", "samples"])
def test_an_empty_pack_is_one_token_without_a_label(held: bool) -> None:
    row = PackCollator(fields={"input_ids": [[1, 2]]} if held else None)([])
    assert row["input_ids"].tolist() == [[0]] and row["labels"].tolist() == [[-100]]
    assert row["cu_seq_lens_q"].tolist() == [0, 1]
    assert PackCollator(fields={"input_ids": [[1, 2]]} if held else None, pad_to=4)([])["input_ids"].shape == (1, 4)


def test_the_collator_can_hold_the_samples() -> None:
    fields = {"input_ids": pa.array([[1, 2, 3], [4], [5, 6]]), "attention_mask": pa.array([[1, 1, 1], [1], [1, 1]])}
    row = PackCollator(fields=fields, max_length=2)([2, 0])
    assert row["input_ids"].tolist() == [[5, 6, 1, 2]] and row["position_ids"].tolist() == [[0, 1, 0, 1]]
