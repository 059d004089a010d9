"""Answers drawn by vLLM (`rollout: vllm`) in place of `rollout.generate`, and the policy's weights sent to it.

    an answer: (prompt ids, seed, temperature, top_p) -> ids up to and with the end of turn, or cut at max_new_tokens
    weights:   before a rollout, and only if a parameter was written to since; one tensor at a time, whole, in the names
               and the layout of the model's checkpoint; then the prefix cache is dropped

Two places to run it: an engine inside every rank's process (the default), or one `vllm serve` for all ranks at
`vllm_server_base_url`, on GPUs of its own. Both draw with one seed per answer. The log-probabilities of vLLM are never
asked for: its kernels round otherwise than the trainer's, and old log-probabilities are the trainer's own.

vLLM is imported only when a run asks for it, and used through its documented interface.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nova_train.config import ConfigError
from nova_train.mesh import Mesh
from nova_train.rollout import Completion
from nova_train.sharding import full_tensor
from nova_train.state import restore_rng, rng_state

log = logging.getLogger(__name__)

# The weight transfer engine of the trainer's side came with 0.28; 0.32 is the newest whose interface was read.
OLDEST, NEWEST_READ, TOO_NEW = "0.28", "0.32", "1.0"
_USED_WITH_SERVER = {
    "vllm.distributed.weight_transfer": (
        "HTTPVLLMWeightSyncClient",
        "ParamMeta",
        "WeightSource",
        "WeightTransferTrainerFactory",
    ),
    "vllm.distributed.weight_transfer.nccl_engine": ("NCCLTrainerInitInfo",),
    "vllm.utils.network_utils": ("get_ip", "get_open_port"),
}
_LLM_METHODS = ("generate", "collective_rpc", "reset_prefix_cache", "sleep", "wake_up")
_HTTP_PATIENCE = 3600.0  # seconds for one answer or weight update of a server


def check_keys(config: Any) -> None:
    """Refuse keys of `nova-train grpo` that do not go together; vLLM is not needed for that."""
    url, sleeps, share = config.vllm_server_base_url, config.vllm_enable_sleep_mode, config.vllm_gpu_memory_utilization
    if not 0 < share < 1:
        raise ConfigError(f"vllm_gpu_memory_utilization must lie between 0 and 1, got {share}")
    if config.rollout != "vllm":
        for key, value in (("vllm_server_base_url", url), ("vllm_enable_sleep_mode", sleeps)):
            if value:
                raise ConfigError(
                    f"{key} is {value}, but rollout is {config.rollout}; add rollout: vllm, or leave it out"
                )
        return
    if config.dtype == "float64":
        raise ConfigError("rollout: vllm knows no dtype: float64; use float32 or bfloat16, or rollout: hf")
    if url is not None and not re.match(r"https?://", url):
        raise ConfigError(f"vllm_server_base_url must begin with http:// or https://, got {url!r}")
    if url is not None and sleeps:
        raise ConfigError(f"vllm_enable_sleep_mode is for the engine inside a rank; the one at {url} is a server")
    if url is None and not sleeps and config.segments == "auto" and config.memory_budget is None:
        raise ConfigError(
            f"segments: auto would plan with 90 % of the GPU, of which vLLM keeps {share:.0%}; give memory_budget, or "
            "vllm_enable_sleep_mode: true"
        )


class _Place(Protocol):
    """Where vLLM runs: `_Colocated` or `_Server`."""

    @property
    def room(self) -> int:
        """Tokens of the longest prompt with its answer."""

    def loaded(self, send: bool) -> AbstractContextManager[None]:
        """Inside the `with` it can answer; `send`: with the policy's weights of now. All ranks enter it together."""

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Mapping[str, Any]
    ) -> list[Sequence[int]]:
        """The ids of one answer per prompt; `sampling`: of vLLM's SamplingParams, the same for all."""

    def close(self) -> None:
        """Give back what it holds."""


class Engine:
    """Draws answers with vLLM from the weights that the policy has at the time."""

    def __init__(self, place: _Place, policy: PreTrainedModel, mesh: Mesh) -> None:
        self._place, self._policy, self._mesh = place, policy, mesh
        self._steps = 0  # of any optimiser of this process
        self._sent: tuple[int, int] | None = None  # `_writes` when the weights were sent
        self._hook = register_optimizer_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        self._steps += 1

    def _writes(self) -> tuple[int, int]:
        """Grows with every write to a parameter: autograd counts them, but for those of fused optimisers."""
        with torch.no_grad():
            own = [p.to_local() if isinstance(p, DTensor) else p for p in self._policy.parameters()]
        return sum(parameter._version for parameter in own), self._steps

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside the `with` the engine has the policy's weights; entered on all ranks together."""
        writes = self._writes()
        with self._place.loaded(send=self._mesh.any(writes != self._sent)):
            self._sent = writes
            yield

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        end_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[Completion]:
        """As `nova_train.rollout.generate`; every rank asks for as many answers as it likes.

        Raises:
            ValueError: a prompt that does not fit.
        """
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + max_new_tokens > self._place.room:  # vLLM would cut the answer short without a word
            raise ValueError(
                f"generate: a prompt has {longest} tokens; with {max_new_tokens} new ones that is more than vLLM's "
                f"{self._place.room}; shorten the prompt or lower max_completion_length"
            )
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens}
        sampling |= {"stop_token_ids": list(end_ids), "ignore_eos": True}  # these end an answer, and nothing else
        sampling |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # a model's own defaults stay out of it
        return [_completion(ids, end_ids, max_new_tokens) for ids in self._place.draw(prompts, seeds, sampling)]

    def close(self) -> None:
        """Give back what it holds."""
        self._hook.remove()
        self._place.close()


