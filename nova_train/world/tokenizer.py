"""A word-level tokenizer for the world's text: whole template words, two-digit numbers, characters for the rest.

Text is cut by one regular expression, leftmost and longest first; every cut is a token, so that decoding is exact for
printable ASCII. Anything else becomes <unk>.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nova_train.chat import CHATML_TEMPLATE
from nova_train.world import vocabulary


def build_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """The tokenizer with the ChatML template; `save_pretrained` makes it open with AutoTokenizer.

    Args:
        max_length: the model's context in tokens, a warning bound for callers of transformers.
    """
    ids = {piece: number for number, piece in enumerate(vocabulary.pieces())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=vocabulary.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_cut_rule()), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=vocabulary.PAD,
        unk_token=vocabulary.UNKNOWN,
        eos_token=vocabulary.TURN_END,
        additional_special_tokens=[vocabulary.TURN_START],
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def _cut_rule() -> str:
    """Constructs, then words (never a part of a longer word), then numbers, then single characters."""
    words = vocabulary.words()
    spaced = "|".join(_longest_first(word[1:] for word in words if word.startswith(" ")))
    bare = "|".join(_longest_first(word for word in words if not word.startswith(" ")))
    headers = [c for c in vocabulary.CONSTRUCTS if c[0].isalpha()]
    others = [c for c in vocabulary.CONSTRUCTS if not c[0].isalpha()]
    return "|".join(
        (
            "|".join(_longest_first(map(re.escape, others))),
            f"(?<![A-Za-z])(?:{'|'.join(_longest_first(headers))})",
            f" (?:{spaced})(?![A-Za-z])",
            f"(?<![A-Za-z])(?:{bare})(?![A-Za-z])",
            "[1-9][0-9]",
            r"[\s\S]",
        )
    )


def _longest_first(pieces: object) -> list[str]:
    return sorted(pieces, key=len, reverse=True)  # type: ignore[call-overload]
