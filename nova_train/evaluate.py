"""What a model scores on held-out prompts, with 95 % confidence intervals.

    mean      = sum_i w_i x_i
    var(mean) = sum_strata G/(G-1) sum_clusters ( sum_{i in cluster} w_i (x_i - mean of the stratum) )^2

    over prompts        w_i = 1/n, one stratum
    over categories     w_i = 1/(C n_c), one stratum per category: the mean of the category means, with its own interval
    paired difference   x_i = score of one model minus score of another, same prompt, same random numbers
    pooled over seeds   one cluster per prompt: several measurements of one prompt are not independent

G is the number of clusters in a stratum; with one measurement per prompt this is the usual interval of a mean. The
intervals hold for the prompts: they say nothing of how another training run would come out (pool several seeds).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nova_train.chat import Chat
from nova_train.rewards import NamedReward, call_reward_functions, score_sequences, total_rewards
from nova_train.rollout import generate, sampling_seed
from nova_train.samples import Pair, Prompt

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the half width of its 95 % interval (NaN: too few prompts to tell)."""

    mean: float
    half_width: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width


def estimate(
    values: Sequence[float] | np.ndarray,
    *,
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Mean of `values` with its 95 % normal interval; the equation is at the top of this file.

    Args:
        values: one per measurement, finite.
        strata: the category of each; the result is the mean over categories. None: the mean over measurements.
        clusters: what each was measured on (a prompt's key); None: all independent. A cluster lies in one stratum.

    Raises:
        ValueError: no values, values that are not finite, or lists of other lengths.
    """
    x = np.asarray(values, dtype=np.float64)
    labels: Sequence[Hashable] = [0] * len(x) if strata is None else strata
    units: Sequence[Hashable] = range(len(x)) if clusters is None else clusters
    if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"estimate: expected a list of finite values, at least one, got {x.size} in {list(x.shape)}")
    if not len(x) == len(labels) == len(units):
        raise ValueError(f"estimate: {len(x)} values, {len(labels)} strata, {len(units)} clusters")
    stratum, group = _numbered(labels), _numbered(units)
    num_strata = int(stratum.max()) + 1
    sizes = np.bincount(stratum)
    means = np.bincount(stratum, weights=x) / sizes
    residuals = (x - means[stratum]) / (num_strata * sizes[stratum])
    sums = np.bincount(group, weights=residuals)
    home = np.zeros(len(sums), dtype=np.int64)
    home[group] = stratum
    groups = np.bincount(home, minlength=num_strata).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (groups / (groups - 1) * np.bincount(home, weights=sums**2, minlength=num_strata)).sum()
    return Estimate(float(means.mean()), Z95 * math.sqrt(variance) if variance >= 0 else math.nan, len(x))


def category_estimates(values: Sequence[float] | np.ndarray, categories: Sequence[str]) -> dict[str, Estimate]:
    """The mean of each category, in the order of first appearance."""
    x = np.asarray(values, dtype=np.float64)
    chosen = {
        name: [i for i, category in enumerate(categories) if category == name] for name in dict.fromkeys(categories)
    }
    return {name: estimate(x[places]) for name, places in chosen.items()}


def rank_correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Estimate:
    """Spearman's correlation, ties by their mean rank; 0 where one side is constant.

    The interval is Fisher's, with the variance (1 + r^2 / 2) / (n - 3) of Bonett and Wright (2000), eq. 12; its two
    halves differ, the half width is their mean.
    """
    x, y = _ranks(np.asarray(a, dtype=np.float64)), _ranks(np.asarray(b, dtype=np.float64))
    if x.shape != y.shape or x.size < 2:
        raise ValueError(f"rank_correlation: expected two lists of one length, at least 2, got {x.size} and {y.size}")
    spread = float(x.std() * y.std())
    r = float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0 else 0.0
    r = min(max(r, -1.0), 1.0)
    if x.size <= 3 or abs(r) == 1:
        return Estimate(r, math.nan if x.size <= 3 else 0.0, x.size)
    delta = Z95 * math.sqrt((1 + r * r / 2) / (x.size - 3))
    half = (math.tanh(math.atanh(r) + delta) - math.tanh(math.atanh(r) - delta)) / 2
    return Estimate(r, half, x.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One model on one list of prompts. Outer keys are temperatures as `temperature_name` writes them."""

    scores: dict[str, list[float]]  # true score of each prompt, mean over its samples
    by_function: dict[str, dict[str, float]]  # mean of each reward function
    learned: dict[str, list[float]]  # learned score of each prompt; empty without a reward model
    answers: dict[str, list[str]]  # the first sample of each prompt
    tokens: dict[str, float]  # mean length of an answer
    finished: dict[str, float]  # share of answers that ended by themselves


def temperature_name(temperature: float) -> str:
    """A temperature as a key of results: 1.0 -> "1", 0.7 -> "0.7", 0.0 -> "0"."""
    return f"{temperature:g}"


def sampling_label(temperature: str) -> str:
    """A key of results for people: "0.7" -> "T = 0.7", "0" -> "greedy"."""
    return "greedy" if temperature == "0" else f"T = {temperature}"


def evaluate_model(
    model: nn.Module,
    chat: Chat,
    prompts: Sequence[Prompt],
    functions: Sequence[NamedReward],
    *,
    temperatures: Sequence[float],
    max_completion_length: int,
    seed: int,
    samples_per_prompt: int = 1,
    batch_size: int = 256,
    reward_model: nn.Module | None = None,
) -> Evaluation:
    """Answer every prompt at every temperature and score the answers; the true score is the functions' sum.

    Sample j of a prompt is drawn with `sampling_seed(seed, prompt.key, j)` whatever the model and the temperature, so
    differences between models are paired, and results do not depend on how prompts are batched.

    Args:
        samples_per_prompt: answers per prompt; at temperature 0 always one.
        batch_size: answers per generation batch.
        reward_model: scores the same answers beside the functions.

    Raises:
        RewardError: an answer that no function scores.
    """
    plan = [
        (prompt, sample, temperature)
        for temperature in temperatures
        for prompt in prompts
        for sample in range(samples_per_prompt if temperature > 0 else 1)
    ]
    completions = generate(
        model,
        [prompt.ids for prompt, _, _ in plan],
        seeds=[sampling_seed(seed, prompt.key, sample) for prompt, sample, _ in plan],
        end_ids=[chat.end_of_turn_id],
        pad_id=chat.end_of_turn_id,
        max_new_tokens=max_completion_length,
        temperature=[temperature for _, _, temperature in plan],
        batch_size=batch_size,
    )
    asked, ids = [prompt for prompt, _, _ in plan], [completion.ids for completion in completions]
    texts = [chat.decode(tokens) for tokens in ids]
    scores = call_reward_functions(functions, asked, texts, ids)
    total = total_rewards(scores)
    learned = None
    if reward_model is not None:
        learned = score_sequences(reward_model, [[*p.ids, *answer] for p, answer in zip(asked, ids, strict=True)])
    lengths = torch.tensor([float(len(tokens)) for tokens in ids])
    ended = torch.tensor([float(completion.finished) for completion in completions])
    found = Evaluation(scores={}, by_function={}, learned={}, answers={}, tokens={}, finished={})
    first = 0
    for temperature in temperatures:
        samples = samples_per_prompt if temperature > 0 else 1
        part = slice(first, first + samples * len(prompts))
        first, name = part.stop, temperature_name(temperature)
        found.scores[name] = _per_prompt(total[part], samples)
        found.by_function[name] = {key: float(values[part].nanmean()) for key, values in scores.items()}
        if learned is not None:
            found.learned[name] = _per_prompt(learned[part], samples)
        found.answers[name] = texts[part][::samples]
        found.tokens[name] = float(lengths[part].mean())
        found.finished[name] = float(ended[part].mean())
    return found


def mean_rewards(prompts: Sequence[Prompt], scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of an evaluation during training, from scores [n] by name (NaN = not scored).

    `eval_rewards/<name>/mean`, and where the prompts have several categories `eval_rewards/<name>/<category>`.
    """
    categories = [prompt.category for prompt in prompts]
    metrics: dict[str, float] = {}
    for name, values in scores.items():
        metrics[f"eval_rewards/{name}/mean"] = float(values.nanmean())
        for category in dict.fromkeys(categories) if len(set(categories)) > 1 else ():
            chosen = values[[i for i, found in enumerate(categories) if found == category]]
            metrics[f"eval_rewards/{name}/{category}"] = float(chosen.nanmean())
    return metrics


@torch.no_grad()
def classifier_scores(
    model: Any, sequences: Sequence[Sequence[int] | np.ndarray], *, batch_size: int = 64
) -> np.ndarray:
    """Scores fp64 [n] as any user of transformers gets them: padded batches through the model's own forward.

    Raises:
        ValueError: a model whose config has no pad_token_id, or one that occurs in a sequence: transformers reads the
            score at the last other token, which would then be the wrong one.
    """
    pad = model.config.pad_token_id
    if pad is None or any(int(ids[-1]) == pad for ids in sequences):
        raise ValueError(
            f"classifier_scores: the reward model's pad_token_id is {pad}, expected a token that ends no sequence; "
            "retrain it with `nova-train reward`, which gives padding a token of its own"
        )
    scores = np.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        longest = len(sequences[chosen[-1]])
        ids = torch.full((len(chosen), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            tokens = torch.as_tensor(np.asarray(sequences[index], dtype=np.int64))
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        device = next(model.parameters()).device
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        scores[chosen] = logits[:, 0].double().cpu().numpy()
    return scores


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScores:
    """A reward model on held-out pairs."""

    chosen: np.ndarray  # fp64 [pairs], learned score
    rejected: np.ndarray
    accuracy: Estimate  # share of pairs with chosen above rejected; equal scores count half
    correlation: Estimate | None  # rank correlation with the absolute scores, where pairs have them

    @property
    def margins(self) -> np.ndarray:
        return self.chosen - self.rejected


def score_pairs(model: Any, pairs: Sequence[Pair], *, batch_size: int = 64) -> PairScores:
    """Pair accuracy and rank correlation of an AutoModelForSequenceClassification, through its own forward."""
    scores = classifier_scores(model, [p.chosen for p in pairs] + [p.rejected for p in pairs], batch_size=batch_size)
    chosen, rejected = scores[: len(pairs)], scores[len(pairs) :]
    truth = [p.chosen_score for p in pairs] + [p.rejected_score for p in pairs]
    known = [(learned, true) for learned, true in zip(scores, truth, strict=True) if true is not None]
    return PairScores(
        chosen=chosen,
        rejected=rejected,
        accuracy=estimate((np.sign(chosen - rejected) + 1) / 2),
        correlation=rank_correlation(*zip(*known, strict=True)) if len(known) > 3 else None,
    )


def calibration(margins: Sequence[float] | np.ndarray, *, bins: int = 10) -> list[tuple[float, float, int]]:
    """Pairs in bins of |margin|, equally full: (predicted accuracy, observed accuracy, pairs) of each.

    A Bradley-Terry model says that the higher score of a pair is the chosen one's with probability sigmoid(|margin|);
    observed is how often it is.
    """
    values = np.asarray(margins, dtype=np.float64)
    ordered = values[np.argsort(np.abs(values), kind="stable")]
    parts = [part for part in np.array_split(ordered, min(bins, max(len(ordered) // 10, 1))) if len(part)]
    return [
        (float((1 / (1 + np.exp(-np.abs(part)))).mean()), float(((np.sign(part) + 1) / 2).mean()), len(part))
        for part in parts
    ]


def _per_prompt(values: Tensor, samples: int) -> list[float]:
    means: list[float] = values.double().view(-1, samples).mean(dim=1).tolist()
    return [round(value, 6) for value in means]


def _numbered(labels: Sequence[Hashable]) -> np.ndarray:
    """Labels -> 0, 1, ... in the order of first appearance."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.int64)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(((last - counts) + (last - 1)) / 2.0)[place]