def start(policy: PreTrainedModel, config: Any, mesh: Mesh) -> Engine:
    """The engine of a run; all ranks call it.

    Raises:
        ConfigError: as `require`; a server that does not answer or fit; weights that cannot be sent one at a time.
    """
    mesh.require_same("vLLM", (vllm := require(config)).__version__)
    checkpoint_layout(policy)
    place = _Colocated if config.vllm_server_base_url is None else _Server
    return Engine(place(vllm, policy, config, mesh), policy, mesh)


def require(config: Any) -> Any:
    """The module, if it has what is used of it.

    Raises:
        ConfigError: vLLM is missing, too old or too new.
    """
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            f"rollout: vllm needs vLLM, which cannot be imported ({error}): pip install vllm, or use rollout: hf"
        ) from error
    if not _number(OLDEST) <= _number(vllm.__version__) < _number(TOO_NEW):
        raise ConfigError(
            f"rollout: vllm was written for vLLM {OLDEST} and later below {TOO_NEW}, found {vllm.__version__}; "
            "install one of them, or use rollout: hf"
        )
    missing = [f"LLM.{name}" for name in _LLM_METHODS if not hasattr(getattr(vllm, "LLM", None), name)]
    used = {"vllm": ("LLM", "SamplingParams"), **({} if config.vllm_server_base_url is None else _USED_WITH_SERVER)}
    for module, names in used.items():
        try:
            part = importlib.import_module(module)
        except ImportError:
            missing.append(module)
        else:
            missing += [f"{module}.{name}" for name in names if not hasattr(part, name)]
    if missing:
        raise ConfigError(f"rollout: vllm uses {missing[0]}, which vLLM {vllm.__version__} has not; use rollout: hf")
    if _number(vllm.__version__) > _number(NEWEST_READ):
        log.warning("vLLM %s is newer than %s, for which this was written", vllm.__version__, NEWEST_READ)
    return vllm


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def checkpoint_layout(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors as its checkpoint names and shapes them, on the meta device, in the order they are sent.

    Raises:
        ConfigError: one tensor of the checkpoint is made of several of the model's.
    """
    bare = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in _tensors(model)}
    alone: dict[str, Tensor] = {}
    for name, value in bare.items():
        alone |= revert_weight_conversion(model, {name: value})
    whole = revert_weight_conversion(model, bare)
    if {name: value.shape for name, value in whole.items()} != {name: value.shape for name, value in alone.items()}:
        raise ConfigError(
            f"rollout: vllm sends weights one at a time, and a checkpoint of {type(model).__name__} joins several of "
            "the model's into one; use rollout: hf"
        )
    return alone


def checkpoint_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The same with their values: one whole tensor after the other. Where they are sharded, all ranks iterate."""
    for name, value in _tensors(model):
        yield from revert_weight_conversion(model, {name: full_tensor(value.detach())}).items()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, layer by layer; tied weights once."""
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


class _Colocated:
    """An engine in this process, on this rank's GPU; every rank has one of the whole model."""

    def __init__(self, vllm: Any, policy: PreTrainedModel, config: Any, mesh: Mesh) -> None:
        needed = config.max_length + config.max_completion_length
        self.room = min(needed, getattr(policy.config, "max_position_embeddings", None) or needed)
        self._policy, self._sleeps = policy, config.vllm_enable_sleep_mode
        self._sampling = vllm.SamplingParams
        # The engine has to live in this process: it reads the weights from it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        before = rng_state()
        self._llm: Any = vllm.LLM(
            model=str(config.model_name_or_path),
            load_format="dummy",  # its weights are the policy's, sent before the first answer
            skip_tokenizer_init=True,
            dtype="bfloat16" if config.bf16 else config.dtype,
            seed=config.seed,
            max_model_len=self.room,
            max_num_seqs=config.rollout_batch_size,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            enable_sleep_mode=self._sleeps,
            tensor_parallel_size=1,
            **({} if mesh.size == 1 else {"distributed_executor_backend": "external_launcher"}),
        )
        restore_rng(before)  # vLLM seeds the generators of a process that it lives in
        self._sleep()

    @contextmanager
    def loaded(self, send: bool) -> Iterator[None]:
        self._wake("weights")
        if send:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_weights(self._policy)})
            if self._llm.reset_prefix_cache() is False:
                raise RuntimeError("vLLM did not drop its prefix cache: it would answer from the old weights")
        self._wake("kv_cache")
        try:
            yield
        finally:
            self._sleep()

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Mapping[str, Any]
    ) -> list[Sequence[int]]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._sampling(seed=seed, detokenize=False, **sampling) for seed in seeds],
            use_tqdm=False,
        )
        return [output.outputs[0].token_ids for output in outputs]

    def close(self) -> None:
        self._llm = None
        gc.collect()
        torch.cuda.empty_cache()

    def _wake(self, part: str) -> None:
        if self._sleeps:
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=[part])

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)  # weights to the host; level 2 would lose the buffers of some models


