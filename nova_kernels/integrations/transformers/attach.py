"""A model's attention exchanged for ours, and put back.

What would let packed sequences see each other is refused: a KV cache, an attention mask (padding), positions that do
not say where sequences start. Generation needs the cache and so the model's own attention:
`with handle.suspended(): model.generate(...)`.

Once per forward pass the boundaries are settled, checked and copied to the model's device. If they come on the CPU, as
PackedBatch has them, nothing waits for the device. Models on the meta device work the same, for those who plan memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from nova_kernels.attention.dispatch import boundaries_on
from nova_kernels.integrations.transformers.interface import IMPLEMENTATION, register
from nova_kernels.ulysses import TokenPlan
from nova_kernels.varlen import cu_seqlens_from_lengths, cu_seqlens_from_positions, lengths_of


def use_varlen_attention(model: PreTrainedModel, backend: str | None = None) -> VarlenAttentionHandle:
    """Attach varlen attention to this model object; other models are not touched.

    Boundaries come from `cu_seq_lens_q`, else from `position_ids` that start again at 0, else every row of the batch
    is one sequence. The config, which is saved with the model, is left as it was but for its attention implementation,
    which is never saved. Models that share one config object switch together: attach each of them; the last one to be
    restored puts the config back.

    Args:
        backend: of nova_kernels.attention.varlen_attention; None takes the fastest that can run.

    Returns:
        A handle: `.restore()` puts the model's own attention back, `.suspended()` does so for a while; as a context
        manager it restores on leaving.

    Raises:
        ValueError: the model has it already, has an encoder and a decoder, mixes tokens outside of its attention, or
            does not take its attention from the AttentionInterface.
    """
    _check_model(model, "use_varlen_attention")
    return VarlenAttentionHandle(model, Options(backend=backend))


def use_ulysses(
    model: PreTrainedModel, group: dist.ProcessGroup, *, backend: str | None = None, chunks: int = 1
) -> VarlenAttentionHandle:
    """Attach varlen attention over rows that the ranks of a group hold in parts.

    Rank p calls the model with its tokens of the row, input_ids [1, t] of TokenPlan.build(T, P).bounds(p), and with
    the boundaries of the WHOLE row in `cu_seq_lens_q` (`PackedBatch.attention_kwargs()` has them; best on the CPU), and
    gets its tokens' outputs. `position_ids` [1, t] are its tokens' own; without them they are made from the boundaries.
    Labels must be shifted before the row is cut (SequenceShards does). All ranks run forward and backward together.

    Args:
        group: ranks that share the row; all of them attach the same model.
        backend, chunks: of nova_kernels.ulysses.ulysses_attention.

    Returns:
        As `use_varlen_attention`.

    Raises:
        ValueError: as `use_varlen_attention`; this process is not in the group.
    """
    _check_model(model, "use_ulysses")
    if dist.get_rank(group) < 0:
        raise ValueError("use_ulysses: this process is not in the group; pass the group that shares its rows")
    return VarlenAttentionHandle(model, Options(backend=backend, group=group, chunks=chunks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How attention is computed."""

    backend: str | None
    group: dist.ProcessGroup | None = None  # ranks that share the row; None: this process has all of it
    chunks: int = 1


def _check_model(model: PreTrainedModel, caller: str) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{caller}: expected a transformers PreTrainedModel, got {type(model).__name__}; "
            "pass the model inside the wrapper"
        )
    where = f"{caller}: {type(model).__name__}"
    if any(isinstance(hook, _Boundaries) for hook in model.base_model._forward_pre_hooks.values()):
        raise ValueError(
            f"{where} has it already; use its handle (a copy of an attached model is attached too: "
            "to attach it by itself, copy inside `with handle.suspended():`)"
        )
    if model.config._attn_implementation == IMPLEMENTATION and not _attached_with(model.config):
        raise ValueError(
            f"{where} got its config from an attached model: the attention is set to {IMPLEMENTATION!r}; "
            'call model.set_attn_implementation("sdpa") first'
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{where}: encoder-decoder models are not supported: keys of the encoder have boundaries of their own; "
            "use the model's own attention, with one sequence per row"
        )
    if mixers := _other_mixers(model):
        raise ValueError(
            f"{where} mixes tokens outside of its attention ({mixers}), where packed sequences would see each other; "
            "give it one sequence per row"
        )


