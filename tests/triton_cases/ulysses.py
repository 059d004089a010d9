"""Kernels of ulysses as launched for heads of width 128, 96 and 256, with and without a rotation."""

from __future__ import annotations

MODULE = "nova_kernels.ulysses.kernels"
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def _case(
    kernel: str, dtype: str, width: int, angles: str | None
) -> tuple[str, dict[str, str], dict[str, object], int]:
    import triton
    import triton.language as tl

    from nova_kernels.ulysses.kernels import HEADS, NUM_WARPS, TILE_BYTES

    columns = triton.next_power_of_2(width // 2)
    strides = (f"{name}_{axis}" for name in "qkv" for axis in ("token", "head"))
    types = {
        **dict.fromkeys(("q", "k", "v", "buffer"), f"*{dtype}:16"),
        **dict.fromkeys(strides, "i32:16"),
        **{"bounds": "*i32:16", "places": "*i32:16", "num_tokens": "i32:16", "q_heads": "i32", "kv_heads": "i32"},
    }
    if angles is not None:
        types |= {"cos": f"*{angles}:16", "sin": f"*{angles}:16", "cos_token": "i32:16", "sin_token": "i32:16"}
    constants = {
        **{"D": width, "HALF": width // 2, "BLOCK": columns, "HEADS": HEADS},
        "SUM": tl.float64 if dtype == "fp64" else tl.float32,
        "TOKENS": TILE_BYTES // (columns * SIZES[dtype]),
    }
    return kernel, types, constants, NUM_WARPS


WAYS = [
    *(("bf16", 128, angles) for angles in (None, "bf16", "fp32")),
    ("bf16", 96, "bf16"),
    ("bf16", 256, "fp32"),
    ("fp16", 128, "fp16"),
    *(("fp32", 128, angles) for angles in (None, "fp32")),
    *(("fp64", 128, angles) for angles in (None, "fp64")),
]
CASES = [_case(kernel, *way) for kernel in ("_pack", "_unpack") for way in WAYS]
