"""Hugging Face models on rows that the ranks of a group share, and the same models in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from nova_kernels.checkpoint import checkpoint_segments
from nova_kernels.integrations.transformers import use_ulysses, use_varlen_attention
from nova_kernels.packing import PackedBatch, pack_samples
from nova_kernels.ulysses import SequenceShards, TokenPlan
from nova_kernels.varlen import cu_seqlens_from_lengths

WORLD = 3
GROUPS = ((0, 1), (0, 1, 2))
LENGTHS = [5, 1, 11, 8]  # 25 tokens: neither 2 nor 3 divides them, and every edge of a shard is inside of a document
SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# On 3 ranks neither 4 query heads nor 7 divide, and one or two key heads are copied.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**{**SIZES, "hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "gemma2": lambda: Gemma2Config(
        **SIZES, head_dim=4, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
}
WAYS = ("plain", "chunks", "segments", "no positions")


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).double()


def make_batch() -> PackedBatch:
    """A packed row whose first shard has few trained tokens, its last document many."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for length in LENGTHS:
        ids = torch.randint(3, 37, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return pack_samples(samples)


def one_process(name: str) -> dict[str, Tensor]:
    """Loss, logits and gradients with the model's own attention, one document after the other."""
    model, batch = make_model(name), make_batch()
    ends = batch.cu_seqlens.tolist()
    logits, losses, count = [], [], 0
    for start, end in pairwise(ends):
        out = model(input_ids=batch.input_ids[:, start:end], use_cache=False).logits[0]
        targets = batch.labels[0, start + 1 : end]
        losses.append(torch.nn.functional.cross_entropy(out[:-1], targets, reduction="sum", ignore_index=-100))
        count += int((targets != -100).sum())
        logits.append(out.detach())
    loss = torch.stack(losses).sum() / count
    loss.backward()
    return {"loss": loss.detach(), "logits": torch.cat(logits), **gradients(model)}


def shared(name: str, group: dist.ProcessGroup, way: str = "plain") -> dict[str, Tensor]:
    """The same on this rank's tokens; loss and gradients summed over the ranks, logits put together."""
    model, batch = make_model(name), make_batch()
    shards = SequenceShards(TokenPlan.build(batch.num_tokens, dist.get_world_size(group)), dist.get_rank(group))
    part = shards.shard(batch)
    given = batch.attention_kwargs() | {"position_ids": part["position_ids"], "input_ids": part["input_ids"]}
    if way == "no positions":
        del given["position_ids"]
    use_ulysses(model, group, chunks=2 if way == "chunks" else 1)
    if way == "segments":
        checkpoint_segments(model, 2)
    logits = model(**given).logits[0]
    targets = part["shift_labels"][0]
    count = torch.tensor(int((targets != -100).sum()))
    dist.all_reduce(count, group=group)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100) / count
    loss.backward()
    summed = {"loss": loss.detach().clone(), **gradients(model)}
    for value in summed.values():
        dist.all_reduce(value, group=group)
    return {**summed, "logits": shards.gather(logits, group)}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cut_at_shards(name: str, group: dist.ProcessGroup) -> Tensor:
    """Logits of ranks that do not exchange: every one takes its shard for the row."""
    model, batch = make_model(name), make_batch()
    shards = SequenceShards(TokenPlan.build(batch.num_tokens, dist.get_world_size(group)), dist.get_rank(group))
    part = shards.shard(batch)
    use_varlen_attention(model)
    boundaries = cu_seqlens_from_lengths([part["input_ids"].shape[1]])
    logits = model(
        input_ids=part["input_ids"], position_ids=part["position_ids"], cu_seq_lens_q=boundaries, use_cache=False
    ).logits[0]
    return shards.gather(logits, group)


def suspended(group: dist.ProcessGroup) -> dict[str, Any]:
    """Inside `suspended()` each rank has its own model and whole rows; afterwards the group's again."""
    model, batch, rank = make_model("llama"), make_batch(), dist.get_rank(group)
    own = slice(*TokenPlan.build(batch.num_tokens, dist.get_world_size(group)).bounds(rank))
    given = batch.attention_kwargs() | {"position_ids": batch.position_ids[:, own]}
    handle = use_ulysses(model, group)
    found: dict[str, Any] = {}
    with torch.no_grad():
        before = model(input_ids=batch.input_ids[:, own], **given).logits
        with handle.suspended():
            prompt = batch.input_ids[:, : 4 + rank]  # of different lengths: nobody waits for anybody
            found["alone"] = model(input_ids=prompt).logits
            found["generated"] = model.generate(prompt, max_new_tokens=3 + rank, do_sample=False)
        found["same again"] = torch.equal(before, model(input_ids=batch.input_ids[:, own], **given).logits)
        handle.restore()
        found["restored"] = model(input_ids=prompt).logits
    return found


def refusals(group: dist.ProcessGroup, two: Any) -> dict[str, str]:
    """What every rank is told, by mistake; nobody waits for the others, since nothing was sent."""
    model, batch, rank = make_model("qwen2"), make_batch(), dist.get_rank(group)
    own = slice(*TokenPlan.build(batch.num_tokens, dist.get_world_size(group)).bounds(rank))
    ids, kwargs = batch.input_ids[:, own], batch.attention_kwargs()
    use_ulysses(model, group)
    calls: Mapping[str, Callable[[], Any]] = {
        "whole row": lambda: model(input_ids=batch.input_ids, **kwargs),
        "no boundaries": lambda: model(input_ids=ids, use_cache=False),
        "cache": lambda: model(input_ids=ids, **{**kwargs, "use_cache": True}),
        "mask": lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs),
        "two rows": lambda: model(input_ids=ids.expand(2, -1), **kwargs),
        "twice": lambda: use_ulysses(model, group),
        "another group": lambda: use_ulysses(make_model("qwen2"), two),
        "no model": lambda: use_ulysses(torch.nn.Linear(2, 2), group),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, TypeError) as error:
            said[name] = str(error)
    return said


def compiled_alone(group: dist.ProcessGroup) -> tuple[float, float, int]:
    """In a group of one rank, compiled layers against layers as they are: distance, size, and graphs."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def logits(compile: bool) -> Tensor:
        model, batch = make_model("llama"), make_batch()
        use_ulysses(model, group)
        for layer in model.model.layers if compile else ():
            layer.compile(backend=count, fullgraph=True)
        return model(input_ids=batch.input_ids, **batch.attention_kwargs()).logits.detach()

    plain, compiled = logits(False), logits(True)
    return (plain - compiled).abs().max().item(), plain.abs().max().item(), len(graphs)


def on_every_rank() -> dict[str, Any]:
    """One process: its part of everything."""
    dist.init_process_group("gloo")
    groups = {ranks: dist.new_group(ranks) for ranks in GROUPS}
    alone, found = dist.new_group((2,)), dict[str, Any]()
    if dist.get_rank() == 2:
        found["compiled alone"] = compiled_alone(alone)
    for ranks, group in groups.items():
        if dist.get_rank() not in ranks:
            continue
        for name in CONFIGS:
            for way in WAYS if name == "llama" else WAYS[:1]:
                found[f"{name} {way} {len(ranks)}"] = shared(name, group, way)
            found[f"cut {name} {len(ranks)}"] = cut_at_shards(name, group)
    found["suspended"] = suspended(groups[GROUPS[1]])
    found["refusals"] = refusals(groups[GROUPS[1]], groups[GROUPS[0]])
    return found
