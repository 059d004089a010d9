"""Triton kernels over a block of products y = h W^T, fp32 [n, V] of any row stride (launched by triton.py).

    z = y + b    or, under a softcap c,    z = c tanh((y + b) / c)        slope = dz/dy = 1 - (z/c)^2        x = z / T

Statistics of a row (maximum m, total s, weighted w) are those of its pieces, merged; one entry x is a piece (x, 1, 0):

    m = max m_i        s = sum s_i exp(m_i - m)        w = sum exp(m_i - m) (w_i + s_i (m_i - m))

Gradient by y:

    g_v = slope (scale exp(x_v - maximum) + [v = target] by_target) + sum_k [v = id_k] by_kept_k

Products by 1/c and 1/T stand for the divisions: they are closer than the two units in the last place that Triton's
division may err by, and cheaper than an exact one.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

# The maximum before the first entry: unlike -inf it can be subtracted from -inf. Entries below it count as -inf.
LOWEST = tl.constexpr(-1e38)
# Differences beyond this underflow in exp; capped, their product with 0 is 0 and not NaN.
FAR = tl.constexpr(1000.0)


@triton.jit
def exponential(x):
    """exp without the three instructions by which tl.exp keeps results below 2^-126, of no weight beside 1."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def hyperbolic_tangent(x):
    """tanh to about two units in the last place; below 0.55 a fit in x^2, since there 1 - exp(-2x) cancels."""
    size = tl.abs(x)
    decay = exponential(-2.0 * size)
    large = (1.0 - decay) / (1.0 + decay)
    bounded = tl.minimum(size, 1.0)
    square = bounded * bounded
    fit = -0.006615746766328812 * square + 0.021312739700078964
    fit = fit * square - 0.053910065442323685
    fit = fit * square + 0.13333117961883545
    fit = fit * square - 0.3333333134651184
    tangent = tl.where(size < 0.55, bounded + bounded * square * fit, large)
    return tl.where(x < 0, -tangent, tangent)


@triton.jit
def logits_at(products, bias, columns, inside, softcap):
    """z at `columns` of the row that starts at `products`; of no meaning where not `inside`."""
    z = tl.load(products + columns, mask=inside, other=float("-inf"))
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0)
    if softcap is not None:
        z = softcap * hyperbolic_tangent(z * tl.div_rn(1.0, softcap))
    return z


@triton.jit
def slope_at(z, softcap):
    """dz/dy under a softcap."""
    tangent = z * tl.div_rn(1.0, softcap)
    return 1.0 - tangent * tangent


@triton.jit
def merged_stats(maximum, total, weighted):
    """Statistics of the pieces along axis 0, as one. Pieces without an entry have maximum LOWEST and total 0."""
    whole = tl.max(maximum, axis=0)
    distance = whole - maximum
    decay = exponential(-distance)
    shifted = decay * (weighted - total * tl.minimum(distance, FAR))
    return whole, tl.sum(total * decay, axis=0), tl.sum(shifted, axis=0)


