"""Hugging Face models as the loop sees them: packed rows in, hidden states [T, H] out, and the head beside them.

The trainer never asks a model for logits: the losses take hidden states and the head's weight (`nova_kernels.logprob`,
`nova_kernels.topk_kl`). The head is checked once per model, so that a model whose logits are not
`softcap(hidden @ weight.T + bias)` is refused instead of trained wrongly.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from nova_kernels.integrations.transformers import use_ulysses, use_varlen_attention
from nova_kernels.packing import PackedBatch
from nova_train import state
from nova_train.chat import CHATML_TEMPLATE
from nova_train.config import ConfigError, TrainConfig
from nova_train.mesh import Mesh
from nova_train.sharding import shard

log = logging.getLogger(__name__)

PAD_TOKEN = "<|pad|>"
WEIGHTS_COMPARED = 64  # of each tensor, between ranks
# What transformers raises on a config.json with values of wrong types or sizes.
MALFORMED = (
    StrictDataclassError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Arithmetic(Protocol):
    """How a model is placed and computes; the keys of the stages' configs of the same names."""

    @property
    def dtype(self) -> str: ...
    @property
    def bf16(self) -> bool: ...
    @property
    def attention_backend(self) -> str | None: ...
    @property
    def device(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head as plain tensors: logits = softcap(hidden @ weight.T + bias)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None

    def kwargs(self) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap}


def load_tokenizer(path: str | Path) -> Any:
    """AutoTokenizer; one without a chat template gets ChatML (its markers must then be special tokens).

    Raises:
        ConfigError: nothing of this name here or on the Hub.
    """
    tokenizer = _from_pretrained(AutoTokenizer, path)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def load_causal_lm(
    path: str | Path, config: Arithmetic, *, frozen: bool = False, mesh: Mesh | None = None
) -> PreTrainedModel:
    """A causal LM with varlen attention, in evaluation mode; one that is trained waits for its segments (memory.py).

    Args:
        mesh: ranks that split its rows; on several, `distribute` shards the weights and places them.
    """
    if state.has_sharded_weights(path):
        model = _without_weights(AutoModelForCausalLM, path, config)
        model.generation_config = GenerationConfig.from_pretrained(path)
    else:
        model = _from_pretrained(AutoModelForCausalLM, path, dtype=config.dtype)
    return _placed(model, config, frozen=frozen, mesh=mesh or Mesh())


def load_plain_causal_lm(path: str | Path) -> PreTrainedModel:
    """A causal LM in evaluation mode with its own attention, for generation only, on a GPU where there is one."""
    model: PreTrainedModel = _from_pretrained(AutoModelForCausalLM, path)
    return model.eval().requires_grad_(False).to(pick_device("auto"))


def load_reward_model(
    path: str | Path, config: TrainConfig, *, frozen: bool = False, mesh: Mesh | None = None
) -> PreTrainedModel:
    """AutoModelForSequenceClassification with one output; a causal LM's weights give the backbone, the head is new.

    Args:
        mesh: as of `load_causal_lm`.
    """
    if state.has_sharded_weights(path):
        model = _without_weights(AutoModelForSequenceClassification, path, config)
        return _placed(model, config, frozen=frozen, mesh=mesh or Mesh())
    model, loading = _from_pretrained(
        AutoModelForSequenceClassification, path, num_labels=1, dtype=config.dtype, output_loading_info=True
    )
    if frozen and loading["missing_keys"]:
        raise ConfigError(
            f"reward_model {path}: {', '.join(sorted(loading['missing_keys']))} is not saved there, so its scores "
            "would be random; give a model trained by `nova-train reward`"
        )
    return _placed(model, config, frozen=frozen, mesh=mesh or Mesh())


def distribute(model: PreTrainedModel, config: Arithmetic, mesh: Mesh) -> PreTrainedModel:
    """Shard a loaded model over the ranks and place it on their devices; the same model. Nothing on one rank.

    Raises:
        ConfigError: the ranks have read different weights, which together would be a model of nobody.
    """
    if mesh.size > 1:
        if not hasattr(model, "_weights_at"):
            require_same_weights(model, mesh)
        shard(model, mesh, bf16=config.bf16)
        model.to(pick_device(config.device))
        _read_weights(model)
    return model


def require_same_weights(model: PreTrainedModel, mesh: Mesh) -> None:
    """Compare a model between ranks: each tensor's name, shape and some values; training changes nearly all of them.

    Raises:
        ConfigError: they differ.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // WEIGHTS_COMPARED)]
        digest.update(f"{name} {list(tensor.shape)} {some.double().tolist()}\n".encode())
    mesh.require_same(f"the weights of {model.name_or_path or type(model).__name__}", digest.hexdigest())


def model_without_weights(
    path: str | Path, config: Arithmetic, place: AbstractContextManager[Any], *, reward_head: bool = False
) -> PreTrainedModel:
    """The model as it is trained, from its configuration alone.

    Args:
        place: where its tensors are made, such as torch.device("meta"): shapes and dtypes without memory.
    """
    shape = load_model_config(path)
    if reward_head:
        shape.num_labels = 1
    family = AutoModelForSequenceClassification if reward_head else AutoModelForCausalLM
    with place:
        model: PreTrainedModel = family.from_config(shape, dtype=getattr(torch, config.dtype))
    return _prepared(model, config, Mesh())


def give_own_pad_token(model: PreTrainedModel, tokenizer: Any, end_of_turn_id: int) -> None:
    """Make sure that padding has a token of its own, known to both.

    transformers scores a sequence at its last token that is not `pad_token_id`; where padding shares its id with the
    end of a turn, that is the token before. A new token is added (and the embedding grown) only where it is needed.
    """
    ends = {tokenizer.eos_token_id, end_of_turn_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id >= rows:
        model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


def end_generation_at(model: PreTrainedModel, end_of_turn_id: int) -> None:
    """Let `generate` of the saved model stop where its turns end; a base model's own end is another token."""
    known = model.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if end_of_turn_id not in ends:
        model.generation_config.eos_token_id = [*ends, end_of_turn_id]


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Last hidden states [t, H] of a packed row, after the final norm, on the model's device.

    They are those of `own_tokens(model, T)`: of all tokens, unless ranks split the row. Samples do not see each other.
    With `bf16` the autocast is entered here, so that the policy, the reference and every evaluation run the same
    arithmetic.
    """
    own, batch = own_tokens(model, batch.num_tokens), batch.to(model.device)
    options = {**batch.attention_kwargs(), "position_ids": batch.position_ids[:, own]}
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=getattr(model, "_autocast", False)):
        output = model.base_model(input_ids=batch.input_ids[:, own], **options)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def own_tokens(model: PreTrainedModel, num_tokens: int) -> slice:
    """Which of a row's tokens this rank has the hidden states of."""
    return mesh_of(model).own_tokens(num_tokens)


