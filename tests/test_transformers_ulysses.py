"""Unmodified Hugging Face models whose rows are shared by 2 and 3 gloo processes equal one process without our code."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from numerics import distance
from processes import on_ranks
from transformers_ulysses_jobs import CONFIGS, GROUPS, WAYS, WORLD, make_batch, make_model, on_every_rank, one_process

truth = lru_cache(one_process)


pytestmark = pytest.mark.slow  # several models on several ranks; test_ranks.py has one of them in every run


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(WORLD, on_every_rank)


@pytest.mark.parametrize("members", GROUPS, ids=len)
@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in CONFIGS for way in WAYS[: 4 if name == "llama" else 1]]
)
def test_equal_to_one_process(ranks: list[dict[str, Any]], name: str, way: str, members: tuple[int, ...]) -> None:
    expected = truth(name)
    for rank in members:
        found = ranks[rank][f"{name} {way} {len(members)}"]
        assert found.keys() == expected.keys()
        assert all(expected[key].abs().max() > 1e-6 for key in expected if key.endswith("_proj.weight"))
        worst = {key: distance(found[key], expected[key]) for key in expected}
        # Gemma's own attention takes the softmax of its scores, and its norms their gradients, in float32.
        assert max(worst.values()) < (1e-5 if name == "gemma2" else 1e-12), worst


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_that_do_not_exchange_are_noticed(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        assert distance(found[f"cut {name} 3"], truth(name)["logits"]) > 1e-3


def test_generation_is_each_rank_for_itself(ranks: list[dict[str, Any]]) -> None:
    model, batch = make_model("llama"), make_batch()
    for rank, all_found in enumerate(ranks):
        found, prompt = all_found["suspended"], batch.input_ids[:, : 4 + rank]
        with torch.no_grad():
            expected = model(input_ids=prompt).logits
            answer = model.generate(prompt, max_new_tokens=3 + rank, do_sample=False)
        assert torch.equal(found["alone"], expected) and torch.equal(found["restored"], expected)
        assert torch.equal(found["generated"], answer) and answer.shape[1] > prompt.shape[1]
        assert found["same again"]


def test_on_one_rank_a_layer_compiles_as_one_graph(ranks: list[dict[str, Any]]) -> None:
    gap, size, graphs = ranks[2]["compiled alone"]
    assert gap < 1e-12 < 1e-3 < size
    assert graphs == 1  # for all layers, and nothing breaks


REFUSED = {
    "whole row": "of a row of 25 tokens rank {rank} of 3 holds {start} to {end}, got 25 tokens",
    "no boundaries": "ranks that share a row need the boundaries of the whole row: pass cu_seq_lens_q",
    "cache": "takes no KV cache; pass use_cache=False",
    "mask": "takes no attention_mask",
    "two rows": "cu_seq_lens_q describes one packed row [1, T], got [2, {held}]",
    "twice": "use_ulysses: Qwen2ForCausalLM has it already",
    "no model": "use_ulysses: expected a transformers PreTrainedModel, got Linear",
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_refused_on_every_rank(ranks: list[dict[str, Any]], mistake: str) -> None:
    for rank, found in enumerate(ranks):
        start, end = ((0, 9), (9, 17), (17, 25))[rank]
        says = REFUSED[mistake].format(rank=rank, start=start, end=end, held=end - start)
        assert says in found["refusals"][mistake]


def test_a_group_of_others_is_refused(ranks: list[dict[str, Any]]) -> None:
    said = [found["refusals"].get("another group") for found in ranks]
    assert said[:2] == [None, None]
    assert said[2] is not None and "this process is not in the group" in said[2]
