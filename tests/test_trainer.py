"""Packed batches inside the Hugging Face Trainer and TRL's SFTTrainer, unmodified but for the mixin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from nova_kernels.integrations.trainer import PackedTraining, token_lengths
from nova_kernels.integrations.transformers import use_varlen_attention
from nova_kernels.packing import PackCollator, PackSampler
from small_tokenizers import byte_level

LENGTHS = np.random.default_rng(0).integers(3, 40, 60)


class PackedTrainer(PackedTraining, Trainer):
    """The Trainer, on packs; it remembers what it was fed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fed: list[torch.Tensor] = []

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.fed.append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *args, **kwargs)


def samples() -> list[dict[str, Any]]:
    random = np.random.default_rng(1)
    return [{"input_ids": random.integers(1, 64, n).tolist(), "note": "not for the model"} for n in LENGTHS.tolist()]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def packed_trainer(folder: Path, **options: Any) -> PackedTrainer:
    arguments = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_steps": 4,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 100,
    }  # fmt: skip
    model = tiny_model()
    use_varlen_attention(model)
    return PackedTrainer(
        model,
        TrainingArguments(str(folder), **(arguments | options)),
        train_dataset=samples(),
        data_collator=PackCollator(),
        pack_capacity=128,
    )


def test_the_trainer_sees_every_sample_once_an_epoch(tmp_path: Path) -> None:
    trainer = packed_trainer(tmp_path, save_strategy="no")
    result = trainer.train()
    per_epoch = len(trainer.get_train_dataloader())
    assert len(trainer.fed) == 3 * per_epoch and result.global_step == 3 * per_epoch // 2
    every = sorted(sum((sample["input_ids"] for sample in samples()), []))  # noqa: RUF017
    epochs = [trainer.fed[start : start + per_epoch] for start in range(0, len(trainer.fed), per_epoch)]
    for epoch in epochs:
        assert sorted(torch.cat([row[0] for row in epoch]).tolist()) == every
        assert all(row.shape[1] <= 128 for row in epoch)
    assert not all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))


@pytest.mark.parametrize("step", [4, "last-of-epoch"])
def test_a_resumed_run_is_fed_the_same_batches(tmp_path: Path, step: int | str) -> None:
    whole = packed_trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    steps_per_epoch = len(whole.get_train_dataloader()) // 2
    stop = steps_per_epoch if step == "last-of-epoch" else int(step)
    first = packed_trainer(tmp_path / "cut", save_steps=stop)
    first.train()
    second = packed_trainer(tmp_path / "cut", save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    rest = whole.fed[2 * stop :]
    assert len(second.fed) == len(rest) and all(torch.equal(a, b) for a, b in zip(second.fed, rest, strict=True))
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_packed_losses_are_those_of_the_samples_alone(tmp_path: Path) -> None:
    trainer = packed_trainer(tmp_path, save_strategy="no")
    row = next(iter(trainer.get_train_dataloader()))
    assert "note" not in row
    with torch.no_grad():
        logits = trainer.model(**row, use_cache=False).logits[0]
        bounds = row["cu_seq_lens_q"].tolist()
        plain = tiny_model()
        for start, end in zip(bounds, bounds[1:], strict=False):  # noqa: RUF007
            alone = plain(row["input_ids"][:, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(logits[start:end], alone)


def test_masks_and_options_reach_the_batches(tmp_path: Path) -> None:
    masked = [{**sample, "completion_mask": [0] * (len(sample["input_ids"]) - 1) + [1]} for sample in samples()]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "data_seed": 5}
    trainer = PackedTrainer(
        tiny_model(),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], dataloader_num_workers=1, **options),
        train_dataset=masked,
        eval_dataset=masked,
        data_collator=PackCollator(),
        pack_capacity=64,
        pack_options={"overlong": "drop", "window": 2},
    )
    for row in trainer.get_eval_dataloader():
        assert (row["labels"] != -100).sum() == row["cu_seq_lens_q"].numel() - 1
    loader = trainer.get_train_dataloader()
    rows = list(loader)
    assert all((row["labels"] != -100).sum() == row["cu_seq_lens_q"].numel() - 1 for row in rows)
    expected = PackSampler(LENGTHS, 64, packs_per_batch=2, packs_per_step=6, seed=5, overlong="drop", window=2)
    for row, numbers in zip(rows, expected, strict=True):
        assert row["cu_seq_lens_q"].tolist() == np.cumsum([0, *LENGTHS[numbers]]).tolist()
    assert loader.num_workers == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"remainder": "carry"}, r"epochs of different lengths"), ({"overlong": "truncate"}, r"cut the samples")],
)
def test_options_that_the_trainer_cannot_serve_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedTrainer(tiny_model(), pack_capacity=64, pack_options=options)


def test_a_stream_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match=r"generator has no length; stream it with PackStream instead"):
        token_lengths(sample for sample in samples())


def test_lengths_are_read_from_an_arrow_table() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"input_ids": [1] * n, "text": "x"} for n in (3, 1, 2)])
    chosen = rows.select([2, 0])
    fixed = datasets.Features({"input_ids": datasets.List(datasets.Value("int64"), length=2)})
    assert token_lengths(datasets.Dataset.from_list([{"input_ids": [1, 2]}] * 3, features=fixed)).tolist() == [2, 2, 2]
    assert (
        token_lengths(chosen).tolist()
        == [2, 3]
        == token_lengths([{"input_ids": [1, 2]}, {"input_ids": [1] * 3}]).tolist()
    )


def test_trl_takes_the_mixin(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class PackedSFTTrainer(PackedTraining, trl.SFTTrainer): ...

    model = tiny_model()
    use_varlen_attention(model)
    rows = datasets.Dataset.from_list([{"input_ids": sample["input_ids"]} for sample in samples()])
    arguments = trl.SFTConfig(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no")
    trainer = PackedSFTTrainer(
        model, arguments, train_dataset=rows, processing_class=byte_level(), data_collator=PackCollator(),
        pack_capacity=128,
    )  # fmt: skip
    assert trainer.train().global_step == 2
