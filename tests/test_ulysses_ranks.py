"""Ulysses on gloo processes is attention in one process: loss, weight and input gradients, and what is exchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nova_kernels.ulysses import HeadPlan, TokenPlan, comm_bytes
from numerics import distance
from processes import on_ranks
from ulysses_jobs import BROKEN, TRITON, WORLD, on_every_rank, stack
from ulysses_ranks import CASES, GROUPS, HEADS, WIDTH, Case, one_process

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(WORLD, on_every_rank)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    case, expected = CASES[name], one_process(CASES[name])
    tolerance = TOLERANCE[case.dtype]
    for index, rank in enumerate(case.ranks):
        found = ranks[rank][name]
        start, end = case.token_plan.bounds(index)
        for key, truth in expected.items():
            truth = truth[start:end] if key == "x" else truth
            assert distance(found[key], truth) <= tolerance, key


@pytest.mark.parametrize("name", CASES)
def test_two_exchanges_per_chunk_with_the_bytes_of_the_formula(ranks: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    for index, rank in enumerate(case.ranks):
        found = ranks[rank][name]
        element = torch.empty(0, dtype=case.dtype).element_size()
        predicted = comm_bytes(case.head_plan, case.token_plan, rank=index, head_dim=WIDTH, element_size=element)
        calls = 2 * case.chunks if len(case.ranks) > 1 else 0
        forward, backward = found["forward"], found["backward"]
        assert forward.calls == ["all_to_all_single"] * calls
        if not case.checkpointed:
            assert backward.calls == forward.calls
            assert sum(forward.bytes) == predicted.total
            assert sum(forward.bytes[: case.chunks]) == predicted.qkv


@pytest.mark.parametrize(
    ("mistake", "wrong", "right"),
    [
        ("copies not summed", ["qkv.weight", "x"], ["loss", "out.weight"]),  # only gradients of keys and values suffer
        ("cut at shards", ["loss", "qkv.weight", "x"], []),
    ],
)
def test_mistakes_are_noticed(ranks: list[dict[str, Any]], mistake: str, wrong: list[str], right: list[str]) -> None:
    expected = one_process(BROKEN)
    for rank, found in enumerate(ranks):
        truth = {**expected, "x": expected["x"][slice(*BROKEN.token_plan.bounds(rank))]}
        distances = {key: distance(found["broken"][mistake][key], truth[key]) for key in truth}
        assert all(distances[key] > 1e-3 for key in wrong), distances
        assert all(distances[key] < 1e-12 for key in right), distances


@pytest.mark.parametrize("heads", [*HEADS, (3, 1)])
@pytest.mark.parametrize("half", ["scatter", "gather"])
def test_each_half_is_the_adjoint_of_its_backward(ranks: list[dict[str, Any]], heads: Any, half: str) -> None:
    for found in ranks:
        there, back = found["adjoint"][heads][half]
        assert abs(there) > 1e-3
        assert there == pytest.approx(back, rel=1e-12)


def test_halves_around_another_attention(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        difference, size = found["own attention"]
        assert difference < 1e-14 < size


def test_gradients_of_some_inputs(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert all(gap < 1e-13 < 1e-3 < size for gap, size in found["some gradients"])


def test_shards_are_put_together(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for ids, embeddings in found["gathered"]:
            assert ids.tolist() == [list(range(37))]
            assert embeddings.flatten().tolist() == list(range(74))


def test_layers_of_different_heads_and_chunks(ranks: list[dict[str, Any]]) -> None:
    for truth, *values in zip(stack(None), *(found["stack"] for found in ranks), strict=True):
        assert truth.abs().max() > 1e-3
        assert all(distance(value, truth) < 1e-12 for value in values)


def test_the_kernels_of_cuda_around_the_exchanges(ranks: list[dict[str, Any]]) -> None:
    if ranks[0]["triton"] is None:
        pytest.skip("needs the Triton interpreter")
    expected = one_process(TRITON)
    for rank, found in enumerate(ranks):
        truth = {**expected, "x": expected["x"][slice(*TRITON.token_plan.bounds(rank))]}
        assert all(distance(found["triton"][key], truth[key]) < 1e-5 for key in truth)


def test_exchanges_run_while_other_chunks_are_computed(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        forward, backward = found["order"]
        assert forward == [
            *("begin qkv 0", "begin qkv 1"),
            *("wait for qkv 0", "attend", "begin out 0"),  # while chunk 1 is on its way
            *("wait for qkv 1", "attend", "begin out 1"),  # while output 0 is
            *("wait for out 0", "wait for out 1"),
        ]
        assert backward == [
            *("begin out 0", "begin out 1"),
            *("wait for out 1", "attend", "begin qkv 1"),
            *("wait for out 0", "attend", "begin qkv 0"),
            *("wait for qkv 0", "wait for qkv 1"),
        ]


def test_autocast_comes_before_the_exchange(ranks: list[dict[str, Any]]) -> None:
    case = Case((0, 1, 2, 3), 8, 2)
    for rank, found in enumerate(ranks):
        dtype, sent, difference = found["autocast"]
        assert dtype == torch.bfloat16 and difference < 0.05
        assert sent == list(comm_bytes(case.head_plan, case.token_plan, rank=rank, head_dim=WIDTH, element_size=2))


def test_a_graph_is_walked_twice(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        first, second = found["backward twice"]
        assert first.abs().max() > 1e-3
        assert torch.equal(first, second)


def test_a_compiled_layer_breaks_once(ranks: list[dict[str, Any]]) -> None:
    """What is before the call and what is after it are graphs; the exchanges run as they are."""
    for rank in GROUPS[0]:
        gap, size, graphs = ranks[rank]["compiled"]
        assert gap < 1e-12 < 1e-3 < size and graphs == 2


def test_options_are_rehearsed_once(ranks: list[dict[str, Any]]) -> None:
    """Whatever the longest sequence is; narrow windows are other options, and wide ones are none."""
    for found in ranks:
        assert found["rehearsals"] == [[(None, 1)], [], [], [(3, 4)], [], [], [], [(36, 37)]]


def test_tensors_are_made_where_the_inputs_are(ranks: list[dict[str, Any]]) -> None:
    assert all(found["another default device"] for found in ranks)


def test_on_one_rank_nothing_breaks(ranks: list[dict[str, Any]]) -> None:
    gap, size, graphs = ranks[2]["compiled"]
    assert gap < 1e-12 < 1e-3 < size and graphs == 1
    assert ranks[2]["refused alone"] == [
        "HeadPlan.split: chunks must be from 1 to 14, the heads of a rank; got 15",
        "ulysses_attention: chunks must be an int, a number of exchanges, got 1.0; 1 = one",
    ]


REFUSED = {
    "tokens": "rank {rank} holds the {held} tokens {start} to {end} of 37, got 37,",
    "heads": "the head plan is for 6 query and 3 key heads, of one width, expected q [t, 6, 4]",
    "key heads": "num_heads must be a positive multiple of num_kv_heads, got 3 and 2",
    "width": "one width, expected q [t, 3, 4] and k, v [t, 1, 4], got [{held}, 3, 4], [{held}, 1, 4], [{held}, 1, 8]",
    "dtype": "one floating-point dtype and one device, got torch.float32 on cpu, torch.float64",
    "shape": "expected q [t, Hq, D] and k, v [t, Hkv, D], this rank's tokens first, got [3, 4], [{held}, 1, 4]",
    "one dimension": "expected q [t, Hq, D] and k, v [t, Hkv, D], this rank's tokens first, got [4], [{held}, 1, 4]",
    "keys of one dimension": "this rank's tokens first, got [{held}, 3, 4], [4], [{held}, 1, 4]",
    "head plan": "the group has 4 ranks, the head plan is for 2 and the token plan for 4",
    "token plan": "the group has 4 ranks, the head plan is for 4 and the token plan for 2",
    "boundaries dtype": "cu_seqlens must be int32 of shape [S + 1], got torch.int64 [5]",
    "boundaries of a shard": "cu_seqlens ends at 6, the token plan at 37; cu_seqlens is about the whole row",
    "boundaries decrease": "must not decrease, entry 2 is 37 after 38",
    "boundaries elsewhere": "cu_seqlens must be a tensor on the CPU or on cpu, it is on meta",
    "boundaries on the device": "cu_seqlens is on meta, where reading T would wait; keep it on the CPU, or pass",
    "boundaries in a list": "cu_seqlens must be a tensor on the CPU or on cpu, it is a list; cu_seqlens_from_lengths",
    "settled, decrease": "must not decrease, entry 2 is 16 after 17",
    "settled, start": "must start at 0, starts at 1",
    "settled, max_seqlen": "sequence 3 has 17 tokens, more than max_seqlen=16",
    "head plan's type": "expected a HeadPlan, got (0, 1, 2, 3, 3); HeadPlan.build makes one",
    "token plan's type": "expected a TokenPlan, got (10, 9, 9, 9); TokenPlan.build makes one",
    "max_seqlen": "sequence 3 has 17 tokens, more than max_seqlen=16",
    "max_seqlen's type": "max_seqlen must be an int, got 17.0",
    "chunks": "chunks must be from 1 to 1, the heads of a rank; got 2",
    "chunks' type": "chunks must be an int, a number of exchanges, got '1'; 1 = one",
    "window's type": "window must be an int, a number of tokens, got 3.0",
    "scale's type": "softmax_scale must be a Python number, got tensor(",
    "causal's type": "causal must be True or False, got 1",
    "window": "window must be at least 1 token, got 0",
    "softcap": "softcap must be positive, got -1.0",
    "backend": "varlen_attention: backend 'flash' cannot run: it runs on CUDA, the tensors are on cpu",
    "backend of the environment": "backend 'flash' cannot run: it runs on CUDA, the tensors are on cpu",
    "packing": "ulysses packing: unknown backend 'cuda'; expected one of ['reference', 'triton']",
    "packing's type": "ulysses packing: the backend must be a name, got ['reference']",
    "empty heads": "heads need a width, got D = 0",
    "softcap, heads for all": "softcap must be positive, got -1.0",
    "cos alone": "pass both or neither",
    "cos of the row": "cos and sin must be [{held}, 4], for this rank's tokens",
    "not in the group": "this process is not in the group",
    "scatter": "this rank's tokens first, got [4], [{held}, 1, 4], [{held}, 1, 4]",
    "scatter's plan": "expected a TokenPlan, got (10, 9, 9, 9); TokenPlan.build makes one",
    "gather": "rank {rank} computes {heads} heads of 37 tokens, expected [37, {heads}, D], got [{held}, 3, 4]",
    "gather rows": "rank {rank} holds {held} tokens, got 37 along dimension 0 of [37]",
    "gather rank": "made for rank {rank} of 4, in the group it is rank",
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_on_every_rank_before_anything_is_sent(ranks: list[dict[str, Any]], mistake: str) -> None:
    """On 3 heads and 4 ranks: one of them computes nothing and refuses all the same."""
    tokens, heads = TokenPlan.build(37, WORLD), HeadPlan.build(3, 1, WORLD)
    for rank, found in enumerate(ranks):
        start, end = tokens.bounds(rank)
        facts = {"rank": rank, "start": start, "end": end, "held": end - start, "heads": len(heads.q_heads(rank))}
        if mistake != "not in the group" or rank >= 2:
            assert REFUSED[mistake].format(**facts) in found["refusals"][mistake]
