"""Kernels of topk_kl as the launchers run them: V = 151,936, K = 500, bfloat16 and float32 logits."""

from __future__ import annotations

from nova_kernels.topk_kl.triton import plan, power_of_two, warps

MODULE = "nova_kernels.topk_kl.triton_kernels"
VOCABULARY, K = 151_936, 500


def _cases(vocabulary: int, k: int, logits: str) -> list[tuple[str, dict[str, str], dict[str, object], int]]:
    sizes = plan(vocabulary, k)
    lanes = power_of_two(k)
    width, slots, capacity = sizes.width, sizes.slots, sizes.capacity
    select = {
        "logits": logits, "groups": "*i32", "candidates": "*i32", "counts": "*i32", "floors": "*i32", "ids": "*i32",
        "row_stride": "i32:16",
    }  # fmt: skip
    kl = {"policy": logits, "mask": "*u8", "kl": "*fp32", "by_kept": "*fp32", "temperature": "fp32"}
    return [
        (
            "reduce_groups",
            {
                "logits": logits, "mask": "*u8", "maxima": logits, "partial_lse": "*fp32", "row_stride": "i32:16",
                "vocabulary": "i32:16", "tiles": "i32", "temperature": "fp32",
            },
            {"GROUPS": sizes.tile_groups, "WIDTH": width},
            warps(sizes.tile_groups * width, 64),
        ),
        (
            "choose_groups",
            {
                "maxima": logits, "mask": "*u8", "partial_lse": "*fp32", "groups": "*i32", "floors": "*i32",
                "lse": "*fp32", "k": "i32", "length": "i32:16", "tiles": "i32",
            },
            {"SLOTS": slots, "LANES": sizes.lanes, "TILES": power_of_two(sizes.tiles)},
            warps(sizes.lanes),
        ),
        (
            "collect_candidates",
            {
                "logits": logits, "mask": "*u8", "groups": "*i32", "floors": "*i32", "candidates": "*i32",
                "counts": "*i32", "row_stride": "i32:16", "vocabulary": "i32:16", "k": "i32",
            },
            {"SLOTS": slots, "WIDTH": width, "CAPACITY": capacity},
            warps(slots * width),
        ),
        (
            "keep_entries",
            {**select, "values": "*fp32"},
            {"K": k, "SLOTS": slots, "WIDTH": width, "CAPACITY": capacity},
            warps(capacity, 16),
        ),
        (
            "keep_entries_kl",
            {**select, **kl, "policy_stride": "i32:16"},
            {"K": k, "SLOTS": slots, "WIDTH": width, "CAPACITY": capacity, "POLICY_FIRST": True},
            warps(capacity, 16),
        ),
        (
            "kl_rows",
            {**kl, "ids": "*i32", "values": "*fp32", "policy_stride": "i32:16", "K": "i32"},
            {"LANES": lanes, "POLICY_FIRST": True},
            warps(lanes, 16),
        ),
        (
            "scatter_rows",
            {
                "by_kept": "*fp32", "upstream": "*fp32", "ids": "*i32", "dlogits": logits, "vocabulary": "i32:16",
                "K": "i32",
            },
            {"LANES": lanes},
            warps(lanes, 16),
        ),
    ]  # fmt: skip


# (kernel, types of its arguments (":16": divisible by 16), constants, warps)
CASES = _cases(VOCABULARY, K, "*bf16:16")
# topk_select has no mask.
CASES += [(name, {n: t for n, t in types.items() if n != "mask"}, *rest) for name, types, *rest in CASES[:3]]
# Logits of hidden states are float32, and kl_terms has no ids: the kept logits are gathered already.
CASES += [case for case in _cases(VOCABULARY, K, "*fp32:16") if case[0] != "scatter_rows"]
CASES += [
    (
        "kl_rows",
        {n: t for n, t in types.items() if n not in ("ids", "mask")},
        {**constants, "POLICY_FIRST": first},
        warp,
    )
    for name, types, constants, warp in _cases(VOCABULARY, K, "*fp32:16")
    if name == "kl_rows"
    for first in (True, False)
]