class _Server:
    """A `vllm serve` with --weight-transfer-config '{"backend": "nccl"}' and VLLM_SERVER_DEV_MODE=1.

    The first rank sends the weights over NCCL; every rank asks for its own answers over HTTP.
    """

    def __init__(self, vllm: Any, policy: PreTrainedModel, config: Any, mesh: Mesh) -> None:
        self._url = str(config.vllm_server_base_url).rstrip("/")
        self._mesh, self._at_once = mesh, config.rollout_batch_size
        self._model, self.room, place = mesh.on_main(self._look, vllm.__version__, config)
        transfer = importlib.import_module("vllm.distributed.weight_transfer")
        nccl = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
        self._transfer: Any = transfer.WeightTransferTrainerFactory.trainer_init(
            init_info=nccl.NCCLTrainerInitInfo(rank=mesh.rank, **place),
            client=transfer.HTTPVLLMWeightSyncClient(self._url, timeout=_HTTP_PATIENCE),
            source=_source(transfer, policy),
        )

    def _look(self, version: str, config: Any) -> tuple[str, int, dict[str, Any]]:
        """What is served: its name, its room in tokens, and where its workers are to meet the trainer."""
        theirs = self._ask("/version")["version"]
        if theirs != version:
            raise ConfigError(f"vLLM at {self._url} is {theirs}, here it is {version}; install the same")
        served = self._ask("/v1/models")["data"][0]
        needed = config.max_length + config.max_completion_length
        if served["max_model_len"] < needed:
            raise ConfigError(
                f"vLLM at {self._url} was started for {served['max_model_len']} tokens; max_length + "
                f"max_completion_length is {needed}: start it with --max-model-len {needed}"
            )
        net, workers = importlib.import_module("vllm.utils.network_utils"), self._ask("/get_world_size")["world_size"]
        place = {"master_address": net.get_ip(), "master_port": net.get_open_port(), "world_size": workers + 1}
        return served["id"], served["max_model_len"], place

    @contextmanager
    def loaded(self, send: bool) -> Iterator[None]:
        if send:
            self._transfer.send_weights()
            self._mesh.on_main(self._ask, "/reset_prefix_cache", {})  # nobody asks before the first rank has sent all
        yield

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Mapping[str, Any]
    ) -> list[Sequence[int]]:
        same = {"model": self._model, "return_token_ids": True, **sampling}
        asked = [{**same, "prompt": list(prompt), "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
        with ThreadPoolExecutor(self._at_once) as pool:
            answers = pool.map(lambda one: self._ask("/v1/completions", one), asked)
            return [answer["choices"][0]["token_ids"] for answer in answers]

    def close(self) -> None:
        self._transfer.shutdown()

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """GET, or POST of a body; the JSON that comes back, or None."""
        data, kind = None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = Request(self._url + path, data=data, headers=kind)
        try:
            with urlopen(request, timeout=_HTTP_PATIENCE) as reply:
                text = reply.read()
        except HTTPError as error:
            hint = "; is it started with VLLM_SERVER_DEV_MODE=1?" if error.code == 404 else ""
            raise ConfigError(f"vLLM at {self._url}{path}: {error}: {error.read()[:300]!r}{hint}") from error
        except URLError as error:
            raise ConfigError(f"vLLM at {self._url} cannot be reached: {error.reason}") from error
        return json.loads(text) if text else None


def _source(transfer: Any, policy: PreTrainedModel) -> Any:
    """The policy as vLLM's trainer side reads it."""

    class Weights(transfer.WeightSource):
        def metadata(self) -> list[Any]:
            layout = checkpoint_layout(policy)
            return [transfer.ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in layout.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return checkpoint_weights(policy)

    return Weights()


def _completion(ids: Sequence[int], end_ids: Sequence[int], max_new_tokens: int) -> Completion:
    ids = [int(token) for token in ids]
    finished = bool(ids) and ids[-1] in end_ids
    if any(token in end_ids for token in ids[:-1]) or not (finished or len(ids) == max_new_tokens):
        raise RuntimeError(
            f"vLLM gave an answer of {len(ids)} tokens that neither stops at its first end of turn "
            f"({list(end_ids)}) nor fills max_completion_length {max_new_tokens}"
        )
    return Completion(ids, finished)
