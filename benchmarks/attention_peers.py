"""How packed samples attend elsewhere, each way behind one function of q, k, v and a Packed: [T, H, D] -> [T, Hq, D].

block-diagonal mask     one SDPA over the row with a boolean mask [T, T]: what a packed batch without varlen
                        attention needs; the mask is made beforehand, as for many layers
padded                  one SDPA over [S, H, longest, D]: what a padded batch does; inputs are padded beforehand,
                        since such a model never lays them side by side
flex_attention          compiled, with a block mask of the same; made beforehand
varlen_attn, flash_attn the kernels themselves, called directly with everything they need on the device
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ways import Way
from nova_kernels import BackendUnavailableError

PADDED = "padded, SDPA"


@dataclass(frozen=True)
class Packed:
    """Where the samples of a row begin and end."""

    lengths: tuple[int, ...]
    device: str

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def bounds(self) -> list[int]:
        return [sum(self.lengths[:index]) for index in range(len(self.lengths) + 1)]

    @property
    def parts(self) -> list[slice]:
        return [slice(start, stop) for start, stop in pairwise(self.bounds)]

    @property
    def pairs(self) -> int:
        """Of a token and one that it sees."""
        return sum(length * (length + 1) // 2 for length in self.lengths)


@cache
def cu_seqlens(packed: Packed, device: str) -> Tensor:
    return torch.tensor(packed.bounds, dtype=torch.int32, device=device)


@cache
def documents(packed: Packed) -> Tensor:
    """[T], the number of each token's sample."""
    lengths = torch.tensor(packed.lengths, device=packed.device)
    return torch.arange(len(packed.lengths), device=packed.device).repeat_interleave(lengths)


@cache
def visible(packed: Packed) -> Tensor:
    """bool [T, T]"""
    document = documents(packed)
    return (document[:, None] == document).tril_()


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def masked(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Key heads are repeated, as Hugging Face does beside a mask: kernels that take masks know no groups."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (heads_first(x) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(packed))
    return out.squeeze(0).transpose(0, 1)


def padded(q: Tensor, k: Tensor, v: Tensor, packed: Packed, *, flash: bool = False) -> Tensor:
    """[S, L, H, D] -> [S, L, Hq, D]; causal, so that no token sees the padding behind its sample."""
    if flash and packed.device == "cpu":
        raise BackendUnavailableError("it runs on CUDA")
    q_rows, k_rows, v_rows = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
        out = F.scaled_dot_product_attention(
            q_rows, k_rows, v_rows, is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
        )
    return out.transpose(1, 2)


def pad(x: Tensor, packed: Packed) -> Tensor:
    """[T, H, D] -> [S, longest, H, D]"""
    return torch.nn.utils.rnn.pad_sequence([x[part] for part in packed.parts], batch_first=True)


def unpad(x: Tensor, packed: Packed) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(x, packed.lengths, strict=True)])


@cache
def flex_mask(packed: Packed) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    document = documents(packed)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key)

    return create_block_mask(sees, None, None, packed.tokens, packed.tokens, device=packed.device)


@lru_cache(maxsize=1)
def compiled_flex(packed: Packed, heads: tuple[int, int]) -> Callable[..., Any]:
    """Compiled for one problem alone: later ones must not meet the limit of recompilations."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    heads = (q.shape[1], k.shape[1])
    rows = (heads_first(x) for x in (q, k, v))
    run = compiled_flex(packed, heads)
    out: Tensor = run(*rows, block_mask=flex_mask(packed), enable_gqa=heads[0] != heads[1])
    return out.squeeze(0).transpose(0, 1)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    if packed.device == "cpu":
        raise BackendUnavailableError("it runs on CUDA")
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = cu_seqlens(packed, packed.device), packed.longest
    call: Any = varlen_attn  # its options change with torch's version
    known = varlen_attn.__kwdefaults__ or {}
    how: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        how["enable_gqa"] = q.shape[1] != k.shape[1]
    out: Tensor = call(q, k, v, bounds, bounds, longest, longest, **how)
    return out


def flash_attn(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    if packed.device == "cpu":
        raise BackendUnavailableError("it runs on CUDA")
    from flash_attn import flash_attn_varlen_func

    bounds, longest = cu_seqlens(packed, packed.device), packed.longest
    out: Tensor = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=True)
    return out


PEERS = (
    Way("torch varlen_attn, called directly", torch_varlen),
    Way("flash_attn_varlen_func, called directly", flash_attn, "flash-attn"),
    Way("SDPA, block-diagonal mask", masked),
    Way(PADDED, padded),
    Way(f"{PADDED} by FlashAttention", partial(padded, flash=True)),
    Way("flex_attention, compiled", flex, compiled=True),
)
