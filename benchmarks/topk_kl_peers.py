"""How the top K and its KL are computed without this package, each way behind one small function.

    selectors    logits [N, V], k -> ids, values, both [N, K], in any order
    divergences  policy logits [N, V], reference -> KL [N]
    heads        hidden [N, H], weight [V, H], reference -> KL [N]

Libraries, written out in our own words from what they do:

    full log-softmax over V, then gather    verl, TRL, DistillKit (renormalised here, so that the result is the same)
    float32 copy of all logits, then gather NeMo-RL, DistillationLossFn with kl_type "reverse", zero_outside_topk false
    softmax of the gathered logits          the same after its PR 3314, ms-swift's and axolotl's GKD at beta = 1

All are the reverse KL over the reference's K ids, renormalised on both sides; the gradient is autograd's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ways import Way
from nova_kernels import TopK

Selector = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Divergence = Callable[[Tensor, TopK], Tensor]
Head = Callable[[Tensor, Tensor, TopK], Tensor]


def torch_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Any of equal entries, descending; ids int64."""
    values, ids = logits.topk(k, dim=-1)
    return ids, values


def stable_sort(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Lowest index of equal entries: what a top-K has to give, by sorting everything."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return ids[:, :k], values[:, :k]


def reverse_kl(kept: Tensor, values: Tensor) -> Tensor:
    """KL(p || r) of logits [N, K]."""
    policy, reference = kept.log_softmax(dim=-1), values.log_softmax(dim=-1)
    return (policy.exp() * (policy - reference)).sum(dim=-1)


def gathered(logits: Tensor, ref: TopK) -> Tensor:
    return reverse_kl(logits.gather(1, ref.ids.long()).float(), ref.values)


def upcast(logits: Tensor, ref: TopK) -> Tensor:
    return reverse_kl(logits.float().gather(1, ref.ids.long()), ref.values)


def full_softmax(logits: Tensor, ref: TopK) -> Tensor:
    policy = logits.float().log_softmax(dim=-1).gather(1, ref.ids.long())
    return reverse_kl(policy, ref.values)


def by_kept(kl: Callable[[Tensor, Tensor], Tensor], logits: Tensor, ref: TopK) -> tuple[Tensor, Tensor]:
    """KL and its gradient by the kept logits [N, K]."""
    kept = logits.gather(1, ref.ids.long()).float().requires_grad_()
    result = kl(kept, ref.values)
    return result, torch.autograd.grad(result.sum(), kept)[0]


def selected_inside(logits: Tensor, ref_logits: Tensor, k: int) -> Tensor:
    """torch.topk of the reference, then the gathered logits of both."""
    values, ids = ref_logits.topk(k, dim=-1)
    return reverse_kl(logits.gather(1, ids).float(), values.float())


def head_float32(hidden: Tensor, weight: Tensor, ref: TopK) -> Tensor:
    """[N, V] from a float32 product."""
    return gathered(hidden.float() @ weight.float().t(), ref)


def head_native(hidden: Tensor, weight: Tensor, ref: TopK) -> Tensor:
    """[N, V] in the dtype of the model, as its head gives it: logits are rounded before the KL sees them."""
    return gathered(hidden @ weight.t(), ref)


def head_rows(hidden: Tensor, weight: Tensor, ref: TopK) -> Tensor:
    """[N, K, H] of gathered rows of the weight instead of [N, V]."""
    rows = weight[ref.ids.long()]
    return reverse_kl(torch.einsum("nh,nkh->nk", hidden, rows).float(), ref.values)


SELECTORS = (
    Way("torch.topk", torch_topk),
    Way("torch.sort, stable", stable_sort, main_only=True),
)
DIVERGENCES = (
    Way("PyTorch, gathered logits", gathered),
    Way("PyTorch, gathered, compiled", gathered, main_only=True, compiled=True),
    Way("PyTorch, float32 copy first", upcast, main_only=True),
    Way("PyTorch, full log-softmax", full_softmax),
    Way("PyTorch, full log-softmax, compiled", full_softmax, main_only=True, compiled=True),
)
HEADS = (
    Way("PyTorch, float32 logits", head_float32),
    Way("PyTorch, 16-bit logits", head_native, tolerance=0.5, sixteen_bit=True),
    Way("PyTorch, compiled", head_native, main_only=True, tolerance=0.5, compiled=True),
    Way("PyTorch, gathered weight rows", head_rows, most=2**33, tolerance=0.5),
)
