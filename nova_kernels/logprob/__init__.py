"""Log-probabilities of given tokens from hidden states and an LM-head weight, without the [N, V] logits in memory.

    logprobs_n = log softmax(z_n / T)[target_n]         z = softcap(h W^T + b)
    entropy_n  = - sum_v p_nv log p_nv                   no gradient
    kl_n       = top-K KL to a reference                 nova_kernels.topk_kl
    policy_mass_n = sum of p_n over the reference's ids  no gradient

All at temperature T, in one pass over the logits; float32 (float64 for float64 inputs), also under autocast.
For the same rows the results are the same bits with and without gradients, and the KL sees the logits that
linear_topk_select saw: the ratio to an unchanged policy is exactly 1, its KL to itself exactly 0.
Derivation, memory and limits: docs/kernels/logprob.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nova_kernels.logprob.dispatch import terms_of
from nova_kernels.logprob.terms import LogprobTerms
from nova_kernels.topk_kl import TopK

__all__ = ["LogprobTerms", "linear_cross_entropy", "linear_logprobs"]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ref: TopK | None = None,
    direction: str = "policy_ref",
    tail: str = "none",
    ignore_index: int | None = -100,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int = 0,
    backend: str | None = None,
) -> LogprobTerms:
    """Terms of every row of hidden [N, H] under a head weight [V, H] and bias [V].

    Args:
        targets: int64 [N]; rows with `ignore_index` give 0 in every term and cost nothing.
        softcap: c of c tanh(z / c), before the temperature.
        vocab_size: rows of the weight from here on are padding and do not exist.
        ref: the reference's top K of the same N rows; rows that are ignored are not read.
        direction, tail: as in topk_kl_div.
        ignore_index: None where every row counts: on CUDA nothing then waits for the device to count them.
        group: the ranks among which the vocabulary is split; weight and bias are this rank's, from id `vocab_start`
            on, everything else is the same on all ranks. Every rank gets the terms and all of dhidden.
        backend: "triton", "chunked" (PyTorch) or "reference" (holds [N, V]).

    Returns:
        LogprobTerms; gradients flow through logprobs and kl to hidden, weight and bias.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; a target outside the vocabulary.
    """
    return terms_of(
        "linear_logprobs",
        hidden,
        weight,
        targets,
        ref,
        bias=bias,
        softcap=softcap,
        vocab_size=vocab_size,
        temperature=temperature,
        direction=direction,
        tail=tail,
        ignore_index=ignore_index,
        group=group,
        vocab_start=vocab_start,
        backend=backend,
        entropy=True,
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy [N] of `labels` int64 [N] (already shifted): -logprobs of linear_logprobs, without its other terms.

    0 where ignored; not reduced. Arguments and errors as in linear_logprobs.
    """
    terms = terms_of(
        "linear_cross_entropy",
        hidden,
        weight,
        labels,
        None,
        bias=bias,
        softcap=softcap,
        vocab_size=vocab_size,
        temperature=temperature,
        direction="policy_ref",
        tail="none",
        ignore_index=ignore_index,
        group=group,
        vocab_start=vocab_start,
        backend=backend,
        entropy=False,
    )
    return 0.0 - terms.logprobs
