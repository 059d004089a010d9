"""What a training run would need, before it starts: its resolved keys, its data in tokens, its memory in bytes.

With P trained parameters of b bytes, M of them under Muon, and F frozen ones (GRPO's reference, a reward model):

    weights          (P + F) b
    gradients        P b
    optimiser        2 (P - M) b + M b                        AdamW keeps two moments, Muon one
    logits chunk     2 * 4 * V min(tokens, rows of a chunk)   logits and their gradient in fp32

Activations come on top: they depend on `segments` and on the attention backend.

A cache of the reference takes its rows times bytes per row on disk, and about the time of the model's products: 2
operations per token and weight of the body, and per trained token and weight of the head, at the rate that large linear
layers reach here in the model's arithmetic. Attention and reading the data come on top. Of a mixture of experts only a
part works on each token: no time is given.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from nova_kernels.lm_head import chunk_rows
from nova_kernels.topk_kl import CacheHeader
from nova_train.chat import Chat
from nova_train.config import TrainConfig, resolved_text, stage_name
from nova_train.datasets import Kind, read_rows
from nova_train.model import load_tokenizer, pick_device
from nova_train.optim import muon_names
from nova_train.reference_topk import rows_of_samples, supervised_samples
from nova_train.stages.cache_reference import CacheReferenceConfig, plan_shards
from nova_train.stages.grpo import GRPOConfig, needs_reference
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


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPart:
    """One line of the estimate."""

    name: str
    num_bytes: int
    formula: str


def print_plan(config: Any, *, console: Console | None = None) -> None:
    """The resolved keys as a recipe; for a stage that trains, its data and its memory as well."""
    console = Console() if console is None else console
    console.print(resolved_text(config).rstrip(), markup=False, highlight=False, soft_wrap=True)
    if isinstance(config, TrainConfig):
        for name in [*config.dataset_name, *config.eval_dataset_name]:
            console.rule(name)
            _print_data(config, name, console)
        console.rule("memory")
        console.print(memory_text(estimate_memory(config)), markup=False, highlight=False, soft_wrap=True)
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


def estimate_memory(config: TrainConfig) -> list[MemoryPart]:
    """Bytes by the formulas above, from the models' config files; no weights are loaded."""
    stage = stage_name(type(config))
    model = _without_memory(str(config.model_name_or_path), reward_head=stage == "reward")
    trained, size = _count(model), getattr(torch, config.dtype).itemsize
    frozen = trained if isinstance(config, GRPOConfig) and needs_reference(config) else 0
    if judge := getattr(config, "reward_model", None):
        frozen += _count(_without_memory(judge, reward_head=True))
    muon = 0
    if config.optim == "muon":
        named = list(model.named_parameters())
        names = muon_names(model, named)
        muon = sum(p.numel() for name, p in named if name in names)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary: int = model.config.vocab_size
    logits = min(config.per_device_train_batch_size * config.max_length, chunk_rows(vocabulary, device)) * vocabulary

    def part(name: str, times: int, parameters: int) -> MemoryPart:
        formula = f"{times} x {parameters:,} parameters x {size} bytes"
        return MemoryPart(name=name, num_bytes=times * parameters * size, formula=formula)

    parts = [
        part("weights", 1, trained),
        part("frozen models", 1, frozen),
        part("gradients", 1, trained),
        part("AdamW", 2, trained - muon),
        part("Muon", 1, muon),
        MemoryPart(name="logits chunk", num_bytes=8 * logits, formula=f"2 x {logits:,} logits x 4 bytes"),
    ]
    return [line for line in parts if line.num_bytes]


def memory_text(parts: list[MemoryPart]) -> str:
    """The estimate as aligned lines with its sum."""
    total = MemoryPart(name="sum", num_bytes=sum(part.num_bytes for part in parts), formula="and activations on top")
    return "\n".join(f"{part.name:<14} {_size(part.num_bytes):>12}   {part.formula}" for part in [*parts, total])


def cache_text(config: CacheReferenceConfig) -> str:
    """Rows, bytes on disk, and about the time of a cache; no weights are loaded."""
    model = _without_memory(config.model_name_or_path, reward_head=False)
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
        "on disk": f"{_size(header.num_bytes)} in {shards} shards; {_size(free)} are free",
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


def _size(num_bytes: int) -> str:
    """Bytes with a unit that leaves one to four digits before the point."""
    power = min((max(num_bytes, 1).bit_length() - 1) // 10, 4)
    return f"{num_bytes / 2 ** (10 * power):,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _without_memory(path: str, *, reward_head: bool) -> PreTrainedModel:
    """The model's shapes, on the meta device."""
    config = AutoConfig.from_pretrained(path)
    if reward_head:
        config.num_labels = 1
    family = AutoModelForSequenceClassification if reward_head else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = family.from_config(config)
    return model


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
