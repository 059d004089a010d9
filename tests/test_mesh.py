"""What a rank can know before it meets the others, and a mesh of one; tests with several ranks are in test_ranks.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nova_train import mesh
from nova_train.config import ConfigError
from nova_train.mesh import Mesh, Repeat, mapped
from nova_train.sharding import full_tensor, gathered, is_sharded, like_parameter, shard, with_weights


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun would start this process; meeting the other one is a failure of the test."""

    def meet() -> None:
        raise AssertionError("it should have been refused before")

    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mesh, "connect", meet)


@pytest.mark.usefixtures("two_ranks")
def test_rows_can_only_be_split_over_ranks_that_exist() -> None:
    with pytest.raises(ConfigError, match="sequence_parallel_size 3 does not divide the 2 ranks that were started"):
        mesh.join(3)
    with pytest.raises(AssertionError, match="refused before"):
        mesh.join(2)


@pytest.mark.usefixtures("two_ranks")
def test_gpus_need_nccl_and_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="needs a torch with NCCL; install one, or use device: cpu"):
        mesh.join(device="cuda")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks were started on this machine, which has 1 GPUs; start one rank per"):
        mesh.join(device="cuda")
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with pytest.raises(AssertionError, match="refused before"):
        mesh.join(device="cuda")
    assert taken == [1]


def test_ranks_share_the_cpus_that_they_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Mesh().cpu_threads(1000) == 1000
    cpus = {"a": frozenset(range(8)), "b": frozenset(range(8, 12))}
    monkeypatch.setattr(mesh, "usable_cpus", lambda: cpus["a"])
    for others, expected in (([], 8), (["a"], 4), (["a", "a"], 2), (["b", "b", "b"], 8), (["a"] * 20, 1)):
        monkeypatch.setattr(Mesh, "gather", lambda _, own, others=others: [own, *((own[0], cpus[o]) for o in others)])
        ranks = Mesh(dp=1 + len(others), devices=object())
        assert [ranks.cpu_threads(wanted) for wanted in (1, 1000)] == [1, expected]


def test_every_rank_gets_equally_many_items_and_each_item_counts_once() -> None:
    shares = [Mesh(dp=3, rank=rank).share("abcde") for rank in range(3)]
    assert shares == [["a", "d"], ["b", "e"], ["c", Repeat("a")]]
    assert [mapped(str.upper, item) for item in shares[2]] == ["C", Repeat("A")]


def test_ranks_that_share_rows_get_the_same_items() -> None:
    assert [Mesh(dp=2, sp=2, rank=rank).share("abcd") for rank in range(4)] == [["a", "c"]] * 2 + [["b", "d"]] * 2


def test_alone_nothing_is_exchanged() -> None:
    alone = Mesh()
    alone.require_same("data", "x")
    assert alone.total({"a": 2.0}) == {"a": 2.0}
    assert (alone.gather(1), alone.any(True), alone.on_main(max, 1, 2)) == ([1], True, 2)
    assert alone.spread([1, 2], lambda some: [2 * one for one in some]) == [2, 4]
    assert alone.own_tokens(5) == slice(0, 5)
    assert mesh.tells("anything")


def test_a_model_of_one_rank_stays_as_it_is() -> None:
    model = nn.Linear(2, 3)
    weight = model.weight
    shard(model, Mesh(), bf16=False)
    assert not is_sharded(model)
    with gathered(model):
        assert with_weights(model, lambda: model.weight) is weight
    assert full_tensor(weight) is weight
    assert like_parameter(value := torch.zeros(3, 2), weight) is value
