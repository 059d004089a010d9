"""From a call to the implementation that serves it: what both functions of this package check and choose."""

from __future__ import annotations

import torch
from torch import Tensor

from nova_kernels.backend import choose, fastest_first, why_not_triton
from nova_kernels.lm_head import check_head, factor_dtype, parallel, wants_gradient
from nova_kernels.logprob import composed, ops
from nova_kernels.logprob.targets import check_shape
from nova_kernels.logprob.terms import LogprobTerms
from nova_kernels.topk_kl import TopK
from nova_kernels.topk_kl.entries import check_divergence, check_temperature


def backends(hidden: Tensor, weight: Tensor, group: torch.distributed.ProcessGroup | None) -> dict[str, str | None]:
    """Backends for such a head, fastest first, each with the reason it cannot run."""
    double = "it has no float64" if torch.float64 in (hidden.dtype, weight.dtype) else None
    compiled = {"triton": why_not_triton(hidden.device) or double}
    return fastest_first(hidden.device, compiled, {"chunked": None, "reference": parallel.why_not(group)})


def terms_of(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref: TopK | None,
    *,
    bias: Tensor | None,
    softcap: float | None,
    vocab_size: int | None,
    temperature: float,
    direction: str,
    tail: str,
    ignore_index: int | None,
    group: torch.distributed.ProcessGroup | None,
    vocab_start: int,
    backend: str | None,
    entropy: bool,
) -> LogprobTerms:
    """LogprobTerms of each row, for the function of the name `where`; the entropy is [0] where it is not asked for."""
    vocabulary = check_head(where, hidden, weight, bias, softcap, vocab_size, vocab_start, group)
    check_temperature(where, temperature)
    check_shape(where, hidden, targets)
    if ref is not None:
        everywhere = vocabulary if group is None else None
        check_divergence(where, ref, hidden.shape[:1], everywhere, temperature, direction, tail)
    name = choose(where, backend, backends(hidden, weight, group))
    if name == "reference":
        return composed.linear_logprobs(
            hidden,
            weight,
            bias,
            targets,
            ref,
            softcap=softcap,
            vocabulary=vocabulary,
            temperature=temperature,
            direction=direction,
            tail=tail,
            ignore_index=ignore_index,
        )
    logprobs, entropies, kl, mass, *_ = ops.linear_logprobs(
        hidden,
        weight,
        bias,
        targets,
        *((None, None, None) if ref is None else (ref.ids, ref.values, ref.lse)),
        softcap=softcap,
        vocabulary=vocabulary,
        temperature=temperature,
        direction=direction,
        tail=tail,
        ignore_index=ignore_index,
        entropy=entropy,
        factors=factor_dtype(hidden, weight),
        group=parallel.name_of(group),
        vocab_start=vocab_start,
        gradient=wants_gradient(hidden, weight, bias),
        in_triton=name == "triton",
    )
    return LogprobTerms(logprobs, entropies, None if ref is None else kl, None if ref is None else mass)
