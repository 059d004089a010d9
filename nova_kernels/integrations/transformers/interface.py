"""The two functions that transformers calls instead of its own: no mask, and attention within boundaries.

The boundaries come as keyword arguments from the forward hook of attach.py, through the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from nova_kernels.attention import count_flops
from nova_kernels.attention.dispatch import attend
from nova_kernels.ulysses import TokenPlan, ulysses_attention

IMPLEMENTATION = "nova_varlen"  # name in the AttentionInterface and the AttentionMaskInterface of transformers


def register() -> None:
    """Make the implementation known to transformers, under its name; calling it twice is harmless."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    count_flops()


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
    varlen_options: Any = None,  # attach.Options
    varlen_plan: TokenPlan | None = None,
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
    options: dict[str, Any] = {
        "cu_seqlens": varlen_boundaries,
        "on_device": cu_seq_lens_q,
        "max_seqlen": max_length_q,
        "causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
        "window": sliding_window,
        "softmax_scale": scaling,
        "softcap": softcap,
        "backend": varlen_options.backend,
    }
    if varlen_options.group is None:
        out = attend(q, k, v, **options)
    else:
        group, chunks = varlen_options.group, varlen_options.chunks
        out = ulysses_attention(q, k, v, **options, token_plan=varlen_plan, group=group, chunks=chunks)
    return out.reshape(rows, length, *out.shape[1:]), None
