"""The K most likely tokens of every row, kept from a model's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopK:
    """The top-K entries of rows of logits. No gradient: a tensor that requires one is refused.

    A row with fewer than K entries above -inf ends with `ids = -1`, `values = -inf`; those slots count nowhere.
    """

    ids: Tensor  # int32 [..., K], ascending, each once; -1 in unused slots
    values: Tensor  # float32 or float64 [..., K], raw logits: no temperature
    lse: Tensor  # [...], log-sum-exp of logits / temperature over the whole vocabulary
    temperature: float = 1.0  # of lse

    def __post_init__(self) -> None:
        if self.ids.shape != self.values.shape or self.lse.shape != self.ids.shape[:-1] or self.ids.ndim < 1:
            raise ValueError(
                f"TopK: expected ids and values [..., K] and lse [...], got ids {list(self.ids.shape)}, "
                f"values {list(self.values.shape)}, lse {list(self.lse.shape)}"
            )
        if self.ids.dtype != torch.int32:
            raise ValueError(f"TopK: ids must be int32, got {self.ids.dtype}; convert with ids.int()")
        if self.values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"TopK: values must be float32 or float64, got {self.values.dtype}; use .float()")
        if self.values.requires_grad or self.lse.requires_grad:
            raise ValueError("TopK: the reference requires grad, but no gradient flows to it; detach it")
        check_temperature("TopK", self.temperature)

    @property
    def k(self) -> int:
        return self.ids.shape[-1]

    def __getitem__(self, rows: slice | Tensor | tuple[slice | Tensor, ...]) -> TopK:
        """Some of the rows: any index into the leading dimensions."""
        return TopK(ids=self.ids[rows], values=self.values[rows], lse=self.lse[rows], temperature=self.temperature)

    def reshape(self, *shape: int) -> TopK:
        """The same rows under other leading dimensions."""
        return TopK(
            ids=self.ids.reshape(*shape, self.k),
            values=self.values.reshape(*shape, self.k),
            lse=self.lse.reshape(shape),
            temperature=self.temperature,
        )

    def where(self, mask: Tensor) -> TopK:
        """All slots unused in the rows where `mask` bool [...] is False."""
        return TopK(
            ids=self.ids.where(mask.unsqueeze(-1), -1),
            values=self.values.where(mask.unsqueeze(-1), -torch.inf),
            lse=self.lse.where(mask, -torch.inf),
            temperature=self.temperature,
        )

    def to(self, device: torch.device | str) -> TopK:
        return TopK(
            ids=self.ids.to(device),
            values=self.values.to(device),
            lse=self.lse.to(device),
            temperature=self.temperature,
        )


def check_temperature(where: str, temperature: float) -> None:
    """Refuse a temperature that divides by nothing or by everything."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{where}: temperature must be positive and finite, got {temperature}")


def check_k(where: str, k: int, vocabulary: int | Tensor | None) -> None:
    """Refuse a k that leaves no distribution, or that the vocabulary cannot serve (on CUDA, asynchronously).

    None is a vocabulary split over ranks, whose size is known inside the op alone.
    """
    if isinstance(vocabulary, Tensor) and vocabulary.device.type != "cpu":
        torch._assert_async(vocabulary >= k, f"{where}: k is beyond the vocabulary")
        return
    if k < 2:
        raise ValueError(f"{where}: k must be at least 2 (over one token the renormalised KL is always 0), got {k}")
    if vocabulary is not None and k > int(vocabulary):
        raise ValueError(f"{where}: k must not exceed the vocabulary of {int(vocabulary)}, got {k}")


def check_divergence(
    where: str,
    ref: TopK,
    rows: torch.Size,
    vocabulary: int | None,
    temperature: float,
    direction: str,
    tail: str,
    mask: Tensor | None = None,
) -> None:
    """Refuse a reference that does not belong to policy logits of shape [*rows, vocabulary], or unknown options.

    A `vocabulary` of None is split over ranks (see check_k).
    """
    check_options(where, rows, temperature, direction, tail, mask)
    if tail == "bucket":
        check_lse_temperature(where, ref, temperature)
    if ref.lse.shape != rows:
        raise ValueError(f"{where}: expected a reference with rows {list(rows)}, got {list(ref.lse.shape)}")
    check_k(where, ref.k, vocabulary)


