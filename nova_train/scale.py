"""Memory and traffic of one GPU of many, by formula: the tables of docs/scale.md.

N GPUs hold all states in parts (FSDP2); sp of them share every row of T tokens, the N / sp groups have rows of their
own. For every row a GPU

    computes    forward, forward again, backward:   4 x the layers' forward + 3 x the head's, of T / sp tokens
    gathers     (N - 1) / N of all weights twice in bf16, and sends their gradients in fp32
    exchanges   q, k, v and outputs in forward, again, backward:   3 x comm_bytes x layers

Seconds are bytes and operations divided by stated rates, not measurements. Gathers hide behind computing as long as
they take less time; exchanges are in the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nova_kernels.checkpoint import FSDP, Action, SegmentPlan, plan_segments
from nova_kernels.ulysses import HeadPlan, TokenPlan, comm_bytes
from nova_train.fleet import BFLOAT16, MATMUL_FLOPS, MODEL_SHAPES, Card, ModelShape, chain_of, memory_need, sharded

GIB = 2**30
FLOPS = 400e12  # per second, of a GPU at these products
WITHIN, ACROSS = 450e9, 50e9  # bytes per second that a GPU sends, within a machine and between machines
GRADIENT = 4  # bytes of a gradient while it is summed
MACHINE = 8  # GPUs
TOKENS = (16384, 32768, 65536, 131072)
MODELS = (("qwen2-7b", 8, (1, 2, 8)), ("qwen2-72b", 64, (1, 4, 8, 16)))  # name, GPUs, sp
ALLOWED: dict[str, tuple[Action, ...]] = {"segments": ("segment",), "offload": ("segment", "offload")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One GPU of `gpus`, of which `sp` share rows of `tokens` tokens."""

    shape: ModelShape
    gpus: int
    sp: int
    tokens: int

    def gib(self, card: Card) -> dict[str, float]:
        """Sum of all on one GPU, with the slack of the card: by plan."""
        chain = chain_of(self.shape, self.tokens, sp=self.sp)
        plans = {"each layer": SegmentPlan.of(chain, [1] * len(chain.layers))}
        plans |= {name: plan_segments(sharded(chain), allow=allow, fsdp=FSDP()) for name, allow in ALLOWED.items()}
        needs = {
            name: memory_need(chain, plan.bounds, plan.actions, parameters=self.shape.parameters, sp=self.sp)
            for name, plan in plans.items()
        }
        return {name: need.total(self.gpus, card) / GIB for name, need in needs.items()}

    @property
    def compute_seconds(self) -> float:
        """Forward, forward again and backward of a row; the head is not computed again."""
        chain = chain_of(self.shape, self.tokens, sp=self.sp)
        head = MATMUL_FLOPS * self.shape.vocab * self.shape.hidden * self.tokens / self.sp
        return (4 * chain.flops + 3 * head) / FLOPS

    @property
    def gathered_bytes(self) -> float:
        """What a GPU sends for gathers and sums of gradients, per row."""
        return self.shape.parameters * (2 * BFLOAT16 + GRADIENT) * (self.gpus - 1) / self.gpus

    @property
    def exchanged_bytes(self) -> int:
        """What the GPU that sends most sends for attention, per row."""
        heads = HeadPlan.build(self.shape.heads, self.shape.kv_heads, self.sp)
        tokens = TokenPlan.build(self.tokens, self.sp)
        per_layer = max(
            comm_bytes(heads, tokens, rank=rank, head_dim=self.shape.head_dim, element_size=BFLOAT16).total
            for rank in range(self.sp)
        )
        return 3 * self.shape.num_layers * per_layer

    @property
    def gather_seconds(self) -> float:
        """At the speed of the slowest link in the way."""
        return self.gathered_bytes / (WITHIN if self.gpus <= MACHINE else ACROSS)

    @property
    def exchange_seconds(self) -> float:
        """Groups lie within a machine as long as they fit."""
        return self.exchanged_bytes / (WITHIN if self.sp <= MACHINE else ACROSS)


def scale_lines(card: Card) -> Iterator[str]:
    """The tables as Markdown."""
    limit = card.memory_bytes / GIB
    for name, gpus, sizes in MODELS:
        yield f"{name} on {gpus} GPUs of {limit:.1f} GiB: GiB per GPU by plan (* does not fit), seconds per row"
        yield ""
        titles = ("tokens", "sp", "each layer", *ALLOWED, "compute s", "gather s", "exchange s", "exchanged GiB")
        yield "| " + " | ".join(titles) + " |"
        yield "|" + " ---: |" * len(titles)
        for tokens in TOKENS:
            for sp in sizes:
                at = Scale(shape=MODEL_SHAPES[name], gpus=gpus, sp=sp, tokens=tokens)
                sums = [f"{gib:.1f}{'*' if gib > limit else ''}" for gib in at.gib(card).values()]
                times = [f"{at.compute_seconds:.1f}", f"{at.gather_seconds:.2f}", f"{at.exchange_seconds:.2f}"]
                cells = [f"{tokens:,}", str(sp), *sums, *times, f"{at.exchanged_bytes / GIB:.1f}"]
                yield "| " + " | ".join(cells) + " |"
        yield ""
