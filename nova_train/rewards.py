"""Scores of answers: reward functions with TRL's signature, and a learned reward model read at the last token.

A reward function is `f(prompts, completions, completion_ids=..., **columns) -> list[float | None]`: standard prompts
come as texts with texts for completions, conversational ones as messages with `[{"role": "assistant", "content": ..}]`;
each further column of the data is a list of the same length; None means "not scored". The same file works in TRL.

A reward model's score is the head's output at the last token of prompt + answer, found by length, never by looking for
padding or an end-of-text token: the score of an answer is the same alone, padded and packed.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nova_kernels.packing import PackedBatch, pack_samples
from nova_train.chat import Chat
from nova_train.config import ConfigError, TrainConfig
from nova_train.mesh import Mesh
from nova_train.model import distribute, hidden_states, load_reward_model, load_tokenizer, mesh_of
from nova_train.rollout import Completion
from nova_train.samples import Prompt
from nova_train.sharding import gathered

REWARD_MODEL = "reward_model"  # the learned score's name in metrics
TOKENS_PER_BATCH = 16_384  # of one packed forward of the reward model

# Columns that TRL does not hand to reward functions as such.
_RESERVED = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})


class RewardError(ValueError):
    """A reward function cannot be used, or returned something that is not one score per answer."""


@dataclass(frozen=True, slots=True)
class NamedReward:
    """A reward function and the name it has in metrics."""

    name: str
    function: Callable[..., Any]


def load_reward_functions(specs: Sequence[str]) -> list[NamedReward]:
    """Import "package.module:function" or "path/to/file.py:function".

    Raises:
        RewardError: a spec without a colon, a missing file, module or function, or two functions of one name.
    """
    rewards = [_load_one(spec) for spec in specs]
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1 or name == REWARD_MODEL:
            raise RewardError(
                f"reward_funcs: the name {name!r} is taken twice among {list(specs)} (metrics are kept per name, and "
                f"{REWARD_MODEL!r} is the learned score); rename one function"
            )
    return rewards


def source_hashes(rewards: Sequence[NamedReward]) -> dict[str, str]:
    """SHA-256 of the file of each function; "" where it has none."""
    hashes = {}
    for reward in rewards:
        made = reward.function if inspect.isroutine(reward.function) else type(reward.function)
        try:
            source = inspect.getsourcefile(inspect.unwrap(made))
        except TypeError:  # built in
            source = None
        hashes[reward.name] = "" if source is None else hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return hashes


def call_reward_functions(
    rewards: Sequence[NamedReward],
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """Every function's scores, fp64 [n] on the CPU; NaN = not scored.

    Args:
        texts: the answers without special tokens, one per prompt.
        completion_ids: their tokens.

    Raises:
        RewardError: a function that does not take the columns, returns another number of values, or values that are
            neither numbers nor None.
    """
    if not len(prompts) == len(texts) == len(completion_ids):
        raise ValueError(
            f"call_reward_functions: {len(prompts)} prompts, {len(texts)} texts, {len(completion_ids)} token lists"
        )
    if not prompts:
        return {reward.name: torch.zeros(0, dtype=torch.float64) for reward in rewards}
    arguments: dict[str, list[Any]] = {
        "prompts": [prompt.prompt for prompt in prompts],
        "completions": [_as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        "completion_ids": [list(ids) for ids in completion_ids],
        **columns_of(prompts),
    }
    return {reward.name: _call(reward, arguments, len(prompts)) for reward in rewards}


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The data's further columns as lists; None where a row lacks one."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in _RESERVED)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def total_rewards(scores: Mapping[str, Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The weighted sum of several scores, fp64 [n]; what is not scored adds nothing, as in TRL.

    Raises:
        RewardError: an answer that nothing with a weight has scored.
    """
    stacked = torch.stack([values.double() for values in scores.values()])  # [functions, n]
    factors = torch.ones(len(scores)) if weights is None else torch.tensor(list(weights))
    missing = torch.isnan(stacked[factors != 0]).all(dim=0).nonzero()[:, 0].tolist()
    if missing:
        raise RewardError(
            f"{', '.join(scores)}: no reward for {len(missing)} of {stacked.shape[1]} answers, the first is number "
            f"{missing[0]}; let one function return a number where the others return None"
        )
    return torch.nansum(stacked * factors.double()[:, None], dim=0)


