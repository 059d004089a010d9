"""`rollout: vllm` against a stand-in for vLLM: answers follow the weights, ranks agree, refusals.

Nothing here runs vLLM itself.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import fake_vllm
import tiny
from nova_train import vllm_rollout
from nova_train.config import ConfigError, identity
from nova_train.mesh import Mesh
from nova_train.metrics import read_metrics
from nova_train.model import load_causal_lm
from nova_train.rollout import Completion, generate
from nova_train.stages import grpo
from nova_train.vllm_rollout import Engine, checkpoint_layout, checkpoint_weights
from processes import on_ranks

REWARDS = """
def ids(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 17) for ids in completion_ids]
"""
PROMPTS = [[9, 10, 11], [12, 13], [9, 10, 11]]
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    tiny.save_model(folder / "model")
    tiny.prompt_file(folder / "prompts.jsonl", 8)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[fake_vllm.LLM]:
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    fake_vllm.LLM.made.clear()
    return fake_vllm.LLM


def config(folder: Path, **options: Any) -> grpo.GRPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": [str(folder / "prompts.jsonl")],
        "eval_dataset_name": [str(folder / "prompts.jsonl")],
        "reward_funcs": [f"{folder / 'rewards.py'}:ids"],
        "rollout": "vllm",
        "max_length": 128,
        "max_completion_length": 6,
        "kl_top_k": 32,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "logging_steps": 1,
        "eval_steps": 2,
        "learning_rate": 3e-2,
        "disable_progress": True,
    }
    return grpo.GRPOConfig(**{**defaults, **options})


def write(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """One optimiser step that changes every weight."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def drawn(writer: Any, temperature: float = 1.0) -> list[Completion]:
    how: dict[str, Any] = {
        "seeds": SEEDS,
        "end_ids": [4],
        "max_new_tokens": 6,
        "temperature": temperature,
        "top_p": 0.9,
    }
    if isinstance(writer, Engine):
        with writer.ready():
            return writer.generate(PROMPTS, **how)
    return generate(writer, PROMPTS, pad_id=4, **how)


@pytest.fixture(params=["engine", "sleeping engine", "server"])
def options(request: pytest.FixtureRequest, folder: Path, vllm: Any) -> Iterator[dict[str, Any]]:
    if request.param != "server":
        yield {"vllm_enable_sleep_mode": request.param == "sleeping engine"}
        return
    with fake_vllm.server(str(folder / "model"), room=134) as (url, _):
        yield {"vllm_server_base_url": url + "/"}


@pytest.mark.parametrize("kind", ["AdamW", "fused AdamW", "SGD"])
def test_answers_follow_the_weights(folder: Path, options: dict[str, Any], kind: str) -> None:
    c = config(folder, **options)
    policy = load_causal_lm(folder / "model", c)
    engine = vllm_rollout.start(policy, c, Mesh())
    make = getattr(torch.optim, kind.split()[-1])
    optimizer = make(policy.parameters(), lr=0.3, **({"fused": True} if "fused" in kind else {}))
    before = drawn(policy)
    assert drawn(engine) == before
    write(policy, optimizer)
    after = drawn(policy)
    assert after != before
    assert drawn(engine) == after
    assert drawn(engine, temperature=0.0) == drawn(policy, temperature=0.0)
    engine.close()


