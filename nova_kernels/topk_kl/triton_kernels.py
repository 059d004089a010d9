"""Kernels of topk_kl: exact selection by group maxima, and the KL of the kept logits.

A value's key is the integer that orders as the value does, 16 bits wide for 16-bit logits. "Above a key" means
not (x <= value of the key), so that NaN is above every key and -0 equals +0 without a look at the bits of x.

One program never waits for another, and none reads what it wrote: every hand-over is the end of a kernel.
Arithmetic is in float32 whatever the logits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

LINEAR_STEPS = tl.constexpr(8)  # of a search, halving the range of values; from then on that of keys
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def value_of(key, dtype: tl.constexpr):
    """The value of a key, in float32."""
    if dtype.primitive_bitwidth == 32:
        return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    elif dtype == tl.bfloat16:
        return (tl.where(key < 0, key ^ 0x7FFF, key) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.where(key < 0, key ^ 0x7FFF, key).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def key_of(value, dtype: tl.constexpr):
    """The key of a float32 value, rounded in some way where `dtype` is narrower; of zeros that of -0."""
    if dtype == tl.float16:
        bits = value.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ (0x7FFF if dtype == tl.float16 else 0x7FFFFFFF), bits)
    if dtype == tl.bfloat16:
        key = key >> 16
    return tl.where(value == 0, -1, key)


@triton.jit
def infinity_key(dtype: tl.constexpr):
    """The key of +inf; that of NaN is the next, that of -inf is its complement."""
    if dtype.primitive_bitwidth == 32:
        return 0x7F800000
    elif dtype == tl.float16:
        return 0x7C00
    else:
        return 0x7F80


@triton.jit
def above(x, key, dtype: tl.constexpr):
    """Which of x have a larger key, for any key but NaN's."""
    return ~(x <= value_of(key, dtype))


@triton.jit
def count_above(x, key, dtype: tl.constexpr):
    """Counted in float32, where a comparison and its 0 or 1 are one instruction; exact below 2^24."""
    return tl.sum(tl.where(x <= value_of(key, dtype), 0.0, 1.0))


@triton.jit
def left_out(mask, row):
    """Whether a mask is given and it leaves this row out."""
    if mask is None:
        return False
    else:
        return tl.load(mask + row) == 0


@triton.jit
def keep_largest(x, low, k, dtype: tl.constexpr, CAPACITY: tl.constexpr):
    """Which of x, a vector in float32, to keep: at most CAPACITY, the k largest among them, the first of equal ones.

    `low` is a key with k values above it, or with all above it that may be kept.

    Returns:
        The mask, and a key with nothing but kept values above it or equal to the next key.
    """
    kept = count_above(x, low, dtype)
    infinity = infinity_key(dtype)
    high = infinity + 1  # the key of NaN
    above_high = 0.0
    if kept > CAPACITY:
        nans = count_above(x, infinity, dtype)
        if nans >= k:
            low, kept = low * 0 + infinity, nans
        else:
            high, above_high = key_of(tl.max(x), dtype), nans
        step = 0
        while (kept > CAPACITY) & (low + 1 < high):
            by_key = (low & high) + ((low ^ high) >> 1)
            by_value = key_of(value_of(low, dtype) * 0.5 + value_of(high, dtype) * 0.5, dtype)
            middle = tl.where(step < LINEAR_STEPS, by_value, by_key)
            middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
            count = count_above(x, middle, dtype)
            enough = count >= k
            low, kept = tl.where(enough, middle, low), tl.where(enough, count, kept)
            high, above_high = tl.where(enough, high, middle), tl.where(enough, above_high, count)
            step += 1
    mask = above(x, low, dtype)
    if kept > CAPACITY:  # high = low + 1 is the k-th largest key, and not all that have it fit
        larger = above(x, high, dtype) & (high <= infinity)
        tied = mask & ~larger
        mask = larger | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= tl.cast(k - above_high, tl.int32)))
    return mask, low


