"""Logits of a language-model head, one chunk of rows at a time.

    z = h W^T + b            softcap c:  z = c tanh((h W^T + b) / c)          h [N, H], W [V, H], b [V], z [N, V]

[N, V] is never held: every op that starts from hidden states walks the same chunks of rows, fills one buffer with the
chunk's logits, and is done with it before the next. Backward, with g = dL/dz (times 1 - (z/c)^2 under a softcap):

    dh = g W        dW = sum over chunks of g^T h        db = sum over chunks and rows of g

Arithmetic is float32 whatever the inputs (float64 if one of them is float64), also under autocast, and dW is added up
in it. A row's logits can differ in the last bit with its place in a chunk (matrix products pick their kernel by
shape), so ops whose results must agree to the bit get the same rows and walk the same chunks: `Head.logits`,
`chunks` and `log_normalizer_` are the only path, with and without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**22}  # logits held at once, by device type
CHUNK_ELEMENTS_ELSEWHERE = 2**27


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of a chunk: as many as the bound on its elements allows, at least one."""
    return max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ELSEWHERE) // max(1, vocabulary))


def chunks(num_rows: int, rows_per_chunk: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows_per_chunk` that cover `num_rows`."""
    for start in range(0, num_rows, max(1, rows_per_chunk)):
        yield slice(start, min(start + rows_per_chunk, num_rows))


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b [n, m] of matrices, added up and returned in float32 (float64 if one of them is), without autocast.

    Where CUDA multiplies 16-bit matrices into float32 they are not copied.
    """
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, torch.float32) if out is None else torch.mm(a, b, torch.float32, out=out)
    dtype = arithmetic_dtype(a, b)
    with without_autocast(a.device):
        return torch.mm(a.to(dtype), b.to(dtype), out=out)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside it, matrix products stay in the dtype they are given."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def check_head(
    where: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, vocab_size: int | None
) -> int:
    """Refuse a head that does not fit together; returns the vocabulary that counts (columns after `vocab_size`)."""
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
    if vocab_size is None:
        return vocabulary
    if not 0 < vocab_size <= vocabulary:
        raise ValueError(
            f"{where}: vocab_size must lie between 1 and the {vocabulary} rows of weight, got {vocab_size}"
        )
    return vocab_size


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def kept_rows(keep: Tensor) -> Tensor | None:
    """Indices int64 [n] of the True rows of `keep` [N], or None if that is all of them. Waits for an accelerator."""
    return None if bool(keep.all()) else keep.nonzero().squeeze(1)


def take(values: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    """Rows `part` of what `rows` (None: all) leaves of `values`."""
    return values[part] if rows is None else values.index_select(0, rows[part])


def spread(values: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """Inverse of `take`: [n, ...] back to [num_rows, ...], 0 where no row was taken."""
    if rows is None:
        return values
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, rows, values)


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


def _plain_memory(tensor: Tensor) -> Tensor:
    """Contiguous, on a 64-byte boundary: matrix products pick their kernel by alignment too."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


@dataclass(frozen=True, slots=True)
class Head:
    """A head ready for arithmetic: detached, in the arithmetic's dtype, padding rows of the vocabulary cut off."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None

    @classmethod
    def prepare(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, vocab_size: int | None
    ) -> Head:
        dtype = arithmetic_dtype(hidden, weight)
        cut_weight = _plain_memory(weight.detach()[:vocab_size].to(dtype))
        cut_bias = None if bias is None else _plain_memory(bias.detach()[:vocab_size].to(dtype))
        return cls(cut_weight, cut_bias, softcap)

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def rows(self, hidden: Tensor, rows: Tensor | None, part: slice) -> Tensor:
        """Hidden states [n, H] of a chunk in the arithmetic's dtype."""
        return _plain_memory(take(hidden, rows, part).to(self.weight.dtype))

    def buffer(self, num_rows: int) -> Tensor:
        """Memory for the logits of the largest chunk of `num_rows` rows."""
        size = min(num_rows, chunk_rows(self.vocabulary, self.weight.device))
        return self.weight.new_empty(size, self.vocabulary)

    def logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """Logits [n, V] of a chunk's hidden states [n, H], written into the first n rows of `buffer`."""
        out = buffer[: hidden.shape[0]]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def softcap_slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the softcap at its own output: 1 - (z/c)^2."""
        return 1.0 if self.softcap is None else 1 - (logits / self.softcap).square_()


def log_normalizer_(logits: Tensor, temperature: float, exponentials: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the vocabulary in pieces: m = max z/T, s = sum exp(z/T - m); log-sum-exp = m + log s.

    Overwrites `logits` with z/T - m and fills `exponentials` [n, V] with exp(z/T - m). Returns m and s, both [n].
    """
    if temperature != 1.0:
        logits.div_(temperature)
    maximum = logits.amax(dim=-1)
    torch.exp(logits.sub_(maximum.unsqueeze(1)), out=exponentials)
    return maximum, exponentials.sum(dim=-1)


def scaled_exp_(logits: Tensor, temperature: float, maximum: Tensor, scale: Tensor) -> Tensor:
    """scale exp(z/T - maximum) in the memory of `logits` [n, V]; `maximum` and `scale` are [n]."""
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.sub_(maximum.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))


class HeadGradients:
    """Gradients of hidden, weight and bias, gathered chunk by chunk; dW and db in the arithmetic's dtype."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        needed: tuple[bool, ...],
    ) -> None:
        self._head, self._rows = head, rows
        self._dtypes = (weight.dtype, None if bias is None else bias.dtype)
        dtype = head.weight.dtype
        self._hidden = torch.zeros_like(hidden) if needed[0] else None
        self._weight = weight.new_zeros(weight.shape, dtype=dtype) if needed[1] else None
        self._bias = bias.new_zeros(bias.shape, dtype=dtype) if bias is not None and needed[2] else None

    def add(self, part: slice, hidden: Tensor, dlogits: Tensor) -> None:
        """Take in a chunk: its slice of rows, hidden states [n, H] and dL/d(h W^T + b) [n, V]."""
        vocabulary = self._head.vocabulary
        if self._hidden is not None:
            rows_grad = torch.mm(dlogits, self._head.weight)
            if self._rows is None:
                self._hidden[part] = rows_grad
            else:
                self._hidden.index_copy_(0, self._rows[part], rows_grad.to(self._hidden.dtype))
        if self._weight is not None:
            self._weight[:vocabulary].addmm_(dlogits.t(), hidden)
        if self._bias is not None:
            self._bias[:vocabulary].add_(dlogits.sum(dim=0))

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dL/d(hidden, weight, bias) in the dtypes of the inputs; None where not needed."""
        weight = None if self._weight is None else self._weight.to(self._dtypes[0])
        bias = None if self._bias is None else self._bias.to(self._dtypes[1])
        return self._hidden, weight, bias
