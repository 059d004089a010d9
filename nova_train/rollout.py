"""Answers drawn from a model: generation with a KV cache, seeded per answer.

    token_t = min { v : sum_{w <= v} p_w > u_t * sum_w p_w },     p = softmax(logits / temperature), cut to its nucleus
    u_t ~ Uniform[0, 1) from the answer's own generator           temperature 0: token_t = argmax logits

so an answer depends on (model, prompt, its seed, temperature, top_p) and not on the batch it is drawn in, up to the
rounding of the model's own forward. Left padding exists only here; what comes out is ragged. Answers to the same prompt
share one pass over it, and finished rows leave the batch.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nova_train.model import own_attention

# Finished rows are dropped once they are this share of the batch: each drop copies the cache.
_DROP_AT = 0.1


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer."""

    ids: list[int]  # with the end-of-turn token, if it came
    finished: bool  # False: cut off at max_new_tokens


@dataclass(frozen=True, slots=True)
class _Group:
    """A prompt and the rows of the request that ask for an answer to it."""

    prompt: tuple[int, ...]
    rows: list[int]


def sampling_seed(seed: int, *place: int | str) -> int:
    """A 63-bit seed for one answer, from the run's seed and the answer's place, e.g. (prompt key, number).

    Stable over processes and machines: SHA-256, not `hash`.
    """
    text = "\0".join([str(seed), *(f"{type(part).__name__}:{part}" for part in place)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float | Sequence[float],
    top_p: float = 1.0,
    batch_size: int = 256,
) -> list[Completion]:
    """One answer per prompt, in the order of `prompts`.

    The model runs in evaluation mode on its own attention and is put back as it was.

    Args:
        model: a Hugging Face causal LM with a KV cache.
        prompts: token ids, none empty; equal ones share their first pass.
        seeds: one per prompt.
        end_ids: tokens that end an answer.
        pad_id: a valid id for the left padding; it is masked, so any will do.
        max_new_tokens: longest answer, tokens.
        temperature: 0 is greedy; one for all, or one per prompt.
        top_p: only the smallest set of tokens with at least this probability is drawn from.
        batch_size: answers in one batch.

    Raises:
        ValueError: impossible arguments, a prompt that does not fit, or a model without a KV cache of this kind.
        FloatingPointError: logits that are not finite.
    """
    temperatures = [float(temperature)] * len(prompts) if isinstance(temperature, (int, float)) else list(temperature)
    _check(model, prompts, seeds, temperatures, max_new_tokens, top_p, batch_size)
    completions: list[Completion | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), own_attention(model):
            for groups in _batches(prompts, batch_size):
                rows = [row for group in groups for row in group.rows]
                drawn = _complete(
                    model,
                    groups,
                    _uniforms([seeds[row] for row in rows], max_new_tokens),
                    torch.tensor([temperatures[row] for row in rows], dtype=torch.float64),
                    end_ids=end_ids,
                    pad_id=pad_id,
                    top_p=top_p,
                )
                for row, ids in zip(rows, drawn, strict=True):
                    completions[row] = _cut(ids, frozenset(end_ids))
    finally:
        model.train(was_training)
    return [completion for completion in completions if completion is not None]


def draw_tokens(logits: Tensor, uniforms: Tensor, temperatures: Tensor, top_p: float = 1.0) -> Tensor:
    """One token per row by inverting the cumulative distribution at a given uniform number.

    Args:
        logits: [B, V], finite or -inf.
        uniforms: fp64 [B] in [0, 1).
        temperatures: fp64 [B]; 0 is greedy.
        top_p: in (0, 1].

    Returns:
        int64 [B]; a token of probability 0 is never drawn.
    """
    greedy = temperatures == 0
    best = logits.argmax(dim=-1)
    if bool(greedy.all()):
        return best
    scale = torch.where(greedy, torch.ones_like(temperatures), temperatures)
    probabilities = torch.softmax(logits.double() / scale[:, None], dim=-1)
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(dim=-1)
    # u <= 1 - 2^-53, so u * total rounds to less than total: some entry lies above it.
    target = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return torch.where(greedy, best, drawn)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """[B, V] with the tokens outside the smallest set of mass >= top_p set to 0; not renormalised."""
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, index, ordered.masked_fill(mass_before >= top_p, 0.0))


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """fp64 [rows, count] in [0, 1); a longer request begins with the numbers of a shorter one."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[_Group]]:
    """Equal prompts together, near-equal lengths side by side, at most `batch_size` answers in a batch."""
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(int(token) for token in prompt), []).append(row)
    batch: list[_Group] = []
    used = 0
    for prompt in sorted(rows_of, key=len):
        rows = rows_of[prompt]
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            if used + len(some) > batch_size:
                yield batch
                batch, used = [], 0
            batch.append(_Group(prompt, some))
            used += len(some)
    if batch:
        yield batch


def _complete(
    model: nn.Module,
    groups: Sequence[_Group],
    uniforms: Tensor,
    temperatures: Tensor,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    top_p: float,
) -> list[list[int]]:
    """The tokens drawn for each row of a batch; behind the end of an answer they mean nothing (-1 or leftovers)."""
    device = next(model.parameters()).device
    num_rows, max_new_tokens = uniforms.shape
    uniforms, temperatures = uniforms.to(device), temperatures.to(device)
    ends = torch.tensor(list(end_ids), dtype=torch.int64, device=device)
    input_ids, mask = _pad_left([group.prompt for group in groups], pad_id, device)
    forward = _Forward(model)
    logits = forward(input_ids, mask)
    copies = torch.tensor([len(group.rows) for group in groups], device=device)
    shared = torch.repeat_interleave(torch.arange(len(groups), device=device), copies)
    forward.select(shared)
    logits, mask = logits[shared], mask[shared]
    drawn = torch.full((num_rows, max_new_tokens), -1, dtype=torch.int64, device=device)
    alive = torch.arange(num_rows, device=device)
    going = torch.ones(num_rows, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise FloatingPointError(
                f"generate: the model's logits are not finite at new token {step + 1}; the weights or the precision "
                f"({logits.dtype}) of {type(model).__name__} are broken"
            )
        tokens = draw_tokens(logits, uniforms[alive, step], temperatures[alive], top_p)
        drawn[alive, step] = tokens
        going &= ~torch.isin(tokens, ends)
        left = int(going.sum())
        if left == 0 or step + 1 == max_new_tokens:
            break
        if left <= (1 - _DROP_AT) * len(alive):
            forward.select(going)
            alive, tokens, mask, going = alive[going], tokens[going], mask[going], going[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = forward(tokens[:, None], mask)
    rows: list[list[int]] = drawn.tolist()
    return rows


class _Forward:
    """The model with its cache: new tokens and the mask of all tokens in, logits [B, V] of the last token out."""

    def __init__(self, model: Any) -> None:
        accepted = inspect.signature(model.forward).parameters
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._takes_positions = "position_ids" in accepted
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def __call__(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        options: dict[str, Any] = dict(self._options)
        if self._takes_positions:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        output = self._model(
            input_ids=input_ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **options
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the cache: a boolean mask, or indices that may repeat."""
        self._cache.batch_select_indices(rows)


