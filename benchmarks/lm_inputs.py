"""Inputs that look like a language model's last layer, what is right for them, and the limit of their matrix products.

Logits, ids ordered by how common a token is, as byte-pair encodings order them (v: the id, e: standard normal):

    narrow   2 e                          wide     10 e
    zipf     2 e - 2 log(1 + v)           spiky    e, 20 columns of each row 20 higher
    five     five values in turn          equal    all 1                  ties decide, more and more of them

Hidden states h ~ N(0, 1), weight W ~ N(0, 9 / H): logits of deviation 3. Targets are Zipf-distributed. The reference's
top K of a row is drawn without replacement, with weights (1 + v)^-1.1 where the row's topic likes v (an eighth of the
vocabulary, another one every 64 rows; the 1024 most common tokens are everybody's) and 1/32 of that elsewhere:
`union_share` says how much of the vocabulary 512 rows come to. Its values are the policy's own logits plus 0.3 e, a KL
of a few hundredths.

    products, multiply and add counted as two:  h W^T, dz W and dz^T h take 2 N V H each
    on an H200 their limit is 790 TFLOP/s (bf16), elsewhere the rate measured for the very shapes, in the run
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from nova_kernels import TopK

K = 500
SEED = 4
PEAK = {"NVIDIA H200": 790e12}  # FLOP/s in bf16
TOPIC_ROWS, COMMON, EXPONENT = 64, 1024, 1.1
BLOCK = {"cpu": 2**23, "cuda": 2**28}  # logits made at once


LARGE, MEDIUM, SMALL = 151_936, 128_256, 32_000  # Qwen's, Llama 3's and Llama 2's vocabulary
BF16, FP32 = torch.bfloat16, torch.float32
HEADS = {  # rows, vocabulary, hidden width, dtype; the first is the main one
    "cpu": [(512, SMALL, 128, FP32), (64, SMALL, 128, FP32), (128, LARGE, 128, FP32)],
    "cuda": [(8192, LARGE, 4096, BF16)]
    + [(8192, LARGE, h, BF16) for h in (2048, 8192)]
    + [(n, LARGE, 4096, BF16) for n in (256, 2048, 32768)]
    + [(8192, v, 4096, BF16) for v in (SMALL, MEDIUM)],
}


@dataclass(frozen=True)
class Size:
    """One benchmark case: N rows, V columns, hidden width H."""

    rows: int
    vocabulary: int
    hidden: int
    dtype: torch.dtype
    device: str
    k: int = K

    def facts(self) -> dict[str, Any]:
        width = {"h": self.hidden} if self.hidden else {}
        return {"n": self.rows, "v": self.vocabulary, **width, "dtype": name_of(self.dtype)}

    def parts(self) -> list[slice]:
        step = max(1, BLOCK[self.device] // self.vocabulary)
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]


def sizes(table: dict[str, list[Any]], device: str, *, quick: bool) -> Iterator[tuple[Size, bool]]:
    """Each size of a device, and whether it is the main one; tiny ones for --quick."""
    for number, (rows, vocabulary, *hidden, dtype) in enumerate(table[device]):
        if quick:
            rows, vocabulary, hidden = 24 + 8 * number, 1000 + number, [16] * len(hidden)
        yield Size(rows, vocabulary, *(hidden or [0]), dtype, device, k=20 if quick else K), number == 0


@dataclass(frozen=True, eq=False)
class Layer:
    """Everything that the ops of a head are called with."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # int64 [N]
    upstream: Tensor  # float32 [N], the same within each of 8 sequences
    ref: TopK
    union_share: float


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


LOGITS = ("narrow", "wide", "zipf", "spiky", "five", "equal")


