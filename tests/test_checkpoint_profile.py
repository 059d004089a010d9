"""Predicted bytes against measured ones: the profile, the cost of plans, and the tracker that both are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, Qwen2Config

from nova_kernels.checkpoint import (
    Profile,
    SegmentPlan,
    StorageTracker,
    checkpoint_segments,
    plan_segments,
    profile_layers,
)
from nova_kernels.checkpoint.samples import shortened
from nova_kernels.integrations.transformers import use_varlen_attention
from nova_kernels.packing import pack_samples

LAYERS = 8
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "num_hidden_layers": LAYERS}
PLANS = {
    "keep": ([LAYERS], "keep"),
    "k=1": ([1] * 8, "segment"),
    "k=2": ([2] * 4, "segment"),
    "k=4": ([4] * 2, "segment"),
    "uniform, rest last": ([3, 3, 2], "segment"),
    "decreasing": ([4, 2, 1, 1], "segment"),
    "reversed": ([1, 1, 2, 4], "segment"),
    "nested": ([4, 4], "nested"),
    "mixed": ([3, 3, 2], ["nested", "segment", "keep"]),
    "kept first": ([2, 3, 3], ["keep", "segment", "nested"]),
}


def make_model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    family = Qwen2Config if name == "qwen2" else LlamaConfig
    return AutoModelForCausalLM.from_config(family(**SIZES, **options)).train()


def sample_of(tokens: int) -> dict[str, Any]:
    ids = torch.arange(tokens) % 60
    batch = pack_samples([{"input_ids": ids[: tokens // 4]}, {"input_ids": ids[tokens // 4 :]}])
    return {"input_ids": batch.input_ids, "labels": batch.labels, **batch.attention_kwargs()}


def loss_of(model: nn.Module, sample: dict[str, Any]) -> Tensor:
    return model(**sample).loss


def measured_peak(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Of forward and backward, with the gradients of weights in place."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with StorageTracker() as tracker:
        loss().backward()
    return tracker.peak


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def profiled(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Profile]]:
    model = make_model(request.param)
    with use_varlen_attention(model):
        yield model, profile_layers(model, sample_of(64), loss=loss_of)


@pytest.mark.parametrize("tokens", [96, 384])
@pytest.mark.parametrize("name", PLANS)
def test_one_profile_predicts_every_plan_at_every_length(
    profiled: tuple[nn.Module, Profile], name: str, tokens: int
) -> None:
    model, profile = profiled
    plan, sample = SegmentPlan.of(profile, *PLANS[name], tokens=tokens), sample_of(tokens)
    with checkpoint_segments(model, plan):
        measured = measured_peak(model, lambda: loss_of(model, sample))
    assert plan.predicted_peak_bytes == pytest.approx(measured, rel=0.002), plan.table()


def test_the_planner_s_promises_hold(profiled: tuple[nn.Module, Profile]) -> None:
    (model, profile), sample = profiled, sample_of(256)
    everything = SegmentPlan.of(profile, [LAYERS], "keep", tokens=256).predicted_peak_bytes
    for budget in (None, everything // 3, everything // 2, everything):
        plan = plan_segments(profile, tokens=256, budget_bytes=budget)
        with checkpoint_segments(model, plan):
            measured = measured_peak(model, lambda: loss_of(model, sample))
        assert measured == pytest.approx(plan.predicted_peak_bytes, rel=0.002)
        assert budget is None or measured <= budget
        assert "offload" not in plan.actions, "host memory is the same memory here"


@pytest.mark.parametrize("inside", [True, False], ids=["loss under autocast", "loss outside"])
@pytest.mark.parametrize("name", ["keep", "k=1", "k=4", "mixed"])
def test_weights_that_autocast_copies(name: str, inside: bool) -> None:
    model = make_model("llama")

    def loss(model: nn.Module, sample: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            if inside:
                return loss_of(model, sample)
            hidden = model.model(input_ids=sample["input_ids"], use_cache=False).last_hidden_state
        return nn.functional.cross_entropy(model.lm_head(hidden.float())[0], sample["labels"][0].clamp_min(0))

    sample = {"input_ids": torch.arange(64)[None] % 60, "labels": torch.arange(64)[None] % 60, "use_cache": False}
    plan = SegmentPlan.of(profile_layers(model, sample, loss=loss), *PLANS[name])
    with checkpoint_segments(model, plan):
        assert measured_peak(model, lambda: loss(model, sample)) == pytest.approx(plan.predicted_peak_bytes, rel=0.01)


def test_a_profile_without_weights_is_the_same() -> None:
    """On the meta device, from the config alone; a fake run needs no memory and gives the same bytes."""
    real = make_model("qwen2").bfloat16()
    with torch.device("meta"):
        empty = make_model("qwen2").bfloat16()
    profiles = []
    for model in (real, empty):
        sample = sample_of(64)
        for field in ("input_ids", "labels", "position_ids"):
            sample[field] = sample[field].to(model.device)
        with use_varlen_attention(model, backend="reference"):
            profiles.append(profile_layers(model, sample, loss=loss_of))
    on_cpu, on_meta = (profile.at(1000) for profile in profiles)
    assert profiles[1].device == "meta" and profiles[0].weight_bytes == profiles[1].weight_bytes
    assert on_meta.layers == on_cpu.layers
    assert on_meta.loss == pytest.approx(on_cpu.loss, rel=0.001)


def test_a_trained_embedding_counts_and_a_frozen_one_needs_no_gradient() -> None:
    model = make_model("llama")
    sample = {"input_ids": torch.arange(32)[None], "use_cache": False}
    trained = profile_layers(model, sample).at(32)
    model.get_input_embeddings().requires_grad_(False)
    frozen = profile_layers(model, sample).at(32)
    assert trained.embedding > 0 == frozen.embedding
    assert frozen.layers[0].backward <= trained.layers[0].backward and frozen.layers[1] == trained.layers[1]
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert profile_layers(model, sample).at(32).layers[3].saved == 0


def test_layers_that_differ_are_measured_apart() -> None:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.down(torch.tanh(self.up(hidden)))

    layers = nn.ModuleList([Block(width) for width in (8, 32, 8, 32, 64)])

    def loss(layers: nn.ModuleList, sample: Tensor) -> Tensor:
        hidden = sample * 1.0
        for layer in layers:
            hidden = layer(hidden)
        return (hidden * torch.linspace(0, 1, 8)).sum()

    sample = torch.randn(40, 8, requires_grad=True)
    profile = profile_layers(layers, sample, loss=loss)
    saved = [layer.saved for layer in profile.at(40).layers]
    assert saved == [4 * 40 * width for width in (8, 32, 8, 32, 64)]
    assert len(set(profile.layers)) == 3
    for name, sizes in (("segment", [2, 2, 1]), ("nested", [3, 2]), ("keep", [5])):
        plan = SegmentPlan.of(profile, sizes, name)
        with checkpoint_segments(layers, plan):
            measured = measured_peak(layers, lambda: loss(layers, sample))
        assert measured == pytest.approx(plan.predicted_peak_bytes, rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=256, attn_pdrop=0.0),
        GPTNeoXConfig(
            vocab_size=64, hidden_size=32, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4
        ),
    ],
    ids=["gpt2", "gpt_neox"],
)
@pytest.mark.parametrize("name", ["k=1", "decreasing", "nested", "mixed"])
def test_a_recomputation_ends_with_the_last_tensor_saved(config: Any, name: str) -> None:
    """Here the peak lies in a recomputation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    sample = {"input_ids": torch.arange(128)[None] % 60, "use_cache": False}
    profile = profile_layers(
        model, {name: value[:, :64] if name == "input_ids" else value for name, value in sample.items()}
    )
    plan = SegmentPlan.of(profile, *PLANS[name], tokens=128)
    with checkpoint_segments(model, plan):
        measured = measured_peak(model, lambda: model(**sample).logits.sum())
    assert plan.predicted_peak_bytes == pytest.approx(measured, rel=0.01), plan.table()


