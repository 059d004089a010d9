"""Look at data as a stage will see it: counts, token lengths, packs, and a few rows coloured by what is trained.

    nova-train inspect-data --model_name_or_path M --dataset_name train.jsonl --max_length 4096

Nothing is trained and nothing is refused for its length: rows longer than `max_length` are counted. `--check_packing`
also loads the model and measures whether samples in one row see each other:

    largest |logit of the packed row - logit of the sample alone|  <=  1e-4 of the largest |logit|      apart, else LEAK

Rounding in float32 stays far below that bound, and what a sample takes from its neighbours lies far above.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nova_kernels.integrations.transformers import check_packing
from nova_kernels.packing import PackedBatch, pack_samples, plan_packs
from nova_train.chat import Chat
from nova_train.config import ConfigError, fingerprint, identity
from nova_train.datasets import Row, read_rows
from nova_train.model import load_causal_lm, load_tokenizer, own_attention
from nova_train.samples import IGNORE_INDEX, preference_pairs, prompts, sft_samples
from nova_train.state import claim_folder, mark_finished

STATISTICS_FILE = "statistics.json"
PERCENTILES = (5, 25, 50, 75, 95, 99)
PACKED_SAMPLES = 4  # at most, in the row that check_packing looks at
TOLERANCE = 1e-4  # of the largest logit

# Neighbouring tokens alternate between two shades, so that their borders show.
_TRAINED = ("black on green", "black on bright_green")
_CONTEXT = ("dim", "dim underline")


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectDataConfig:
    """Keys of `nova-train inspect-data`."""

    model_name_or_path: str  # for its tokenizer, and for check_packing its weights
    dataset_name: list[str]
    dataset_columns: dict[str, str] = field(default_factory=dict)  # our name -> their column, or text with {column}
    kind: Literal["sft", "preference", "prompt"] = "sft"  # what the rows are for
    on_bad_row: Literal["error", "skip"] = "error"
    max_length: int = 4096  # tokens per sample, and per pack
    rows_shown: int = 3
    tokens_shown: int = 400  # per row
    check_packing: bool = False  # load the model and measure whether samples in one row see each other
    attention_backend: str | None = None  # of check_packing; None: the fastest that can run
    output_dir: str | None = None  # also gets statistics.json

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):
            object.__setattr__(self, "dataset_name", [self.dataset_name])
        if self.max_length < 1:
            raise ConfigError(f"max_length must be at least 1 token, got {self.max_length}")
        for key in ("rows_shown", "tokens_shown"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} must be at least 0, got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStatistics:
    """Token counts of a data set."""

    samples: int
    tokens: int
    mean: float  # tokens per sample
    shortest: int
    longest: int
    percentiles: dict[str, int]  # "50" -> tokens; nearest rank
    trained_share: float | None  # trained tokens / tokens; None where nothing is marked as trained
    overlong: int  # samples longer than max_length, left out of the packs
    packs: int | None  # rows of max_length tokens per epoch; None where rows are not packed
    utilization: float | None  # used share of the packs


def token_statistics(
    lengths: Sequence[int], *, max_length: int, trained: int | None = None, packing: bool = True
) -> TokenStatistics:
    """Statistics of samples with `lengths` tokens, of which `trained` in all carry a label.

    Raises:
        ValueError: no samples.
    """
    sizes = np.sort(np.asarray(lengths, dtype=np.int64))
    if sizes.size == 0:
        raise ValueError("token_statistics: expected at least one sample, got none")
    tokens = int(sizes.sum())
    plan = plan_packs(np.asarray(lengths, dtype=np.int64), max_length, overlong="drop") if packing else None
    return TokenStatistics(
        samples=int(sizes.size),
        tokens=tokens,
        mean=tokens / sizes.size,
        shortest=int(sizes[0]),
        longest=int(sizes[-1]),
        percentiles={str(p): int(sizes[max(math.ceil(p / 100 * sizes.size), 1) - 1]) for p in PERCENTILES},
        trained_share=None if trained is None else trained / tokens,
        overlong=int((sizes > max_length).sum()),
        packs=None if plan is None else plan.num_packs,
        utilization=None if plan is None else plan.utilization,
    )


def sample_statistics(
    samples: Sequence[Mapping[str, np.ndarray]], *, max_length: int, packing: bool = True
) -> TokenStatistics:
    """Statistics of supervised samples {"input_ids", "labels"}."""
    trained = sum(int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples)
    return token_statistics(
        [len(sample["input_ids"]) for sample in samples], max_length=max_length, trained=trained, packing=packing
    )


def statistics_table(title: str, statistics: TokenStatistics) -> Table:
    """The statistics as a table of two columns."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("samples", f"{statistics.samples:,}")
    table.add_row("tokens", f"{statistics.tokens:,}")
    table.add_row("tokens per sample, mean", f"{statistics.mean:,.1f}")
    table.add_row("shortest, longest", f"{statistics.shortest:,}, {statistics.longest:,}")
    names, values = zip(*statistics.percentiles.items(), strict=True)
    table.add_row(f"percentiles {', '.join(names)}", ", ".join(f"{value:,}" for value in values))
    if statistics.trained_share is not None:
        table.add_row("trained share of tokens", f"{statistics.trained_share:.1%}")
    table.add_row("longer than max_length", f"{statistics.overlong:,}")
    if statistics.packs is not None and statistics.utilization is not None:
        table.add_row("packs per epoch, utilisation", f"{statistics.packs:,}, {statistics.utilization:.1%}")
    return table