@lru_cache(maxsize=2)
def logits(kind: str, rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> Tensor:
    """[N, V] of a kind."""
    random = generator(device)
    columns = torch.arange(vocabulary, device=device)
    out = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    for part in Size(rows, vocabulary, 0, dtype, device).parts():
        block = out[part]
        if kind in ("five", "equal"):
            block.copy_(torch.ones_like(columns) if kind == "equal" else columns % 5)
            continue
        noise = torch.randn(block.shape, generator=random, device=device)
        if kind == "spiky":
            peaks = torch.randint(0, vocabulary, (len(block), 20), generator=random, device=device)
            noise.scatter_add_(1, peaks, torch.full(peaks.shape, 20.0, device=device))
        scale = {"narrow": 2.0, "wide": 10.0, "zipf": 2.0, "spiky": 1.0}[kind]
        noise.mul_(scale)
        block.copy_(noise - 2.0 * columns.log1p() if kind == "zipf" else noise)
    return out


@lru_cache(maxsize=1)
def layer(size: Size) -> Layer:
    random, device = generator(size.device), size.device
    hidden = torch.randn(size.rows, size.hidden, generator=random, device=device).to(size.dtype)
    weight = torch.empty(size.vocabulary, size.hidden, dtype=size.dtype, device=device)
    for part in weight.split(max(1, BLOCK[device] // max(1, size.hidden))):
        part.copy_(torch.randn(part.shape, generator=random, device=device) * (3.0 * size.hidden**-0.5))
    weights = torch.arange(1, size.vocabulary + 1, device=device, dtype=torch.float64) ** -EXPONENT
    targets = torch.multinomial(weights, size.rows, replacement=True, generator=random)
    sequence = torch.arange(size.rows, device=device) * 8 // max(1, size.rows)
    upstream = torch.randn(8, generator=random, device=device)[sequence]
    ids = top_ids(size, random)
    values = kept(hidden, weight, ids, size)
    values += 0.3 * torch.randn(values.shape, generator=random, device=device)
    ref = TopK(ids=ids.int(), values=values, lse=values.logsumexp(1) + 1.0)
    union = len(ids[:512].unique()) / size.vocabulary
    return Layer(hidden, weight, targets, upstream, ref, round(union, 3))


def top_ids(size: Size, random: torch.Generator) -> Tensor:
    """int64 [N, K] ascending: draws without replacement are the K largest of log weight + Gumbel noise."""
    columns = torch.arange(size.vocabulary, device=size.device)
    ids = torch.empty(size.rows, size.k, dtype=torch.int64, device=size.device)
    for part in size.parts():
        topics = torch.arange(part.start, part.stop, device=size.device) // TOPIC_ROWS
        mixed = (columns * 2654435761 + topics.unsqueeze(1) * 40503) % 2**32  # a different eighth for every topic
        liked = ((mixed >> 13) % 8 == 0) | (columns < COMMON)
        scores = torch.empty(liked.shape, device=size.device).exponential_(generator=random).log_().neg_()
        scores -= EXPONENT * columns.log1p()
        scores.sub_((~liked).float(), alpha=math.log(32))
        ids[part] = scores.topk(size.k, dim=1).indices.sort(dim=1).values
    return ids


def kept(hidden: Tensor, weight: Tensor, ids: Tensor, size: Size) -> Tensor:
    """float32 [N, K]: the policy's logits at the ids."""
    out = torch.empty(ids.shape, device=ids.device)
    for part in size.parts():
        out[part] = (hidden[part] @ weight.t()).float().gather(1, ids[part])
    return out


Terms = Callable[[Tensor, Tensor, slice], list[Tensor]]  # hidden rows, weight, which rows -> results [n]


def truth(size: Size, terms: Terms, upstream: list[Tensor]) -> list[Tensor]:
    """Results [N] and the gradients of hidden and weight in float64, by autograd on blocks of rows."""
    given = layer(size)
    hidden = given.hidden.double().requires_grad_()
    weight = given.weight.double().requires_grad_()
    found: list[list[Tensor]] = []
    step = max(1, BLOCK[size.device] // 4 // size.vocabulary)
    for start in range(0, size.rows, step):
        part = slice(start, min(start + step, size.rows))
        results = terms(hidden[part], weight, part)
        loss = sum((up[part].double() * result).sum() for up, result in zip(upstream, results, strict=True))
        loss.backward()
        found.append([result.detach() for result in results])
    results = [torch.cat(column) for column in zip(*found, strict=True)]
    return [*results, *(gradient for leaf in (hidden, weight) if (gradient := leaf.grad) is not None)]


def distance(found: Tensor, right: Tensor) -> float:
    """Norm of the difference, relative to what is right; NaN is as far as can be."""
    assert found.shape == right.shape, f"shape {list(found.shape)}, expected {list(right.shape)}"
    if found.ndim == 0:
        found, right = found.unsqueeze(0), right.unsqueeze(0)
    far = 0.0
    for a, b in zip(found.split(4096), right.split(4096), strict=True):
        far += float((a.detach().double() - b).square().sum())
    away = (far**0.5) / (float(right.double().norm()) or 1.0)
    return away if away == away else float("inf")


def two_digits(value: float) -> float:
    return float(f"{value:.2g}")


@lru_cache(maxsize=4)
def product_seconds(size: Size) -> tuple[float, float, float]:
    """The least that h W^T, dz W and dz^T h can take: at the peak rate, or as measured."""
    flops = 2.0 * size.rows * size.vocabulary * size.hidden
    if size.device == "cuda" and size.dtype == torch.bfloat16:
        peak = PEAK.get(torch.cuda.get_device_name())
        if peak is not None:
            return (flops / peak,) * 3
    given = layer(size)
    logits = given.hidden @ given.weight.t()
    return (
        _fastest(lambda: torch.mm(given.hidden, given.weight.t(), out=logits)),
        _fastest(lambda: logits @ given.weight),
        _fastest(lambda: logits.t() @ given.hidden),
    )


def _fastest(call: Callable[[], Any]) -> float:
    seconds: list[float] = []
    while len(seconds) < 5 or (sum(seconds) < 0.2 and len(seconds) < 50):
        begin = perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(perf_counter() - begin)
    return min(seconds)


Run = Callable[[Tensor, Tensor], list[Tensor]]  # hidden, weight -> results that gradients flow through


def stepped(run: Run, given: Layer, step: str, upstream: list[Tensor]) -> Callable[[], list[Tensor]]:
    """The call of a step: `forward`, `frozen` (gradient of hidden) or `both`; results first, then gradients."""
    if step == "forward":
        return torch.no_grad()(lambda: run(given.hidden, given.weight))
    hidden = given.hidden.detach().requires_grad_()
    weight = given.weight.detach().requires_grad_(step == "both")

    def call() -> list[Tensor]:
        results = run(hidden, weight)
        leaves = [hidden, weight] if step == "both" else [hidden]
        return [*results, *torch.autograd.grad(results, leaves, upstream)]

    return call


def check(found: list[Tensor], right: list[Tensor], tolerance: float) -> dict[str, Any]:
    """Results and gradients within the tolerance of float64, or of 16-bit rounding; the largest error is a fact."""
    errors = [(distance(a, b), allowed(a, tolerance)) for a, b in zip(found, right, strict=False)]
    for error, most in errors:
        assert error <= most, f"error {error:.1e} relative to float64, above {most}"
    return {"error": two_digits(max(error for error, _ in errors))}


def allowed(found: Tensor, tolerance: float) -> float:
    """A result that is returned in 16 bits has their rounding."""
    return max(tolerance, 2.0**-6) if found.dtype in (torch.bfloat16, torch.float16) else tolerance