@triton.jit
def partial_stats(
    products, row_stride, vocabulary, bias, softcap, inverse_temperature, partials,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Statistics of COLUMNS columns of a row, into partials [n, 3, parts]; grid n * parts.

    LANES running statistics side by side, merged only at the end: a thread has whole columns of the tile [TILE, LANES],
    so the loop has no barrier, its TILE loads are in flight together, and an entry costs one exp.
    """
    parts = tl.cdiv(vocabulary, COLUMNS)
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    tile = tl.arange(0, TILE)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    maximum = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for start in range(part * COLUMNS, tl.minimum((part + 1) * COLUMNS, vocabulary), TILE * LANES):
        columns = start + tile
        inside = columns < vocabulary
        z = logits_at(products + row * row_stride, bias, columns, inside, softcap)
        x = tl.where(inside, z * inverse_temperature, float("-inf"))
        top = tl.maximum(maximum, tl.max(x, axis=0))
        decay = exponential(maximum - top)
        weighted = decay * (weighted - total * tl.minimum(top - maximum, FAR))
        total *= decay
        maximum = top
        x -= top[None, :]
        exponentials = exponential(x)
        total += tl.sum(exponentials, axis=0)
        weighted += tl.sum(exponentials * tl.maximum(x, -FAR), axis=0)
    maximum, total, weighted = merged_stats(maximum, total, weighted)
    place = partials + row * 3 * parts + part
    tl.store(place, maximum)
    tl.store(place + parts, total)
    tl.store(place + 2 * parts, weighted)


@triton.jit(do_not_specialize_on_alignment=["targets"])
def finish_stats(
    partials, parts, products, row_stride, vocabulary, bias, softcap, inverse_temperature, targets, ids, num_kept,
    maximum, total, weighted, target, kept,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge a row's partials [n, 3, parts] (PARTS >= parts) and gather its target logit and kept products; grid n."""
    row = tl.program_id(0).to(tl.int64)
    products += row * row_stride
    part = tl.arange(0, PARTS)
    place = partials + row * 3 * parts + part
    whole, mass, moment = merged_stats(
        tl.load(place, mask=part < parts, other=LOWEST),
        tl.load(place + parts, mask=part < parts, other=0.0),
        tl.load(place + 2 * parts, mask=part < parts, other=0.0),
    )
    # max passes a NaN by; it is in the total.
    tl.store(maximum + row, tl.where(mass > 0, whole, tl.where(mass == 0, float("-inf"), mass)))
    tl.store(total + row, mass)
    tl.store(weighted + row, moment)
    if targets is not None:
        wanted = tl.load(targets + row)
        here = (wanted >= 0) & (wanted < vocabulary)
        z_wanted = logits_at(products, bias, wanted, here, softcap)
        tl.store(target + row, tl.where(here, z_wanted * inverse_temperature, 0.0))
    if ids is not None:
        for start in range(0, num_kept, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            columns = tl.load(ids + row * num_kept + slots, mask=slots < num_kept, other=-1)
            inside = (columns >= 0) & (columns < vocabulary)
            y = tl.load(products + columns, mask=inside, other=0.0)
            tl.store(kept + row * num_kept + slots, y, mask=slots < num_kept)


@triton.jit
def gradient_at(z, softcap, inverse_temperature, maximum, scale, by_logit):
    """slope (scale exp(z/T - maximum) + by_logit); `scale` may be None."""
    gradient = by_logit
    if scale is not None:
        gradient += scale * exponential(z * inverse_temperature - maximum)
    if softcap is not None:
        gradient *= slope_at(z, softcap)
    return gradient


@triton.jit(do_not_specialize_on_alignment=["maximum", "scale"])
def dense_gradient(
    products, row_stride, vocabulary, bias, softcap, inverse_temperature, maximum, scale, out, out_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """slope scale exp(x - maximum), into out [n, V], which may be the products; grid n * ceil(V / BLOCK)."""
    parts = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    columns = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    z = logits_at(products + row * row_stride, bias, columns, inside, softcap)
    gradient = gradient_at(z, softcap, inverse_temperature, tl.load(maximum + row), tl.load(scale + row), 0.0)
    tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["maximum", "scale", "targets", "by_target"])
def entry_gradients(
    products, row_stride, vocabulary, bias, softcap, inverse_temperature, maximum, scale, targets, by_target, ids,
    by_kept, num_kept, entries,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole gradient at a row's ids and (last) at its target, into entries fp32 [n, num_kept + 1]; grid n.

    Slots whose column is outside the block stay as they are.
    """
    row = tl.program_id(0).to(tl.int64)
    products += row * row_stride
    entries += row * (num_kept + 1)
    row_maximum = None
    row_scale = None
    if scale is not None:
        row_maximum = tl.load(maximum + row)
        row_scale = tl.load(scale + row)
    target = tl.full([], -1, tl.int64)
    upstream = 0.0
    if targets is not None:
        target = tl.load(targets + row)
        upstream = tl.load(by_target + row)
        here = (target >= 0) & (target < vocabulary)
        z_target = logits_at(products, bias, target, here, softcap)
        by_product = gradient_at(z_target, softcap, inverse_temperature, row_maximum, row_scale, upstream)
        tl.store(entries + num_kept, by_product, mask=here)
    if ids is not None:
        for start in range(0, num_kept, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            columns = tl.load(ids + row * num_kept + slots, mask=slots < num_kept, other=-1)
            inside = (columns >= 0) & (columns < vocabulary)
            z = logits_at(products, bias, columns, inside, softcap)
            by_logit = tl.where(columns == target, upstream, 0.0)
            gradient = gradient_at(z, softcap, inverse_temperature, row_maximum, row_scale, by_logit)
            gradient += tl.load(by_kept + row * num_kept + slots, mask=inside, other=0.0)
            tl.store(entries + slots, gradient, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["targets"])
def place_entries(entries, vocabulary, targets, ids, num_kept, out, out_stride, BLOCK: tl.constexpr):
    """Write entries [n, num_kept + 1] over out [n, V]; grid n. A target among the ids is written once, by its id."""
    row = tl.program_id(0).to(tl.int64)
    entries += row * (num_kept + 1)
    out += row * out_stride
    target = tl.full([], -1, tl.int64)
    if targets is not None:
        target = tl.load(targets + row)
    hits = 0
    if ids is not None:
        for start in range(0, num_kept, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            columns = tl.load(ids + row * num_kept + slots, mask=slots < num_kept, other=-1)
            inside = (columns >= 0) & (columns < vocabulary)
            gradient = tl.load(entries + slots, mask=inside, other=0.0)
            tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=inside)
            hits += tl.sum((columns == target).to(tl.int32), axis=0)
    if targets is not None:
        alone = (target >= 0) & (target < vocabulary) & (hits == 0)
        by_product = tl.load(entries + num_kept, mask=alone, other=0.0)
        tl.store(out + target, by_product.to(out.dtype.element_ty), mask=alone)
