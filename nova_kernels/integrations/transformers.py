"""Packed rows in unmodified Hugging Face models.

    with use_varlen_attention(model):
        model(input_ids=batch.input_ids, **batch.attention_kwargs())

Every sequence of the row attends to itself alone, through nova_kernels.attention. What would break that is refused:
a KV cache, an attention mask (padding), positions that do not say where sequences start. Generation needs the cache
and so the model's own attention: `with handle.suspended(): model.generate(...)`.

Once per forward pass the boundaries are settled, checked and copied to the model's device. If they come on the CPU, as
PackedBatch has them, nothing waits for the device. Models on the meta device work the same, for those who plan memory.

The model's own attention keeps packed sequences apart only if no cache and no mask reach it, although use_cache is on
by default, even in training: `check_packing` measures whether the way a model is called leaks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from nova_kernels.attention import count_flops
from nova_kernels.attention.dispatch import attend, boundaries_on
from nova_kernels.packing import PackedBatch
from nova_kernels.varlen import cu_seqlens_from_lengths, cu_seqlens_from_positions, lengths_of

IMPLEMENTATION = "nova_varlen"  # name in the AttentionInterface and the AttentionMaskInterface of transformers


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
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"use_varlen_attention: expected a transformers PreTrainedModel, got {type(model).__name__}; "
            "pass the model inside the wrapper"
        )
    _check_model(model)
    return VarlenAttentionHandle(model, backend)


def _check_model(model: PreTrainedModel) -> None:
    where = f"use_varlen_attention: {type(model).__name__}"
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

    def __init__(self, model: PreTrainedModel, backend: str | None) -> None:
        self._model = model
        self._backend = backend
        self._hook: _Boundaries | None = None
        sharing = _attached_with(model.config)
        self._own = sharing[0].own if sharing else _implementations(model.config)
        AttentionInterface.register(IMPLEMENTATION, _attention)
        AttentionMaskInterface.register(IMPLEMENTATION, _mask)
        count_flops()
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
        self._hook = _Boundaries(names, self._backend, self._model.config, self._own)
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

    def __init__(self, names: tuple[str, ...], backend: str | None, config: Any, own: str | dict[str, Any]) -> None:
        self.names = names
        self.backend = backend
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
        longest = _longest(cu_seqlens, kwargs.get("max_length_q"))
        on_device = boundaries_on(tokens.device, cu_seqlens, rows * length, longest)
        _check_keys(where, cu_seqlens, kwargs.get("cu_seq_lens_k"))
        if given is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _positions(on_device, length)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].to(tokens.device)
        if "attention_mask" in self.names:
            kwargs["attention_mask"] = tokens.new_empty((rows, 0), dtype=torch.bool)  # for _mask
        kwargs.update(use_cache=False, cu_seq_lens_q=on_device, cu_seq_lens_k=on_device)
        kwargs.update(max_length_q=longest, max_length_k=longest)
        kwargs.update(varlen_boundaries=cu_seqlens, varlen_backend=self.backend)
        return (), kwargs


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


def _mask(
    *_args: Any,
    config: Any = None,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> None:
    """The AttentionMaskInterface: no mask is built, as the boundaries say everything; what they cannot say is refused.

    The forward hook hands models an empty mask [B, 0] instead of none. With none, transformers would look for
    sequences in position_ids and wait for the device; with it, a mask that a model adds on its own shows here.
    """
    name = getattr(config, "model_type", "this model")
    if attention_mask is not None and attention_mask.shape[-1]:
        raise ValueError(
            f"{name}: varlen attention takes no attention_mask, got one of {list(attention_mask.shape)}; lay the "
            "sequences side by side with pack_samples, or use the model inside `with handle.suspended():`"
        )
    plain = allow_is_causal_skip if allow_is_bidirectional_skip is None else allow_is_bidirectional_skip
    if use_vmap or (attention_mask is not None and not plain):
        raise ValueError(
            f"{name}: varlen attention cannot express the mask that this model adds; use its own attention"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and local_size == chunk and (q_length is None or q_length > chunk):
        raise ValueError(
            f"{name}: varlen attention has no chunks (attention_chunk_size={chunk}); use rows of at most {chunk} "
            "tokens, or the model's own attention"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    varlen_boundaries: Tensor | None = None,
    varlen_backend: str | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The AttentionInterface's signature: [B, H, L, D] in, ([B, L, H, D], None) out."""
    where = type(module).__name__
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ValueError(f"{where}: varlen attention takes neither a mask nor a KV cache")
    if dropout:
        raise ValueError(f"{where}: varlen attention has no dropout, got {dropout}; set attention_dropout to 0")
    if s_aux is not None:
        raise ValueError(f"{where}: varlen attention has no attention sinks; use the model's own attention")
    if cu_seq_lens_q is None or varlen_boundaries is None:
        raise ValueError(
            f"{where}: no boundaries arrived; call the whole model (its forward hook settles them), attach it if it "
            "shares the config of an attached one, or use its own attention if it does not hand arguments to its layers"
        )
    rows, _heads, length, _width = query.shape
    q, k, v = (x.transpose(1, 2).reshape(rows * length, x.shape[1], x.shape[3]) for x in (query, key, value))
    out = attend(
        q,
        k,
        v,
        cu_seqlens=varlen_boundaries,
        on_device=cu_seq_lens_q,
        max_seqlen=max_length_q,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        window=sliding_window,
        softmax_scale=scaling,
        softcap=softcap,
        backend=varlen_backend,
    )
    return out.reshape(rows, length, *out.shape[1:]), None


def _implementations(config: Any) -> str | dict[str, Any]:
    """What set_attn_implementation needs to put everything back: a name, or names by sub-config."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    if not parts:
        name: str = config._attn_implementation
        return name
    return {"": config._attn_implementation, **{name: _implementations(part) for name, part in parts.items()}}


@torch.no_grad()
def check_packing(model: PreTrainedModel, batch: PackedBatch, model_kwargs: Mapping[str, Any] | None = None) -> float:
    """Largest difference between the logits of a packed row and those of its samples one by one.

    About 1e-6 in float32 when the samples are kept apart, 0.1 or more when they see each other. Works with and without
    varlen attention, so it also tells whether another trainer's way of calling the model leaks.

    Args:
        model: returns logits per token; of other models (sequence classification) the last hidden states are compared.
        batch: the packed row, on the model's device.
        model_kwargs: what the model is called with beside input_ids; None is `batch.attention_kwargs()`.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        packed = _outputs(model, batch.input_ids, batch.attention_kwargs() if model_kwargs is None else model_kwargs)
        lengths = lengths_of(batch.cu_seqlens)
        alone = [_outputs(model, ids, {"use_cache": False}) for ids in batch.input_ids.split(lengths, dim=1)]
        differences = (packed - torch.cat(alone, dim=1)).abs()
        return float(differences.max())
    finally:
        for module, mode in modes:
            module.training = mode


def _outputs(model: PreTrainedModel, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    logits: Tensor | None = getattr(model(input_ids=input_ids, **kwargs), "logits", None)
    if logits is not None and logits.ndim == 3:
        return logits
    hidden: Tensor = model.base_model(input_ids=input_ids, **kwargs).last_hidden_state
    return hidden
