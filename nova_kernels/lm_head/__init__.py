"""Logits of a language-model head, a block at a time: every op that starts from hidden states walks the same blocks.

    z = h W^T + b            softcap c:  z = c tanh((h W^T + b) / c)          h [N, H], W [V, H], b [V], z [N, V]

[N, V] is never held. Arithmetic has float32 sums whatever the inputs (float64 if one of them is), also under autocast.
A row's logits can differ in the last bit with its place in a block (matrix products pick their kernel by shape), so
ops whose results must agree to the bit get the same rows and walk the same chunks. docs/kernels/lm_head.md has the
walks, what they hold and what they cost.
"""

from nova_kernels.lm_head import arithmetic, parallel, rows, walk
from nova_kernels.lm_head.arithmetic import (
    CHUNK_ELEMENTS,
    add_product_,
    arithmetic_dtype,
    chunk_elements,
    chunk_rows,
    chunks,
    factor_dtype,
    kept_rows,
    product,
    spread,
    take,
    wants_gradient,
    without_autocast,
)
from nova_kernels.lm_head.head import Head, check_head, dense_logits, kept_logits, softcap_slope
from nova_kernels.lm_head.rows import RowStats, RowTerms

__all__ = [
    "CHUNK_ELEMENTS",
    "Head",
    "RowStats",
    "RowTerms",
    "add_product_",
    "arithmetic",
    "arithmetic_dtype",
    "check_head",
    "chunk_elements",
    "chunk_rows",
    "chunks",
    "dense_logits",
    "factor_dtype",
    "kept_logits",
    "kept_rows",
    "parallel",
    "product",
    "rows",
    "softcap_slope",
    "spread",
    "take",
    "walk",
    "wants_gradient",
    "without_autocast",
]
