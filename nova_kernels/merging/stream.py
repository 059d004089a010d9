"""merge_state: saved models in, one saved model out, a piece of a tensor at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nova_kernels.merging import output, reference
from nova_kernels.merging.agreement import check_agreement
from nova_kernels.merging.saved import WEIGHTS, SavedModel, TensorInfo

Method = Literal["linear", "task_arithmetic", "model_stock"]
Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

MAX_PIECE = 2**22  # elements of one tensor that are in memory at a time, per model


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What merge_state did."""

    method: str
    out: Path
    num_tensors: int
    num_bytes: int  # of the merged tensors
    left_out: tuple[str, ...]  # tied copies that not every model has saved
    weights: tuple[float, ...]  # as applied, one per source; empty for model_stock
    ratios: dict[str, float] = field(default_factory=dict)  # model_stock: t of each tensor, the mean over its rows

    def __str__(self) -> str:
        t = f", mean t {sum(self.ratios.values()) / len(self.ratios):.3f}" if self.ratios else ""
        size = f"{self.num_tensors} tensors, {self.num_bytes / 1e6:.1f} MB"
        return f"merged by {self.method} into {self.out}: {size}{t}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Merge:
    """The open models and the options of one merge."""

    method: str
    sources: list[SavedModel]
    base: SavedModel | None
    weights: list[float]
    lam: float
    filter_wise: bool


