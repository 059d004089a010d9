"""The report of an evaluation: tables and plots from results.json, and several seeds' results pooled.

results.json (written by `nova_train.stages.eval`; T is a temperature as text, lists are in the order of `keys`):

    seed, temperatures [T]
    keys [prompt key], categories [category of each prompt]
    models        {name: {scores {T: [..]}, learned {T: [..]}, by_function {T: {function: mean}}, tokens {T: mean},
                  finished {T: share}}}
    baselines     {name: [names it is compared with]}
    reward_model  null, or {accuracy, correlation: [mean, half width, count]; margins [..], categories [..],
                  packed_difference}
    augmentation  null, or {keys, categories, examples, models {name: {without, with: as in models}}}
    curves        {run: {metric: [[step, value], ..]}}

`python -m nova_train.report a/results.json b/results.json` prints the pooled table.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table as RichTable

from nova_train.config import ConfigError
from nova_train.evaluate import Estimate, calibration, category_estimates, estimate, rank_correlation, sampling_label

Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """A table for people, in Markdown and in the terminal; the first column is text."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        align = ["---"] + ["---:"] * (len(self.header) - 1)
        rows = [[cell.replace("|", "/") for cell in row] for row in (self.header, align, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return f"### {self.title}\n\n" + "\n".join(lines) + "\n"

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired differences of two sets of answers at one temperature."""

    subject: str  # "models" or "augmentation"
    label: str
    temperature: str
    values: np.ndarray  # fp64 [prompts]
    categories: list[str]
    keys: list[str]

    def over_prompts(self) -> Estimate:
        return estimate(self.values, clusters=self.keys)

    def over_categories(self) -> Estimate:
        return estimate(self.values, strata=self.categories, clusters=self.keys)


def comparisons(results: Results) -> Iterator[Comparison]:
    """Every paired difference of a results.json: model minus baseline, and with minus without augmentation."""
    for temperature in results["temperatures"]:
        for name, others in results["baselines"].items():
            for other in others:
                new, old = (results["models"][n]["scores"][temperature] for n in (name, other))
                difference = np.subtract(new, old)
                yield Comparison(
                    "models", f"{name} - {other}", temperature, difference, results["categories"], results["keys"]
                )
        augmentation = results.get("augmentation") or {"models": {}}
        for name, both in augmentation["models"].items():
            difference = np.subtract(both["with"]["scores"][temperature], both["without"]["scores"][temperature])
            categories, keys = augmentation["categories"], augmentation["keys"]
            yield Comparison("augmentation", f"{name} with PAS - without", temperature, difference, categories, keys)


def console_tables(results: Results) -> list[RichTable]:
    """The tables for the terminal: scores, differences, reward model, augmentation."""
    return [table.rich() for table in _headline(results)]


def write_report(folder: str | Path, results: Results, *, pooled: Sequence[Path] = ()) -> Path:
    """Write report.md and its plots into `folder`; returns the path of report.md.

    Without matplotlib the report says so and has no plots.
    """
    folder = Path(folder)
    parts = ["# Evaluation\n"]
    if results["models"]:
        count, categories = len(results["keys"]), len(dict.fromkeys(results["categories"]))
        parts.append(
            f"{count:,} held-out prompts in {categories} {'category' if categories == 1 else 'categories'}, sampling "
            f"seed {results['seed']}. ± is a 95 % interval over prompts; it does not contain the spread between "
            "training runs. Differences are paired (same prompts, same random numbers); * marks those whose interval "
            "excludes zero. T is the sampling temperature.\n"
        )
    parts += [table.markdown() for table in _headline(results)]
    parts.append(_plots(folder, results))
    parts += [table.markdown() for table in _details(results)]
    parts += _examples(results)
    if pooled:
        parts.append(pool(pooled))
    path = folder / "report.md"
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return path


def pool(paths: Sequence[str | Path]) -> str:
    """Paired differences of several seeds' results.json as Markdown.

    The pooled interval is over prompts (a prompt that several seeds share counts as one cluster); the spread is the
    standard deviation of the seeds' means, and "all seeds agree" says whether every seed has the sign of the mean.

    Raises:
        ConfigError: no files, an unreadable one, or files that compare different things.
    """
    runs = [_read_results(Path(path)) for path in paths]
    if not runs:
        raise ConfigError("pool: expected at least one results.json, got none")
    tables = [{(c.label, c.temperature): c for c in comparisons(run)} for run in runs]
    for path, table in zip(paths, tables, strict=True):
        if table.keys() != tables[0].keys():
            odd = sorted(table.keys() ^ tables[0].keys())[0]
            raise ConfigError(
                f"pool: {path} and {paths[0]} compare different things: {odd[0]!r} at T = {odd[1]} is in one only; "
                "give results of one recipe with different seeds"
            )
    seeds = [f"seed {run['seed']}" for run in runs]
    found = []
    for title, by_category in (("Pooled differences, over prompts", False), ("Pooled, mean over categories", True)):
        if by_category and all(len(set(run["categories"])) < 2 for run in runs):
            continue
        rows = [_pooled_row(key, [table[key] for table in tables], by_category) for key in tables[0]]
        header = ["difference", "sampling", *seeds, "pooled", "spread of seeds", "all seeds agree"]
        found.append(Table(title, header, rows).markdown())
    accuracies = [run["reward_model"]["accuracy"] for run in runs if (run.get("reward_model") or {}).get("accuracy")]
    if len(accuracies) == len(runs):
        row = ["pair accuracy", *(_plain(Estimate(*_numbers(accuracy))) for accuracy in accuracies)]
        found.append(Table("Reward model", ["", *seeds], [row]).markdown())
    return "\n".join(found)


def _headline(results: Results) -> list[Table]:
    """What the evaluation is for, in a few tables."""
    temperatures = [sampling_label(t) for t in results["temperatures"]]
    tables = []
    if results["models"]:
        rows = [
            [name, *(_plain(estimate(found["scores"][t])) for t in results["temperatures"])]
            for name, found in results["models"].items()
        ]
        tables.append(Table("Score", ["model", *temperatures], rows))
    if several := len(set(results["categories"])) > 1:
        rows = [
            [
                name,
                *(_plain(estimate(found["scores"][t], strata=results["categories"])) for t in results["temperatures"]),
            ]
            for name, found in results["models"].items()
        ]
        tables.append(Table("Score, mean over categories", ["model", *temperatures], rows))
    differences = _difference_rows(results, by_category=False)
    if differences:
        tables.append(Table("Paired differences", ["difference", *temperatures], differences))
    if several and differences:
        rows = _difference_rows(results, by_category=True)
        tables.append(Table("Paired differences, mean over categories", ["difference", *temperatures], rows))
    if table := _reward_model_table(results):
        tables.append(table)
    if augmentation := results.get("augmentation"):
        rows = [
            [f"{name}, {way} PAS", *(_plain(estimate(both[way]["scores"][t])) for t in results["temperatures"])]
            for name, both in augmentation["models"].items()
            for way in ("without", "with")
        ]
        title = f"Prompt augmentation on {len(augmentation['keys']):,} underspecified prompts"
        tables.append(Table(title, ["model", *temperatures], rows))
    return tables


def _details(results: Results) -> Iterator[Table]:
    """Categories, the single reward functions, the learned score, lengths."""
    models, temperatures = results["models"], results["temperatures"]
    yield from _category_tables(results)
    for t in temperatures:
        functions = list(next(iter(models.values()))["by_function"][t]) if models else []
        if len(functions) > 1:
            rows = [[name, *(_number(found["by_function"][t][f]) for f in functions)] for name, found in models.items()]
            yield Table(f"Mean of each reward function, {sampling_label(t)}", ["model", *functions], rows)
    header = ["model", *(sampling_label(t) for t in temperatures)]
    learned = {name: found for name, found in models.items() if found["learned"]}
    if learned:
        rows = [
            [name, *(_plain(estimate(found["learned"][t])) for t in temperatures)] for name, found in learned.items()
        ]
        yield Table("Learned score (reward model)", header, rows)
        rows = [
            [name, *(_plain(rank_correlation(found["learned"][t], found["scores"][t])) for t in temperatures)]
            for name, found in learned.items()
        ]
        yield Table("Rank correlation of learned and true score, over a model's own answers", header, rows)
    if models:
        rows = [
            [name, *(f"{found['tokens'][t]:.1f}, {100 * found['finished'][t]:.1f} %" for t in temperatures)]
            for name, found in models.items()
        ]
        yield Table("Answer length in tokens, and share that ended by itself", header, rows)


def _category_tables(results: Results) -> Iterator[Table]:
    """Scores and paired differences of each category, one table per temperature."""
    differences = list(comparisons(results))
    groups = [("models", results["categories"], "Score per category", results["models"])]
    if augmentation := results.get("augmentation"):
        title = "Gain of prompt augmentation per category"
        groups.append(("augmentation", augmentation["categories"], title, {}))
    for subject, categories, title, models in groups:
        names = list(dict.fromkeys(categories))
        for t in results["temperatures"] if len(names) > 1 else ():
            rows = []
            for model, found in models.items():
                means = category_estimates(found["scores"][t], categories)
                rows.append([model, *(_plain(means[name]) for name in names)])
            for compared in differences:
                if compared.temperature == t and compared.subject == subject:
                    means = category_estimates(compared.values, categories)
                    rows.append([compared.label, *(_signed(means[name]) for name in names)])
            yield Table(f"{title}, {sampling_label(t)}", ["", *names], rows)


def _difference_rows(results: Results, *, by_category: bool) -> list[list[str]]:
    """One row per comparison; augmentation is left out of the means over categories."""
    rows: dict[str, list[str]] = {}
    for compared in comparisons(results):
        if by_category and compared.subject != "models":
            continue
        found = compared.over_categories() if by_category else compared.over_prompts()
        rows.setdefault(compared.label, [compared.label]).append(_signed(found))
    return list(rows.values())


def _pooled_row(key: tuple[str, str], parts: Sequence[Comparison], by_category: bool) -> list[str]:
    means = [(part.over_categories() if by_category else part.over_prompts()).mean for part in parts]
    pooled = estimate(
        np.concatenate([part.values for part in parts]),
        strata=[category for part in parts for category in part.categories] if by_category else None,
        clusters=[name for part in parts for name in part.keys],
    )
    spread = f"{np.std(means, ddof=1):.3f}" if len(means) > 1 else "-"
    agree = all(mean > 0 for mean in means) or all(mean < 0 for mean in means)
    return [
        key[0],
        sampling_label(key[1]),
        *(f"{mean:+.3f}" for mean in means),
        _signed(pooled),
        spread,
        "yes" if agree else "no",
    ]


def _reward_model_table(results: Results) -> Table | None:
    found = results.get("reward_model") or {}
    if not found.get("accuracy"):
        return None
    accuracy = Estimate(*_numbers(found["accuracy"]))
    rows = [["pair accuracy", _plain(accuracy)], ["held-out pairs", f"{accuracy.count:,}"]]
    if found.get("correlation"):
        rows.append(["rank correlation with absolute scores", _plain(Estimate(*_numbers(found["correlation"])))])
    rows.append(["largest difference to the packed scorer", f"{found['packed_difference']:.1e}"])
    gaps = [abs(predicted - observed) * n for predicted, observed, n in calibration(found["margins"])]
    rows.append(["calibration error (mean of predicted - observed)", f"{sum(gaps) / accuracy.count:.3f}"])
    return Table("Reward model, through AutoModelForSequenceClassification", ["", "value"], rows)


def _examples(results: Results) -> list[str]:
    augmentation = results.get("augmentation")
    if not augmentation or not augmentation["examples"]:
        return []
    quoted = ["### Augmented prompts\n"]
    for example in augmentation["examples"]:
        lines = [*example["after"].split("\n"), ""]
        quoted.append("\n".join(f"> {line}  " for line in lines[:-1]) + "\n")
    return quoted


def _plots(folder: Path, results: Results) -> str:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return "*No plots: matplotlib is not installed (`pip install nova-kernels[report]`).*\n"
    from nova_train import plots

    files = plots.draw(folder, results)
    return "\n".join(f"![{title}]({name})\n" for title, name in files)


def _read_results(path: Path) -> Results:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"pool: {path}: expected a results.json of nova-train eval: {error}") from error
    if not isinstance(found, dict) or not {"seed", "models", "baselines"} <= found.keys():
        raise ConfigError(f"pool: {path} is not a results.json of nova-train eval: it lacks seed, models or baselines")
    return found


def _numbers(saved: Sequence[float | None]) -> tuple[float, float, int]:
    mean, half_width, count = saved
    return float(mean or 0.0), math.nan if half_width is None else float(half_width), int(count or 0)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _plain(found: Estimate) -> str:
    return f"{found.mean:.3f}" + ("" if math.isnan(found.half_width) else f" ± {found.half_width:.3f}")


def _signed(found: Estimate) -> str:
    half = "" if math.isnan(found.half_width) else f" ± {found.half_width:.3f}"
    return f"{found.mean:+.3f}{half}{'*' if found.excludes_zero else ''}"


if __name__ == "__main__":
    sys.stdout.write(pool(sys.argv[1:]))