def coloured(chat: Chat, ids: np.ndarray, mask: np.ndarray, limit: int) -> Text:
    """The first `limit` tokens as text: trained on green, context dim, neighbours in alternating shades.

    Args:
        ids: int64 [T].
        mask: bool [T], True = trained.
    """
    text = Text()
    start = shade = 0
    shown = [int(i) for i in ids[:limit]]
    for end in range(1, len(shown) + 1):
        piece = chat.decode(shown[start:end], keep_special=True)
        last = end == len(shown) or bool(mask[end]) != bool(mask[start])
        # Half of a character decodes to the replacement sign: wait for the token that completes it.
        if piece.endswith("\ufffd") and not last and end - start < 4:
            continue
        text.append(piece, style=(_TRAINED if mask[start] else _CONTEXT)[shade % 2])
        start, shade = end, shade + 1
    if len(ids) > limit:
        text.append(f" ... {len(ids) - limit} more tokens", style="italic")
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What was found in a data set."""

    statistics: dict[str, TokenStatistics]  # by name: samples, or chosen and rejected, or prompts
    notes: list[str]
    examples: list[tuple[str, np.ndarray, np.ndarray]]  # title, ids int64 [T], mask bool [T]
    sequences: list[np.ndarray]  # ids int64 [T] of everything that a model would read, in order

    def print(self, console: Console, chat: Chat, tokens_shown: int) -> None:
        """Tables, notes, then the examples."""
        for name, statistics in self.statistics.items():
            console.print(statistics_table(name, statistics))
        for note in self.notes:
            console.print(Text(note))
        for title, ids, mask in self.examples:
            console.rule(title)
            console.print(coloured(chat, ids, mask, tokens_shown), soft_wrap=True)


def run(config: InspectDataConfig, *, console: Console | None = None) -> Path:
    """Print statistics and coloured rows; returns `output_dir` if there is one, else the first data set's name."""
    folder = None if config.output_dir is None else Path(config.output_dir)
    if folder is not None:
        claim_folder(config, "inspect-data")
    console = Console() if console is None else console
    chat = Chat(load_tokenizer(config.model_name_or_path))
    rows = _rows(config)
    found = inspect_rows(rows, chat, config)
    console.print(_counts_table(rows))
    found.print(console, chat, config.tokens_shown)
    checked = measure_packing(found.sequences, config) if config.check_packing else None
    if checked is not None:
        console.print(checked.text(), markup=False, highlight=False, soft_wrap=True)
        checked.raise_if_leaking(config.model_name_or_path)
    if folder is None:
        return Path(config.dataset_name[0])
    facts: dict[str, Any] = {name: asdict(statistics) for name, statistics in found.statistics.items()}
    facts["rows"] = {"count": len(rows), **{key: Counter(row[key] for row in rows) for key in ("source", "category")}}
    if checked is not None:
        facts["check_packing"] = asdict(checked)
    (folder / STATISTICS_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    mark_finished(folder, fingerprint(identity(config)))
    return folder


def statistics_text(config: InspectDataConfig) -> str:
    """The statistics alone as plain text, for `--dry_run`."""
    out = StringIO()
    chat = Chat(load_tokenizer(config.model_name_or_path))
    found = inspect_rows(_rows(config), chat, replace(config, rows_shown=0))
    found.print(Console(file=out, width=100, color_system=None), chat, 0)
    return out.getvalue().rstrip()


def inspect_rows(rows: Sequence[Row], chat: Chat, config: InspectDataConfig) -> Inspection:
    """Statistics and examples of rows of `config.kind`."""
    inspect = {"sft": _inspect_sft, "preference": _inspect_preference, "prompt": _inspect_prompts}[config.kind]
    return inspect(rows, chat, config)


def _inspect_sft(rows: Sequence[Row], chat: Chat, config: InspectDataConfig) -> Inspection:
    samples = sft_samples(rows, chat, None, on_bad_row=config.on_bad_row)
    shown = samples[: config.rows_shown]
    return Inspection(
        statistics={"samples": sample_statistics(samples, max_length=config.max_length)},
        notes=[f"masks: {chat.route}"],
        examples=[(f"sample {i}", s["input_ids"], s["labels"] != IGNORE_INDEX) for i, s in enumerate(shown)],
        sequences=[sample["input_ids"] for sample in samples],
    )


def _inspect_preference(rows: Sequence[Row], chat: Chat, config: InspectDataConfig) -> Inspection:
    pairs = preference_pairs(rows, chat, None, on_bad_row=config.on_bad_row)
    statistics, notes = {}, []
    for side in ("chosen", "rejected"):
        lengths = [len(getattr(pair, side)) for pair in pairs]
        statistics[side] = token_statistics(lengths, max_length=config.max_length, packing=False)
        scores = [score for pair in pairs if (score := getattr(pair, f"{side}_score")) is not None]
        mean = f", mean {np.mean(scores):.3f}" if scores else ""
        notes.append(f"{side}: {len(scores):,} of {len(pairs):,} have a score{mean}")
    same = sum(np.array_equal(pair.chosen, pair.rejected) for pair in pairs)
    notes.append(f"pairs with the same text twice: {same:,}")
    examples = []
    for number, pair in enumerate(pairs[: config.rows_shown]):
        answer = np.arange(pair.chosen.size) >= pair.prompt_length
        examples.append((f"pair {number}, chosen", pair.chosen, answer))
        examples.append((f"pair {number}, rejected", pair.rejected, np.zeros(pair.rejected.size, dtype=np.bool_)))
    sequences = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    return Inspection(statistics=statistics, notes=notes, examples=examples, sequences=sequences)


def _inspect_prompts(rows: Sequence[Row], chat: Chat, config: InspectDataConfig) -> Inspection:
    asked = prompts(rows, chat, None, on_bad_row=config.on_bad_row)
    lengths = [len(prompt.ids) for prompt in asked]
    different = len({prompt.key for prompt in asked})
    columns = sorted({name for prompt in asked for name in prompt.columns})
    sequences = [np.array(prompt.ids, dtype=np.int64) for prompt in asked]
    shown = sequences[: config.rows_shown]
    return Inspection(
        statistics={"prompts": token_statistics(lengths, max_length=config.max_length, packing=False)},
        notes=[f"different prompts: {different:,}", f"columns for reward functions: {', '.join(columns)}"],
        examples=[(f"prompt {i}", ids, np.zeros(ids.size, dtype=np.bool_)) for i, ids in enumerate(shown)],
        sequences=sequences,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingCheck:
    """How far the logits of a packed row are from those of its samples alone."""

    samples: int
    tokens: int  # of the packed row
    largest_logit: float
    trainer: float  # largest difference, with varlen attention, as the trainer calls the model
    own_attention: float  # the same with the model's own attention, called with position_ids and its default use_cache

    def verdict(self, difference: float) -> Literal["apart", "LEAK"]:
        """A difference that is not a number is a leak, too."""
        return "apart" if difference <= TOLERANCE * self.largest_logit else "LEAK"

    def text(self) -> str:
        """The measurements, one way of calling the model per line."""
        lines = {"the trainer, varlen attention": self.trainer, "its own attention, use_cache": self.own_attention}
        return "\n".join(
            [
                f"packing: {self.samples} samples, {self.tokens:,} tokens in one row; logits up to "
                f"{self.largest_logit:.3g}; apart: within {TOLERANCE * self.largest_logit:.1e} of each sample alone",
                *(f"  {name:<30} {value:8.1e}   {self.verdict(value)}" for name, value in lines.items()),
            ]
        )

    def raise_if_leaking(self, model: str) -> None:
        """Refuse a model that the trainer would train on samples that see each other.

        Raises:
            ConfigError: the difference, and the way out.
        """
        if self.verdict(self.trainer) == "LEAK":
            raise ConfigError(
                f"model {model}: packed samples see each other (logits differ by {self.trainer:.2g}); do not train it "
                "on packed rows: choose another attention_backend, or packing: false with batches of one"
            )


def measure_packing(sequences: Sequence[np.ndarray], config: InspectDataConfig) -> PackingCheck:
    """Load the model in float32, pack the first sequences that fit into one row, and compare.

    Raises:
        ConfigError: no weights to load, or no two sequences that fit into `max_length` together.
    """
    batch = _first_pack(sequences, config.max_length)
    try:
        model = load_causal_lm(config.model_name_or_path, _Float32(config.attention_backend), frozen=True)
    except ValueError as error:
        raise ConfigError(f"check_packing needs a causal LM with its weights: {error}") from error
    batch = batch.to(model.device)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits
    trainer = check_packing(model, batch)
    with own_attention(model):
        naive = check_packing(model, batch, {"position_ids": batch.position_ids})
    return PackingCheck(
        samples=batch.num_samples,
        tokens=batch.num_tokens,
        largest_logit=float(logits.abs().max()),
        trainer=trainer,
        own_attention=naive,
    )


@dataclass(frozen=True, slots=True)
class _Float32:
    """The arithmetic in which a leak is told from rounding."""

    attention_backend: str | None
    dtype: str = "float32"
    bf16: bool = False
    device: str = "auto"


def _first_pack(sequences: Sequence[np.ndarray], max_length: int) -> PackedBatch:
    """The first sequences that fit into `max_length` tokens side by side."""
    chosen: list[np.ndarray] = []
    for ids in sequences:
        if len(chosen) < PACKED_SAMPLES and sum(map(len, chosen)) + len(ids) <= max_length:
            chosen.append(ids)
    if len(chosen) < 2:
        raise ConfigError(
            f"check_packing: no two of {len(sequences)} samples fit into max_length {max_length} together; raise it"
        )
    return pack_samples([{"input_ids": ids} for ids in chosen])


def _rows(config: InspectDataConfig) -> list[Row]:
    return read_rows(
        config.dataset_name, kind=config.kind, on_bad_row=config.on_bad_row, columns=config.dataset_columns
    )


def _counts_table(rows: Sequence[Row]) -> Table:
    table = Table("source", "category", "rows", title="rows", title_justify="left")
    for (source, category), count in Counter((row["source"], row["category"]) for row in rows).most_common(30):
        table.add_row(Text(source), Text(category), f"{count:,}")
    return table
