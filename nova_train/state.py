"""Saved states: one run per folder, checkpoints that resume bit for bit, damage that is noticed.

    output_dir/
        resolved_config.yaml      the configuration the folder belongs to; another one is refused
        checkpoint-N/             everything step N + 1 needs, written beside and renamed when complete
            manifest.json         size and SHA-256 of every other file of the checkpoint
            trainer.pt            optimisers, source position, random states, metric windows
            model.safetensors ... the model, as Hugging Face saves it
            sharded/              instead of these: weights and optimisers, written by several ranks, read by any number
        finished.json             written last: the run is complete, with its fingerprint

"State" means saved weights and what belongs to them; "checkpoint" alone means activations elsewhere in this package.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as sharded_files
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)

from nova_train.config import TrainConfig, config_to_dict, identity_of, write_config, write_text
from nova_train.mesh import Mesh

log = logging.getLogger(__name__)

SHARDED = "sharded"  # folder within a checkpoint of several ranks


class StateError(RuntimeError):
    """A saved state cannot be used: another run's folder, or damaged files."""


def claim_folder(config: Any, stage: str) -> None:
    """Make `config.output_dir` this run's own: write resolved_config.yaml, or check that it is the same run's.

    Raises:
        StateError: the folder holds another run (each differing key is named), or files of unknown origin where
            `resume_from_checkpoint` is None (start fresh).
    """
    folder = Path(config.output_dir)
    resolved = folder / "resolved_config.yaml"
    wanted = {"stage": stage, **config_to_dict(config)}
    if resolved.exists():
        if getattr(config, "resume_from_checkpoint", "auto") is None:
            raise StateError(
                f"{folder}: resume_from_checkpoint is null (start fresh), but the folder already holds a run; "
                "remove it or choose another output_dir"
            )
        found = yaml.safe_load(resolved.read_text(encoding="utf-8")) or {}
        shown, way_out = difference(identity_of(found), identity_of(wanted))
        if shown and holds_work(folder):
            raise StateError(
                f"{folder} holds another run ({shown}); {way_out}choose another output_dir, or remove the folder to "
                "start again"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, resolved, stage=stage)


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, str]:
    """What sets a saved run apart from this one ("" if nothing does), and what to do where that is the batch alone."""
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    shown = "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names[:5])
    if names != ["global_batch_size"]:
        return shown, ""
    wanted = there["global_batch_size"]
    return shown, (
        f"to continue it on another number of ranks give global_batch_size {wanted} and leave "
        "gradient_accumulation_steps out, or "
    )


def holds_work(folder: Path) -> bool:
    """Whether a run left anything that another one would spoil; a run that stopped at a typo left nothing."""
    patterns = ("checkpoint-*", "shard-*.json", "header.json", "finished.json", "config.json")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def mark_finished(output_dir: str | Path, fingerprint: str, **facts: Any) -> None:
    """Write finished.json atomically: the last act of a stage."""
    write_text(Path(output_dir) / "finished.json", json.dumps({"fingerprint": fingerprint, **facts}, indent=1))


def finished_fingerprint(output_dir: str | Path) -> str | None:
    """The fingerprint of the finished run in this folder, or None."""
    path = Path(output_dir) / "finished.json"
    if not path.exists():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, in types that torch.load(weights_only) takes."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])  # there may be fewer than there were


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    write_files: Callable[[Path], None],
    trainer: Mapping[str, Any],
    *,
    keep: int,
    mesh: Mesh | None = None,
) -> Path:
    """Write `checkpoint-<step>`, complete or not at all, then remove all but the newest `keep`.

    Args:
        write_files: writes the model (and whatever a stage adds) into the folder it is given; every rank calls it.
        trainer: the rest, saved as trainer.pt by the first rank; only tensors and plain Python types.
        keep: how many checkpoints stay; at least 2 lets a damaged one fall back on the one before.
    """
    mesh = mesh or Mesh()
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(final.name + ".partial")

    def begin() -> None:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)

    def complete() -> None:
        torch.save(dict(trainer), partial / "trainer.pt")
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {path.relative_to(partial).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}
        write_text(partial / "manifest.json", json.dumps({"step": step, "files": manifest}, indent=1))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)

    mesh.on_main(begin)
    write_files(partial)
    mesh.on_main(complete)
    return final


