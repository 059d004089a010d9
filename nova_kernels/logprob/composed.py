"""The reference backend: the definitions of the parts, put together on all of [N, V]."""

from __future__ import annotations

from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.logprob import reference
from nova_kernels.logprob.terms import Asked, Terms
from nova_kernels.topk_kl import reference as kl_reference


def linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, softcap: float | None, vocab_size: int | None, asked: Asked
) -> Terms:
    """Terms of each row of hidden [N, H], differentiable by autograd."""
    num_rows = hidden.shape[0]
    kept_hidden = lm_head.take(hidden, asked.rows, slice(None))
    logits = lm_head.dense_logits(kept_hidden, weight, bias, softcap, vocab_size)
    logprobs, entropy = reference.linear_logprobs(logits / asked.temperature, asked.targets)
    kl = mass = None
    if asked.kl is not None:
        ref = asked.kl.ref if asked.rows is None else asked.kl.ref[asked.rows]
        options = (asked.temperature, asked.kl.direction, asked.kl.tail)
        kl = kl_reference.topk_kl_div(logits, ref.ids, ref.values, ref.lse, *options, None)
        lse = (logits.detach() / asked.temperature).logsumexp(dim=-1)
        mass = kl_reference.mass(kl_reference.kept_logits(logits.detach(), ref.ids), lse, asked.temperature)
    entropy_or_none = entropy if asked.entropy else None
    kl, mass, entropy_or_none = (
        None if term is None else lm_head.spread(term, asked.rows, num_rows) for term in (kl, mass, entropy_or_none)
    )
    return Terms(lm_head.spread(logprobs, asked.rows, num_rows), entropy_or_none, kl, mass)
