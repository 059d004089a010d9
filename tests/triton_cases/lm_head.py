"""Row kernels of lm_head as the launchers run them: V = 151,936, K = 500, bare and with a bias and a softcap."""

from __future__ import annotations

from nova_kernels.lm_head.triton import COLUMNS, DENSE_BLOCK, ENTRIES_BLOCK, LANES, NARROW, TILE, WIDE

MODULE = "nova_kernels.lm_head.triton_kernels"
COLUMN_RANGES = 16  # the power of two at or above ceil(V / COLUMNS)

BLOCK = {"products": "*fp32:16", "row_stride": "i32:16", "vocabulary": "i32:16", "inverse_temperature": "fp32"}
HEADS: tuple[dict[str, str], ...] = ({}, {"bias": "*fp32:16", "softcap": "fp32"})
STATS = {"maximum": "*fp32:16", "total": "*fp32:16", "weighted": "*fp32:16", "target": "*fp32:16", "kept": "*fp32:16"}
SOFTMAX = {"maximum": "*fp32", "scale": "*fp32"}
PLACES = {"targets": "*i64", "ids": "*i32:16", "num_kept": "i32"}
UPSTREAM = {"by_target": "*fp32", "by_kept": "*fp32:16", "entries": "*fp32:16"}


def _out(dtype: str) -> dict[str, str]:
    return {"out": f"*{dtype}:16", "out_stride": "i32:16"}


CASES: list[tuple[str, dict[str, str], dict[str, object], int]] = []
for head in HEADS:
    block = BLOCK | head
    partials = block | {"partials": "*fp32:16"}
    CASES += [
        ("partial_stats", partials, {"COLUMNS": COLUMNS, "TILE": TILE, "LANES": LANES}, WIDE),
        (
            "finish_stats",
            partials | {"parts": "i32"} | STATS | PLACES,
            {"PARTS": COLUMN_RANGES, "BLOCK": ENTRIES_BLOCK},
            NARROW,
        ),
        ("entry_gradients", block | SOFTMAX | PLACES | UPSTREAM, {"BLOCK": ENTRIES_BLOCK}, NARROW),
        *(
            ("dense_gradient", block | SOFTMAX | _out(dtype), {"BLOCK": DENSE_BLOCK}, WIDE)
            for dtype in ("fp32", "bf16", "fp16")
        ),
    ]
CASES += [
    (
        "place_entries",
        {"entries": "*fp32:16", "vocabulary": "i32:16"} | PLACES | _out(dtype),
        {"BLOCK": ENTRIES_BLOCK},
        NARROW,
    )
    for dtype in ("fp32", "bf16", "fp16")
]