class VarlenAttentionHandle:
    """Varlen attention on one model; made by use_varlen_attention."""

    def __init__(self, model: PreTrainedModel, options: Options) -> None:
        self._model = model
        self._options = options
        self._hook: _Boundaries | None = None
        sharing = _attached_with(model.config)
        self._own = sharing[0].own if sharing else _implementations(model.config)
        register()
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"use_varlen_attention: {type(model).__name__} does not take its attention from the "
                f"AttentionInterface of transformers, it stays on {model.config._attn_implementation!r}"
            )
        self._attach()

    @property
    def attached(self) -> bool:
        """Whether the model runs on varlen attention now."""
        return self._hook is not None

    def restore(self) -> None:
        """Put the model's own attention back; calling it twice is harmless."""
        if self._hook is not None:
            self._detach(self._hook)
            if not _attached_with(self._model.config):
                self._model.set_attn_implementation(self._own)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model's own attention inside a `with`; what was attached is attached again afterwards.

        Other attached models that share its config cannot run meanwhile, and say so.
        """
        if self._hook is None:
            yield
            return
        before = _implementations(self._model.config)
        self._detach(self._hook)
        self._model.set_attn_implementation(self._own)
        try:
            yield
        finally:
            self._model.set_attn_implementation(before)
            self._attach()

    def _attach(self) -> None:
        base = self._model.base_model
        names = tuple(inspect.signature(base.forward).parameters)
        self._hook = _Boundaries(names, self._options, self._model.config, self._own)
        self._registration = base.register_forward_pre_hook(self._hook, with_kwargs=True)
        _hooks().add(self._hook)

    def _detach(self, hook: _Boundaries) -> None:
        self._registration.remove()
        _hooks().discard(hook)
        self._hook = None

    def __enter__(self) -> VarlenAttentionHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def _other_mixers(model: PreTrainedModel) -> str:
    """What besides attention carries tokens from one to the next: convolutions, recurrent states; "" if nothing."""
    if getattr(model, "_is_stateful", False):
        return "a recurrent state"
    found = sorted({type(module).__name__ for module in model.modules() if isinstance(module, nn.Conv1d)})
    return ", ".join(found)


class _Boundaries:
    """Forward pre-hook of the base model: settles the boundaries once, for all layers."""

    def __init__(self, names: tuple[str, ...], options: Options, config: Any, own: str | dict[str, Any]) -> None:
        self.names = names
        self.options = options
        self.config = config
        self.own = own  # attention implementation of the config before any model that shares it was attached

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        where = type(module).__name__
        if (own := getattr(module.config, "_attn_implementation", IMPLEMENTATION)) != IMPLEMENTATION:
            raise ValueError(
                f"{where}: its attention was set to {own!r} while varlen attention is attached; call restore() of the "
                "handle first, or use `with handle.suspended():`"
            )
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise ValueError(
                f"{where}: varlen attention takes no KV cache; pass use_cache=False, "
                "or generate inside `with handle.suspended():`"
            )
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                f"{where}: varlen attention takes no attention_mask, not even one of ones; lay the sequences side by "
                "side with pack_samples, or use the model inside `with handle.suspended():`"
            )
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        rows, length = tokens.shape[:2]
        given: Tensor | None = kwargs.get("cu_seq_lens_q")
        if given is not None and rows != 1:
            raise ValueError(f"{where}: cu_seq_lens_q describes one packed row [1, T], got {[rows, length]}")
        cu_seqlens = _boundaries(where, tokens, kwargs.get("position_ids")) if given is None else given
        plan = self._plan(where, given, length)
        total = rows * length if plan is None else plan.num_tokens
        longest = _longest(cu_seqlens, kwargs.get("max_length_q"))
        on_device = boundaries_on(tokens.device, cu_seqlens, total, longest)
        _check_keys(where, cu_seqlens, kwargs.get("cu_seq_lens_k"))
        if given is not None and kwargs.get("position_ids") is None:
            own = slice(None) if plan is None else slice(*plan.bounds(dist.get_rank(self.options.group)))
            kwargs["position_ids"] = _positions(on_device, total)[:, own]
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].to(tokens.device)
        if "attention_mask" in self.names:
            kwargs["attention_mask"] = tokens.new_empty((rows, 0), dtype=torch.bool)  # for _mask
        kwargs.update(use_cache=False, cu_seq_lens_q=on_device, cu_seq_lens_k=on_device)
        kwargs.update(max_length_q=longest, max_length_k=longest)
        kwargs.update(varlen_boundaries=cu_seqlens, varlen_options=self.options, varlen_plan=plan)
        return (), kwargs

    def _plan(self, where: str, cu_seqlens: Tensor | None, length: int) -> TokenPlan | None:
        """Which ranks hold which tokens of the row; None: this one has them all."""
        group = self.options.group
        if group is None or dist.get_world_size(group) == 1:
            return None
        if cu_seqlens is None or cu_seqlens.device.type != "cpu":
            raise ValueError(
                f"{where}: ranks that share a row need the boundaries of the whole row: pass cu_seq_lens_q, int32 "
                f"[S + 1], on the CPU, got {cu_seqlens if cu_seqlens is None else cu_seqlens.device}"
            )
        plan = TokenPlan.build(int(cu_seqlens[-1]), dist.get_world_size(group))
        start, end = plan.bounds(dist.get_rank(group))
        if length != end - start:
            raise ValueError(
                f"{where}: of a row of {plan.num_tokens} tokens rank {dist.get_rank(group)} of {plan.world_size} holds "
                f"{start} to {end}, got {length} tokens; cut every row with TokenPlan.build, or SequenceShards"
            )
        return plan


@lru_cache(maxsize=1)
def _hooks() -> WeakSet[_Boundaries]:
    """Of all models that are attached."""
    return WeakSet()


def _attached_with(config: Any) -> list[_Boundaries]:
    """Hooks of the attached models that share this config object."""
    return [hook for hook in _hooks() if hook.config is config]


def _check_keys(where: str, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> None:
    """Keys have the boundaries of the queries. Compared on the CPU only: elsewhere that would wait for the device."""
    if cu_seqlens_k is None or not cu_seqlens.device.type == cu_seqlens_k.device.type == "cpu":
        return
    if not torch.equal(cu_seqlens, cu_seqlens_k):
        raise ValueError(f"{where}: cu_seq_lens_q and cu_seq_lens_k differ; varlen attention is self-attention only")


def _longest(cu_seqlens: Tensor, given: int | None) -> int:
    """Tokens of the longest sequence; of boundaries on a device the one given, which is checked there."""
    if cu_seqlens.device.type != "cpu" and isinstance(given, int):
        return given
    if cu_seqlens.is_meta:
        raise ValueError("cu_seq_lens_q on the meta device has no values; leave it on the CPU, or pass max_length_q")
    return max(lengths_of(cu_seqlens), default=0)


def _boundaries(where: str, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
    rows, length = tokens.shape[:2]
    if position_ids is None:
        return cu_seqlens_from_lengths([length] * rows)
    if tuple(position_ids.shape) not in ((1, length), (rows, length)):
        raise ValueError(
            f"{where}: position_ids {list(position_ids.shape)} do not tell where sequences start, {[rows, length]} "
            "would; beside positions of several axes, as models of images have them, pass cu_seq_lens_q, int32 [S + 1]"
        )
    if position_ids.is_meta:
        raise ValueError(f"{where}: position_ids on the meta device have no values; pass cu_seq_lens_q, on the CPU")
    position_ids = position_ids.expand(rows, length)
    if length and bool((position_ids[:, 0] != 0).any()):
        raise ValueError(
            f"{where}: every row must start at position 0, rows start at {position_ids[:, 0].tolist()}; "
            "left padding is not supported, pack the sequences with pack_samples"
        )
    return cu_seqlens_from_positions(position_ids.flatten())


def _positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """[1, T], counting from 0 within each sequence, on the device of the boundaries."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1]
    return (tokens - starts)[None]


def _implementations(config: Any) -> str | dict[str, Any]:
    """What set_attn_implementation needs to put everything back: a name, or names by sub-config."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    if not parts:
        name: str = config._attn_implementation
        return name
    return {"": config._attn_implementation, **{name: _implementations(part) for name, part in parts.items()}}