def mesh_of(model: Any) -> Mesh:
    """The ranks that split the model's rows."""
    mesh: Mesh | None = getattr(model, "_mesh", None)
    return Mesh() if mesh is None else mesh


def lm_head(model: PreTrainedModel) -> Head:
    """The head's tensors; gradients reach the model through them."""
    linear = model.get_output_embeddings()
    return Head(
        weight=linear.weight,
        bias=getattr(linear, "bias", None),
        softcap=getattr(model.config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose own logits are not what `lm_head` says (some scale them).

    Raises:
        ConfigError: the largest difference, and what is supported; a model that cannot run without its head.
    """
    if model.base_model is model:
        raise ConfigError(
            f"{type(model).__name__}: its layers cannot be run without its head (base_model is the model itself); take "
            "a causal language model whose body is a model of its own, such as Llama, Qwen or Mistral"
        )
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(min(8, model.config.vocab_size), device=device)[None]
    with own_attention(model):
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    head = lm_head(model)
    bias = None if head.bias is None else head.bias.float()
    logits = torch.nn.functional.linear(output.hidden_states[-1][0].float(), head.weight.float(), bias)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    own = output.logits[0].float()
    error = float((logits - own).abs().max())
    if error > 1e-2 * (1.0 + float(own.abs().max())):
        raise ConfigError(
            f"{type(model).__name__}: the model's logits differ from hidden @ head.T by {error:.2g}; models that "
            "rescale their logits are not supported (config fields like logit_scale or logits_scaling)"
        )


def pick_device(name: str) -> str:
    """ "auto" is a GPU where there is one; asking for one that is not there is an error."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("device: cuda, but torch sees no GPU here; use auto or cpu")
    return "cuda" if name != "cpu" and found else "cpu"


def own_attention(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """The model's own attention for the length of a `with`: generation needs its KV cache and padding mask."""
    handle = getattr(model, "_varlen_attention", None)
    return nullcontext() if handle is None else handle.suspended()


def load_model_config(path: str | Path) -> Any:
    """A model's configuration without its weights.

    Raises:
        ConfigError: nothing of this name here or on the Hub, or a malformed one.
    """
    try:
        return _from_pretrained(AutoConfig, path)
    except ConfigError:
        raise
    except MALFORMED as error:
        raise ConfigError(f"model {path}: {one_line(error)}; correct its config.json") from error


def one_line(error: Exception) -> str:
    """The first two lines joined: a strict configuration has the field in one and the reason in the next."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]).rstrip(" .")
    says_all = isinstance(error, (StrictDataclassError, ValueError, RuntimeError))
    return text if says_all else f"{type(error).__name__}: {text}"


def _from_pretrained(cls: Any, path: str | Path, *, dtype: str | None = None, **options: Any) -> Any:
    if dtype is not None:
        options["dtype"] = getattr(torch, dtype)
    try:
        return cls.from_pretrained(path, **options)
    except OSError as error:
        reason = "it has no model that opens" if Path(path).exists() else "no such folder here, and not on the Hub"
        raise ConfigError(f"model {path}: {reason} ({str(error).splitlines()[0]})") from error
    except StrictDataclassError as error:
        raise ConfigError(f"model {path}: {one_line(error)}; correct its config.json") from error


def _without_weights(family: Any, path: str | Path, config: Arithmetic) -> PreTrainedModel:
    """A model whose weights wait in a checkpoint of several ranks."""
    model: PreTrainedModel = family.from_config(load_model_config(path), dtype=getattr(torch, config.dtype))
    model._weights_at = Path(path)
    return model


def _read_weights(model: PreTrainedModel) -> None:
    if (folder := vars(model).pop("_weights_at", None)) is not None:
        state.read_sharded_weights(folder, model)


def _placed(model: PreTrainedModel, config: Arithmetic, *, frozen: bool, mesh: Mesh) -> PreTrainedModel:
    _prepared(model, config, mesh)
    if mesh.size == 1:  # more ranks shard it first
        model.to(pick_device(config.device))
        _read_weights(model)
    return model.requires_grad_(not frozen)


def _prepared(model: PreTrainedModel, config: Arithmetic, mesh: Mesh) -> PreTrainedModel:
    if mesh.sequence_group is None:
        model._varlen_attention = use_varlen_attention(model, backend=config.attention_backend)
    else:
        model._varlen_attention = use_ulysses(model, mesh.sequence_group, backend=config.attention_backend)
    model._mesh = mesh
    model._autocast = config.bf16
    # Trained in evaluation mode: no dropout, no noise in a router, so log-probabilities are those of one model.
    return model.eval()
