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

from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.backend import choose
from nova_kernels.logprob import chunked, composed
from nova_kernels.logprob.terms import Asked, LogprobTerms, kept_targets
from nova_kernels.topk_kl import TopK
from nova_kernels.topk_kl.dense import KLOptions, may_be_padded
from nova_kernels.topk_kl.entries import check_divergence, check_temperature

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
    ignore_index: int = -100,
    backend: str | None = None,
) -> LogprobTerms:
    """Terms of every row of hidden [N, H] under a head weight [V, H] and bias [V].

    Args:
        targets: int64 [N]; rows with `ignore_index` give 0 in every term and cost nothing.
        softcap: c of c tanh(z / c), before the temperature.
        vocab_size: rows of the weight from here on are padding and do not exist.
        ref: the reference's top K of the same N rows; rows that are ignored are not read.
        direction, tail: as in topk_kl_div.
        backend: "chunked" or "reference" (holds [N, V]).

    Returns:
        LogprobTerms; gradients flow through logprobs and kl to hidden, weight and bias.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; a target outside the vocabulary.
    """
    where = "linear_logprobs"
    vocabulary = lm_head.check_head(where, hidden, weight, bias, softcap, vocab_size)
    check_temperature(where, temperature)
    if ref is not None:
        check_divergence(where, ref, hidden.shape[:1], vocabulary, temperature, direction, tail)
    rows, kept = kept_targets(where, hidden, targets, vocabulary, ignore_index)
    gradient = lm_head.wants_gradient(hidden, weight, bias)
    kl = None
    if ref is not None:
        kl = KLOptions(
            ref=ref,
            temperature=temperature,
            direction=direction,
            tail=tail,
            rows=rows,
            padded=may_be_padded(ref, rows),
            gradient=gradient,
        )
    asked = Asked(targets=kept, rows=rows, temperature=temperature, entropy=True, kl=kl, gradient=gradient)
    name = choose(where, backend, {"chunked": None, "reference": None})
    run = chunked.linear_logprobs if name == "chunked" else composed.linear_logprobs
    terms = run(hidden, weight, bias, softcap=softcap, vocab_size=vocab_size, asked=asked)
    assert terms.entropy is not None, "the entropy was asked for"
    return LogprobTerms(terms.logprobs, terms.entropy, terms.kl, terms.policy_mass)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy [N] of `labels` int64 [N] (already shifted): -logprobs of linear_logprobs, without its other terms.

    0 where ignored; not reduced. Arguments and errors as in linear_logprobs.
    """
    where = "linear_cross_entropy"
    vocabulary = lm_head.check_head(where, hidden, weight, bias, softcap, vocab_size)
    check_temperature(where, temperature)
    rows, targets = kept_targets(where, hidden, labels, vocabulary, ignore_index)
    gradient = lm_head.wants_gradient(hidden, weight, bias)
    asked = Asked(targets=targets, rows=rows, temperature=temperature, entropy=False, kl=None, gradient=gradient)
    name = choose(where, backend, {"chunked": None, "reference": None})
    run = chunked.linear_logprobs if name == "chunked" else composed.linear_logprobs
    return 0.0 - run(hidden, weight, bias, softcap=softcap, vocab_size=vocab_size, asked=asked).logprobs
