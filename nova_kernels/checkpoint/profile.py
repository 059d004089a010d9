"""What the layers of a model cost: bytes kept, bytes at the worst moment, work. Measured, not estimated.

A short forward and backward pass is measured three times, with all, half and a quarter of the sample's tokens:

    layers   each layer that differs from the others runs by itself, on the arguments the model gives it; a
             StorageTracker follows every storage. What is alive after the output is gone is what autograd keeps.
    rest     the whole model runs with layers that return their input: embedding, head and loss.

Bytes are affine in the number of tokens (affine.py), so that the profile holds for any number. On the meta device
nothing is computed and no memory is needed: a model of any size is profiled from its config alone. Attention must
have a memory-efficient backend there (`use_varlen_attention` does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nova_kernels.checkpoint.affine import Lines, NotAffineError
from nova_kernels.checkpoint.cost import Chain, LayerCost
from nova_kernels.checkpoint.measure import LayerRun, RestRun, alike, measure_layer, measure_rest, record_calls
from nova_kernels.checkpoint.samples import Sample, sample_shape, shortened
from nova_kernels.checkpoint.stack import has_segments, hidden_of, layers_of

LEAST_TOKENS = 8  # of a sample: a quarter of it must be a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """One layer: LayerCost as a function of tokens."""

    boundary: Lines
    saved: Lines
    saves_input: bool
    forward: Lines
    recompute: Lines
    recompute_cut: Lines
    backward: Lines
    copies: int  # bytes, as are
    weights: int
    saves: bool
    flops: tuple[float, float]  # a T + b T^2
    tail_flops: tuple[float, float]

    def at(self, tokens: int) -> LayerCost:
        return LayerCost(
            boundary=self.boundary.at(tokens),
            saved=self.saved.at(tokens),
            saves_input=self.saves_input,
            forward=self.forward.at(tokens),
            recompute=self.recompute.at(tokens),
            recompute_cut=self.recompute_cut.at(tokens),
            backward=self.backward.at(tokens),
            copies=self.copies,
            weights=self.weights,
            flops=max(1, round(self.flops[0] * tokens + self.flops[1] * tokens**2)),
            tail_flops=round(self.tail_flops[0] * tokens + self.tail_flops[1] * tokens**2),
            saves=self.saves,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A stack of layers and what surrounds it."""

    tokens: int  # of the sample
    device: str  # "cpu", "cuda", "meta"
    layers: tuple[LayerProfile, ...]
    shared: Lines  # alive all along: tensors that several layers are given
    loss: Lines
    under_autocast: Lines
    after_loss: Lines
    embedding: Lines
    not_affine: str | None = None  # why the profile holds for the sample's tokens alone

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def weight_bytes(self) -> int:
        """Parameters of the layers."""
        return sum(layer.weights for layer in self.layers)

    def at(self, tokens: int | None = None) -> Chain:
        """The costs at this number of tokens; None is the sample's own.

        Raises:
            ValueError: fewer than one token, or another number than the sample's where bytes are not affine.
        """
        tokens = self.tokens if tokens is None else tokens
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"Profile.at: tokens must be a whole number of at least 1, got {tokens!r}")
        if self.not_affine is not None and tokens != self.tokens:
            raise ValueError(
                f"Profile.at: this profile holds for its sample's {self.tokens} tokens only, not for {tokens}: "
                f"{self.not_affine}, which no line fits; attention that keeps its scores is quadratic: use a "
                "memory-efficient one (use_varlen_attention, sdpa), or a sample of the wanted length"
            )
        distinct = {layer: layer.at(tokens) for layer in set(self.layers)}
        return Chain(
            layers=tuple(distinct[layer] for layer in self.layers),
            loss=self.loss.at(tokens),
            under_autocast=self.under_autocast.at(tokens),
            after_loss=self.after_loss.at(tokens),
            embedding=self.embedding.at(tokens),
            fixed=self.shared.at(tokens),
            held=0 if self.layers[0].saves else self.layers[0].boundary.at(tokens),
            num_tokens=tokens,
        )


