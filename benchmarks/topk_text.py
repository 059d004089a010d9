"""A small language model of real text, made here: the tokenizer, the packed rows and the decoder of topk_union.

Conversations below the folder NOVA_DATA, question and answer as one text. Every 25th sample of a file is held out. A
row is LENGTH tokens of samples in a seeded order, one after the other, with <|end|> after each; attention is causal
over the row. Loss over the whole vocabulary costs four times the rest of the model on a CPU, so most steps estimate it

    log sum_v exp z_v  ~  log( exp z_target + sum over drawn v != target of exp z_v / P(v is drawn) )

with DRAWN draws from the token counts to the power 0.75, the same for all tokens of a step; the last ones compute it.
Nothing that is read here leaves this process but counts.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEED = 1234
LENGTH = 512
ROWS_PER_STEP = 4
DRAWN = 6000
EXACT_SHARE = 0.15  # of the training time, at its end, with the loss over the whole vocabulary
LEARNING_RATE = 3e-3
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}
FILES = {
    "english": (
        "sft/alpaca_en_demo",
        "sft/gsm8k_train",
        "reasoning/math_test_minus500",
        "tools/glaive_toolcall_en_demo",
    ),
    "code": ("sft/codealpaca_new",),
    "chinese": ("curation/alpaca_zh_20k", "sft/alpaca_zh_demo", "tools/glaive_toolcall_zh_demo"),
}
FIELDS = ("instruction", "question", "problem", "input", "output", "response", "answer", "solution")


def samples(folder: Path, file: str) -> Iterator[str]:
    """The conversations of a file, one text each."""
    with gzip.open(folder / f"{file}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as lines:
        for row in map(json.loads, lines):
            turns = [turn["value"] for turn in row.get("conversations", [])]
            yield "\n".join(turns or [row[name] for name in FIELDS if row.get(name)])


def split(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts to train on and held-out texts, by kind."""
    train: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {}
    for kind, files in FILES.items():
        texts = [list(samples(folder, file)) for file in files]
        train[kind] = [text for file in texts for place, text in enumerate(file) if place % 25]
        held[kind] = [text for file in texts for text in file[::25]]
    return train, held


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Byte-level BPE; id 0 ends a sample."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def packed_rows(tokenizer: Any, texts: list[str], seed: int) -> Tensor:
    """Samples in a seeded order, end to end: int64 [rows, LENGTH + 1], the last column the target of the one before."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    encoded = tokenizer.encode_batch([texts[place] for place in order])
    stream = torch.tensor([token for sample in encoded for token in (*sample.ids, 0)])
    rows = (len(stream) - 1) // LENGTH
    return stream.as_strided((rows, LENGTH + 1), (LENGTH, 1)).clone()


class Decoder:
    """A Llama of transformers with tied embeddings, its training and its logits."""

    def __init__(self, vocabulary: int) -> None:
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(SEED)
        config = LlamaConfig(vocab_size=vocabulary, **MODEL)
        self.body = LlamaModel(config)
        self.tokens_seen = 0

    @property
    def weight(self) -> Tensor:
        return self.body.embed_tokens.weight

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.body.parameters())

    def hidden(self, ids: Tensor) -> Tensor:
        """[rows, LENGTH] -> [rows * LENGTH, H]"""
        return self.body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)

    def loss(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Mean cross-entropy; over the whole vocabulary if `weights` (of the draws) is None."""
        hidden, targets = self.hidden(rows[:, :-1]), rows[:, 1:].flatten()
        if weights is None:
            return torch.nn.functional.cross_entropy(hidden @ self.weight.t(), targets)
        drawn = torch.multinomial(weights, DRAWN, replacement=True).unique()
        chance = -torch.expm1(DRAWN * torch.log1p(-weights[drawn]))
        others = hidden @ self.weight[drawn].t() - chance.log()
        others = others.masked_fill(targets.unsqueeze(1) == drawn, -math.inf)
        own = (hidden * self.weight[targets]).sum(-1, keepdim=True)
        return (torch.cat([own, others], dim=1).logsumexp(dim=1) - own.squeeze(1)).mean()

    @torch.no_grad()
    def held_out_loss(self, rows: Tensor) -> float:
        """Mean cross-entropy of rows, over the whole vocabulary."""
        self.body.eval()
        losses = [self.loss(part, None).item() for part in rows.split(4)]
        self.body.train()
        return sum(losses) / len(losses)

    def train(self, rows: Tensor, minutes: float, stops: dict[float, Callable[[], None]]) -> None:
        """AdamW for `minutes` of this process's CPU time; calls `stops[share]` when that share of it has gone."""
        weights = torch.bincount(rows.flatten(), minlength=len(self.weight)).clamp(min=1).double().pow(0.75)
        weights = (weights / weights.sum()).float()
        matrices = [p for p in self.body.parameters() if p.ndim > 1]
        vectors = [p for p in self.body.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)).split(ROWS_PER_STEP)
        used, step, waiting = 0.0, 0, sorted(stops)
        while waiting:
            begin = time.process_time()
            share = min(1.0, used / (60 * minutes))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 40, max(0.02, 1.25 * (1 - share)))
            batch = rows[order[step % len(order)]]
            loss = self.loss(batch, None if share > 1 - EXACT_SHARE else weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.body.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.tokens_seen += batch[:, 1:].numel()
            step += 1
            used += time.process_time() - begin
            while waiting and used >= 60 * minutes * waiting[0]:
                stops[waiting.pop(0)]()
