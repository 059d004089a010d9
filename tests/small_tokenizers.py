"""Tokenizers made on the spot: nothing is downloaded."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TEXTS = ["user\n", "assistant\n", "system\n", "tool\n", "What is two and two?", "The answer is four."]
TEXTS += [
    "Sort the letters of nova.",
    "日本語の文",
    "naïve café",
    "one\ntwo\n\nthree",
    "  indented",
    "a<|b|>c",
    "[INST] go [/INST]",
]


def byte_level(template: str | None = None, *, bos: bool = False) -> Any:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = template
    return wrapped


def whole_words(template: str | None = None) -> Any:
    """A fixed word list whose words include the special tokens, so that text could match them."""
    words = ["<unk>", *SPECIAL, "user", "assistant", "\n", " ", "two", "four", "<", "|im_end|>", "?", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    pattern = r"<\|im_end\|>|\|im_end\|>|user|assistant|two|four|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    wrapped.add_special_tokens({"bos_token": "<|im_start|>"})
    wrapped.chat_template = template
    return wrapped