def has_sharded_weights(folder: str | Path) -> bool:
    """Whether a checkpoint was written by several ranks."""
    return (Path(folder) / SHARDED / ".metadata").exists()


def write_sharded(folder: Path, model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Each rank writes its part of the weights and of the optimisers' tensors."""
    sharded_files.save(
        {"model": get_model_state_dict(model), **_moments(model, optimizers)}, checkpoint_id=folder / SHARDED
    )


def read_sharded_weights(folder: Path, model: nn.Module) -> None:
    """Into a model that is sharded in any way, or not at all."""
    _read(folder, {"model": (weights := get_model_state_dict(model))})
    set_model_state_dict(model, weights)


def read_sharded_optimizers(folder: Path, model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """The same for optimisers: the tensors that were saved, of the weights that had been updated."""
    weights = dict(model.named_parameters())
    found: dict[str, dict[str, dict[str, Tensor]]] = {kind: {} for kind in optimizers}
    for key, saved in FileSystemReader(folder / SHARDED).read_metadata().state_dict_metadata.items():
        kind, _, rest = key.partition(".")
        name, _, item = rest.rpartition(".")
        if kind in found and isinstance(saved, TensorStorageMetadata):
            like = weights[name]
            empty = torch.zeros_like(like) if saved.size == like.shape else torch.zeros(saved.size)
            found[kind].setdefault(name, {})[item] = empty.detach()
    _read(folder, found)
    names: dict[Tensor, str] = {p: name for name, p in weights.items()}
    for kind, optimizer in optimizers.items():
        order = [names[p] for group in optimizer.param_groups for p in group["params"]]
        tensors = {place: found[kind][name] for place, name in enumerate(order) if name in found[kind]}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": tensors})


def _moments(model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """Tensors by optimiser, weight and name; nothing of weights that have not been updated yet."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        kind: {names[p]: dict(tensors) for p, tensors in optimizer.state.items() if tensors}
        for kind, optimizer in optimizers.items()
    }


def _read(folder: Path, values: dict[str, Any]) -> None:
    alone = not torch.distributed.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # of one process: that is the intent
        sharded_files.load(values, checkpoint_id=folder / SHARDED, no_dist=alone)


def drop_newer(output_dir: str | Path, step: int) -> None:
    """Remove the checkpoints behind the step a run continues from: they are damaged, or of a future that changes."""
    for found in list_checkpoints(output_dir):
        if int(found.name.split("-")[-1]) > step:
            shutil.rmtree(found)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders, oldest step first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and p.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]))


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint this run continues from, or None to start at step 0.

    "auto" takes the newest undamaged checkpoint of output_dir and says which ones it passed over; a path must be
    sound itself.

    Raises:
        StateError: a checkpoint asked for by path is missing or damaged, or all checkpoints of the folder are damaged.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        return None
    if asked != "auto":
        reason = damage_of(Path(asked))
        if reason is not None:
            raise StateError(f"resume_from_checkpoint {asked}: {reason}; use 'auto' for the newest sound one")
        return Path(asked)
    candidates = list_checkpoints(config.output_dir)
    for checkpoint in reversed(candidates):
        reason = damage_of(checkpoint)
        if reason is None:
            return checkpoint
        log.warning("checkpoint %s is damaged (%s); using the one before", checkpoint, reason)
    if candidates:
        raise StateError(
            f"{config.output_dir}: every checkpoint is damaged ({', '.join(p.name for p in candidates)}); "
            "remove them to start again from step 0"
        )
    return None


def damage_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: every file must have the size and hash of its manifest."""
    if not checkpoint.is_dir():
        return "no such folder"
    manifest = checkpoint / "manifest.json"
    if not manifest.exists():
        return "manifest.json is missing"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError):
        return "manifest.json cannot be read"
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {size}"
        if _sha256(path) != digest:
            return f"{name} does not match its hash"
    return None


def load_trainer(checkpoint: Path) -> dict[str, Any]:
    """The trainer.pt of a sound checkpoint."""
    loaded: dict[str, Any] = torch.load(checkpoint / "trainer.pt", weights_only=True, map_location="cpu")
    return loaded


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