def test_weights_are_sent_after_a_write_only_and_one_at_a_time(folder: Path, vllm: Any) -> None:
    c = config(folder)
    policy = load_causal_lm(folder / "model", c)
    engine = vllm_rollout.start(policy, c, Mesh())
    (llm,) = vllm.made
    assert llm.events == [] and llm.backend is None
    for _ in range(2):
        drawn(engine)
    write(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
    drawn(engine)
    names = [event[0] for event in llm.events]
    assert names == ["reload", "generate", "generate", "reload", "generate"]
    with torch.no_grad():
        next(policy.parameters()).mul_(2)  # by hand, with no optimiser
    drawn(engine)
    assert [event[0] for event in llm.events[5:]] == ["reload", "generate"]
    count = len(dict(checkpoint_weights(policy)))
    assert llm.events[0] == ("reload", count, 1) and count > 10


def test_it_sleeps_between_rollouts(folder: Path, vllm: Any) -> None:
    c = config(folder, vllm_enable_sleep_mode=True)
    engine = vllm_rollout.start(load_causal_lm(folder / "model", c), c, Mesh())
    (llm,) = vllm.made
    assert llm.awake == set()
    with pytest.raises(RuntimeError, match="the scorer"), engine.ready():
        assert llm.awake == {"weights", "kv_cache"}
        raise RuntimeError("the scorer failed")
    assert llm.awake == set() and llm.events.count(("sleep", 1)) == 2


def test_a_run_is_that_of_rollout_hf(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    ours = grpo.run(config(folder, output_dir=str(tmp_path / "hf"), rollout="hf"))
    theirs = grpo.run(config(folder, output_dir=str(tmp_path / "vllm"), **options))
    a, b = (load_file(path / "model.safetensors") for path in (ours, theirs))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_metrics(ours) == read_metrics(theirs)
    start = load_file(folder / "model" / "model.safetensors")
    assert any(not torch.equal(a[name], start[name]) for name in a)


def on_rank(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    """One of two ranks: sharded weights, whole ones in every engine."""
    fake_vllm.install()
    for name, options in cases.items():
        grpo.run(config(folder, output_dir=str(folder / f"two-{name}"), **options))
    (llm,) = fake_vllm.LLM.made
    assert llm.backend == "external_launcher"
    assert max(event[2] for event in llm.events if event[0] == "reload") == 1
    assert sum(event[0] == "reload" for event in llm.events) == 4  # 3 rollouts; evaluated after steps 2 and 3


@pytest.mark.slow
def test_ranks_send_whole_weights_and_ask_for_their_share(folder: Path) -> None:
    with fake_vllm.server(str(folder / "model"), room=134) as (url, paths):
        cases = {"hf": {"rollout": "hf"}, "engine": {}, "server": {"vllm_server_base_url": url}}
        on_ranks(2, on_rank, folder, cases)
    weights = {name: load_file(folder / f"two-{name}" / "model.safetensors") for name in cases}
    for name in ("engine", "server"):
        assert all(torch.equal(weights["hf"][key], value) for key, value in weights[name].items())
        assert read_metrics(folder / "two-hf") == read_metrics(folder / f"two-{name}")
    assert paths.count("/update_weights") == 4
    assert paths.count("/v1/completions") == 3 * 4 * 3 + 2 * 8  # steps x prompts x answers, evaluations x prompts


def test_the_generators_of_the_process_stay_as_they_were(folder: Path, vllm: Any) -> None:
    c = config(folder)
    policy = load_causal_lm(folder / "model", c)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist()
    vllm_rollout.start(policy, c, Mesh())
    assert torch.equal(torch.rand(3), expected)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_weights_go_out_as_a_checkpoint_has_them(tmp_path: Path) -> None:
    """The experts of this model are joined in memory and apart in its checkpoints."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=32, num_experts=4, num_experts_per_tok=2, **sizes, **heads, tie_word_embeddings=True)
    )
    model.save_pretrained(tmp_path)
    saved, sent = load_file(tmp_path / "model.safetensors"), list(checkpoint_weights(model))
    assert sorted(name for name, _ in sent) == sorted(saved)
    assert len(saved) > len(dict(model.named_parameters()))
    assert all(torch.equal(saved[name], value) for name, value in sent)
    layout = checkpoint_layout(model)
    assert [(name, value.shape) for name, value in sent] == [(name, value.shape) for name, value in layout.items()]


def test_the_way_to_draw_is_part_of_the_run(folder: Path) -> None:
    ours = identity(config(folder, rollout="hf"))
    theirs = identity(config(folder, vllm_enable_sleep_mode=True, vllm_gpu_memory_utilization=0.5))
    assert {name for name in ours if ours[name] != theirs[name]} == {"rollout"}
    assert identity(config(folder, vllm_server_base_url="http://a:1")) == identity(config(folder))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization must lie between 0 and 1, got 1.5"),
        ({"rollout": "hf", "vllm_server_base_url": "http://a"}, "vllm_server_base_url is http://a, but rollout is hf"),
        ({"rollout": "hf", "vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode is True, but rollout is hf"),
        ({"dtype": "float64"}, "knows no dtype: float64"),
        ({"vllm_server_base_url": "a:8000"}, "must begin with http:// or https://, got 'a:8000'"),
        ({"vllm_server_base_url": "http://a", "vllm_enable_sleep_mode": True}, "the one at http://a is a server"),
        ({"segments": "auto"}, "of which vLLM keeps 30%; give memory_budget"),
    ],
)
def test_keys_that_do_not_go_together(folder: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(folder, **keys)
    config(folder, segments="auto", memory_budget="1GiB")


def begin(folder: Path, **options: Any) -> Engine:
    c = config(folder, **options)
    return vllm_rollout.start(load_causal_lm(folder / "model", c), c, Mesh())


def test_vllm_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install vllm, or use rollout: hf"):
        begin(folder)


@pytest.mark.parametrize("version", ["0.27.1", "1.0.0", "dev"])
def test_versions_that_are_refused(folder: Path, vllm: Any, version: str) -> None:
    sys.modules["vllm"].__version__ = version
    with pytest.raises(ConfigError, match=f"vLLM 0.28 and later below 1.0, found {version}"):
        begin(folder)


def test_a_newer_version_is_named(folder: Path, vllm: Any, caplog: pytest.LogCaptureFixture) -> None:
    sys.modules["vllm"].__version__ = "0.33.0"
    begin(folder)
    assert "vLLM 0.33.0 is newer than 0.32" in caplog.text


def test_a_vllm_without_what_is_used(folder: Path, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["vllm.utils.network_utils"], "get_ip")
    begin(folder)  # an engine in the process does without
    with pytest.raises(ConfigError, match=r"uses vllm.utils.network_utils.get_ip, which vLLM 0.32.1 has not"):
        begin(folder, vllm_server_base_url="http://127.0.0.1:1")
    monkeypatch.delattr(vllm, "collective_rpc")
    with pytest.raises(ConfigError, match=r"uses LLM.collective_rpc"):
        begin(folder)


def test_servers_that_are_refused(folder: Path, vllm: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be reached"):
        begin(folder, vllm_server_base_url="http://127.0.0.1:1")
    with fake_vllm.server(str(folder / "model"), room=100) as (url, _), pytest.raises(ConfigError, match="len 134"):
        begin(folder, vllm_server_base_url=url)
    with (
        fake_vllm.server(str(folder / "model"), room=134, version="0.30.0") as (url, _),
        pytest.raises(ConfigError, match=r"is 0.30.0, here it is 0.32.1"),
    ):
        begin(folder, vllm_server_base_url=url)


def test_prompts_and_answers_that_do_not_fit(folder: Path, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = begin(folder)
    how: dict[str, Any] = {"seeds": [1], "end_ids": [4], "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0}
    with pytest.raises(ValueError, match="129 tokens; with 6 new ones that is more than vLLM's 134"):
        engine.generate([[9] * 129], **how)
    assert engine.generate([], **{**how, "seeds": []}) == []
    for ids in ([9, 4, 9, 9, 9, 9], [9, 9], []):
        monkeypatch.setattr(fake_vllm.Weights, "answer", lambda *_, ids=ids: ids)
        with pytest.raises(RuntimeError, match=f"an answer of {len(ids)} tokens that neither stops"):
            engine.generate([[9]], **how)
    monkeypatch.setattr(vllm, "reset_prefix_cache", lambda self: False)
    with pytest.raises(RuntimeError, match="from the old weights"), engine.ready():
        raise AssertionError("must not be reached")
