"""The collate_fn for a DataLoader, the Hugging Face Trainer and TRL: one packed row with the models' keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nova_kernels.packing.batch import IGNORE_INDEX, pack_samples
from nova_kernels.packing.columns import Ragged, sample_numbers


class PackCollator:
    """Samples side by side in one row [1, T], as a Hugging Face model takes it.

    Keys: input_ids, labels, position_ids; cu_seq_lens_q/k (int32 [S + 1]) and max_length_q/k (int), for attention that
    reads them; every further field of the samples; seq_idx if asked for. There is no attention_mask: one of ones would
    switch the isolation of the samples off. An empty batch (an empty pack, see `balance_ranks`) is one token of padding
    without a label.
    """

    def __init__(
        self,
        *,
        fields: Mapping[str, Any] | None = None,
        drop: Sequence[str] = ("attention_mask", "position_ids"),
        masks: Sequence[str] = ("completion_mask", "assistant_masks"),
        max_length: int | None = None,
        pad_to: int | None = None,
        pad_to_multiple_of: int | None = None,
        seq_idx: bool = False,
    ) -> None:
        """Nothing is allocated.

        Args:
            fields: the fields of all samples (each a Ragged, an Arrow list array or a list of arrays); a batch is then
                a list of sample numbers, and the data set of the DataLoader can be `range(N)`. None = a batch is a list
                of samples.
            drop: fields that are left out, as tokenizers add masks to every sample.
            masks: fields, where there are any, whose zeros mark tokens that are not trained (TRL's names): the label
                becomes -100, and the field is not handed on.
            max_length: longer samples are cut to it, in every field.
            pad_to, pad_to_multiple_of: as in `pack_samples`.
            seq_idx: add the number of its sample for every token, int32 [1, T], for state-space layers.
        """
        self._drop = set(drop)
        self._fields = (
            None if fields is None else {name: _as_field(f) for name, f in fields.items() if name not in self._drop}
        )
        self.masks = tuple(masks)
        self._max_length, self._seq_idx = max_length, seq_idx
        self._pad_to, self._multiple = pad_to, pad_to_multiple_of

    def __call__(self, batch: Sequence[Any]) -> dict[str, Any]:
        """One row.

        Args:
            batch: samples, or their numbers where the collator holds the fields.

        Raises:
            ValueError, IndexError: as `pack_samples`.
        """
        if self._fields is not None and len(batch):
            samples: Any = {name: self._take(field, batch) for name, field in self._fields.items()}
        else:
            samples = [self._cut(sample) for sample in batch]
        pad_to = self._pad_to if len(batch) else self._pad_to or 1
        packed = pack_samples(samples, pad_to=pad_to, pad_to_multiple_of=self._multiple)
        row: dict[str, Any] = {"input_ids": packed.input_ids, "labels": packed.labels, **packed.extra}
        for name in self.masks:
            if name in row:
                row["labels"][row.pop(name) == 0] = IGNORE_INDEX
        row |= packed.attention_kwargs()
        del row["use_cache"]
        if self._seq_idx:
            row["seq_idx"] = packed.seq_idx()
        return row

    def _cut(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._max_length is None and self._drop.isdisjoint(sample):
            return sample
        return {name: values[: self._max_length] for name, values in sample.items() if name not in self._drop}

    def _take(self, field: Any, numbers: Sequence[int]) -> list[Any]:
        if isinstance(field, Ragged):
            arrays: list[Any] = list(field.take(numbers))
        else:
            arrays = [field[number] for number in sample_numbers(numbers, len(field)).tolist()]
        return arrays if self._max_length is None else [array[: self._max_length] for array in arrays]


def _as_field(values: Any) -> Any:
    return values if isinstance(values, Ragged | list | tuple) else Ragged.from_arrow(values)
