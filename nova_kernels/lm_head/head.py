"""A language-model head z = softcap(h W^T + b): what is accepted, its definition, and its form for arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nova_kernels.lm_head.arithmetic import arithmetic_dtype, chunk_rows, plain_memory, product, without_autocast


def check_head(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    vocab_size: int | None,
    vocab_start: int = 0,
    group: object | None = None,
) -> int:
    """Refuse a head that does not fit together; returns how many rows of `weight` count, those before `vocab_size`.

    With a process group, `weight` and `bias` are this rank's, from id `vocab_start` on.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{where}: expected hidden [N, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}; "
            "flatten batch and sequence into N first"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"{where}: expected floating-point hidden and weight, got {hidden.dtype} and {weight.dtype}")
    vocabulary = weight.shape[0]
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"{where}: expected bias of shape [V] = [{vocabulary}], got {list(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{where}: softcap must be positive, got {softcap}; pass None for no softcap")
    if vocab_start < 0 or (vocab_start > 0 and group is None):
        raise ValueError(
            f"{where}: vocab_start {vocab_start} without a group, or below 0; it is the first id of this rank's rows "
            "of a weight that is split over the group"
        )
    if vocab_size is None:
        return vocabulary
    if group is not None and vocab_size > 0:
        return max(0, min(vocabulary, vocab_size - vocab_start))
    if not 0 < vocab_size <= vocabulary:
        raise ValueError(
            f"{where}: vocab_size must lie between 1 and the {vocabulary} rows of weight, got {vocab_size}"
        )
    return vocab_size


def dense_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, vocab_size: int | None
) -> Tensor:
    """The definition: all of [N, V] at once, differentiable by autograd. For the reference backends."""
    dtype = arithmetic_dtype(hidden, weight)
    with without_autocast(hidden.device):
        logits = hidden.to(dtype) @ weight[:vocab_size].to(dtype).t()
    if bias is not None:
        logits = logits + bias[:vocab_size].to(dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@dataclass(frozen=True, slots=True)
class Head:
    """A head ready for arithmetic: detached, in the dtype of the factors, padding rows of the vocabulary cut off."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V], float32 or float64
    softcap: float | None

    @classmethod
    def prepare(
        cls, weight: Tensor, bias: Tensor | None, softcap: float | None, vocabulary: int, factors: torch.dtype
    ) -> Head:
        sums = torch.float64 if factors == torch.float64 else torch.float32
        cut_weight = plain_memory(weight.detach()[:vocabulary].to(factors))
        return cls(cut_weight, None if bias is None else bias.detach()[:vocabulary].to(sums), softcap)

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def sums(self) -> torch.dtype:
        """The dtype of logits and of every sum."""
        return arithmetic_dtype(self.weight)

    def hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] in the dtype of the factors."""
        return hidden.detach().to(self.weight.dtype)

    def buffer(self, num_rows: int) -> Tensor:
        """Memory for the logits of the largest chunk of `num_rows` rows."""
        size = min(num_rows, chunk_rows(self.vocabulary, self.weight.device))
        return self.weight.new_empty(size, self.vocabulary, dtype=self.sums)

    def products(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """h W^T [n, V] of a chunk's hidden states [n, H], in the first n rows of `buffer`.

        The one path to logits: a row's bits can differ with its place in a chunk and with where the memory begins.
        """
        return product(plain_memory(hidden), self.weight.t(), out=buffer[: hidden.shape[0]])

    def logits_(self, products: Tensor) -> Tensor:
        """softcap(products + b), in their place."""
        if self.bias is not None:
            products.add_(self.bias)
        return products if self.softcap is None else products.div_(self.softcap).tanh_().mul_(self.softcap)

    def columns(self, part: slice) -> Head:
        """The head of a part of the vocabulary."""
        return Head(self.weight[part], None if self.bias is None else self.bias[part], self.softcap)


def kept_logits(products: Tensor, ids: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """softcap(products + b) [n, K] of products taken at ids int [n, K]; 0 where an id is outside the bias [V].

    One function for every path, so that the policy's and the reference's logits of equal products are equal bits.
    """
    if bias is not None and bias.numel() > 0:
        inside = (ids >= 0) & (ids < bias.numel())
        products = products + bias[ids.where(inside, 0).long()].where(inside, 0.0)
    return products if softcap is None else products.div(softcap).tanh_().mul_(softcap)


def softcap_slope(logits: Tensor, softcap: float) -> Tensor:
    """Derivative of the softcap at its own output: 1 - (z/c)^2."""
    return 1 - (logits / softcap).square_()
