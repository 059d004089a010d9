"""Plots of an evaluation, drawn from results.json (its form: nova_train.report). Needs matplotlib (extra [report])."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nova_train.evaluate import calibration, category_estimates, estimate, sampling_label

Results = Mapping[str, Any]
Curve = Sequence[Sequence[float]]  # [step, value] pairs

LEARNED = "rewards/reward_model/mean"


def draw(folder: Path, results: Results) -> list[tuple[str, str]]:
    """Write every plot that the results have data for; returns (title, file name) of each."""
    drawn: list[tuple[str, str]] = []

    def save(figure: Figure, title: str, name: str) -> None:
        figure.savefig(folder / name, dpi=120)
        drawn.append((title, name))

    if results["models"]:
        save(_scores(results), "Score of each model", "scores.png")
        if len(set(results["categories"])) > 1:
            save(_by_category(results), "Score per category", "categories.png")
    if figure := _reward_model(results):
        save(figure, "Reward model: calibration, and learned against true score", "calibration.png")
    for name, curves in results.get("curves", {}).items():
        if figure := _training(name, curves):
            save(figure, f"Training of {name}", f"curve-{name.replace('/', '-')}.png")
    return drawn


def _figure(columns: int = 1, *, width: float = 6.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, so that no display and no global state is involved."""
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _scores(results: Results) -> Figure:
    """Models side by side in the order of the recipe, one line per temperature."""
    models = results["models"]
    figure, (axis,) = _figure(width=max(6.0, 1.0 * len(models) + 2))
    places = np.arange(len(models))
    for number, temperature in enumerate(results["temperatures"]):
        found = [estimate(model["scores"][temperature]) for model in models.values()]
        axis.errorbar(
            places + 0.06 * (number - (len(results["temperatures"]) - 1) / 2),
            [one.mean for one in found],
            yerr=[np.nan_to_num(one.half_width) for one in found],
            marker="o",
            capsize=3,
            linewidth=1,
            label=sampling_label(temperature),
        )
    axis.set_xticks(places, list(models), rotation=20, ha="right")
    axis.set_ylabel("score, 95 % interval")
    axis.legend()
    return figure


def _by_category(results: Results) -> Figure:
    """One panel per temperature: categories below, one marker per model."""
    temperatures, categories = results["temperatures"], list(dict.fromkeys(results["categories"]))
    figure, axes = _figure(len(temperatures), width=max(5.0, 0.7 * len(categories) + 1))
    models = results["models"]
    for axis, temperature in zip(axes, temperatures, strict=True):
        for number, (name, model) in enumerate(models.items()):
            found = category_estimates(model["scores"][temperature], results["categories"])
            axis.errorbar(
                np.arange(len(categories)) + 0.6 * ((number + 0.5) / len(models) - 0.5),
                [found[category].mean for category in categories],
                yerr=[np.nan_to_num(found[category].half_width) for category in categories],
                fmt="o",
                markersize=4,
                capsize=2,
                label=name,
            )
        axis.set_xticks(np.arange(len(categories)), categories, rotation=30, ha="right")
        axis.set_title(sampling_label(temperature))
    axes[0].set_ylabel("score, 95 % interval")
    axes[-1].legend(fontsize="small")
    return figure


def _reward_model(results: Results) -> Figure | None:
    """Observed against predicted pair accuracy, and the mean true score in tenths of the learned one."""
    margins = (results.get("reward_model") or {}).get("margins")
    learned = {name: model for name, model in results["models"].items() if model["learned"]}
    if not margins and not learned:
        return None
    figure, (left, right) = _figure(2)
    if margins:
        predicted, observed, counts = (np.array(column) for column in zip(*calibration(margins), strict=True))
        error = 1.96 * np.sqrt(observed * (1 - observed) / counts)
        left.errorbar(predicted, observed, yerr=error, marker="o", capsize=3)
    left.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", linewidth=1)
    left.set_xlabel("predicted pair accuracy, sigmoid(|margin|)")
    left.set_ylabel("observed pair accuracy")
    temperature = results["temperatures"][0] if results["temperatures"] else ""
    for name, model in learned.items():
        scores = np.array([model["learned"][temperature], model["scores"][temperature]])
        parts = np.array_split(scores[:, np.argsort(scores[0], kind="stable")], 10, axis=1)
        means = np.array([part.mean(axis=1) for part in parts if part.size])
        right.plot(means[:, 0], means[:, 1], marker="o", markersize=4, label=name)
    right.set_xlabel(f"learned score of own answers, in tenths ({sampling_label(temperature)})")
    right.set_ylabel("mean true score")
    if learned:
        right.legend(fontsize="small")
    return figure