def _pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 ids and mask, each [B, longest]."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


def _cut(ids: Sequence[int], ends: frozenset[int]) -> Completion:
    for place, token in enumerate(ids):
        if token in ends:
            return Completion(list(ids[: place + 1]), finished=True)
    return Completion(list(ids), finished=False)


def _check(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    temperatures: Sequence[float],
    max_new_tokens: int,
    top_p: float,
    batch_size: int,
) -> None:
    for name, count in (("seeds", len(seeds)), ("temperatures", len(temperatures))):
        if count != len(prompts):
            raise ValueError(f"generate: expected one of {name} per prompt, {len(prompts)} in all, got {count}")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"generate: {name} must be at least 1, got {value}")
    if bad := [t for t in temperatures if not 0 <= t < float("inf")]:
        raise ValueError(f"generate: temperature must be 0 (greedy) or positive, got {bad[0]}")
    if not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must lie in (0, 1], got {top_p}")
    if getattr(model, "_is_stateful", False) or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"generate: {type(model).__name__} has no KV cache that can be padded on the left (recurrent state or an "
            "encoder); only decoder-only attention models are supported"
        )
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(f"generate: prompt {lengths.index(0)} has no tokens")
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and lengths and max(lengths) + max_new_tokens > room:
        raise ValueError(
            f"generate: prompt {lengths.index(max(lengths))} has {max(lengths)} tokens; with {max_new_tokens} new ones "
            f"that is more than the model's {room} positions; shorten the prompt or lower max_new_tokens"
        )