def merge_state(
    method: Method,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    lam: float = 1.0,
    filter_wise: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge saved models into a new one that opens with AutoModel*.

    All checks come before the first byte is written, and `out` appears when everything is written. Shards, config and
    tokenizer follow the first source. Sums are float32 and rounded once; at most 2^22 elements of a tensor are in
    memory at a time (model_stock by rows: at least one row), whatever the size of the models.

    Args:
        method: "linear", "task_arithmetic" or "model_stock"; the functions of these names state the formulas.
        sources: folders with config.json and safetensors weights.
        out: folder of the result. Files of another kind in it are left alone.
        base: the model that the sources continued from; not for linear, needed by the others.
        weights, normalize: see the functions; model_stock takes no weights.
        lam: task_arithmetic only, factor on the whole step.
        filter_wise: model_stock only, one t per row instead of per tensor.
        dtype: of the result's floating-point tensors. None = each as in the sources, the wider one where they differ.
        overwrite: replace a model that is in `out` already.
        progress: called with (bytes written, bytes in all) after every piece.

    Raises:
        FileNotFoundError: a folder, a config or a shard is missing.
        ValueError: models that do not belong together, a damaged file, options that the method does not have.
        FileExistsError: `out` holds a model and overwrite is False.
    """
    folder = Path(out)
    _check_options(method, sources, folder, base, weights, lam, filter_wise, overwrite)
    with ExitStack() as stack:
        models = [stack.enter_context(SavedModel(source)) for source in sources]
        base_model = None if base is None else stack.enter_context(SavedModel(base))
        names = check_agreement(models, base_model)
        factors = [] if method == "model_stock" else reference.resolve_weights(method, len(models), weights, normalize)
        merge = _Merge(
            method=method, sources=models, base=base_model, weights=factors, lam=lam, filter_wise=filter_wise
        )
        report = MergeReport(
            method=method,
            out=folder,
            num_tensors=len(names),
            num_bytes=sum(info.num_bytes for info in _plan(merge, names, dtype).values()),
            left_out=tuple(sorted({name for model in models for name in model.tensors} - set(names))),
            weights=tuple(factors),
        )
        building = folder.parent / f".{folder.name}.merging"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        stack.callback(shutil.rmtree, building, ignore_errors=True)
        _write_model(merge, _plan(merge, names, dtype), building, report, progress)
        output.write_json(building / "merge.json", _provenance(merge, report, normalize, dtype))
        output.publish(building, folder)
    return report


def _check_options(
    method: str,
    sources: Sequence[str | Path],
    out: Path,
    base: str | Path | None,
    weights: Sequence[float] | None,
    lam: float,
    filter_wise: bool,
    overwrite: bool,
) -> None:
    if method not in ("linear", "task_arithmetic", "model_stock"):
        raise ValueError(f"merge_state: method must be linear, task_arithmetic or model_stock, got {method!r}")
    fewest = 2 if method == "model_stock" else 1
    if isinstance(sources, str | Path) or len(sources) < fewest:
        raise ValueError(f"merge_state: {method} needs a list of at least {fewest} sources, got {sources}")
    if method == "linear" and base is not None:
        raise ValueError(f"merge_state: linear has no base, got {base}; list it among the sources, with a weight")
    if method != "linear" and base is None:
        raise ValueError(f"merge_state: {method} needs base, the model that the sources continued from")
    if method != "task_arithmetic" and lam != 1.0:
        raise ValueError(f"merge_state: only task_arithmetic has lam, got lam={lam} for {method}")
    if not math.isfinite(lam):
        raise ValueError(f"merge_state: lam must be finite, got {lam}")
    if method != "model_stock" and filter_wise:
        raise ValueError(f"merge_state: only model_stock has filter_wise, got it for {method}")
    if method == "model_stock" and weights is not None:
        raise ValueError(f"merge_state: model_stock takes no weights, its angles set the step; got {list(weights)}")
    if any(out.resolve() == Path(path).resolve() for path in [*sources, *([] if base is None else [base])]):
        raise ValueError(f"merge_state: {out} is one of the models to merge; choose another folder for the result")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"merge_state: {out} is a file; choose a folder")
    if output.holds_model(out) and not overwrite:
        raise FileExistsError(f"merge_state: {out} holds a model already; remove it or pass overwrite=True")


def _plan(merge: _Merge, names: Sequence[str], dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """The result's tensors: shapes and shards of the first source, dtypes by the rule of merge_state."""
    plan = {}
    for name in names:
        info = merge.sources[0].tensors[name]
        widest = reduce(torch.promote_types, (source.tensors[name].dtype for source in merge.sources))
        chosen = dtype if dtype is not None and info.dtype.is_floating_point else widest
        plan[name] = replace(info, dtype=chosen)
    if len({info.file for info in plan.values()}) == 1:
        plan = {name: replace(info, file=WEIGHTS) for name, info in plan.items()}
    return plan


def _write_model(
    merge: _Merge, plan: dict[str, TensorInfo], folder: Path, report: MergeReport, progress: Progress | None
) -> None:
    done = 0

    def counted(infos: dict[str, TensorInfo]) -> Iterator[Tensor]:
        nonlocal done
        for name, info in infos.items():
            for piece in _merged_pieces(merge, name, info, report.ratios):
                yield piece
                done += piece.numel() * piece.element_size()
                if progress is not None:
                    progress(done, report.num_bytes)

    for file in sorted({info.file for info in plan.values()}):
        infos = {name: info for name, info in plan.items() if info.file == file}
        output.write_shard(folder / file, infos, counted(infos))
    output.write_index(folder, plan)
    output.copy_companions(merge.sources[0].folder, folder)
    output.write_json(folder / "config.json", _config(merge, plan))


def _merged_pieces(merge: _Merge, name: str, info: TensorInfo, ratios: dict[str, float]) -> Iterator[Tensor]:
    """The merged tensor in consecutive pieces, in the result's dtype."""
    if not info.dtype.is_floating_point:
        yield merge.sources[0].read(name)
        return
    spans = _spans(info.shape)
    if merge.method == "linear":
        for span in spans:
            yield reference.weighted_sum(_read(merge.sources, name, span), merge.weights).to(info.dtype)
        return
    assert merge.base is not None, "only linear goes without a base"
    count = len(merge.sources)
    factors = [merge.lam * weight for weight in merge.weights] or [1 / count] * count
    by_row = merge.method == "model_stock" and merge.filter_wise and len(info.shape) > 1
    ratio = _stock_ratio(merge, name, spans) if merge.method == "model_stock" and not by_row else None
    seen: list[Tensor] = [] if ratio is None else [ratio]
    for span in spans:
        tensors, start = _read(merge.sources, name, span), merge.base.read(name, *span)
        if by_row:
            ratio = reference.stock_ratio(reference.stock_gram(tensors, start, filter_wise=True))
            seen.append(ratio)
        yield reference.step_from(start, tensors, factors, ratio).to(info.dtype)
    if seen and info.shape and 0 not in info.shape:
        ratios[name] = float(torch.cat(seen).mean())


def _stock_ratio(merge: _Merge, name: str, spans: list[tuple[int, ...]]) -> Tensor:
    """t of a whole tensor, from one pass over its pieces."""
    assert merge.base is not None, "model_stock has a base"
    count = len(merge.sources)
    gram = torch.zeros(1, count, count, dtype=torch.float64)
    for span in spans:
        gram += reference.stock_gram(_read(merge.sources, name, span), merge.base.read(name, *span), filter_wise=False)
    return reference.stock_ratio(gram)


def _read(models: Sequence[SavedModel], name: str, span: tuple[int, ...]) -> list[Tensor]:
    return [model.read(name, *span) for model in models]


def _spans(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Row ranges of at most MAX_PIECE elements; () reads the tensor whole."""
    if math.prod(shape) <= MAX_PIECE:
        return [()]
    rows = max(1, MAX_PIECE // math.prod(shape[1:]))
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def _config(merge: _Merge, plan: dict[str, TensorInfo]) -> dict[str, Any]:
    """The first source's config; its dtype is the result's where all tensors share one."""
    config = dict(merge.sources[0].config)
    dtypes = {info.dtype for info in plan.values() if info.dtype.is_floating_point}
    if len(dtypes) == 1:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = str(next(iter(dtypes))).removeprefix("torch.")
    return config


def _provenance(
    merge: _Merge, report: MergeReport, normalize: bool | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """What merge.json says: enough to do the merge again, and to see whether the sources are still the same."""

    def described(model: SavedModel) -> dict[str, Any]:
        return {"path": str(model.folder), "bytes": model.num_bytes, "header_sha256": model.header_sha256}

    options: dict[str, Any] = {"weights": list(report.weights), "normalize": normalize}
    if merge.method == "task_arithmetic":
        options["lam"] = merge.lam
    if merge.method == "model_stock":
        options = {"filter_wise": merge.filter_wise, "t": report.ratios}
    return {
        "method": merge.method,
        **options,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "sources": [described(source) for source in merge.sources],
        "base": None if merge.base is None else described(merge.base),
        "left_out": list(report.left_out),
    }