def _training(name: str, curves: Mapping[str, Curve]) -> Figure | None:
    """RL runs: true and learned reward over steps and over the KL; other runs: losses and accuracy."""
    true = {key: curve for key, curve in curves.items() if _is_true_reward(key)}
    if "kl" in curves and (true or LEARNED in curves):
        return _rl(name, true, curves)
    losses = {key: curve for key, curve in curves.items() if key in ("loss", "eval_loss")}
    accuracies = {key: curve for key, curve in curves.items() if key in ("accuracy", "eval_accuracy")}
    panels = [panel for panel in (losses, accuracies) if panel]
    if not panels:
        return None
    figure, axes = _figure(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        for key, curve in panel.items():
            _line(axis, curve, key)
        axis.set_xlabel("step")
        axis.legend()
    axes[0].set_title(name)
    return figure


def _rl(name: str, true: Mapping[str, Curve], curves: Mapping[str, Curve]) -> Figure:
    figure, (rewards, kl, against) = _figure(3, width=5.0)
    for key, curve in true.items():
        _line(rewards, curve, _reward_name(key))
        steps, values = _at_common_steps(curves["kl"], curve)
        against.plot(_smooth(steps), _smooth(values), label=_reward_name(key))
    if LEARNED in curves:
        for axis, xs in ((rewards, None), (against, curves["kl"])):
            other = axis.twinx()
            if xs is None:
                _line(other, curves[LEARNED], "learned", color="tab:red")
            else:
                steps, values = _at_common_steps(xs, curves[LEARNED])
                other.plot(_smooth(steps), _smooth(values), color="tab:red", label="learned")
            other.set_ylabel("learned reward", color="tab:red")
    _line(kl, curves["kl"], "KL to the reference")
    for axis, title, label in (
        (rewards, f"{name}: reward", "step"),
        (kl, "KL per token", "step"),
        (against, "reward against KL", "KL per token"),
    ):
        axis.set_title(title)
        axis.set_xlabel(label)
    rewards.set_ylabel("true reward")
    if true:
        rewards.legend(loc="lower right")
    return figure


def _line(axis: Axes, curve: Curve, label: str, color: str | None = None) -> None:
    """The values as they are, faint, and their running mean."""
    steps, values = np.array(curve, dtype=np.float64).T
    (line,) = axis.plot(steps, values, alpha=0.25, linewidth=1, color=color)
    axis.plot(steps, _smooth(values), color=line.get_color(), label=label)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a tenth of the points, shorter at the ends."""
    place = np.arange(len(values))
    half = np.minimum(np.minimum(place, place[::-1]), len(values) // 20)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[place + half + 1] - total[place - half]) / (2 * half + 1)


def _at_common_steps(x: Curve, y: Curve) -> tuple[np.ndarray, np.ndarray]:
    at = {point[0]: point[1] for point in y}
    common = [(point[1], at[point[0]]) for point in x if point[0] in at]
    return np.array([p[0] for p in common]), np.array([p[1] for p in common])


def _is_true_reward(key: str) -> bool:
    return key.startswith(("rewards/", "eval_rewards/")) and key.endswith("/mean") and not key.endswith(LEARNED)


def _reward_name(key: str) -> str:
    name = key.removesuffix("/mean")
    return (
        f"{name.removeprefix('eval_rewards/')}, held out" if name.startswith("eval_") else name.removeprefix("rewards/")
    )
