"""The losses as modules: options when built, tensors when called.

`reduction` is "mean" (over the rows that count; 0 where there are none), "sum" or "none". Everything else is as in the
function that each one calls, which says what is refused.
"""

from __future__ import annotations

from torch import Tensor, nn

from nova_kernels.logprob import linear_cross_entropy
from nova_kernels.topk_kl import TopK, linear_topk_kl_div, topk_kl_div

REDUCTIONS = ("mean", "sum", "none")


class _Loss(nn.Module):
    def __init__(self, reduction: str) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"{type(self).__name__}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
        self.reduction = reduction

    def reduced(self, losses: Tensor, counts: Tensor | None) -> Tensor:
        """Losses [...] that are 0 where `counts` bool [...] is False, reduced."""
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        return losses.sum() / (max(1, losses.numel()) if counts is None else counts.sum().clamp(min=1))

    def extra_repr(self) -> str:
        """The options, for print(module)."""
        return ", ".join(
            f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_" and name != "training"
        )


class TopKKLDivLoss(_Loss):
    """topk_kl_div of policy logits [..., V] from a reference's top K [..., K]."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        direction: str = "policy_ref",
        tail: str = "none",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(reduction)
        self.temperature, self.direction, self.tail, self.backend = temperature, direction, tail, backend

    def forward(self, policy_logits: Tensor, ref: TopK, mask: Tensor | None = None) -> Tensor:
        """A scalar, or [...] without reduction; rows where `mask` bool [...] is False do not count."""
        kl = topk_kl_div(
            policy_logits,
            ref,
            temperature=self.temperature,
            direction=self.direction,
            tail=self.tail,
            mask=mask,
            backend=self.backend,
        )
        return self.reduced(kl, mask)


class LinearTopKKLDivLoss(_Loss):
    """linear_topk_kl_div of hidden [N, H] under a head weight [V, H] from a reference's top K [N, K]."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        direction: str = "policy_ref",
        tail: str = "none",
        softcap: float | None = None,
        vocab_size: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(reduction)
        self.temperature, self.direction, self.tail, self.backend = temperature, direction, tail, backend
        self.softcap, self.vocab_size = softcap, vocab_size

    def forward(
        self, hidden: Tensor, weight: Tensor, ref: TopK, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """A scalar, or [N] without reduction; rows where `mask` bool [N] is False do not count."""
        kl = linear_topk_kl_div(
            hidden,
            weight,
            ref,
            bias=bias,
            softcap=self.softcap,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            direction=self.direction,
            tail=self.tail,
            mask=mask,
            backend=self.backend,
        )
        return self.reduced(kl, mask)


class LinearCrossEntropyLoss(_Loss):
    """linear_cross_entropy of labels [N] (already shifted) from hidden [N, H] under a head weight [V, H]."""

    def __init__(
        self,
        *,
        ignore_index: int | None = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        vocab_size: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(reduction)
        self.ignore_index, self.temperature, self.backend = ignore_index, temperature, backend
        self.softcap, self.vocab_size = softcap, vocab_size

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        """A scalar, or [N] without reduction; rows whose label is `ignore_index` do not count."""
        losses = linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=self.softcap,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )
        return self.reduced(losses, None if self.ignore_index is None else labels != self.ignore_index)
