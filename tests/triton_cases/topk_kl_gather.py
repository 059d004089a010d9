"""Kernels of topk_kl.gather_kernels as launched for K = 500, H = 4096."""

from __future__ import annotations

MODULE = "nova_kernels.topk_kl.gather_kernels"

_SIZES = {"K": "i32", "H": "i32:16"}
_BLOCKS = {"K_BLOCK": 16, "H_BLOCK": 256}


def _cases(real: str) -> list[tuple[str, dict[str, str], dict[str, object], int]]:
    import triton.language as tl

    constants = {**_BLOCKS, "SUM": tl.float32}
    rows, sums = f"*{real}:16", "*fp32:16"
    return [
        (
            "_kept",
            {
                **{"hidden_ptr": rows, "weight_ptr": rows, "ids_ptr": "*i32:16", "kept_ptr": sums},
                **_SIZES,
                **{"hidden_stride": "i32:16", "weight_stride": "i32:16"},
            },
            constants,
            4,
        ),
        (
            "_hidden_gradient",
            {
                **{"weight_ptr": rows, "ids_ptr": "*i32:16", "by_kept_ptr": sums, "dhidden_ptr": sums},
                **_SIZES,
                "weight_stride": "i32:16",
            },
            constants,
            4,
        ),
        (
            "_weight_gradient",
            {
                **{"hidden_ptr": rows, "by_kept_ptr": sums, "order_ptr": "*i64:16", "starts_ptr": "*i64:16"},
                **{"dweight_ptr": rows, **_SIZES, "hidden_stride": "i32:16"},
            },
            constants,
            4,
        ),
    ]


CASES = _cases("bf16") + _cases("fp32")
