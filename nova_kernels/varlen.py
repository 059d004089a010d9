"""Where sequences begin and end in a packed row.

A packed row holds S sequences, one after the other, in T tokens. Its boundaries are

    cu_seqlens = [0, l_1, l_1 + l_2, ..., T]      int32 [S + 1], on the CPU

so sequence s owns the tokens cu_seqlens[s] : cu_seqlens[s + 1]. Boundaries are computed once, from the lengths,
and handed to whoever needs them; they are never guessed from a shard or from padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

MAX_TOKENS = 2**31 - 1  # cu_seqlens is int32, as in the attention kernels that read it


def cu_seqlens_from_lengths(lengths: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Boundaries of sequences with these lengths, in this order.

    Args:
        lengths: integers [S], tokens per sequence; 0 is a sequence without tokens.

    Returns:
        int32 [S + 1] on the CPU, starting at 0.

    Raises:
        ValueError: not one-dimensional, not integers, a negative length, or more than 2^31 - 1 tokens in all.
    """
    sizes = np.asarray(lengths)
    if sizes.size == 0:
        sizes = sizes.reshape(-1).astype(np.int64)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu":
        raise ValueError(
            f"cu_seqlens_from_lengths: expected integers of shape [S], got {sizes.dtype} {list(sizes.shape)}"
        )
    sizes = sizes.astype(np.int64)
    if sizes.size and sizes.min() < 0:
        raise ValueError(f"cu_seqlens_from_lengths: sequence {int(sizes.argmin())} has length {int(sizes.min())}")
    ends = np.cumsum(sizes)
    if sizes.size and ends[-1] > MAX_TOKENS:
        raise ValueError(
            f"cu_seqlens_from_lengths: {int(ends[-1])} tokens do not fit in int32; "
            f"use rows of at most {MAX_TOKENS} tokens"
        )
    return torch.from_numpy(np.concatenate([np.zeros(1, np.int64), ends]).astype(np.int32))


def cu_seqlens_from_positions(position_ids: Tensor) -> Tensor:
    """Boundaries of a packed row whose positions start again at 0 with every sequence.

    Args:
        position_ids: integers [T] or [1, T]; reading them from an accelerator waits for it.

    Returns:
        int32 [S + 1] on the CPU.

    Raises:
        ValueError: another shape, or positions that neither count up by one nor return to 0 (left padding, a
            later part of a sequence): the boundaries are then unknown.
    """
    if position_ids.ndim == 2 and position_ids.shape[0] == 1:
        position_ids = position_ids[0]
    if position_ids.ndim != 1:
        raise ValueError(
            f"cu_seqlens_from_positions: expected position_ids [T] or [1, T], got {list(position_ids.shape)}; "
            "lay the sequences side by side in one row"
        )
    positions = position_ids.detach().cpu().to(torch.int64)
    starts = positions == 0
    if positions.numel():
        follows = torch.cat([starts[:1], starts[1:] | (positions[1:] == positions[:-1] + 1)])
        if not bool(follows.all()):
            where = int(torch.nonzero(~follows)[0])
            raise ValueError(
                f"cu_seqlens_from_positions: position_ids must start at 0 and count up by one within each sequence, "
                f"token {where} has position {int(positions[where])}"
                + (f" after {int(positions[where - 1])}" if where else "")
                + "; pass cu_seqlens instead"
            )
    ends = torch.tensor([positions.numel()])
    return torch.cat([torch.nonzero(starts).flatten(), ends]).to(torch.int32)


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int | None = None) -> None:
    """Refuse boundaries that do not describe a row of `num_tokens` tokens, or sequences longer than `max_seqlen`.

    On the CPU wrong values are a ValueError; on an accelerator they are an asynchronous device assertion, so that
    nothing waits.

    Raises:
        ValueError: not int32 [S + 1] with S >= 0, not starting at 0, decreasing, not ending at `num_tokens`, or a
            sequence of more than `max_seqlen` tokens.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens: expected int32 of shape [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}; "
            "build it with cu_seqlens_from_lengths"
        )
    lengths = cu_seqlens.diff()
    if cu_seqlens.device.type != "cpu":
        right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens) & (lengths >= 0).all()
        torch._assert_async(right if max_seqlen is None else right & (lengths <= max_seqlen).all())
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens: must start at 0, starts at {first}; build it with cu_seqlens_from_lengths")
    if lengths.numel() and int(lengths.min()) < 0:
        index = int((lengths < 0).nonzero()[0]) + 1
        raise ValueError(
            f"cu_seqlens: must not decrease, entry {index} is {int(cu_seqlens[index])} after "
            f"{int(cu_seqlens[index - 1])}; build it with cu_seqlens_from_lengths"
        )
    if last != num_tokens:
        raise ValueError(
            f"cu_seqlens: must end at the token count {num_tokens}, ends at {last}; "
            "did the collator drop or add a sequence?"
        )
    if max_seqlen is not None and lengths.numel() and int(lengths.max()) > max_seqlen:
        raise ValueError(
            f"cu_seqlens: sequence {int(lengths.argmax())} has {int(lengths.max())} tokens, "
            f"more than max_seqlen={max_seqlen}; pass max_seqlen={int(lengths.max())}"
        )


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """Tokens per sequence, [S] Python integers; reading them from an accelerator waits for it."""
    bounds = cu_seqlens.tolist()
    return [end - start for start, end in pairwise(bounds)]
