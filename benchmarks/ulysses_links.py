"""How long a layer's exchanges would take between many GPUs: a model. Nothing of it is measured.

    seconds = collectives * latency + the slower of: bytes to ranks of the own node / NVLINK
                                                     bytes to ranks of other nodes  / NETWORK

A rank sends every other rank the same share and receives as much meanwhile; nodes have NODE GPUs, a GPU its own links.
LATENCY is that of the slowest link that is used. Rates are what vendors state for one direction: NVLink 4 (H100, H200),
and a 400 Gbit/s adapter per GPU. No contention, no start-up of kernels, nothing hidden behind computing: that is as bad
as one exchange after the other gets, and as good as the links get.
"""

from __future__ import annotations

from dataclasses import dataclass

from nova_kernels.ulysses import HeadPlan, TokenPlan, allgather_kv_bytes, comm_bytes

NVLINK, NETWORK = 450e9, 50e9  # bytes per second and GPU, one direction
LATENCY = {"nvlink": 10e-6, "network": 25e-6}  # seconds of a collective without bytes: assumed
NODE = 8  # GPUs


@dataclass(frozen=True)
class Layer:
    """The attention of one layer, bfloat16."""

    name: str
    heads: int
    kv_heads: int
    width: int
    tokens: int  # of the whole row


LAYER = Layer("Llama 3 70B", 64, 8, 128, 131_072)
RANKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Traffic:
    """Of one rank and one layer, forward and backward, without what is computed again."""

    sent_bytes: int
    all_gather_bytes: int  # if keys and values went to all ranks instead, stayed, and their gradients went back
    collectives: int
    permutes_collectives: int  # where q, k and v go on their own
    seconds: float
    permutes_seconds: float


def exchange_seconds(sent_bytes: int, collectives: int, ranks: int, *, node: int = NODE) -> float:
    """The formula above."""
    if ranks == 1:
        return 0.0
    near = min(ranks, node) - 1
    far = ranks - 1 - near
    each = sent_bytes / (ranks - 1)
    latency = LATENCY["network" if far else "nvlink"]
    return collectives * latency + max(near * each / NVLINK, far * each / NETWORK)


def traffic(layer: Layer, ranks: int, *, node: int = NODE) -> Traffic:
    """The busiest rank's."""
    heads, tokens = HeadPlan.build(layer.heads, layer.kv_heads, ranks), TokenPlan.build(layer.tokens, ranks)
    sizes = {"head_dim": layer.width, "element_size": 2}
    sent = 2 * max(comm_bytes(heads, tokens, rank=rank, **sizes).total for rank in range(ranks))
    gathered = 2 * max(allgather_kv_bytes(heads, tokens, rank=rank, **sizes) for rank in range(ranks))
    ours, permutes = 2 * 2, 2 * 4
    return Traffic(
        sent,
        gathered,
        ours,
        permutes,
        exchange_seconds(sent, ours, ranks, node=node),
        exchange_seconds(sent, permutes, ranks, node=node),
    )
