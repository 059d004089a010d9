"""A stand-in for vLLM: the names that `rollout: vllm` uses of it, with the trainer's own sampler behind them.

It starts with zeroed weights, remembers answers as a prefix cache would, and refuses what vLLM refuses: work while it
sleeps, prompts that do not fit, unknown arguments. What it cannot show is that vLLM itself behaves so.
"""

from __future__ import annotations

import json
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from urllib.request import Request, urlopen

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from nova_train.rollout import generate

VERSION = "0.32.1"
MODULES = {
    "vllm": ("LLM", "SamplingParams"),
    "vllm.distributed": (),
    "vllm.distributed.weight_transfer": (
        "HTTPVLLMWeightSyncClient",
        "ParamMeta",
        "WeightSource",
        "WeightTransferTrainerFactory",
    ),
    "vllm.distributed.weight_transfer.nccl_engine": ("NCCLTrainerInitInfo",),
    "vllm.utils": (),
    "vllm.utils.network_utils": ("get_ip", "get_open_port"),
}


def modules(version: str = VERSION) -> dict[str, ModuleType]:
    """What to put into sys.modules."""
    found = {}
    for name, members in MODULES.items():
        found[name] = ModuleType(name)
        for member in members:
            setattr(found[name], member, globals()[member])
    found["vllm"].__version__ = version
    return found


def install() -> None:
    sys.modules.update(modules())


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_token_ids: list[int]
    ignore_eos: bool
    top_k: int
    min_p: float
    repetition_penalty: float
    detokenize: bool = True


class Weights:
    """A model whose weights come from elsewhere."""

    def __init__(self, folder: str, dtype: torch.dtype, room: int) -> None:
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
        self.model.load_state_dict({name: torch.zeros_like(value) for name, value in self.model.state_dict().items()})
        self.room = room
        self.remembered: dict[Any, list[int]] = {}

    def load(self, pairs: Any) -> tuple[int, int]:
        """Returns how many tensors came, and how many of them were alive at a time."""
        own, left, alive, most, count = self.model.state_dict(), set(), [], 0, 0
        left = {name for name in own if name != "lm_head.weight"}
        for name, tensor in pairs:
            assert not isinstance(tensor, DTensor) and not tensor.requires_grad
            own[name].copy_(tensor)
            left.discard(name)
            count += 1
            alive = [seen for seen in alive if seen() is not None] + [weakref.ref(tensor)]
            most = max(most, len(alive))
            del tensor
        assert not left, f"never sent: {left}"
        return count, most

    def answer(self, prompt: list[int], params: SamplingParams) -> list[int]:
        assert (params.top_k, params.min_p, params.repetition_penalty) == (0, 0.0, 1.0)
        assert params.ignore_eos and len(prompt) + params.max_tokens <= self.room
        key = (tuple(prompt), params.seed, params.temperature)
        if key not in self.remembered:
            (drawn,) = generate(
                self.model,
                [prompt],
                seeds=[params.seed],
                end_ids=params.stop_token_ids,
                pad_id=0,
                max_new_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
            )
            self.remembered[key] = drawn.ids
        return self.remembered[key]


class LLM:
    made: ClassVar[list[LLM]] = []

    def __init__(
        self,
        model: str,
        *,
        load_format: str,
        skip_tokenizer_init: bool,
        dtype: str,
        seed: int,
        max_model_len: int,
        max_num_seqs: int,
        gpu_memory_utilization: float,
        enable_sleep_mode: bool,
        tensor_parallel_size: int,
        distributed_executor_backend: str | None = None,
    ) -> None:
        torch.manual_seed(seed + 12345)
        self.weights = Weights(model, getattr(torch, dtype), max_model_len)
        self.backend, self.sleeps = distributed_executor_backend, enable_sleep_mode
        self.awake = {"weights", "kv_cache"}
        self.events: list[Any] = []
        LLM.made.append(self)

    def collective_rpc(self, method: str, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[None]:
        assert method == "reload_weights" and set(kwargs) == {"weights_iterator"} and "weights" in self.awake
        self.events.append(("reload", *self.weights.load(kwargs["weights_iterator"])))
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.weights.remembered.clear()
        return True

    def wake_up(self, tags: list[str]) -> None:
        assert self.sleeps
        self.awake |= set(tags)

    def sleep(self, level: int = 1) -> None:
        assert self.sleeps
        self.awake.clear()
        self.events.append(("sleep", level))

    def generate(self, prompts: Any, sampling_params: list[SamplingParams], *, use_tqdm: bool) -> list[Any]:
        assert self.awake == {"weights", "kv_cache"} and not use_tqdm
        self.events.append(("generate", len(prompts)))
        drawn = [self.weights.answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in drawn]


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource:
    """The base class of what a trainer sends."""


@dataclass(kw_only=True)
class NCCLTrainerInitInfo:
    master_address: str
    master_port: int
    world_size: int
    rank: int
    packed: bool = True


def get_ip() -> str:
    return "127.0.0.1"


def get_open_port() -> int:
    return 1


class HTTPVLLMWeightSyncClient:
    def __init__(self, base_url: str, timeout: float = 300) -> None:
        self.url = base_url

    def post(self, path: str, body: Any = None) -> None:
        with urlopen(Request(self.url + path, data=json.dumps(body or {}).encode(), method="POST")) as reply:
            reply.read()


class WeightTransferTrainerFactory:
    @staticmethod
    def trainer_init(*, init_info: NCCLTrainerInitInfo, client: HTTPVLLMWeightSyncClient, source: Any) -> Sender:
        assert isinstance(source, WeightSource) and init_info.world_size == 3
        return Sender(init_info, client, source)


class Sender:
    """Sends over HTTP what NCCL would carry; only the first rank does, all ranks iterate."""

    def __init__(self, init_info: NCCLTrainerInitInfo, client: HTTPVLLMWeightSyncClient, source: Any) -> None:
        self.info, self.client, self.source = init_info, client, source

    def send_weights(self) -> None:
        body = {}
        for meta, (name, tensor) in zip(self.source.metadata(), self.source, strict=True):
            assert (meta.name, meta.dtype, meta.shape) == (name, tensor.dtype, tuple(tensor.shape))
            body[name] = tensor.tolist()
        if self.info.rank == 0:
            self.client.post("/start_weight_update")
            self.client.post("/update_weights", body)
            self.client.post("/finish_weight_update")

    def shutdown(self) -> None:
        self.client.post("/shutdown")


@contextmanager
def server(folder: str, *, room: int, version: str = VERSION) -> Iterator[tuple[str, list[str]]]:
    """A `vllm serve` of the model in a thread: its address, and the paths that were asked for."""
    weights, paths, lock = Weights(folder, torch.float32, room), [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: Any) -> None:
            data = b"" if body is None else json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            known = {
                "/version": {"version": version},
                "/v1/models": {"data": [{"id": "served", "max_model_len": room}]},
                "/get_world_size": {"world_size": 2},
            }
            self.reply(known[self.path])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                paths.append(self.path)
                if self.path == "/v1/completions":
                    assert body.pop("model") == "served" and body.pop("return_token_ids")
                    ids = weights.answer(body.pop("prompt"), SamplingParams(**body))
                    self.reply({"choices": [{"token_ids": ids}]})
                    return
                if self.path == "/update_weights":
                    weights.load((name, torch.tensor(value)) for name, value in body.items())
                elif self.path == "/reset_prefix_cache":
                    weights.remembered.clear()
            self.reply(None)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}", paths
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