def check_options(
    where: str, rows: torch.Size, temperature: float, direction: str, tail: str, mask: Tensor | None
) -> None:
    """Refuse options of a divergence that there are not."""
    check_temperature(where, temperature)
    if direction not in ("policy_ref", "ref_policy"):
        raise ValueError(f"{where}: direction must be 'policy_ref' or 'ref_policy', got {direction!r}")
    if tail not in ("none", "bucket"):
        raise ValueError(f"{where}: tail must be 'none' or 'bucket', got {tail!r}")
    check_mask(where, mask, rows)


def only_reference_has_buckets(others: tuple[str, ...]) -> dict[str, str | None]:
    """Backends of a divergence from logits where the tail is a bucket, each with the reason it cannot run."""
    reason = "tail='bucket' has a dense gradient, through the log-sum-exp of all of the policy's logits"
    return {**dict.fromkeys(others, reason), "reference": None}


def check_logits(
    where: str, logits: Tensor, k: int, vocab_size: int | None = None, vocab_start: int = 0, group: Any = None
) -> Tensor:
    """Refuse what k entries cannot be selected from; returns the columns of [..., V] that count, detached."""
    if logits.ndim < 1 or not logits.is_floating_point():
        raise ValueError(f"{where}: expected logits float [..., V], got {logits.dtype} {list(logits.shape)}")
    vocabulary = logits.shape[-1]
    if vocab_start < 0 or (vocab_start > 0 and group is None):
        raise ValueError(f"{where}: vocab_start {vocab_start} without a group, or below 0; it is this rank's first id")
    if group is not None:
        check_k(where, k, None)
        own = vocabulary if vocab_size is None else max(0, min(vocabulary, vocab_size - vocab_start))
        return logits.detach()[..., :own]
    if vocab_size is not None and not 0 < vocab_size <= vocabulary:
        raise ValueError(f"{where}: vocab_size must lie between 1 and V = {vocabulary}, got {vocab_size}")
    check_k(where, k, vocabulary if vocab_size is None else vocab_size)
    return logits.detach()[..., :vocab_size]


def check_mask(where: str, mask: Tensor | None, rows: torch.Size) -> None:
    """Refuse a mask of another shape or type than bool [*rows]."""
    if mask is not None and (mask.shape != rows or mask.dtype != torch.bool):
        raise ValueError(f"{where}: expected mask bool {list(rows)}, got {mask.dtype} {list(mask.shape)}")


def check_lse_temperature(where: str, ref: TopK, temperature: float) -> None:
    """Refuse to compare masses that were taken at different temperatures."""
    if ref.temperature != temperature:
        raise ValueError(
            f"{where}: the reference's lse was taken at temperature {ref.temperature}, asked for {temperature}; "
            f"select it again with temperature={temperature}"
        )


def check_ids(where: str, ids: Tensor, vocabulary: int | Tensor) -> None:
    """More ids int32 [..., K] than a vocabulary has, or outside [-1, vocabulary): an error (asynchronous on CUDA)."""
    if ids.numel() == 0:
        return
    check_k(where, ids.shape[-1], vocabulary)
    lowest, highest = ids.aminmax()
    if highest.device.type != "cpu":
        inside = (lowest >= -1) & (highest < vocabulary)
        torch._assert_async(inside, f"{where}: a reference id is outside the policy's vocabulary")
    elif int(lowest) < -1:
        raise ValueError(f"{where}: reference id {int(lowest)} is no id; unused slots bear -1")
    elif int(highest) >= int(vocabulary):
        raise ValueError(
            f"{where}: reference id {int(highest)} is beyond the policy's vocabulary of {int(vocabulary)}; "
            "both models need the same tokenizer"
        )