def only_upper_layers(model: nn.Module) -> None:
    for module in (model.get_input_embeddings(), *model.model.layers[:5]):
        module.requires_grad_(False)


def only_the_head(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)


def adapters(model: nn.Module) -> None:
    """As PEFT trains: small matrices in every layer, and an input that needs a gradient as a leaf."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.requires_grad_(True)


@pytest.mark.parametrize("freeze", [only_upper_layers, only_the_head, adapters])
@pytest.mark.parametrize("sizes", [[1] * LAYERS, [4, 4], [2, 3, 3], [LAYERS]], ids=str)
@pytest.mark.parametrize("action", ["keep", "segment", "nested"])
def test_frozen_layers_keep_nothing(freeze: Callable[[nn.Module], None], action: str, sizes: list[int]) -> None:
    model = make_model("llama")
    freeze(model)
    sample = {"input_ids": torch.arange(96)[None] % 60, "use_cache": False}
    plan = SegmentPlan.of(profile_layers(model, sample), sizes, action)
    with checkpoint_segments(model, plan):
        measured = measured_peak(model, lambda: model(**sample).logits.sum())
    assert plan.predicted_peak_bytes == pytest.approx(measured, rel=0.01), plan.table()


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 3, 2]], ids=str)
def test_layers_that_save_nothing_keep_no_boundary(sizes: list[int]) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(8))

        def forward(self, hidden: Tensor) -> Tensor:
            return (hidden + self.by) * 2

    layers = nn.ModuleList([Shift() if index % 2 else nn.Linear(8, 8) for index in range(8)])

    def loss(layers: nn.ModuleList, sample: Tensor) -> Tensor:
        hidden = sample * 1.0
        for layer in layers:
            hidden = layer(hidden)
        return hidden.sum()

    sample = torch.randn(64, 8)
    plan = SegmentPlan.of(profile_layers(layers, sample, loss=loss), sizes)
    with checkpoint_segments(layers, plan):
        measured = measured_peak(layers, lambda: loss(layers, sample))
    assert plan.predicted_peak_bytes == pytest.approx(measured, rel=0.03), plan.table()


def test_attention_that_is_quadratic_is_noticed() -> None:
    model = make_model("llama", attn_implementation="eager")
    sample = {"input_ids": torch.arange(64)[None] % 60, "use_cache": False}
    profile = profile_layers(model, sample)
    plan = SegmentPlan.of(profile, [2] * 4)
    with checkpoint_segments(model, plan):
        measured = measured_peak(model, lambda: model(**sample).logits.sum())
    assert measured == pytest.approx(plan.predicted_peak_bytes, rel=0.02), "at its own length it holds"
    with pytest.raises(ValueError, match=r"holds for its sample's 64 tokens only, not for 128: .*attention.*quadratic"):
        profile.at(128)


def test_profiling_leaves_no_trace() -> None:
    model = make_model("llama", attention_dropout=0.1)
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 7.0)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    profile_layers(model, {"input_ids": torch.arange(32)[None], "use_cache": False})
    assert torch.equal(torch.rand(3), expected)
    assert bool((model.lm_head.weight.grad == 7).all())
    assert all(p.grad is None for p in model.model.parameters())
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_what_cannot_be_profiled_is_refused() -> None:
    model = make_model("llama")
    sample = {"input_ids": torch.arange(32)[None], "use_cache": False}
    with pytest.raises(ValueError, match="at least 8 tokens per row, got 4"):
        profile_layers(model, {"input_ids": torch.arange(4)[None]})
    with pytest.raises(ValueError, match=r"expected input_ids \[B, T\] or inputs_embeds"):
        profile_layers(model, {"ids": torch.arange(32)[None]})
    with pytest.raises(ValueError, match=r"expected one stack of layers in Linear, found \[\]"):
        profile_layers(nn.Linear(2, 2), sample)
    with checkpoint_segments(model, 2), pytest.raises(ValueError, match="layer 0 has segments already"):
        profile_layers(model, sample)
    with pytest.raises(ValueError, match="the loss must be one number with a gradient"):
        profile_layers(model, sample, loss=lambda model, sample: model(**sample).logits)
    with pytest.raises(ValueError, match=r"does not call layer 0 of 8"):
        profile_layers(model, sample, loss=lambda model, sample: model.lm_head.weight.sum())
    with pytest.raises(ValueError, match="a whole number of at least 1, got 0"):
        profile_layers(model, sample).at(0)
    with pytest.raises(ValueError, match=r"a whole number of at least 1, got 1.5"):
        profile_layers(model, sample).at(1.5)  # type: ignore[arg-type]
    experts = MixtralConfig(**SIZES, num_local_experts=2, output_router_logits=True)
    with pytest.raises(ValueError, match=r"reads something else of them \(router logits"):
        profile_layers(AutoModelForCausalLM.from_config(experts), sample | {"labels": sample["input_ids"]})


def test_a_sample_is_shortened_in_every_field() -> None:
    """A mask has queries and keys; positions have a row for time, height and width, whose number may be T, too."""
    sample = {
        "input_ids": torch.arange(24).view(3, 8),
        "attention_mask": torch.ones(3, 1, 8, 8),
        "position_ids": torch.zeros(3, 8, 8),
        "cu_seq_lens_q": torch.tensor([0, 5, 8]),
        "max_length_q": 5,
        "scale": torch.ones(8),
    }
    short = shortened(sample, 4)
    shapes = {name: list(value.shape) for name, value in short.items() if isinstance(value, Tensor)}
    assert shapes["input_ids"] == [3, 4] and shapes["attention_mask"] == [3, 1, 4, 4]
    assert shapes["position_ids"] == [3, 8, 4] and shapes["scale"] == [8]
    assert short["cu_seq_lens_q"].tolist() == [0, 4] and short["max_length_q"] == 4


def test_running_statistics_are_put_back() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.linear(self.norm(hidden))

    layers = nn.ModuleList([Normed(), Normed()])
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    profile_layers(layers, torch.randn(16, 8))
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_tracker_counts_every_storage_once_and_to_its_end(device: str) -> None:
    weight = torch.ones(10, 10, device=device, requires_grad=True)
    inputs = torch.ones(5, 10, device=device)
    with StorageTracker() as tracker:
        product = inputs @ weight
        assert tracker.current == 200
        view = product.view(-1)[3:]
        assert tracker.current == 200, "a view is no new storage"
        out = product.tanh()
        del product
        assert tracker.current == 400, "the view holds it"
        del view
        assert tracker.current == 200 and tracker.peak == 400
        out.sum().backward()
        del out
        assert tracker.current == weight.grad.nbytes == 400
        tracker.reset_peak()
        assert tracker.peak == 400
    assert tracker.totals == []
    with StorageTracker() as grown:
        buffer = torch.ones(2, device=device)
        buffer.resize_(8)
        assert grown.current == grown.peak == 32
    with StorageTracker("cuda" if device == "cpu" else "cpu") as other:
        torch.ones(3, device=device)
    assert other.peak == 0