@torch.no_grad()
def score_sequences(
    model: nn.Module, sequences: Sequence[Sequence[int] | np.ndarray], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> Tensor:
    """The reward model's score of each sequence (prompt and answer), fp32 [n] on the CPU, in the order given.

    Sequences of near-equal length are packed into rows of at most `tokens_per_batch` tokens (a longer one has a row of
    its own).

    Raises:
        RewardError: a model that is not a sequence classifier with one output.
    """
    outputs = getattr(getattr(model, "score", None), "out_features", None)
    if outputs != 1:
        raise RewardError(
            f"score_sequences: expected an AutoModelForSequenceClassification with num_labels=1 and a head named "
            f"score, got {type(model).__name__} with {'no such head' if outputs is None else f'{outputs} outputs'}"
        )
    scores = torch.zeros(len(sequences))
    was_training = model.training
    model.eval()
    try:
        for chosen in _rows_by_length([len(ids) for ids in sequences], tokens_per_batch):
            packed = pack_samples([{"input_ids": sequences[index]} for index in chosen])
            packed = packed.to(next(model.parameters()).device)
            scores[chosen] = last_token_rewards(model, hidden_states(model, packed), packed).float().cpu()
    finally:
        model.train(was_training)
    return scores


def last_token_rewards(model: Any, hidden: Tensor, packed: PackedBatch) -> Tensor:
    """The head at each sequence's last token: hidden [t, H] -> fp32 (fp64 for fp64) [S], by length alone.

    Of a row that ranks split, each has the last tokens of some sequences; all of them get all rewards.
    """
    mesh = mesh_of(model)
    own = mesh.own_tokens(packed.num_tokens)
    last = packed.cu_seqlens[1 : packed.num_samples + 1].long() - 1
    mine = ((last >= own.start) & (last < own.stop)).nonzero()[:, 0]
    found: Tensor = model.score(hidden[(last[mine] - own.start).to(hidden.device)])[:, 0]
    found = found if found.dtype == torch.float64 else found.float()
    if mine.numel() == last.numel() and mesh.sequence_group is None:
        return found
    rewards = found.new_zeros(last.numel()).index_put((mine.to(found.device),), found)
    return mesh.sum_over_sequence(rewards)


@dataclass(frozen=True, slots=True)
class Judge:
    """What a policy is rewarded by: a reward model (first, if there is one) and reward functions, with weights."""

    chat: Chat
    model: nn.Module | None
    functions: Sequence[NamedReward]
    weights: Sequence[float]

    @classmethod
    def load(
        cls,
        reward_model: str | None,
        reward_funcs: Sequence[str],
        reward_weights: Sequence[float] | None,
        config: TrainConfig,
        chat: Chat,
        mesh: Mesh | None = None,
    ) -> Judge:
        """Load both kinds; the weights are 1 each unless given. Ranks of a mesh share the reward model's weights.

        Raises:
            ConfigError: the reward model's tokenizer gives other ids than the policy's; ranks have read different
                functions or models.
            RewardError: a function that cannot be loaded.
        """
        functions = load_reward_functions(reward_funcs)
        (mesh or Mesh()).require_same("reward_funcs, by the hash of their files", source_hashes(functions))
        model = None
        if reward_model is not None:
            check_same_tokens(chat.tokenizer, load_tokenizer(reward_model), reward_model)
            model = load_reward_model(
                reward_model, config, frozen=True, mesh=replace(mesh or Mesh(), splits_rows=False)
            )
            distribute(model, config, mesh or Mesh())
        count = len(functions) + (model is not None)
        return cls(chat, model, functions, [1.0] * count if reward_weights is None else list(reward_weights))

    def ready(self) -> AbstractContextManager[None]:
        """Inside the `with` every rank may score as many answers as it likes."""
        return nullcontext() if self.model is None else gathered(self.model)

    def each(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, Tensor]:
        """Every score by name, fp64 [n]; NaN = not scored."""
        scores: dict[str, Tensor] = {}
        if self.model is not None:
            sequences = [[*prompt.ids, *answer.ids] for prompt, answer in zip(prompts, completions, strict=True)]
            scores[REWARD_MODEL] = score_sequences(self.model, sequences).double()
        ids = [completion.ids for completion in completions]
        texts = [self.chat.decode(tokens) for tokens in ids] if self.functions else [""] * len(ids)
        return scores | call_reward_functions(self.functions, prompts, texts, ids)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[Tensor, dict[str, tuple[float, float]]]:
        """The weighted sum fp32 [n], and metrics `rewards/<name>/mean` as (sum, number of scored answers)."""
        scores = self.each(prompts, completions)
        metrics = {
            f"rewards/{name}/mean": (float(torch.nansum(values)), float((~torch.isnan(values)).sum()))
            for name, values in scores.items()
        }
        return total_rewards(scores, self.weights).float(), metrics


def check_same_tokens(policy_tokenizer: Any, reward_tokenizer: Any, path: str) -> None:
    """Refuse a reward model that would read the policy's token ids as other text.

    Raises:
        ConfigError: naming the first token that differs.
    """
    theirs = reward_tokenizer.get_vocab()
    for token, index in sorted(policy_tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            raise ConfigError(
                f"reward_model {path}: its tokenizer has {token!r} at {theirs.get(token)}, the policy's at {index}; "
                "train the reward model on the policy's tokenizer"
            )


def _load_one(spec: str) -> NamedReward:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise RewardError(f"reward_funcs: expected 'package.module:function' or 'file.py:function', got {spec!r}")
    module = _load_file(place, spec) if place.endswith(".py") else _load_module(place, spec)
    function = getattr(module, name, None)
    if not callable(function):
        found = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        public = [n for n in found if getattr(module, n).__module__ == module.__name__]
        near = difflib.get_close_matches(name, public, n=1)
        way_out = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(public) or 'no functions'}"
        raise RewardError(f"reward_funcs: {place} has no function {name!r}; {way_out}")
    return NamedReward(name, function)


def _load_file(place: str, spec: str) -> Any:
    path = Path(place)
    found = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if found is None or found.loader is None:
        raise RewardError(f"reward_funcs: {spec!r}: no such file {path.absolute()}")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _load_module(place: str, spec: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise RewardError(
            f"reward_funcs: {spec!r}: {error}; give a module on the Python path, or 'path/to/file.py:function'"
        ) from error


def _as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    return text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]


def _call(reward: NamedReward, arguments: Mapping[str, list[Any]], count: int) -> Tensor:
    try:
        inspect.signature(reward.function).bind(**arguments)
    except TypeError as error:
        raise RewardError(
            f"reward function {reward.name}: cannot be called with {', '.join(arguments)}: {error}; "
            "take the columns it needs by name and the rest as **columns"
        ) from error
    values = reward.function(**arguments)
    if isinstance(values, Tensor):
        values = values.tolist()
    if not hasattr(values, "__len__") or isinstance(values, (str, Mapping)):
        raise RewardError(
            f"reward function {reward.name}: expected a list of {count} scores, got {type(values).__name__}"
        )
    if len(values) != count:
        raise RewardError(f"reward function {reward.name}: expected {count} scores, one per answer, got {len(values)}")
    return torch.tensor([_as_score(value, reward.name, i) for i, value in enumerate(values)], dtype=torch.float64)


def _as_score(value: Any, name: str, index: int) -> float:
    value = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
    if value is None:
        return math.nan
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RewardError(
            f"reward function {name}: score {index} must be a finite number, or None for 'not scored', "
            f"got {value!r} ({type(value).__name__})"
        )
    return float(value)


def _rows_by_length(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices sorted by length, cut into rows of at most `capacity` tokens."""
    rows: list[list[int]] = []
    used = capacity
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if used + lengths[index] > capacity or not rows:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += lengths[index]
    return rows
