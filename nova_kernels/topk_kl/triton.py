"""Top-K selection and KL in Triton: the launchers of triton_kernels.

Selection is exact, without a fall-back: only the steps of a search depend on the input, at most 8 + its bits. Columns
form groups of G; the K largest entries of a row, ties to the lowest index, lie in the K groups with the largest maxima,
ties to the lowest-numbered:

    reduce_groups        one read of the row: each group's maximum, and the log-sum-exp on the way
    choose_groups        K to S groups (S = K rounded up to a power of two), by bisection over the maxima
    collect_candidates   one read of those groups: at most 2 S entries above the smallest chosen maximum (fewer are
                         needed; where more are above it, the bisection goes on)
    keep_entries         the K largest of the candidates, by the same bisection; ascending. With a policy
                         (keep_entries_kl) the KL follows in the same program, on the policy's logits at those columns.

G is the power of two that makes V / G + K G, the lanes of the two middle kernels, smallest: about sqrt(V / K).

Bytes, for N = 8192, V = 151,936, K = 500, bfloat16, G = 32, on an H200 (4.3 TB/s):

    2 N V                   2.49 GB   0.58 ms   the row, read once
    2 * 2 N V / G           0.16 GB   0.04 ms   group maxima, written and read
    2 N K G                 0.26 GB   0.06 ms   chosen groups, read again
    about 80 N K            0.33 GB   0.08 ms   candidates (written, read, gathered in sectors of 32 bytes), the result

Beside the bytes, the middle kernels do arithmetic on N (8192 + 16,384) lanes: a step of a search is two instructions a
lane, with some 55 and 35 instructions a lane in all. At full issue rate that is 0.25 to 0.35 ms and hides their bytes,
so that the whole is near 0.9 ms by this count; not yet measured.

The KL reads N K sectors of the policy's logits more (0.13 GB). Its dense gradient costs the zeros, 2 N V bytes, and
one scattered write; a kernel that wrote both at once would have to search the ids in every block of columns.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_LANES = 32768  # values that one program holds in registers
TILE = 8192  # columns of one program of the streaming kernel
MAX_WIDTH = 128


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return importlib.import_module("nova_kernels.topk_kl.triton_kernels")


def _launch(kernel: str, programs: int, *arguments: Any, **options: Any) -> None:
    """Run so many programs on the device of the first argument."""
    with torch.cuda.device_of(arguments[0]):
        getattr(_kernels(), kernel)[(programs,)](*arguments, **options)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def warps(lanes: int, per_thread: int = 32) -> int:
    """Warps for a program of so many values, each thread holding `per_thread` of them; 1 to 32."""
    return min(32, max(1, power_of_two(lanes) // (32 * per_thread)))


class Plan(NamedTuple):
    """Sizes of a selection of k out of a row of `vocabulary`; all but `tiles` are powers of two."""

    width: int  # columns of a group
    tile_groups: int  # groups of a program of reduce_groups
    tiles: int  # programs a row of reduce_groups
    lanes: int  # group maxima, rounded up
    slots: int  # k, rounded up
    capacity: int  # candidates at most


@lru_cache(maxsize=256)
def plan(vocabulary: int, k: int) -> Plan:
    """The group width with the fewest lanes.

    Raises:
        ValueError: k or the vocabulary is too large for the registers of a program, whatever the width.
    """
    slots = power_of_two(k)
    best: Plan | None = None
    for width in (2**i for i in range(MAX_WIDTH.bit_length())):
        tile_groups = min(TILE // width, power_of_two(-(-vocabulary // width)))
        tiles = -(-vocabulary // (tile_groups * width))
        found = Plan(width, tile_groups, tiles, power_of_two(tiles * tile_groups), slots, min(2 * slots, slots * width))
        if max(found.lanes, slots * width) > MAX_LANES:
            continue
        if best is None or found.lanes + slots * width <= best.lanes + slots * best.width:
            best = found
    if best is None:
        raise ValueError(
            f"topk_select: k = {k} of a vocabulary of {vocabulary} is beyond the {MAX_LANES} values that a Triton "
            'program holds; take a smaller k, or backend="threshold"'
        )
    return best


def why_not(vocabulary: int, k: int) -> str | None:
    """Why a selection of k out of a row of `vocabulary` is beyond these kernels; None if it is not."""
    try:
        plan(vocabulary, k)
    except ValueError as error:
        return str(error)
    return None


class _Candidates(NamedTuple):
    groups: Tensor  # int32 [n, slots], the chosen groups' numbers
    places: Tensor  # int32 [n, capacity], slot * width + column in the group
    counts: Tensor  # int32 [n]
    floors: Tensor  # int32 [n], keys below each row's k largest
    lse: Tensor  # float32 [n]


def _candidates(logits: Tensor, k: int, temperature: float, mask: Tensor | None) -> _Candidates:
    """At most `capacity` entries of each row with its k largest among them, nothing where `mask` uint8 [n] is 0."""
    sizes = plan(logits.shape[1], k)
    n, vocabulary = logits.shape
    length = sizes.tiles * sizes.tile_groups

    def int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=logits.device)

    maxima, partial_lse = logits.new_empty(n, length), logits.new_empty(n, sizes.tiles, dtype=torch.float32)
    found = _Candidates(
        int32(n, sizes.slots),
        int32(n, sizes.capacity),
        int32(n),
        int32(n),
        logits.new_empty(n, dtype=torch.float32),
    )
    _launch(
        "reduce_groups", n * sizes.tiles,
        logits, mask, maxima, partial_lse, logits.stride(0), vocabulary, sizes.tiles, temperature,
        GROUPS=sizes.tile_groups, WIDTH=sizes.width, num_warps=warps(sizes.tile_groups * sizes.width, 64),
    )  # fmt: skip
    _launch(
        "choose_groups", n,
        maxima, mask, partial_lse, found.groups, found.floors, found.lse, k, length, sizes.tiles,
        SLOTS=sizes.slots, LANES=sizes.lanes, TILES=power_of_two(sizes.tiles), num_warps=warps(sizes.lanes),
    )  # fmt: skip
    _launch(
        "collect_candidates", n,
        logits, mask, found.groups, found.floors, found.places, found.counts, logits.stride(0), vocabulary, k,
        SLOTS=sizes.slots, WIDTH=sizes.width, CAPACITY=sizes.capacity, num_warps=warps(sizes.slots * sizes.width),
    )  # fmt: skip
    return found


def topk_select(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """ids int32 [n, k] ascending, values float32 [n, k], lse float32 [n] of logits [n, V] in float16, 32 or bfloat16.

    Unit stride in V, any row stride. Ties, and -0 with +0, go to the lowest index; NaN is the largest; entries of -inf
    are never kept: slots without one hold -1 and -inf. lse is the log-sum-exp of logits / temperature.

    Raises:
        ValueError: k of such a vocabulary is more than a program holds (up to V = 262,144 any k <= 4096 fits).
    """
    n, vocabulary = logits.shape
    sizes = plan(vocabulary, k)
    ids = torch.empty(n, k, dtype=torch.int32, device=logits.device)
    values = torch.empty(n, k, dtype=torch.float32, device=logits.device)
    if n == 0:
        return ids, values, values.new_empty(0)
    found = _candidates(logits, k, temperature, None)
    _launch(
        "keep_entries", n,
        logits, found.groups, found.places, found.counts, found.floors, ids, values, logits.stride(0),
        K=k, SLOTS=sizes.slots, WIDTH=sizes.width, CAPACITY=sizes.capacity, num_warps=warps(sizes.capacity, 16),
    )  # fmt: skip
    return ids, values, found.lse


def topk_kl_div_from_logits(
    policy_logits: Tensor,
    ref_logits: Tensor,
    k: int,
    temperature: float,
    direction: str,
    mask: Tensor | None,
    *,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """topk_select of ref_logits [n, V] and the KL of policy_logits [n, V] there; the kept values stay in registers.

    Rows where `mask` bool [n] is False are not read: KL and by_kept are 0, ids -1. Otherwise as topk_kl_div.

    Returns:
        KL float32 [n], its derivatives by the policy's kept logits float32 [n, k] or None, ids int32 [n, k].

    Raises:
        ValueError: as topk_select.
    """
    n, vocabulary = ref_logits.shape
    sizes = plan(vocabulary, k)
    kl, by_kept = _results(n, k, ref_logits.device, gradient)
    ids = torch.empty(n, k, dtype=torch.int32, device=ref_logits.device)
    if n == 0:
        return kl, by_kept, ids
    rows = _bytes(mask)
    found = _candidates(ref_logits, k, temperature, rows)
    _launch(
        "keep_entries_kl", n,
        ref_logits, policy_logits, rows, found.groups, found.places, found.counts, found.floors, ids, kl, by_kept,
        ref_logits.stride(0), policy_logits.stride(0), temperature, K=k, SLOTS=sizes.slots, WIDTH=sizes.width,
        CAPACITY=sizes.capacity, POLICY_FIRST=direction == "policy_ref", num_warps=warps(sizes.capacity, 16),
    )  # fmt: skip
    return kl, by_kept, ids


def topk_kl_div(
    policy_logits: Tensor,
    ids: Tensor,
    values: Tensor,
    temperature: float,
    direction: str,
    mask: Tensor | None,
    *,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """kl_terms of policy_logits [n, V] (any of the three dtypes) at ids int32 [n, K] with -1 where values is -inf.

    Rows where `mask` bool [n] is False are not read: KL and by_kept are 0.
    """
    return _kl_rows(policy_logits, ids, values, temperature, direction, mask, gradient)


def kl_terms(
    kept: Tensor, values: Tensor, temperature: float, direction: str, *, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """KL of rows of raw logits: the policy's `kept` and the reference's `values`, both float32 [n, K].

    Slots with values -inf are unused: they count nowhere and have derivative 0. A row of nothing but unused slots has
    no distribution: KL and derivatives are NaN, as the reference's. A policy logit of -inf at a used slot has
    probability 0: its term is the reference's probability and its derivative 0 ("policy_ref"), or the KL is +inf.

    Returns:
        KL float32 [n], never negative and 0 where kept equals values; its derivatives by `kept` (over the temperature
        already) float32 [n, K], None without `gradient`.
    """
    return _kl_rows(kept, None, values, temperature, direction, None, gradient)


def _kl_rows(
    policy: Tensor,
    ids: Tensor | None,
    values: Tensor,
    temperature: float,
    direction: str,
    mask: Tensor | None,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    n, k = values.shape
    values, ids = values.contiguous(), None if ids is None else ids.contiguous()
    policy = policy if policy.stride(1) == 1 else policy.contiguous()
    kl, by_kept = _results(n, k, values.device, gradient)
    if n > 0:
        lanes = power_of_two(k)
        _launch(
            "kl_rows", n,
            policy, ids, values, _bytes(mask), kl, by_kept, policy.stride(0), temperature, k,
            LANES=lanes, POLICY_FIRST=direction == "policy_ref", num_warps=warps(lanes, 16),
        )  # fmt: skip
    return kl, by_kept


def scatter_kept(by_kept: Tensor, upstream: Tensor, ids: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """dlogits [n, vocabulary] of `dtype`: upstream [n] times by_kept [n, K] at ids int32 [n, K] (-1: none), else 0."""
    n, k = ids.shape
    dlogits = torch.zeros(n, vocabulary, dtype=dtype, device=ids.device)
    if n > 0:
        lanes = power_of_two(k)
        _launch(
            "scatter_rows", n,
            by_kept.contiguous(), upstream.contiguous(), ids.contiguous(), dlogits, vocabulary, k,
            LANES=lanes, num_warps=warps(lanes, 16),
        )  # fmt: skip
    return dlogits


def _results(n: int, k: int, device: torch.device, gradient: bool) -> tuple[Tensor, Tensor | None]:
    kl = torch.empty(n, dtype=torch.float32, device=device)
    return kl, kl.new_empty(n, k) if gradient else None


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
