"""How many GPUs a model needs under a checkpointing plan, from its shape alone.

With every state sharded over N cards (ZeRO-3, FSDP2) and T tokens on each of them (of a row that sp cards share, T is
its part), one card holds

    parameters x bytes per parameter / N  +  activations  +  logits  +  unsharded layers  +  slack

and the smallest N for which this fits follows. Activations are counted in U = T x hidden x 2 bytes, one bfloat16 hidden
state: a layer's boundary is 1 U and its backward needs n U, n being the sum of `saved_items`. A plan of equal segments
of k layers then peaks at U (ceil(L / k) - 1 + k n + 8) in backward. All of it follows from formulas; docs/fleet.md says
what was measured beside them, and what the numbers leave out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from nova_kernels.checkpoint import FSDP, Action, Chain, Cost, LayerCost, simulate
from nova_kernels.ulysses import HeadPlan

Kernels = Literal["eager", "fused"]

BFLOAT16 = 2  # bytes
# Alive in a layer's backward above what it saved: gradients of two tensors as wide as the MLP, and of hidden states.
BACKWARD_UNITS = 8
# Layers that are unsharded while the loss is computed: the last one, from which backward begins, and the one before it.
LAYERS_AT_LOSS = 2
# Every layer saves the rotary cos and sin, in a storage that all share. The published study counted them in each layer
# of a model 1024 wide, and its n includes them; they are 1 % of it.
COS_SIN_UNITS = 0.25
MATMUL_FLOPS = 2  # per weight and token


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated MLP: what its memory depends on. Numbers of elements."""

    name: str
    family: str = "llama"  # Hugging Face's model_type
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # one norm over the head width for the queries, one for the keys
    tied: bool = False  # embedding and head are one matrix

    def __post_init__(self) -> None:
        for key in ("num_layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab"):
            if getattr(self, key) < 1:
                raise ValueError(f"ModelShape {self.name}: {key} must be at least 1, got {getattr(self, key)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"ModelShape {self.name}: {self.heads} heads cannot share {self.kv_heads} kv_heads evenly")

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any, *, name: str | None = None) -> ModelShape:
        """The shape in a Hugging Face configuration: an object or a mapping, read by the names of its fields.

        Raises:
            ValueError: a family whose layers are built otherwise, a field that is missing or no number of elements.
        """

        def read(field: str, default: Any = None) -> Any:
            value = config.get(field) if isinstance(config, Mapping) else getattr(config, field, None)
            return default if value is None else value

        family = read("model_type")
        if family not in _FAMILIES:
            raise ValueError(
                f"ModelShape: model_type {family!r} is none of {', '.join(sorted(_FAMILIES))}, whose layers are known "
                "by formula; measure it instead (kernels: measured, or profile_layers on the meta device)"
            )
        if missing := [field for field in _REQUIRED if read(field) is None]:
            raise ValueError(f"ModelShape: the configuration has no {missing[0]}")
        sizes = {field: read(field) for field in (*_REQUIRED, *_OPTIONAL) if read(field) is not None}
        if wrong := [(key, size) for key, size in sizes.items() if not isinstance(size, int) or size < 1]:
            key, size = wrong[0]
            raise ValueError(f"ModelShape: {key} must be a whole number of at least 1, got {size!r}")
        extras = {
            ours: told if isinstance(told, bool) else bool(read(told)) for ours, told in _FAMILIES[family].items()
        }
        hidden, heads = read("hidden_size"), read("num_attention_heads")
        return cls(
            name=name or family,
            family=family,
            num_layers=read("num_hidden_layers"),
            hidden=hidden,
            ffn=read("intermediate_size"),
            heads=heads,
            kv_heads=read("num_key_value_heads", heads),
            head_dim=read("head_dim", hidden // heads),
            vocab=read("vocab_size"),
            tied=read("tie_word_embeddings", False),
            **extras,
        )

    @property
    def q_width(self) -> int:
        """Elements of one token's queries, and of its attention output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys; its values are as many."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matmuls(self) -> int:
        """Weights of one layer that every token is multiplied with."""
        return 2 * self.hidden * (self.q_width + self.kv_width) + 3 * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        biases = self.qkv_bias * (self.q_width + 2 * self.kv_width) + self.out_bias * self.hidden
        biases += self.mlp_bias * (2 * self.ffn + self.hidden)
        return self.layer_matmuls + biases + 2 * self.hidden + self.qk_norm * 2 * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of the model: layers, final norm, embedding, and the head unless it is tied."""
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.num_layers * self.layer_parameters + self.hidden + embeddings


_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_OPTIONAL = ("num_key_value_heads", "head_dim")
# What the layers of a family have beside the plain matrices: always, or where a field of the configuration says so.
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_FAMILIES: Mapping[str, Mapping[str, bool | str]] = MappingProxyType(
    {
        "llama": {**_ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
        "mistral": {},
        "qwen2": {"qkv_bias": True},
        "qwen3": {**_ATTENTION_BIAS, "qk_norm": True},
    }
)

LLAMA_3_70B = ModelShape(
    name="llama-3-70b", num_layers=80, hidden=8192, ffn=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256
)
QWEN2_72B = ModelShape(
    name="qwen2-72b",
    family="qwen2",
    num_layers=80,
    hidden=8192,
    ffn=29568,
    heads=64,
    kv_heads=8,
    head_dim=128,
    vocab=152064,
    qkv_bias=True,
)
QWEN2_7B = ModelShape(
    name="qwen2-7b",
    family="qwen2",
    num_layers=28,
    hidden=3584,
    ffn=18944,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocab=152064,
    qkv_bias=True,
)
MODEL_SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {shape.name: shape for shape in (LLAMA_3_70B, QWEN2_72B, QWEN2_7B)}
)


def saved_items(shape: ModelShape, kernels: Kernels, sp: int = 1) -> dict[str, float]:
    """What autograd keeps of one layer, by item, in units of U = T x hidden x 2 bytes; their sum is n.

    T counts the tokens of one GPU. With `sp` GPUs per row attention has all of the row's tokens and some of the heads:
    as much, but for key heads that several GPUs need and query heads that do not divide (the GPU with most is counted),
    and its output is kept by heads and by tokens.

    `eager`: the modules of Hugging Face with flash attention. `fused`: norms, rotary embedding and SwiGLU as kernels
    that keep their bfloat16 inputs alone and compute the rest again in their own backward.

    Raises:
        ValueError: other kernels.
    """
    ffn, head = shape.ffn / shape.hidden, shape.head_dim / shape.hidden
    plan = HeadPlan.build(shape.heads, shape.kv_heads, sp)
    q, kv = (sp * head * max(map(len, map(of, range(sp)))) for of in (plan.q_heads, plan.kv_heads))
    flash = {
        "queries, keys, values": q + 2 * kv,
        "attention output": q,
        **({"attention output, by tokens": shape.heads * head} if sp > 1 else {}),
        "log-sum-exp of attention, fp32": 4 * shape.heads / (BFLOAT16 * shape.hidden),
    }
    if kernels == "eager":
        return {
            "norm 1: input in fp32": 2.0,
            "norm 1: normalised, and times its weight": 2.0,
            **flash,
            "cos, sin": COS_SIN_UNITS,
            "norm 2: input in fp32": 2.0,
            "norm 2: normalised, and times its weight": 2.0,
            "MLP: gate, up, silu, product": 4 * ffn,
        }
    if kernels == "fused":
        return {
            "layer input": 1.0,
            "norm 1: output": 1.0,
            **flash,
            "residual after attention": 1.0,
            "norm 2: output": 1.0,
            "MLP: gate, up": 2 * ffn,
        }
    raise ValueError(f"saved_items: expected kernels to be one of {list(get_args(Kernels))}, got {kernels!r}")


def chain_of(
    shape: ModelShape,
    tokens: int,
    *,
    kernels: Kernels = "fused",
    logit_bytes: float = 0,
    n: float | None = None,
    sp: int = 1,
) -> Chain:
    """The layers of a model as a chain of costs of one GPU, for a row of `tokens` tokens in one document.

    Args:
        sp: GPUs that share the row.
        logit_bytes: bytes per logit [T, V] alive at the loss: 0 with a fused head or a reward head, 8 for fp32 logits
            and their gradient, 12 with one more copy.
        n: saved units of one layer, instead of the sum of its `saved_items`.

    Raises:
        ValueError: fewer than one token or GPU, or unknown kernels.
    """
    if tokens < 1:
        raise ValueError(f"chain_of: tokens must be at least 1, got {tokens}")
    own = math.ceil(tokens / sp)
    unit = own * shape.hidden * BFLOAT16
    saved = round(unit * ((sum(saved_items(shape, kernels, sp).values()) if n is None else n) - 1))
    # Without gradients: hidden state, normed input, gate, up and their product, and the output.
    forward = round(unit * (3 + 3 * shape.ffn / shape.hidden))
    layer = LayerCost(
        boundary=unit,
        saved=saved,
        saves_input=True,
        forward=forward,
        recompute=max(forward, saved + 2 * unit),
        recompute_cut=max(forward, saved + 2 * unit),
        backward=BACKWARD_UNITS * unit,
        weights=shape.layer_parameters * BFLOAT16,
        # Causal attention multiplies two halves of a T x T square per head.
        flops=MATMUL_FLOPS * own * (shape.layer_matmuls + tokens * shape.q_width),
        tail_flops=MATMUL_FLOPS * own * shape.ffn * shape.hidden,
    )
    loss = math.ceil(own * shape.vocab * logit_bytes)
    return Chain(layers=(layer,) * shape.num_layers, loss=loss, num_tokens=own)


def sharded(chain: Chain) -> Chain:
    """The chain as FSDP2 runs it: at the loss, LAYERS_AT_LOSS layers are unsharded beside the logits."""
    return replace(chain, loss=chain.loss + sum(layer.weights for layer in chain.layers[-LAYERS_AT_LOSS:]))


def equal_segments(num_layers: int, size: int) -> list[int]:
    """Segments of `size` layers, the rest last: what `checkpoint_segments(model, size)` cuts.

    Raises:
        ValueError: fewer than one layer per segment.
    """
    if size < 1:
        raise ValueError(f"equal_segments: size must be at least 1, got {size}")
    full, rest = divmod(num_layers, size)
    return [size] * full + [rest] * (rest > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU, and what training keeps per parameter."""

    memory_bytes: int = 80_000_000_000
    slack_bytes: int = 4_000_000_000  # CUDA context, workspaces, fragmentation
    # bfloat16 weight and gradient, float32 master weight and the two moments of AdamW
    bytes_per_parameter: float = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """What one GPU holds at the worst moment of a step, in bytes. The parts of it add up to the peak."""

    activations: int  # of the plan, without loss and without FSDP
    logits: int  # what the loss adds to that peak; 0 where the backward of the layers is worse anyway
    gathered: int  # what unsharded layers and one full gradient add on top
    parameters: int  # of the whole model, a number of elements
    sp: int = 1  # cards that share a row: they come in multiples of it

    def states(self, gpus: int, card: Card) -> int:
        """Weights, gradients and optimiser states of one of `gpus` cards."""
        return math.ceil(self.parameters * card.bytes_per_parameter / gpus)

    def total(self, gpus: int, card: Card) -> int:
        """All of it on one of `gpus` cards; one card alone shards nothing."""
        peak = self.activations + self.logits + (self.gathered if gpus > 1 else 0)
        return self.states(gpus, card) + peak + card.slack_bytes

    def minimum_gpus(self, card: Card) -> int | None:
        """The smallest number of cards on which it fits; None if it fits on no number of them."""
        if self.sp == 1 and self.total(1, card) <= card.memory_bytes:
            return 1
        left = card.memory_bytes - card.slack_bytes - self.activations - self.logits - self.gathered
        if left <= 0:
            return None
        least = max(2, math.ceil(self.parameters * card.bytes_per_parameter / left))
        return -(-least // self.sp) * self.sp


def memory_need(
    chain: Chain,
    bounds: Sequence[int],
    actions: Sequence[Action],
    *,
    parameters: int,
    fsdp: FSDP | None = None,
    sp: int = 1,
) -> MemoryNeed:
    """What a plan needs on every GPU, `sp` of which share a row. Bounds and actions as in `simulate`; of fsdp only
    `reshard` is read.
    """
    bare = simulate(replace(chain, loss=0), bounds, actions).peak_bytes
    cost = simulate(chain, bounds, actions)
    peak = _peak_when_sharded(chain, bounds, actions, cost, reshard=fsdp is not None and fsdp.reshard)
    logits, gathered = cost.peak_bytes - bare, peak - cost.peak_bytes
    return MemoryNeed(activations=bare, logits=logits, gathered=gathered, parameters=parameters, sp=sp)


def _peak_when_sharded(
    chain: Chain, bounds: Sequence[int], actions: Sequence[Action], cost: Cost, *, reshard: bool
) -> int:
    """The peak with whole layers as the published study counts them.

    In backward those of the running segment (one if they are sharded again or kept), one gathered ahead and one full
    gradient; LAYERS_AT_LOSS at the loss. `simulate` has what FSDP2 was seen to hold: one more for one layer alone.
    """
    weights = max(layer.weights for layer in chain.layers)
    kept = before = peak = 0
    for start, stop, action, segment in zip(bounds, bounds[1:], actions, cost.segments, strict=False):
        whole = 1 if reshard or action == "keep" else stop - start
        peak = max(peak, kept + segment.forward + 2 * weights, kept + before + segment.backward + (whole + 2) * weights)
        kept, before = kept + segment.kept, before if action == "keep" else segment.in_flight
    return chain.fixed + max(peak, kept + chain.loss + LAYERS_AT_LOSS * weights, chain.embedding)
