"""Which way to the kept logits of hidden states, and back, is the fastest: dense, union or gather.

Per token and product (logits, dh, dW) each way costs so many columns of a large matrix product, 2 H operations each:

    dense    V (1 + reading / N)
    union    |U| (shared + moved / n) + buffer V / N + wait / (N H)          n = min(N, tokens of a block)
    gather   gathered K

reading, moved   what W, W_U and dW_U cost in memory traffic, spread over the tokens that share it
buffer           a float32 gradient of the weight, made and rounded; nothing where the weight is frozen
gathered         a row of W read for one token
wait             the host's wait for the sizes of the unions

The CPU's numbers are measured (benchmarks/topk_paths.py, float32, one thread): from 64 tokens on a gathered row costs 7
to 18 columns (up to 34 where dW outweighs the rest), and a row of a union 0.8 to 2.6 (up to 3.8). On text union and
gather are then within 40 % of each other where gradients are wanted (the forward alone is up to twice as fast by
union); where ids are more spread, gather is up to four times as fast, so the rule expects unions larger than a young
model's.

CUDA's are not yet measured on a GPU: they follow from an H200's 790 TFLOP/s in bfloat16 and 4.3 TB/s, so that a byte
costs as much as 184 operations. A gathered row of 2 H bytes at 70 % of the bandwidth: 260 columns. A row of a union is
read, written and read by its product: 6 H bytes; with dW, the mean of three products is 9.4 H. A float32 dW is zeroed,
read and rounded: 8 V H bytes more than a bfloat16 one needs. Two waits of 40 microseconds: 1e10 columns for one token
and H = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of |U| with the tokens of a block. 0.27 to 0.37 on text (benchmarks/topk_union.py), and the better trained, the more.
GROWTH = 0.45


@dataclass(frozen=True, slots=True)
class Costs:
    """In columns; see above."""

    reading: float
    shared: float
    moved: float
    moved_with_weight: float  # if dW is needed
    buffer: float
    gathered: float
    wait: float


CPU = Costs(reading=8, shared=1.5, moved=0, moved_with_weight=0, buffer=0, gathered=9, wait=0)
CUDA = Costs(reading=184, shared=1, moved=550, moved_with_weight=860, buffer=245, gathered=260, wait=1e10)


def expected_union(tokens: int, vocabulary: int, kept: int) -> int:
    """Rows that a block of consecutive tokens of text will need: K tokens^GROWTH, at most all V."""
    return min(vocabulary, round(kept * max(1, tokens) ** GROWTH))


def choose_path(
    *,
    num_tokens: int,
    vocabulary: int,
    hidden: int,
    kept: int,
    block: int,
    needs_weight: bool,
    costs: Costs,
    union: int | None = None,
) -> str:
    """The way with the least to do for N tokens; a tie goes to the first of dense, gather, union.

    Args:
        num_tokens, vocabulary, hidden, kept: N, V, H and K.
        block: tokens that share a union (union.block_tokens).
        needs_weight: whether the weight takes a gradient.
        costs: CPU or CUDA.
        union: rows a block of min(N, block) tokens needs, if they were counted; else expected_union.

    Returns:
        "dense", "gather" or "union".
    """
    num_tokens = max(1, num_tokens)
    block = max(1, min(num_tokens, block))
    rows = expected_union(block, vocabulary, kept) if union is None else union
    moved = costs.moved_with_weight if needs_weight else costs.moved
    buffer = costs.buffer * vocabulary / num_tokens if needs_weight else 0.0
    columns = {
        "dense": vocabulary * (1 + costs.reading / num_tokens),
        "gather": costs.gathered * kept,
        "union": rows * (costs.shared + moved / block) + buffer + costs.wait / (num_tokens * hidden),
    }
    best = "dense"
    for name in columns:  # no `min` by key: torch.compile cannot follow it where N is dynamic
        if columns[name] < columns[best]:
            best = name
    return best
