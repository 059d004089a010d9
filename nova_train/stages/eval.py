"""Score saved models on held-out prompts and write the report.

Every model answers the same prompts with the same random numbers at every temperature, so that differences are paired.
Beside the true score (the reward functions' sum) stands a reward model's, with its accuracy on held-out pairs; a PAS
model is compared with and without on prompts of its own; training runs give their curves. What comes out:

    results.json     the score of every prompt: enough to compute any interval again, and to pool runs (`pool`)
    report.md        tables and plots, made from results.json by `nova_train.report`
    answers/         what each model said, one JSON Lines file per model
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import AutoModelForSequenceClassification

from nova_kernels.integrations.transformers import use_varlen_attention
from nova_train import report
from nova_train.augment import PromptAugmenter
from nova_train.chat import Chat
from nova_train.config import ConfigError, build_config, fingerprint, identity
from nova_train.datasets import read_rows
from nova_train.evaluate import Estimate, Evaluation, PairScores, evaluate_model, score_pairs, temperature_name
from nova_train.metrics import read_metrics
from nova_train.model import load_plain_causal_lm, load_tokenizer
from nova_train.rewards import NamedReward, check_same_tokens, load_reward_functions, score_sequences
from nova_train.samples import Pair, Prompt, preference_pairs, prompts
from nova_train.state import claim_folder, finished_fingerprint, mark_finished

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmenterConfig:
    """The key `augmenter`: a PAS model in front of other models."""

    model: str  # folder written by `nova-train pas`
    dataset_name: list[str]  # underspecified prompts, with the columns that the reward functions need
    answer_models: list[str] | None = None  # names out of `models`; None: all
    keywords_column: str | None = None  # column with a list of search keywords; None: without retrieval
    category_column: str | None = None  # column that the report's categories come from; None: category


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Keys of `nova-train eval`."""

    output_dir: str
    models: dict[str, str] = field(default_factory=dict)  # name in the report -> folder, in the report's order
    dataset_name: list[str] = field(default_factory=list)  # held-out prompts
    reward_funcs: list[str] = field(default_factory=list)  # module:function or file.py:function; their sum scores
    baselines: dict[str, list[str]] = field(default_factory=dict)  # model -> models that it is compared with
    temperatures: list[float] = field(default_factory=lambda: [1.0, 0.7, 0.0])  # 0: greedy
    samples_per_prompt: int = 1  # answers per prompt; greedy has one
    reward_model: str | None = None  # learned score beside the true one
    pairs: list[str] = field(default_factory=list)  # held-out preference rows for the reward model
    augmenter: dict[str, Any] | None = None  # keys of AugmenterConfig
    training_runs: dict[str, str] = field(default_factory=dict)  # name -> output_dir with a metrics.jsonl
    pool: list[str] = field(default_factory=list)  # results.json of other seeds: report the pooled differences as well
    max_length: int = 4096  # tokens of a prompt, and of a pair
    max_completion_length: int = 256  # tokens
    batch_size: int = 256  # answers per generation batch
    on_bad_row: Literal["error", "skip"] = "error"
    dataset_columns: dict[str, str] = field(default_factory=dict)  # our column name -> theirs, or a text with {theirs}
    seed: int = 0
    num_threads: int = 1  # CPU threads
    disable_progress: bool = False

    def __post_init__(self) -> None:
        if not self.models and not self.pool:
            raise ConfigError("models is empty: name at least one saved model (or give pool: results.json files)")
        for key in ("dataset_name", "reward_funcs", "temperatures") if self.models else ():
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty: models need prompts, functions that score answers and temperatures")
        for name, others in self.baselines.items():
            if missing := [n for n in (name, *others) if n not in self.models]:
                raise ConfigError(f"baselines.{name}: {missing[0]!r} is not under models {list(self.models)}")
        if self.pairs and self.reward_model is None:
            raise ConfigError(f"pairs {self.pairs} need a reward_model to score them")
        augmenter = self.augmenter_config()
        wanted = (augmenter.answer_models or []) if augmenter is not None else []
        if missing := [n for n in wanted if n not in self.models]:
            raise ConfigError(f"augmenter.answer_models: {missing[0]!r} is not under models {list(self.models)}")
        if cold := [t for t in self.temperatures if t < 0]:
            raise ConfigError(f"temperatures must be at least 0 (greedy), got {cold[0]}")
        for key in ("samples_per_prompt", "max_length", "max_completion_length", "batch_size", "num_threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")

    def augmenter_config(self) -> AugmenterConfig | None:
        """The key `augmenter`, checked."""
        return None if self.augmenter is None else build_config(AugmenterConfig, self.augmenter, where="augmenter")


