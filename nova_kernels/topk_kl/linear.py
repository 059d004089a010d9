"""The ops of this package that start from hidden states and a head weight instead of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from nova_kernels import lm_head
from nova_kernels.backend import choose, why_not_triton
from nova_kernels.lm_head import parallel
from nova_kernels.topk_kl import linear_ops, paths, reference, union
from nova_kernels.topk_kl.entries import (
    TopK,
    check_divergence,
    check_ids,
    check_k,
    check_mask,
    check_temperature,
)
from nova_kernels.topk_kl.selection import select


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
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int = 0,
    backend: str | None = None,
) -> TopK:
    """topk_select of the logits of hidden [N, H] under a head weight [V, H], never holding [N, V]; no gradient.

    Rows where `mask` bool [N] is False are skipped (ids -1, values and lse -inf). With the same rows left in, other
    linear ops see these very logits, to the bit. With a `group`, the weight is this rank's rows of the vocabulary,
    from id `vocab_start` on. Backends: dense (chunked), reference.
    """
    where = "linear_topk_select"
    vocabulary = lm_head.check_head(where, hidden, weight, bias, softcap, vocab_size, vocab_start, group)
    check_temperature(where, temperature)
    check_k(where, k, vocabulary if group is None else None)
    check_mask(where, mask, hidden.shape[:1])
    hidden = hidden.detach()
    if choose(where, backend, {"dense": None, "reference": parallel.why_not(group)}) == "dense":
        ids, values, lse = linear_ops.linear_topk_select(
            hidden,
            weight.detach(),
            None if bias is None else bias.detach(),
            mask,
            k,
            softcap=softcap,
            vocabulary=vocabulary,
            temperature=temperature,
            factors=lm_head.factor_dtype(hidden, weight),
            group=parallel.name_of(group),
            vocab_start=vocab_start,
        )
        return TopK(ids=ids, values=values, lse=lse, temperature=temperature)
    with torch.no_grad():
        logits = lm_head.dense_logits(hidden, weight, bias, softcap, vocabulary)
        ids, values, lse = select(logits, k, temperature, "reference")
    top = TopK(ids=ids, values=values, lse=lse, temperature=temperature)
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
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int = 0,
    backend: str | None = None,
) -> Tensor:
    """topk_kl_div of the logits of hidden [N, H] under a head weight [V, H] -> [N], never holding [N, V].

    Gradients to hidden, weight and bias; dweight is added up in float32. Rows where `mask` bool [N] is False cost
    nothing. With a `group`, the weight is this rank's rows of the vocabulary, from id `vocab_start` on, and every rank
    gets the KL and all of dhidden. Raises as topk_kl_div does.

    Backends: dense (blocks of the vocabulary), union (blocks of tokens share the rows of the weight that they need),
    gather (each token its own), reference; only dense and reference have tail="bucket". nova_kernels.topk_kl.paths
    has the rule that chooses. The KL of a model with itself is exactly 0 by dense alone, which multiplies as
    linear_topk_select does, and rounding by the others.
    """
    where = "linear_topk_kl_div"
    vocabulary = lm_head.check_head(where, hidden, weight, bias, softcap, vocab_size, vocab_start, group)
    everywhere = vocabulary if group is None else None
    check_divergence(where, ref, hidden.shape[:1], everywhere, temperature, direction, tail, mask)
    name = choose(where, backend, _backends(hidden, weight, ref.k, vocabulary, tail, group))
    if name == "reference":
        rows = lm_head.kept_rows(mask)
        kept = ref if rows is None else ref[rows]
        check_ids(where, kept.ids, vocabulary)
        logits = lm_head.dense_logits(lm_head.take(hidden, rows), weight, bias, softcap, vocabulary)
        of_kept = reference.topk_kl_div(logits, kept.ids, kept.values, kept.lse, temperature, direction, tail, None)
        return lm_head.spread(of_kept, rows, len(hidden))
    kl: Tensor = linear_ops.linear_topk_kl_div(
        hidden,
        weight,
        bias,
        ref.ids,
        ref.values,
        ref.lse,
        mask,
        softcap=softcap,
        vocabulary=vocabulary,
        temperature=temperature,
        direction=direction,
        tail=tail,
        factors=lm_head.factor_dtype(hidden, weight),
        group=parallel.name_of(group),
        vocab_start=vocab_start,
        gradient=lm_head.wants_gradient(hidden, weight, bias),
        backend=name,
    )[0]
    return kl


def _backends(
    hidden: Tensor,
    weight: Tensor,
    kept: int,
    vocabulary: int,
    tail: str,
    group: torch.distributed.ProcessGroup | None,
) -> dict[str, str | None]:
    bucket = "tail='bucket' needs the logits of the whole vocabulary" if tail == "bucket" else None
    kernels = why_not_triton(hidden.device) if hidden.device.type != "cpu" else None
    reasons = {"dense": None, "union": bucket, "gather": bucket or kernels}
    first = paths.choose_path(
        num_tokens=hidden.shape[0],
        vocabulary=vocabulary,
        hidden=hidden.shape[1],
        kept=kept,
        block=union.block_tokens(vocabulary, kept, hidden.device),
        needs_weight=lm_head.wants_gradient(weight),
        costs=paths.CPU if hidden.device.type == "cpu" else paths.CUDA,
    )
    return {first: reasons[first], **reasons, "reference": parallel.why_not(group)}