@triton.jit
def reduce_groups(
    logits,
    mask,
    maxima,
    partial_lse,
    row_stride,
    vocabulary,
    tiles,
    temperature,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Maximum of each group of WIDTH columns (NaN if one is in it) and the log-sum-exp of GROUPS groups."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if left_out(mask, row):
        return
    first = tile * (GROUPS * WIDTH)
    columns = first + tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    start = logits + row.to(tl.int64) * row_stride
    if first + GROUPS * WIDTH <= vocabulary:
        x = tl.load(start + columns).to(tl.float32)
    else:
        x = tl.load(start + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    maximum = tl.max(x, axis=1)
    shift = tl.max(maximum, axis=0)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    # Never inf - inf, so a group's sum is NaN exactly where a NaN is in it, which maxima on the GPU pass over.
    sums = tl.sum(tl.exp2((x - shift) * (LOG2_E / temperature)), axis=1)
    maximum = tl.where(sums != sums, float("nan"), maximum)
    place = row.to(tl.int64) * tiles + tile
    tl.store(maxima + place * GROUPS + tl.arange(0, GROUPS), maximum.to(maxima.dtype.element_ty))
    tl.store(partial_lse + place, shift / temperature + tl.log2(tl.sum(sums, axis=0)) * LN_2)


@triton.jit
def choose_groups(
    maxima, mask, partial_lse, groups, floors, lse, k, length, tiles, SLOTS: tl.constexpr, LANES: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Numbers of at most SLOTS groups with all of the k largest entries, ascending, and a key below those entries."""
    row = tl.program_id(0).to(tl.int64)
    if left_out(mask, row):
        return
    dtype: tl.constexpr = maxima.dtype.element_ty
    lane = tl.arange(0, LANES)
    x = tl.load(maxima + row * length + lane, mask=lane < length, other=float("-inf")).to(tl.float32)
    smallest = tl.min(tl.where(x > float("-inf"), x, float("inf")), axis=0)
    chosen, floor = keep_largest(x, key_of(smallest, dtype) - 1, k, dtype, SLOTS)
    place = tl.cumsum(chosen.to(tl.int32), 0)
    tl.store(groups + row * SLOTS + place - 1, lane, mask=chosen)
    slot = tl.arange(0, SLOTS)
    tl.store(groups + row * SLOTS + slot, -1, mask=slot >= tl.max(place, axis=0))
    few = tl.max(place, axis=0) < k  # then a group's smaller entries are among the largest too
    tl.store(floors + row, tl.where(few, -infinity_key(dtype) - 1, floor))

    tile = tl.arange(0, TILES)
    part = tl.load(partial_lse + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    shift = tl.max(part, axis=0)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    tl.store(lse + row, shift + tl.log2(tl.sum(tl.exp2((part - shift) * LOG2_E), axis=0)) * LN_2)


@triton.jit
def collect_candidates(
    logits, mask, groups, floors, candidates, counts, row_stride, vocabulary, k,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Places (group's slot * WIDTH + column in it) of at most CAPACITY entries with the k largest among them."""
    row = tl.program_id(0).to(tl.int64)
    if left_out(mask, row):
        return
    start = logits + row * row_stride
    group = tl.load(groups + row * SLOTS + tl.arange(0, SLOTS))
    within = tl.arange(0, WIDTH)
    column = group[:, None] * WIDTH + within[None, :]
    whole = (group >= 0) & (group < vocabulary // WIDTH)
    x = tl.load(start + column, mask=whole[:, None], other=float("-inf"))
    if vocabulary % WIDTH != 0:
        last = vocabulary // WIDTH
        rest = tl.load(start + last * WIDTH + within, mask=last * WIDTH + within < vocabulary, other=float("-inf"))
        x = tl.where((group == last)[:, None], rest[None, :], x)
    x = tl.reshape(x, [SLOTS * WIDTH]).to(tl.float32)
    chosen, _ = keep_largest(x, tl.load(floors + row), k, logits.dtype.element_ty, CAPACITY)
    place = tl.cumsum(chosen.to(tl.int32), 0)
    tl.store(candidates + row * CAPACITY + place - 1, tl.arange(0, SLOTS * WIDTH), mask=chosen)
    tl.store(counts + row, tl.max(place, axis=0))


@triton.jit
def kept_candidates(
    logits, groups, candidates, counts, floors, row, row_stride, k,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Column, value, final place and whether it is kept, of each candidate of a row; and how many are kept."""
    lane = tl.arange(0, CAPACITY)
    used = lane < tl.load(counts + row)
    candidate = tl.load(candidates + row * CAPACITY + lane, mask=used, other=0)
    column = tl.load(groups + row * SLOTS + candidate // WIDTH, mask=used, other=0) * WIDTH + candidate % WIDTH
    value = tl.load(logits + row * row_stride + column, mask=used, other=float("-inf")).to(tl.float32)
    kept, _ = keep_largest(value, tl.load(floors + row), k, logits.dtype.element_ty, k)
    place = tl.cumsum(kept.to(tl.int32), 0)
    return column, value, place - 1, kept, tl.max(place, axis=0)


@triton.jit
def keep_entries(
    logits, groups, candidates, counts, floors, ids, values, row_stride,
    K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The K largest candidates, ascending by column; -1 and -inf in the slots that are left."""
    row = tl.program_id(0).to(tl.int64)
    column, value, place, kept, total = kept_candidates(
        logits, groups, candidates, counts, floors, row, row_stride, K, SLOTS, WIDTH, CAPACITY
    )
    tl.store(ids + row * K + place, column, mask=kept)
    tl.store(values + row * K + place, value, mask=kept)
    slot = tl.arange(0, SLOTS)
    left = (slot >= total) & (slot < K)
    tl.store(ids + row * K + slot, -1, mask=left)
    tl.store(values + row * K + slot, float("-inf"), mask=left)


@triton.jit
def log_softmax(x, temperature):
    """x over the temperature, less its log-sum-exp; and the exponentials of that."""
    shifted = (x - tl.max(x, axis=0)) / temperature
    exponentials = tl.exp2(shifted * LOG2_E)
    total = tl.sum(exponentials, axis=0)
    return shifted - tl.log2(total) * LN_2, exponentials / total


@triton.jit
def divergence(a, b, d):
    """a (d + exp(-d) - 1) = a d + b - a for d = log a - log b: never negative, 0 at d = 0."""
    s = d * (-1.0 / 362880) + 1.0 / 40320
    s = s * d - 1.0 / 5040
    s = s * d + 1.0 / 720
    s = s * d - 1.0 / 120
    s = s * d + 1.0 / 24
    s = s * d - 1.0 / 6
    s = s * d + 0.5
    return tl.where(tl.abs(d) < 0.7, s * d * d * a, a * d + b - a)


@triton.jit
def kl_of(policy, ref, temperature, POLICY_FIRST: tl.constexpr):
    """KL of two vectors of logits, -inf in both where a lane is unused, and its derivatives by the policy's."""
    log_p, p = log_softmax(policy, temperature)
    log_r, r = log_softmax(ref, temperature)
    d = tl.where(log_r == float("-inf"), 0.0, log_p - log_r)
    if POLICY_FIRST:
        d = tl.maximum(d, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)  # p = 0: the term is r
        kl = tl.sum(divergence(p, r, d), axis=0)
        return kl, tl.where(p == 0, 0.0, p * (d - kl)) / temperature
    else:
        # Not 0 * inf where r underflows and the policy has no such token.
        safe = tl.maximum(r, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
        return tl.sum(divergence(safe, p, -d), axis=0), (p - r) / temperature


@triton.jit
def keep_entries_kl(
    logits, policy, mask, groups, candidates, counts, floors, ids, kl, by_kept, row_stride, policy_stride, temperature,
    K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr, POLICY_FIRST: tl.constexpr,
):  # fmt: skip
    """keep_entries, and on the kept candidates the KL of the policy's logits at the same columns."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    if left_out(mask, row):
        tl.store(ids + row * K + slot, -1, mask=slot < K)
        tl.store(kl + row, 0.0)
        if by_kept is not None:
            tl.store(by_kept + row * K + slot, 0.0, mask=slot < K)
        return
    column, value, place, kept, total = kept_candidates(
        logits, groups, candidates, counts, floors, row, row_stride, K, SLOTS, WIDTH, CAPACITY
    )
    z = tl.load(policy + row * policy_stride + column, mask=kept, other=float("-inf")).to(tl.float32)
    divergence_of_row, slope = kl_of(z, tl.where(kept, value, float("-inf")), temperature, POLICY_FIRST)
    tl.store(kl + row, divergence_of_row)
    tl.store(ids + row * K + place, column, mask=kept)
    left = (slot >= total) & (slot < K)
    tl.store(ids + row * K + slot, -1, mask=left)
    if by_kept is not None:
        tl.store(by_kept + row * K + place, slope, mask=kept)
        tl.store(by_kept + row * K + slot, divergence_of_row * 0.0, mask=left)


@triton.jit
def kl_rows(
    policy, ids, values, mask, kl, by_kept, policy_stride, temperature, K,
    LANES: tl.constexpr, POLICY_FIRST: tl.constexpr,
):  # fmt: skip
    """KL of each row of kept logits [N, K], or, given ids, of the policy's logits [N, V] at those."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < K
    if left_out(mask, row):
        tl.store(kl + row, 0.0)
        if by_kept is not None:
            tl.store(by_kept + row * K + lane, 0.0, mask=inside)
        return
    ref = tl.load(values + row * K + lane, mask=inside, other=float("-inf"))
    used = inside & (ref != float("-inf"))
    column = lane if ids is None else tl.load(ids + row * K + lane, mask=used, other=0)
    z = tl.load(policy + row * policy_stride + column, mask=used, other=float("-inf")).to(tl.float32)
    divergence_of_row, slope = kl_of(z, ref, temperature, POLICY_FIRST)
    tl.store(kl + row, divergence_of_row)
    if by_kept is not None:
        tl.store(by_kept + row * K + lane, slope, mask=inside)


@triton.jit
def scatter_rows(by_kept, upstream, ids, dlogits, vocabulary, K, LANES: tl.constexpr):
    """upstream * by_kept at the ids; -1 is skipped."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    column = tl.load(ids + row * K + lane, mask=lane < K, other=-1)
    value = tl.load(by_kept + row * K + lane, mask=lane < K, other=0.0) * tl.load(upstream + row)
    tl.store(dlogits + row * vocabulary + column, value.to(dlogits.dtype.element_ty), mask=column >= 0)