def run(config: EvalConfig) -> Path:
    """Evaluate, write results.json and the report, print the tables; returns the output folder.

    A finished evaluation is left as it is, and its tables are printed again.
    """
    folder = Path(config.output_dir)
    claim_folder(config, "eval")
    console = Console()
    if finished_fingerprint(folder) is None:
        torch.set_num_threads(config.num_threads)
        results = collect_results(config)
        (folder / "results.json").write_text(json.dumps(results, allow_nan=False), encoding="utf-8")
        report.write_report(folder, results, pooled=[Path(path) for path in config.pool])
        mark_finished(folder, fingerprint({"stage": "eval", **identity(config)}), prompts=len(results["keys"]))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for table in report.console_tables(results):
        console.print(table)
    console.print(f"report: {folder / 'report.md'}")
    return folder


def collect_results(config: EvalConfig) -> dict[str, Any]:
    """Everything the report is made of, as plain JSON (`nova_train.report` states the form)."""
    functions = load_reward_functions(config.reward_funcs)
    names = [temperature_name(t) for t in config.temperatures]
    results: dict[str, Any] = {"seed": config.seed, "temperatures": names if config.models else [], "keys": []}
    results |= {"categories": [], "models": {}, "baselines": config.baselines}
    scorer, results["reward_model"] = _measure_reward_model(config)
    augmented = _Augmented.load(config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=config.disable_progress) as bar:
        task = bar.add_task("eval", total=len(config.models))
        for name, path in config.models.items():
            bar.update(task, description=f"eval {name}")
            tokenizer = load_tokenizer(path)
            if scorer is not None and config.reward_model is not None:
                check_same_tokens(tokenizer, load_tokenizer(config.reward_model), config.reward_model)
            chat, model = Chat(tokenizer), load_plain_causal_lm(path)
            asked = _read_prompts(config.dataset_name, chat, config)
            found = _evaluate(model, chat, asked, functions, config, scorer)
            results["keys"] = [prompt.key for prompt in asked]
            results["categories"] = [prompt.category for prompt in asked]
            results["models"][name] = _as_json(found)
            _write_answers(Path(config.output_dir) / "answers" / f"{name}.jsonl", asked, found)
            if augmented is not None and name in augmented.answer_models:
                augmented.evaluate(name, model, chat, functions, config)
            bar.advance(task)
    results["augmentation"] = None if augmented is None else augmented.results
    results["curves"] = {name: _curves(path) for name, path in config.training_runs.items()}
    return results


class _Augmented:
    """Underspecified prompts, answered by other models with and without a PAS model in front."""

    def __init__(self, settings: AugmenterConfig, config: EvalConfig) -> None:
        self.answer_models = list(config.models) if settings.answer_models is None else settings.answer_models
        self._rows = read_rows(
            settings.dataset_name, kind="prompt", on_bad_row=config.on_bad_row, columns=config.dataset_columns
        )
        self._categories = _column(self._rows, settings.category_column or "category")
        plain = [row["prompt"] for row in self._rows]
        keywords = None if settings.keywords_column is None else _column(self._rows, settings.keywords_column)
        self._prompts = PromptAugmenter.load(settings.model).augment(plain, keywords)
        first = [{"before": _text(a), "after": _text(b)} for a, b in zip(plain[:3], self._prompts[:3], strict=True)]
        self.results: dict[str, Any] = {"keys": [], "categories": [], "examples": first, "models": {}}

    @classmethod
    def load(cls, config: EvalConfig) -> _Augmented | None:
        settings = config.augmenter_config()
        return None if settings is None else cls(settings, config)

    def evaluate(
        self, name: str, model: nn.Module, chat: Chat, functions: Sequence[NamedReward], config: EvalConfig
    ) -> None:
        """Both ways with the same random numbers: the longer prompt keeps the key of the one it was made from."""
        without = prompts(self._rows, chat, config.max_length)
        longer = [{**row, "prompt": text} for row, text in zip(self._rows, self._prompts, strict=True)]
        with_ = [
            replace(prompt, key=plain.key)
            for prompt, plain in zip(prompts(longer, chat, config.max_length), without, strict=True)
        ]
        self.results["keys"] = [prompt.key for prompt in without]
        self.results["categories"] = [str(category) for category in self._categories]
        self.results["models"][name] = {
            "without": _as_json(_evaluate(model, chat, without, functions, config, None)),
            "with": _as_json(_evaluate(model, chat, with_, functions, config, None)),
        }


