"""One run of a model under a StorageTracker: each layer by itself, and the model without its layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from nova_kernels.checkpoint.context import Surroundings
from nova_kernels.checkpoint.recompute import Call, Previous
from nova_kernels.checkpoint.stack import hidden_of, hidden_states
from nova_kernels.checkpoint.tracker import StorageTracker


@dataclass(frozen=True, slots=True)
class Record:
    """One layer's call as the model made it."""

    call: Call
    hidden: Tensor  # its input, detached
    output: Any  # what it returned


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRun:
    """Bytes of one layer at one number of tokens; lists hold what is alive after each operation."""

    boundary: int
    saved: int
    saves_input: bool
    forward: list[int]
    recompute: list[int]
    recompute_cut: list[int]  # of `recompute`, up to the last tensor saved
    backward: list[int]
    saves: bool  # whether autograd saves anything
    cached: int  # of weights in another dtype, which autocast holds until it ends
    flops: int
    tail_flops: int


@dataclass(slots=True, kw_only=True)
class RestRun:
    """Bytes of embedding, head and loss at one number of tokens."""

    shared: int = 0  # alive in front of the first layer, beside its input
    loss: list[int] = field(default_factory=list)
    under_autocast: int = 0  # how many of these lie within the autocast of the layers
    after_loss: int = 0  # still alive when the layers' backward begins, less what of `shared` is gone by then
    embedding: list[int] = field(default_factory=list)
    needs_gradient: bool = False  # whether the layers' input does


