"""A small Qwen2 with random weights and a tokenizer trained on given files: real text without a download.

    python recipes/real/tiny_model.py runs/real/base data/sft/gsm8k_train.jsonl.gz data/sft/alpaca_zh_demo.jsonl.gz

The tokenizer is byte-level BPE with Qwen2's rules for cutting text, so that any Unicode goes in and comes out; the
template is ChatML. The folder opens with AutoTokenizer and AutoModelForCausalLM.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from nova_train.chat import CHATML_TEMPLATE

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|pad|>"]


def texts(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def rows(path: Path) -> Iterator[Any]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return (json.loads(line) for line in data.split(b"\n") if line.strip())


def train_tokenizer(files: list[Path], vocab_size: int) -> Any:
    corpus = (text for path in files for row in rows(path) for text in texts(row))
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, vocab_size, new_special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|pad|>"
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def untrained_model(tokenizer: Any, hidden: int, layers: int, context: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 48, 1),
        num_key_value_heads=max(hidden // 96, 1),
        intermediate_size=hidden * 8 // 3,
        max_position_embeddings=context,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("files", nargs="+", type=Path, help="JSON Lines, .jsonl or .jsonl.gz: the tokenizer's text")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=192, help="a multiple of 96")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.files, arguments.vocab_size)
    model = untrained_model(tokenizer, arguments.hidden, arguments.layers, arguments.context, arguments.seed)
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    sample = "“Ωmega” 12,345 元 = 你好 \u2028 naïve 🙂\n\n#### 18"
    reopened = AutoTokenizer.from_pretrained(arguments.output_dir)
    if reopened.decode(reopened(sample)["input_ids"]) != sample:
        raise RuntimeError(f"{arguments.output_dir}: the saved tokenizer does not give back {sample!r}")
    parameters = sum(weight.numel() for weight in model.parameters())
    sys.stdout.write(f"{arguments.output_dir}: {len(tokenizer)} tokens, {parameters:,} parameters\n")


if __name__ == "__main__":
    main()
