"""Packed, balanced, resumable batches for the Hugging Face Trainer and the trainers that are built on it, as TRL's.

    class PackedSFTTrainer(PackedTraining, SFTTrainer): ...

    PackedSFTTrainer(model, args, train_dataset=tokenized, data_collator=PackCollator(), pack_capacity=8192).train()

per_device_train_batch_size counts packs, not samples. Nothing else changes: learning-rate schedule, number of steps,
resume and logging are the trainer's own. The model must keep packed samples apart: flash attention reads the boundaries
that the collator gives, `use_varlen_attention` works everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from nova_kernels.packing import PackSampler, Ragged


class PackedTraining:
    """Mixin, left of a Trainer class: its training batches are packs, planned anew in every epoch.

    Further keyword arguments of the trainer:
        pack_capacity: tokens per pack.
        pack_options: further options of `PackSampler`: strategy, seed, window, linear, quadratic, overlong ("error" or
            "drop"), remainder ("split", "empty" or "drop": the trainer wants epochs of one length).

    Fields that neither the model nor the collator knows are left out, unless remove_unused_columns is False.
    dataloader_drop_last has no meaning here: see `remainder`.
    """

    def __init__(
        self, *args: Any, pack_capacity: int, pack_options: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        options = dict(pack_options or {})
        if options.get("remainder") == "carry":
            raise ValueError("PackedTraining: remainder='carry' makes epochs of different lengths; use 'split'")
        if options.get("overlong") == "truncate":
            raise ValueError("PackedTraining: overlong='truncate' would only plan; cut the samples of the data set")
        super().__init__(*args, **kwargs)
        self._pack_capacity, self._pack_options = pack_capacity, options

    def get_train_dataloader(self) -> DataLoader:
        """One batch of this rank after the other; `set_epoch` and skipping are left to the trainer."""
        trainer: Any = self
        args = trainer.args
        ranks, packs = args.world_size, args.per_device_train_batch_size
        options = {"seed": args.seed if args.data_seed is None else args.data_seed, **self._pack_options}
        sampler = PackSampler(
            token_lengths(trainer.train_dataset),
            self._pack_capacity,
            packs_per_batch=packs,
            packs_per_step=ranks * packs * args.gradient_accumulation_steps,
            num_ranks=ranks,
            rank=args.process_index,
            **options,
        )
        return _EpochDataLoader(
            trainer.train_dataset,
            batch_sampler=sampler,
            collate_fn=trainer._get_collator_with_removed_columns(trainer.data_collator, description="training"),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _set_signature_columns_if_needed(self) -> None:
        """Fields that the collator turns into labels are not for the model, but must reach the collator."""
        trainer: Any = self
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        masks = getattr(trainer.data_collator, "masks", ())
        trainer._signature_columns += [name for name in masks if name not in trainer._signature_columns]


class _EpochDataLoader(DataLoader):
    """Hands the trainer's epoch on to the sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def token_lengths(dataset: Any) -> np.ndarray:
    """Tokens of every sample, int64 [N]: from the Arrow table where the data set has one, else by reading them all.

    Raises:
        ValueError: a data set without a length cannot be planned.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"PackedTraining: {type(dataset).__name__} has no length; stream it with PackStream instead")
    if hasattr(dataset, "select_columns"):
        column = dataset.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        if str(column.type).startswith(("list<", "large_list<")):
            return np.concatenate([np.empty(0, np.int64), *(Ragged.from_arrow(c).lengths for c in column.chunks)])
    return np.array([len(dataset[number]["input_ids"]) for number in range(len(dataset))], dtype=np.int64)