def record_calls(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[Record]:
    """How the model calls its layers, from a run without gradients.

    Raises:
        ValueError: a layer that is not called exactly once, or whose input is no tensor.
    """
    records: dict[int, Record] = {}

    def recording(index: int, layer: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_states(args, kwargs)
            if hidden is None or index in records:
                what = "has no tensor as its input" if hidden is None else "runs more than once"
                raise ValueError(f"profile_layers: layer {index} ({type(layer).__name__}) {what}")
            call = Call.without(layer, args, kwargs, hidden, Surroundings(hidden.device))
            output = own(*args, **kwargs)
            records[index] = Record(call, hidden.detach(), output)
            return output

        return forward

    with _forwards(layers, recording), torch.no_grad():
        run()
    if missing := [index for index in range(len(layers)) if index not in records]:
        raise ValueError(f"profile_layers: the sample's run does not call layer {missing[0]} of {len(layers)}")
    return [records[index] for index in range(len(layers))]


def alike(records: list[Record], needs_gradient: list[bool]) -> list[int]:
    """For each layer the first one that is like it: same modules and numbers, same shapes, same arguments."""
    first: dict[Any, int] = {}
    return [
        first.setdefault((_likeness(record), needs), index)
        for index, (record, needs) in enumerate(zip(records, needs_gradient, strict=True))
    ]


def _likeness(record: Record) -> Any:
    call = record.call
    modules = tuple(
        (name, type(module), module.training, tuple(sorted((k, v) for k, v in vars(module).items() if _plain(k, v))))
        for name, module in call.layer.named_modules()
    )
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in call.layer.named_parameters())
    arguments = tuple(
        (place, (value.shape, value.dtype) if isinstance(value, Tensor) else repr(value))
        for place, value in [*enumerate(call.args), *sorted(call.kwargs.items())]
        if not isinstance(value, Previous)
    )
    return modules, parameters, arguments, record.hidden.shape, record.hidden.dtype


def _plain(name: str, value: Any) -> bool:
    return name != "layer_idx" and isinstance(value, int | float | str)


def measure_rest(
    layers: Sequence[nn.Module], model: nn.Module | None, records: list[Record], run: Callable[[], Tensor]
) -> RestRun:
    """Forward and backward of the model with layers that return their input."""
    rest, tracker = RestRun(), StorageTracker()
    first: weakref.ref[torch.UntypedStorage] | None = None  # of the first layer's input
    held: list[Any] = []  # what the layers are given is alive as long as they are

    def autocast_ended() -> None:
        rest.under_autocast = len(tracker.totals)

    def entered(hidden: Tensor) -> None:
        nonlocal first
        first = weakref.ref(hidden.untyped_storage())
        rest.needs_gradient = hidden.requires_grad
        rest.shared = tracker.current - tracker.bytes_of(hidden)
        tracker.reset_peak()
        _when_autocast_ends(hidden.device, autocast_ended)

    def left(gradient: Tensor) -> None:
        rest.loss = [total - rest.shared for total in tracker.totals]
        rest.after_loss = tracker.current - gradient.untyped_storage().nbytes() - rest.shared
        if first is not None and (storage := first()) is not None:  # a leaf: the first segment has it, too
            rest.after_loss -= storage.nbytes()
        tracker.reset_peak()

    def hollow(index: int, layer: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_states(args, kwargs)
            assert hidden is not None, "record_calls has seen it"
            held.append(Call.without(layer, args, kwargs, hidden, Surroundings(hidden.device)))
            if index == 0:
                entered(hidden)
                hidden = hidden if hidden.requires_grad else _fresh(hidden, _seed(needs_gradient=True))
            output = hidden_of(records[index].output)
            if output.shape != hidden.shape or output.dtype != hidden.dtype:
                hidden = _Reshaped.apply(hidden, output)
            if index == len(layers) - 1:
                hidden = _Marked.apply(hidden, left)
            whole = records[index].output
            return (hidden, *whole[1:]) if isinstance(whole, tuple) else hidden

        return forward

    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    others = [] if model is None else [p for p in model.parameters() if id(p) not in inside]
    with _forwards(layers, hollow), _gradients_of(others), tracker:
        try:
            loss = run()
        except (IndexError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                "profile_layers: the model does not run with layers that return nothing but their input "
                f"({type(error).__name__}: {error}); it reads something else of them (router logits, attentions, a "
                "cache): switch that off in its config or the sample (output_router_logits=False, use_cache=False)"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError("profile_layers: the loss must be one number with a gradient; check `loss`")
        loss.backward()
        rest.embedding = [total - rest.shared for total in tracker.totals]
    return rest


def measure_layer(record: Record, *, needs_gradient: bool) -> LayerRun:
    """Three passes of one layer: keeping nothing, keeping all and backward, and counting FLOPs."""
    with _gradients_of(list(record.call.layer.parameters())):
        forward, until_last_saved, saves, cached = _pass_that_drops(record, needs_gradient)
        boundary = record.hidden.numel() * record.hidden.element_size()
        saved, saves_input, recompute, backward = _pass_that_keeps(record, needs_gradient, boundary)
    flops, tail = _count_flops(record, needs_gradient)
    return LayerRun(
        boundary=boundary,
        saved=saved,
        saves_input=saves_input,
        forward=forward,
        recompute=recompute,
        recompute_cut=recompute[:until_last_saved],
        backward=backward,
        saves=saves,
        cached=cached,
        flops=flops,
        tail_flops=tail,
    )


def _pass_that_drops(record: Record, needs_gradient: bool) -> tuple[list[int], int, bool, int]:
    seed = _seed(needs_gradient)
    until_last_saved, saves = 0, False
    with StorageTracker() as tracker:

        def drop(_: Tensor) -> None:
            nonlocal until_last_saved, saves
            until_last_saved, saves = len(tracker.totals), True

        with record.call.surroundings.again(), saved_tensors_hooks(drop, _unwanted):
            hidden = _fresh(record.hidden, seed)
            before = tracker.current
            tracker.reset_peak()
            output = record.call.run(hidden)
            totals = [total - before for total in tracker.totals]
            del output, hidden
            inside = tracker.current
        return totals, until_last_saved, saves, inside - tracker.current


def _pass_that_keeps(record: Record, needs_gradient: bool, boundary: int) -> tuple[int, bool, list[int], list[int]]:
    seed = _seed(needs_gradient)
    with StorageTracker() as tracker:
        with record.call.surroundings.again():
            hidden = _fresh(record.hidden, seed)
            alive = weakref.ref(hidden.untyped_storage())
            before = tracker.current
            tracker.reset_peak()
            output = record.call.run(hidden)
            recompute = [total - before for total in tracker.totals]
            if not output.requires_grad:
                return 0, False, recompute, [0]
            end = _Sink.apply(output)
            del output, hidden
        saves_input = alive() is not None
        kept = tracker.current
        tracker.reset_peak()
        end.backward()
        backward = [total - kept for total in tracker.totals]
    return kept - end.untyped_storage().nbytes() - saves_input * boundary, saves_input, recompute, backward


def _count_flops(record: Record, needs_gradient: bool) -> tuple[int, int]:
    counter = FlopCounterMode(display=False)
    at_last_saved = 0

    def note(_: Tensor) -> None:
        nonlocal at_last_saved
        at_last_saved = counter.get_total_flops()

    with counter, record.call.surroundings.again(), saved_tensors_hooks(note, _unwanted):
        record.call.run(_fresh(record.hidden, _seed(needs_gradient)))
    total = counter.get_total_flops()
    return total, total - at_last_saved


def _when_autocast_ends(device: torch.device, callback: Callable[[], None]) -> None:
    """Call back when autocast forgets its copies of weights: a copy of ours tells. If it is off, nothing to do."""
    copies: list[torch.UntypedStorage] = []
    weight = torch.ones(1, 1, device=device, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: copies.append(tensor.untyped_storage()), _unwanted):
        torch.nn.functional.linear(torch.ones(1, 1, device=device, requires_grad=True), weight)
    for copy in copies:
        if copy.nbytes() != weight.untyped_storage().nbytes():
            weakref.finalize(copy, callback).atexit = False


def _unwanted(_: None) -> Tensor:
    raise RuntimeError("profile_layers: a backward through a pass that keeps nothing")


def _seed(needs_gradient: bool) -> Tensor | None:
    """What a graph begins with if the hidden states need a gradient."""
    return torch.zeros((), requires_grad=True) if needs_gradient else None


def _fresh(hidden: Tensor, seed: Tensor | None) -> Tensor:
    """A copy that nothing but the caller and autograd holds, with a gradient that goes nowhere if there is a seed."""
    if seed is None:
        return hidden.clone()
    copy: Tensor = _Source.apply(seed, hidden)
    return copy


@contextmanager
def _forwards(
    layers: Sequence[nn.Module], replacement: Callable[[int, nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Every layer's forward replaced on the instance, and put back."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.forward = replacement(index, layer, layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own


@contextmanager
def _gradients_of(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients exist, as in every step but the first, and their values are put back afterwards."""
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


class _Source(torch.autograd.Function):
    """A copy of the hidden states at the head of a graph."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, None


class _Sink(torch.autograd.Function):
    """A number whose backward makes the gradient of the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.like = (hidden.shape, hidden.dtype, hidden.device)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.ones(shape, dtype=dtype, device=device)


class _Marked(torch.autograd.Function):
    """Its input; calls back when backward gets there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reached: Callable[[Tensor], None]) -> Tensor:
        ctx.reached = reached
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.reached(gradient)
        return gradient, None


class _Reshaped(torch.autograd.Function):
    """Stands for a layer whose output is of another shape than its input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, like: Tensor) -> Tensor:
        ctx.like = (hidden.shape, hidden.dtype, hidden.device)
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), None
