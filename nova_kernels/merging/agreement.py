"""Can these saved models be merged? Every reason why not is an error, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nova_kernels.merging.saved import SavedModel

# What changes the meaning of weights of the same shape; compared where both configs state it.
DEFINING = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


def check_agreement(sources: Sequence[SavedModel], base: SavedModel | None) -> list[str]:
    """Refuse models that do not belong together.

    Returns:
        Names of the tensors to merge. A tied output embedding that only some models have saved is left out.

    Raises:
        ValueError: names, shapes, configs or tokenizers that differ; integer tensors with different values.
    """
    models = [*sources, *([] if base is None else [base])]
    first = models[0]
    for other in models[1:]:
        _check_configs(first, other)
    names = _common_names(models)
    for name in names:
        for other in models[1:]:
            if other.tensors[name].shape != first.tensors[name].shape:
                raise ValueError(
                    f"merge_state: {name} is {list(first.tensors[name].shape)} in {first.folder} and "
                    f"{list(other.tensors[name].shape)} in {other.folder}; resize the embeddings alike before merging"
                )
            _check_integers(name, first, other)
    for other in models[1:]:
        _check_vocabularies(first.folder, other.folder, may_lack_tokens=other is base)
    return names


def _check_configs(first: SavedModel, other: SavedModel) -> None:
    for key in DEFINING:
        if key in first.config and key in other.config and first.config[key] != other.config[key]:
            raise ValueError(
                f"merge_state: {key} is {first.config[key]!r} in {first.folder} and {other.config[key]!r} in "
                f"{other.folder}; merge models of one architecture"
            )


def _common_names(models: Sequence[SavedModel]) -> list[str]:
    """Names in the order of the first model, without tied copies that others did not save."""
    everywhere = set.intersection(*(set(model.tensors) for model in models))
    for model in models:
        extra = sorted(name for name in model.tensors if name not in everywhere and not _is_tied_copy(model, name))
        if extra:
            lacking = next(str(other.folder) for other in models if extra[0] not in other.tensors)
            raise ValueError(
                f"merge_state: {lacking} lacks {len(extra)} tensors that {model.folder} has: {extra[:3]}"
                f"{' ...' if len(extra) > 3 else ''}; merge models of one architecture"
            )
    return [name for name in models[0].tensors if name in everywhere]


def _is_tied_copy(model: SavedModel, name: str) -> bool:
    """Whether an output embedding is the input embedding again, as the config says; if it is not, it must stay."""
    if model.config.get("tie_word_embeddings") is not True or not name.endswith("lm_head.weight"):
        return False
    info = model.tensors[name]
    head = model.read(name)
    return any(
        other != name and twin.shape == info.shape and twin.dtype == info.dtype and torch.equal(model.read(other), head)
        for other, twin in model.tensors.items()
    )


def _check_integers(name: str, first: SavedModel, other: SavedModel) -> None:
    kinds = [model.tensors[name].dtype.is_floating_point for model in (first, other)]
    if all(kinds):
        return
    if any(kinds) or not torch.equal(first.read(name), other.read(name)):
        raise ValueError(
            f"merge_state: {name} is not a floating-point tensor and differs between {first.folder} and {other.folder}"
        )


def _check_vocabularies(first: Path, other: Path, may_lack_tokens: bool) -> None:
    for file in VOCABULARY_FILES:
        here, there = first / file, other / file
        if here.exists() and there.exists() and here.read_bytes() != there.read_bytes():
            raise ValueError(f"merge_state: {file} differs between {first} and {other}; merge models of one tokenizer")
    one, two = _tokenizer(first), _tokenizer(other)
    if one is None or two is None:
        return
    if one["model"].get("merges") != two["model"].get("merges"):
        raise ValueError(f"merge_state: the tokenizers of {first} and {other} have different merges")
    ours, theirs = _tokens(one), _tokens(two)
    by_id = {number: token for token, number in ours.items()}
    for token, number in theirs.items():
        if ours.get(token, number) != number or by_id.get(number, token) != token:
            raise ValueError(
                f"merge_state: token {number} is {by_id.get(number)!r} in {first} and {token!r} in {other}; "
                "merge models of one tokenizer"
            )
    alone = sorted(set(ours) ^ set(theirs) if not may_lack_tokens else set(theirs) - set(ours))
    if alone:
        raise ValueError(
            f"merge_state: only one of the tokenizers of {first} and {other} has {alone[:3]}"
            f"{' ...' if len(alone) > 3 else ''}; add the tokens to both before training"
        )


def _tokenizer(folder: Path) -> dict[str, Any] | None:
    """tokenizer.json, or None if there is none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tokenizer


def _tokens(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Token -> id; a unigram model lists (token, score) pairs in the order of the ids."""
    vocabulary = tokenizer["model"].get("vocab", {})
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, _score) in enumerate(vocabulary)}
    return dict(vocabulary) | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
