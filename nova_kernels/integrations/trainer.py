"""Packed, balanced, resumable batches for the Hugging Face Trainer and the trainers that are built on it, as TRL's.

    class PackedSFTTrainer(PackedTraining, SFTTrainer): ...

    PackedSFTTrainer(model, args, train_dataset=tokenized, data_collator=PackCollator(), pack_capacity=8192).train()

per_device_train_batch_size counts packs, not samples. Nothing else changes: learning-rate schedule, number of steps,
resume and logging are the trainer's own. The model must keep packed samples apart: flash attention reads the boundaries
that the collator gives, `use_varlen_attention` works everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from nova_kernels.packing import PackSampler, Ragged


class PackedTraining:
    """Mixin, left of a Trainer class: its training batches are packs, planned anew in every epoch.

    Further keyword arguments of the trainer:
        pack_capacity: tokens per pack.
        pack_options: further options of `PackSampler`, such as remainder, overlong, window.
    """

    def __init__(
        self, *args: Any, pack_capacity: int, pack_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._pack_capacity, self._pack_options = pack_capacity, pack_options or {}

    def get_train_dataloader(self) -> DataLoader:
        """One batch of this rank after the other; `set_epoch` and skipping are left to the trainer."""
        trainer: Any = self
        args = trainer.args
        ranks, packs = args.world_size, args.per_device_train_batch_size
        sampler = PackSampler(
            token_lengths(trainer.train_dataset),
            self._pack_capacity,
            packs_per_batch=packs,
            packs_per_step=ranks * packs * args.gradient_accumulation_steps,
            num_ranks=ranks,
            rank=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            **self._pack_options,
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


class _EpochDataLoader(DataLoader):
    """Hands the trainer's epoch on to the sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def token_lengths(dataset: Any) -> np.ndarray:
    """Tokens of every sample, int64 [N]: from the Arrow table where the data set has one, else by reading them all."""
    if hasattr(dataset, "with_format"):
        return Ragged.from_arrow(dataset.with_format("arrow")[:]["input_ids"]).lengths
    return np.array([len(dataset[number]["input_ids"]) for number in range(len(dataset))], dtype=np.int64)