def profile_layers(
    model: nn.Module | Sequence[nn.Module],
    sample: Sample,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Profile:
    """Measure what a model's layers keep, need and compute.

    Args:
        model: a model with one stack of layers (Hugging Face decoders), or the layers themselves; on the meta device
            nothing is computed.
        sample: the model's keyword arguments (input_ids [B, T], labels, boundaries of a packed row, ...), or the
            hidden states [..., T, H] that the first layer takes. 512 tokens are plenty.
        loss: (model, sample) -> the number that is differentiated, run once per length; None is `model(**sample).loss`
            or the sum of its output, and for plain layers one after the other, summed.

    Returns:
        Costs for any number of tokens. Gradients of the weights count as there already, as in every step but the
        first. Weights, gradients and optimiser states are not in it.

    Raises:
        ValueError: a model whose layers cannot be found or are not called once each; layers that have segments or are
            sharded already; a sample of fewer than 8 tokens; a loss without gradient.
    """
    stack = layers_of(model, "profile_layers")
    run: Callable[[Any, Any], Tensor] = loss or (_loss_of_model if _is_model(model) else _loss_of_layers)
    rows, length = sample_shape(sample)
    if length < LEAST_TOKENS:
        raise ValueError(f"profile_layers: the sample must have at least {LEAST_TOKENS} tokens per row, got {length}")
    for index, layer in enumerate(stack):
        if has_segments(layer):
            raise ValueError(f"profile_layers: layer {index} has segments already; restore them first")
    lengths = [length // 4, length // 2, length]
    layer_runs: list[list[LayerRun]] = []
    rests: list[RestRun] = []
    groups: list[int] = []
    modules = [model] if isinstance(model, nn.Module) else stack
    with torch.random.fork_rng(devices=_cuda_devices(stack)), _buffers_of(modules):
        for each in lengths:
            passed = partial(run, model, shortened(sample, each))
            records = record_calls(stack, passed)
            rest = measure_rest(stack, model if isinstance(model, nn.Module) else None, records, passed)
            needs = _needs_gradient(stack, rest.needs_gradient)
            groups = alike(records, needs)
            layer_runs.append(
                [measure_layer(records[index], needs_gradient=needs[index]) for index in sorted(set(groups))]
            )
            rests.append(rest)
    return _fitted([rows * each for each in lengths], stack, groups, layer_runs, rests)


def _fitted(
    tokens: list[int], stack: list[nn.Module], groups: list[int], runs: list[list[LayerRun]], rests: list[RestRun]
) -> Profile:
    """Lines through the runs; `runs[length][group]`, and `groups` tells which layer stands for each."""
    order = sorted(set(groups))
    fits: dict[int, LayerProfile] = {}
    not_affine = ""
    for place, index in enumerate(order):
        layer = stack[index]
        weights = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
        try:
            fits[index] = _fitted_layer(tokens, [each[place] for each in runs], weights)
        except NotAffineError as error:
            not_affine = f"layer {index} ({type(layer).__name__}) keeps {error}"
            fits[index] = _fitted_layer(tokens[-1:], [runs[-1][place]], weights)
    cached = sum(runs[-1][order.index(index)].cached for index in groups)
    if not_affine:
        tokens, rests = tokens[-1:], rests[-1:]
    try:
        lines = _fitted_rest(tokens, rests, cached)
    except NotAffineError as error:
        not_affine = f"embedding, head or loss keep {error}"
        lines = _fitted_rest(tokens[-1:], rests[-1:], cached)
    device = next((parameter.device.type for layer in stack for parameter in layer.parameters()), "cpu")
    return Profile(
        tokens=tokens[-1],
        device=device,
        layers=tuple(fits[index] for index in groups),
        not_affine=not_affine or None,
        **lines,
    )


def _fitted_layer(tokens: list[int], runs: list[LayerRun], weights: int) -> LayerProfile:
    if len({run.saves_input for run in runs}) > 1:
        raise NotAffineError(f"its input at some lengths of {tokens} only")
    return LayerProfile(
        boundary=Lines.through(tokens, [[run.boundary] for run in runs]),
        saved=Lines.through(tokens, [[run.saved] for run in runs]),
        saves_input=runs[-1].saves_input,
        forward=Lines.through(tokens, [run.forward for run in runs]),
        recompute=Lines.through(tokens, [run.recompute for run in runs]),
        recompute_cut=Lines.through(tokens, [run.recompute_cut for run in runs]),
        backward=Lines.through(tokens, [run.backward for run in runs]),
        copies=runs[-1].cached,
        weights=weights,
        saves=runs[-1].saves,
        flops=_quadratic(tokens, [run.flops for run in runs]),
        tail_flops=_quadratic(tokens, [run.tail_flops for run in runs]),
    )


def _fitted_rest(tokens: list[int], rests: list[RestRun], cached: int) -> dict[str, Lines]:
    return {
        "shared": Lines.through(tokens, [[rest.shared] for rest in rests]),
        "loss": Lines.through(tokens, [rest.loss[rest.under_autocast :] for rest in rests]),
        "under_autocast": Lines.through(
            tokens, [[total + cached for total in rest.loss[: rest.under_autocast]] for rest in rests]
        ),
        "after_loss": Lines.through(tokens, [[rest.after_loss] for rest in rests]),
        "embedding": Lines.through(tokens, [rest.embedding for rest in rests]),
    }


def _quadratic(tokens: list[int], values: list[int]) -> tuple[float, float]:
    """(a, b) of a T + b T^2: linear layers, and attention."""
    per_token = [value / count for value, count in zip(values, tokens, strict=True)]
    b = 0.0 if len(tokens) == 1 else (per_token[-1] - per_token[0]) / (tokens[-1] - tokens[0])
    return per_token[-1] - b * tokens[-1], b


def _needs_gradient(stack: list[nn.Module], first: bool) -> list[bool]:
    """Whether each layer's input does: from the first trained parameter on, all of them."""
    needs = [first]
    for layer in stack[:-1]:
        needs.append(needs[-1] or any(parameter.requires_grad for parameter in layer.parameters()))
    return needs


def _is_model(model: Any) -> bool:
    return isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList | nn.Sequential)


def _loss_of_model(model: nn.Module, sample: Sample) -> Tensor:
    output = model(sample) if isinstance(sample, Tensor) else model(**sample)
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = next(value for value in tree_leaves(output) if isinstance(value, Tensor)).sum()
    return loss


def _loss_of_layers(layers: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = hidden_of(layer(hidden))
    return hidden.sum()


@contextmanager
def _buffers_of(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Running statistics and the like, which forward changes, are put back afterwards."""
    within = [module for outer in modules for module in outer.modules()]
    before = [
        (module, name, buffer, buffer.clone())
        for module in within
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                module._buffers[name] = buffer.copy_(value)


def _cuda_devices(stack: list[nn.Module]) -> list[torch.device]:
    return sorted({p.device for layer in stack for p in layer.parameters() if p.is_cuda}, key=str)
