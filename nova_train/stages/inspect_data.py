"""Look at data as a stage will see it: counts, token lengths, packs, and a few rows coloured by what is trained.

    nova-train inspect-data --model_name_or_path M --dataset_name train.jsonl --max_length 4096

Nothing is trained and nothing is refused for its length: rows longer than `max_length` are counted.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nova_kernels.packing import plan_packs
from nova_train.chat import Chat
from nova_train.config import ConfigError, write_config
from nova_train.datasets import Row, read_rows
from nova_train.model import load_tokenizer
from nova_train.samples import IGNORE_INDEX, preference_pairs, prompts, sft_samples

STATISTICS_FILE = "statistics.json"
PERCENTILES = (5, 25, 50, 75, 95, 99)

# Neighbouring tokens alternate between two shades, so that their borders show.
_TRAINED = ("black on green", "black on bright_green")
_CONTEXT = ("dim", "dim underline")


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectDataConfig:
    """Keys of `nova-train inspect-data`."""

    model_name_or_path: str  # for its tokenizer
    dataset_name: list[str]
    dataset_columns: dict[str, str] = field(default_factory=dict)  # our name -> their column, or text with {column}
    kind: Literal["sft", "preference", "prompt"] = "sft"  # what the rows are for
    on_bad_row: Literal["error", "skip"] = "error"
    max_length: int = 4096  # tokens per sample, and per pack
    rows_shown: int = 3
    tokens_shown: int = 400  # per row
    output_dir: str | None = None  # also write statistics.json there

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


def coloured(chat: Chat, ids: Sequence[int], mask: Sequence[bool], limit: int) -> Text:
    """The first `limit` tokens as text: trained on green, context dim, neighbours in alternating shades."""
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


def run(config: InspectDataConfig, *, console: Console | None = None) -> Path:
    """Print statistics and coloured rows; returns statistics.json's folder, or the first data set's path."""
    console = Console() if console is None else console
    chat = Chat(load_tokenizer(config.model_name_or_path))
    rows = read_rows(
        config.dataset_name, kind=config.kind, on_bad_row=config.on_bad_row, columns=config.dataset_columns
    )
    console.print(_counts_table(rows))
    report = {"sft": _inspect_sft, "preference": _inspect_preference, "prompt": _inspect_prompts}[config.kind]
    statistics = report(rows, chat, config, console)
    if config.output_dir is None:
        return Path(config.dataset_name[0])
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder / "resolved_config.yaml")
    facts = {name: asdict(value) for name, value in statistics.items()}
    facts["rows"] = {"count": len(rows), **{key: dict(_tally(rows, key)) for key in ("source", "category")}}
    (folder / STATISTICS_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def _inspect_sft(
    rows: Sequence[Row], chat: Chat, config: InspectDataConfig, console: Console
) -> dict[str, TokenStatistics]:
    samples = sft_samples(rows, chat, None, on_bad_row=config.on_bad_row)
    statistics = sample_statistics(samples, max_length=config.max_length)
    console.print(statistics_table(f"supervised samples (masks: {chat.route})", statistics))
    for number, sample in enumerate(samples[: config.rows_shown]):
        _show(console, f"sample {number}", chat, sample["input_ids"], sample["labels"] != IGNORE_INDEX, config)
    return {"samples": statistics}


def _inspect_preference(
    rows: Sequence[Row], chat: Chat, config: InspectDataConfig, console: Console
) -> dict[str, TokenStatistics]:
    pairs = preference_pairs(rows, chat, None, on_bad_row=config.on_bad_row)
    statistics = {}
    for side in ("chosen", "rejected"):
        lengths = [len(getattr(pair, side)) for pair in pairs]
        statistics[side] = token_statistics(lengths, max_length=config.max_length, packing=False)
        console.print(statistics_table(side, statistics[side]))
        scores = [score for pair in pairs if (score := getattr(pair, f"{side}_score")) is not None]
        console.print(
            f"scored: {len(scores):,} of {len(pairs):,}" + (f", mean {np.mean(scores):.3f}" if scores else "")
        )
    for number, pair in enumerate(pairs[: config.rows_shown]):
        for side, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            is_answer = np.arange(ids.size) >= (pair.prompt_length if side == "chosen" else ids.size)
            _show(console, f"pair {number}, {side}", chat, ids, is_answer, config)
    return statistics


def _inspect_prompts(
    rows: Sequence[Row], chat: Chat, config: InspectDataConfig, console: Console
) -> dict[str, TokenStatistics]:
    asked = prompts(rows, chat, None, on_bad_row=config.on_bad_row)
    statistics = token_statistics([len(p.ids) for p in asked], max_length=config.max_length, packing=False)
    console.print(statistics_table("prompts", statistics))
    different = len({p.key for p in asked})
    console.print(f"different prompts: {different:,}; columns for reward functions: {', '.join(asked[0].columns)}")
    for number, prompt in enumerate(asked[: config.rows_shown]):
        _show(console, f"prompt {number}", chat, prompt.ids, [False] * len(prompt.ids), config)
    return {"prompts": statistics}


def _show(console: Console, title: str, chat: Chat, ids: Any, mask: Any, config: InspectDataConfig) -> None:
    console.rule(title)
    console.print(coloured(chat, ids, mask, config.tokens_shown), soft_wrap=True)


def _counts_table(rows: Sequence[Row]) -> Table:
    table = Table("source", "category", "rows", title="rows", title_justify="left")
    for (source, category), count in Counter((row["source"], row["category"]) for row in rows).most_common(30):
        table.add_row(Text(source), Text(category), f"{count:,}")
    return table


def _tally(rows: Sequence[Row], key: str) -> Counter[str]:
    return Counter(row[key] for row in rows)