def _evaluate(
    model: nn.Module,
    chat: Chat,
    asked: Sequence[Prompt],
    functions: Sequence[NamedReward],
    config: EvalConfig,
    scorer: nn.Module | None,
) -> Evaluation:
    return evaluate_model(
        model,
        chat,
        asked,
        functions,
        temperatures=config.temperatures,
        max_completion_length=config.max_completion_length,
        seed=config.seed,
        samples_per_prompt=config.samples_per_prompt,
        batch_size=config.batch_size,
        reward_model=scorer,
    )


def _measure_reward_model(config: EvalConfig) -> tuple[nn.Module | None, dict[str, Any] | None]:
    """The reward model ready for packed scoring, and what it does on the held-out pairs.

    The accuracy goes through `AutoModelForSequenceClassification.from_pretrained` and the model's own forward, as any
    user would read it; the largest difference to the packed scorer that GRPO uses is reported beside it.
    """
    if config.reward_model is None:
        return None, None
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(config.reward_model).eval()
    model.requires_grad_(False)
    if not config.pairs:
        use_varlen_attention(model)
        return model, {}
    chat = Chat(load_tokenizer(config.reward_model))
    pairs = preference_pairs(
        read_rows(config.pairs, kind="preference", on_bad_row=config.on_bad_row, columns=config.dataset_columns),
        chat,
        config.max_length,
    )
    measured = score_pairs(model, pairs)
    use_varlen_attention(model)
    packed = score_sequences(model, [pair.chosen for pair in pairs]).numpy()
    facts = _pair_facts(measured, pairs)
    return model, facts | {"packed_difference": float(np.abs(packed - measured.chosen).max())}


def _pair_facts(measured: PairScores, pairs: Sequence[Pair]) -> dict[str, Any]:
    def plain(found: Estimate | None) -> list[float | None] | None:
        return None if found is None else [found.mean, _finite(found.half_width), found.count]

    return {
        "accuracy": plain(measured.accuracy),
        "correlation": plain(measured.correlation),
        "margins": [round(float(margin), 5) for margin in measured.margins],
        "categories": [pair.category for pair in pairs],
    }


def _read_prompts(names: Sequence[str], chat: Chat, config: EvalConfig) -> list[Prompt]:
    rows = read_rows(names, kind="prompt", on_bad_row=config.on_bad_row, columns=config.dataset_columns)
    return prompts(rows, chat, config.max_length)


def _as_json(found: Evaluation) -> dict[str, Any]:
    return {
        "scores": found.scores,
        "learned": found.learned,
        "by_function": {t: {f: _finite(mean) for f, mean in means.items()} for t, means in found.by_function.items()},
        "tokens": found.tokens,
        "finished": found.finished,
    }


def _write_answers(path: Path, asked: Sequence[Prompt], found: Evaluation) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for index, prompt in enumerate(asked):
            answers = {name: texts[index] for name, texts in found.answers.items()}
            scores = {name: values[index] for name, values in found.scores.items()}
            row = {"prompt": _text(prompt.prompt), "category": prompt.category, "answers": answers, "scores": scores}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _curves(folder: str) -> dict[str, list[list[float]]]:
    """Each metric of a run as [step, value] pairs."""
    curves: dict[str, list[list[float]]] = {}
    lines = read_metrics(folder)
    if not lines:
        log.warning("training_runs: %s has no metrics.jsonl; its curves are left out", folder)
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                curves.setdefault(name, []).append([line["step"], value])
    return curves


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    for number, row in enumerate(rows, 1):
        if name not in row:
            raise ConfigError(f"augmenter: row {number} has no column {name!r}, only {', '.join(row)}")
    return [row[name] for row in rows]


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else value


def _text(prompt: Any) -> str:
    """A prompt for people: the text itself, or the messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
