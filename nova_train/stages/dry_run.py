"""What a training run would need, before it starts: its resolved keys, its data in tokens, its memory in bytes.

The memory is that of nova_train.memory, where its formulas stand: what stays, and the plan of the activations.

A cache of the reference takes its rows times bytes per row on disk, and about the time of the model's products: 2
operations per token and weight of the body, and per trained token and weight of the head, at the rate that large linear
layers reach here in the model's arithmetic. Attention and reading the data come on top. Of a mixture of experts only a
part works on each token: no time is given.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from nova_kernels.checkpoint import format_bytes
from nova_kernels.topk_kl import CacheHeader
from nova_train.chat import Chat
from nova_train.config import TrainConfig, resolved_text, stage_name
from nova_train.datasets import Kind, read_rows
from nova_train.memory import UnpredictableError, estimate_memory, memory_text, plan_memory
from nova_train.model import load_tokenizer, model_without_weights, pick_device
from nova_train.reference_topk import rows_of_samples, supervised_samples
from nova_train.stages.cache_reference import CacheReferenceConfig, plan_shards
from nova_train.stages.inspect_data import InspectDataConfig, inspect_rows
from nova_train.stages.pas import PASConfig, conversations

_KINDS: dict[str, Literal["sft", "preference", "prompt"]] = {
    "sft": "sft",
    "pas": "sft",
    "reward": "preference",
    "grpo": "prompt",
    "cache-reference": "sft",
}
PRODUCTS = {"cpu": 512, "cuda": 4096}  # rows and columns of the linear layer that is timed
LEAST_SECONDS = 0.05  # of a measurement


def print_plan(config: Any, *, console: Console | None = None) -> None:
    """The resolved keys as a recipe; for a stage that trains, its data and its memory as well."""
    console = Console() if console is None else console
    console.print(resolved_text(config).rstrip(), markup=False, highlight=False, soft_wrap=True)
    if isinstance(config, TrainConfig):
        for name in [*config.dataset_name, *config.eval_dataset_name]:
            console.rule(name)
            _print_data(config, name, console)
        console.rule("memory")
        console.print(training_memory(config), markup=False, highlight=False, soft_wrap=True)
    if isinstance(config, CacheReferenceConfig):
        for name in config.dataset_name:
            console.rule(name)
            _print_data(config, name, console)
        console.rule("cache")
        console.print(cache_text(config), markup=False, highlight=False, soft_wrap=True)


def _print_data(config: TrainConfig | CacheReferenceConfig, name: str, console: Console) -> None:
    """Token statistics of one data set as the stage reads it; overlong rows are counted, not refused."""
    chat = Chat(load_tokenizer(str(config.model_name_or_path)))
    seen = InspectDataConfig(
        model_name_or_path=str(config.model_name_or_path),
        dataset_name=[name],
        kind=_KINDS[stage_name(type(config))],
        on_bad_row=config.on_bad_row,
        max_length=config.max_length,
        rows_shown=0,
    )
    kind: Kind = "rows" if isinstance(config, PASConfig) else seen.kind
    rows = read_rows([name], kind=kind, on_bad_row=config.on_bad_row, columns=config.dataset_columns)
    if isinstance(config, PASConfig):
        rows = conversations(rows, config.settings(), config.on_bad_row)
    inspect_rows(rows, chat, seen).print(console, chat, 0)


def training_memory(config: TrainConfig) -> str:
    """The estimate and the plan of the activations; only the estimate where the model cannot be profiled."""
    try:
        return plan_memory(config).text()
    except UnpredictableError as error:
        return f"{memory_text(estimate_memory(config))}\n\n{error}"


def cache_text(config: CacheReferenceConfig) -> str:
    """Rows, bytes on disk, and about the time of a cache; no weights are loaded."""
    model = model_without_weights(config.model_name_or_path, config, torch.device("meta"))
    chat = Chat(load_tokenizer(config.model_name_or_path))
    samples = supervised_samples(config.dataset_name, config, chat)
    rows, tokens = rows_of_samples(samples), sum(len(sample["input_ids"]) for sample in samples)
    header = CacheHeader(
        k=config.kl_top_k,
        vocab_size=model.config.vocab_size,
        temperature=config.temperature,
        num_samples=len(samples),
        num_rows=int(rows.sum()),
        model="unread",
        tokenizer="unread",
        data="unread",
        dtype=config.cache_dtype,
    )
    folder = Path(config.output_dir).resolve()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    shards = len(plan_shards(rows, header, config.num_shards))
    lines = {
        "rows": f"{header.num_rows:,}, {header.record.itemsize:,} bytes each",
        "on disk": f"{format_bytes(header.num_bytes)} in {shards} shards; {format_bytes(free)} are free",
    }
    if not any("experts" in name for name, _ in model.named_modules()):
        head = model.get_output_embeddings().weight
        ends = (head, model.get_input_embeddings().weight)
        body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and not any(p is end for end in ends))
        products, rate = tokens * body + header.num_rows * head.numel(), _linear_rate(config)
        seconds = 2 * products / rate
        lines["time, about"] = f"{seconds:,.0f} s: 2 x {products:,} operations at {rate / 1e9:,.0f} GFLOP/s"
    return "\n".join(f"{name:<14} {text}" for name, text in lines.items())


@torch.no_grad()
def _linear_rate(config: CacheReferenceConfig) -> float:
    """Operations per second of one large linear layer in the model's arithmetic, after a warm-up."""
    torch.set_num_threads(config.num_threads)
    device = pick_device(config.device)
    size = PRODUCTS[device]
    rows, weight = torch.randn(2, size, size, device=device).to(getattr(torch, config.dtype))

    def seconds(times: int) -> float:
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.bf16):
            for _ in range(times):
                out = nn.functional.linear(rows, weight)
        out[0, 0].item()
        return time.perf_counter() - started

    times = 1
    seconds(times)
    while (taken := seconds(times)) < LEAST_SECONDS:
        times *= 2
    return 2 * size**3 * times / taken
