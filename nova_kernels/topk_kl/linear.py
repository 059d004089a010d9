"""The ops of this package that start from hidden states and a head weight instead of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.backend import choose
from nova_kernels.topk_kl import dense, reference
from nova_kernels.topk_kl.entries import TopK, check_divergence, check_k, check_mask, check_temperature
from nova_kernels.topk_kl.selection import select_blocks


def linear_topk_select(
    hidden: Tensor,
    weight: Tensor,
    k: int = 500,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> TopK:
    """topk_select of the logits of hidden [N, H] under a head weight [V, H], never holding [N, V]; no gradient.

    Rows where `mask` bool [N] is False are skipped (ids -1, values and lse -inf). With the same rows left in, other
    linear ops see these very logits, to the bit. Backends: dense (chunked), reference.
    """
    where = "linear_topk_select"
    vocabulary = lm_head.check_head(where, hidden, weight, bias, softcap, vocab_size)
    check_temperature(where, temperature)
    check_k(where, k, vocabulary)
    check_mask(where, mask, hidden.shape[:1])
    rows = None if mask is None else lm_head.kept_rows(mask)
    hidden = hidden.detach()
    if choose(where, backend, {"dense": None, "reference": None}) == "dense":
        head = lm_head.Head.prepare(hidden, weight, bias, softcap, vocab_size)
        return dense.linear_topk_select(hidden, head, k, temperature=temperature, rows=rows)
    with torch.no_grad():
        logits = lm_head.dense_logits(hidden, weight, bias, softcap, vocab_size)
    top = select_blocks(logits, k, temperature=temperature, select=reference.topk_select)
    return top if mask is None else top.where(mask)


def linear_topk_kl_div(
    hidden: Tensor,
    weight: Tensor,
    ref: TopK,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    direction: str = "policy_ref",
    tail: str = "none",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """topk_kl_div of the logits of hidden [N, H] under a head weight [V, H] -> [N], never holding [N, V].

    Gradients to hidden, weight and bias. Rows where `mask` bool [N] is False cost nothing. Backends: dense (chunked),
    reference. Raises as topk_kl_div does.
    """
    where = "linear_topk_kl_div"
    vocabulary = lm_head.check_head(where, hidden, weight, bias, softcap, vocab_size)
    check_divergence(where, ref, hidden.shape[:1], vocabulary, temperature, direction, tail, mask)
    if choose(where, backend, {"dense": None, "reference": None}) == "reference":
        logits = lm_head.dense_logits(hidden, weight, bias, softcap, vocab_size)
        return reference.topk_kl_div(logits, ref.ids, ref.values, ref.lse, temperature, direction, tail, mask)
    rows = None if mask is None else lm_head.kept_rows(mask)
    asked = dense.KLOptions(
        ref=ref,
        temperature=temperature,
        direction=direction,
        tail=tail,
        rows=rows,
        padded=dense.may_be_padded(ref, rows),
        gradient=lm_head.wants_gradient(hidden, weight, bias),
    )
    return dense.linear_topk_kl_div(hidden, weight, bias, softcap=softcap, vocab_size=vocab_size, options=asked)
