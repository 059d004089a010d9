"""What works here: versions, the backend that each op takes and why not a faster one, and a quick self-check.

    python -m nova_kernels.doctor

Every op runs once on small inputs on every device, and its result is compared with plain PyTorch in float64. Exit
status 1 if one of them is wrong or cannot run.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nova_kernels import backend
from nova_kernels.attention import varlen_attention
from nova_kernels.checkpoint import checkpoint_segments
from nova_kernels.logprob import linear_logprobs
from nova_kernels.merging import model_stock
from nova_kernels.packing import pack_samples, plan_packs
from nova_kernels.topk_kl import linear_topk_kl_div, topk_kl_div, topk_select
from nova_kernels.varlen import cu_seqlens_from_lengths

LIBRARIES = ("nova-kernels", "torch", "numpy", "safetensors", "triton", "transformers", "flash-attn")
LIMIT = 1e-4  # error of a float32 result on these inputs that is still rounding
LENGTHS = [5, 1, 9]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One op on one device."""

    op: str
    device: str
    error: float  # distance from the float64 result
    choices: tuple[str, ...]  # what the op said about its backend
    problem: str | None  # why it could not run

    @property
    def healthy(self) -> bool:
        """Whether it ran and came out right."""
        return self.problem is None and self.error <= LIMIT

    def __str__(self) -> str:
        result = self.problem or f"error {self.error:.1e}"
        state = "ok " if self.healthy else "BAD"
        return "\n".join(
            [f"{state} {self.device:<5} {self.op:<11} {result}", *(f"          {c}" for c in self.choices)]
        )


def versions() -> list[str]:
    """One line per library, device and environment variable."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in LIBRARIES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines += [f"{device}: {torch.cuda.get_device_name(device)}" for device in devices() if device != "cpu"]
    lines.append(f"C++ extension: {backend.why_not_native() or 'built'}")
    lines.append(f"CUDA library: {backend.why_no_cuda_library() or 'built'}")
    variable = backend.ENVIRONMENT_VARIABLE
    return [*lines, f"{variable} {os.environ.get(variable) or 'not set'}"]


def devices() -> list[str]:
    """The CPU, and a CUDA device if there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def examine(checks: Mapping[str, Callable[[str], Tensor]] | None = None) -> list[Finding]:
    """Run every check on every device; a check returns differences from the float64 result."""
    findings = []
    for device in devices():
        for op, check in (CHECKS if checks is None else checks).items():
            error, problem = float("nan"), None
            with _choices() as choices:
                try:
                    error = float(check(device).abs().max())
                except (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError) as failure:
                    problem = f"{type(failure).__name__}: {failure}"
            findings.append(Finding(op=op, device=device, error=error, choices=tuple(choices), problem=problem))
    return findings


@contextmanager
def _choices() -> Iterator[list[str]]:
    """Collects what nova_kernels.backend says in the log; every op says it once per process."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, collector = logging.getLogger(backend.__name__), Collector()
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)


def _random(*shape: int, device: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _topk_kl(device: str) -> Tensor:
    policy, ref = (3 * _random(4, 97, device=device, seed=seed) for seed in (0, 1))
    ids = ref.double().topk(10).indices
    log_p, log_r = (logits.double().gather(1, ids).log_softmax(1) for logits in (policy, ref))
    return topk_kl_div(policy, topk_select(ref, 10)).double() - (log_p.exp() * (log_p - log_r)).sum(1)


def _linear_topk_kl(device: str) -> Tensor:
    hidden, weight = _random(4, 16, device=device, seed=0), _random(97, 16, device=device, seed=1)
    ref = topk_select(_random(4, 97, device=device, seed=2), 10)
    truth = topk_kl_div(hidden.double() @ weight.double().T, ref)
    return linear_topk_kl_div(hidden, weight, ref).double() - truth


def _logprob(device: str) -> Tensor:
    hidden, weight = _random(5, 16, device=device, seed=0), _random(97, 16, device=device, seed=1)
    targets = torch.arange(5, device=device) * 7
    truth = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    return linear_logprobs(hidden, weight, targets).logprobs.double() - truth


def _packing(device: str) -> Tensor:
    plan = plan_packs(LENGTHS, 10, seed=1)
    batch = pack_samples([{"input_ids": torch.arange(length)} for length in LENGTHS]).to(device)
    lost = [plan.order.size - len(LENGTHS), plan.gap, int((batch.input_ids != batch.position_ids).sum())]
    return torch.tensor(lost)


def _attention(device: str) -> Tensor:
    q, k, v = (_random(sum(LENGTHS), heads, 8, device=device, seed=heads) for heads in (4, 2, 2))
    row = varlen_attention(q, k, v, cu_seqlens=cu_seqlens_from_lengths(LENGTHS), max_seqlen=max(LENGTHS))
    parts = [x.double().transpose(0, 1).split(LENGTHS, 1) for x in (q, k, v)]
    alone = [
        F.scaled_dot_product_attention(q_s, k_s, v_s, is_causal=True, enable_gqa=True)
        for q_s, k_s, v_s in zip(*parts, strict=True)
    ]
    return row.double() - torch.cat(alone, 1).transpose(0, 1)


def _checkpoint(device: str) -> Tensor:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5))).to(device)
    row = _random(3, 8, device=device, seed=0).requires_grad_()
    (plain,) = torch.autograd.grad(layers(row).square().sum(), row)
    with checkpoint_segments(layers, 2):
        (segmented,) = torch.autograd.grad(layers(row).square().sum(), row)
    return segmented - plain


def _merging(device: str) -> Tensor:
    base, step = _random(6, device=device, seed=0), _random(6, device=device, seed=1)
    return model_stock([base + step, base + step], base) - (base + step)


CHECKS: dict[str, Callable[[str], Tensor]] = {
    "topk_kl": _topk_kl,
    "linear_topk": _linear_topk_kl,
    "logprob": _logprob,
    "packing": _packing,
    "attention": _attention,
    "checkpoint": _checkpoint,
    "merging": _merging,
}


def main() -> int:
    """Print what was found; 0 if everything is well."""
    findings = examine()
    sys.stdout.write("\n".join([*versions(), "", *map(str, findings)]) + "\n")
    sick = [finding for finding in findings if not finding.healthy]
    if sick:
        names = ", ".join(f"{finding.op} on {finding.device}" for finding in sick)
        sys.stderr.write(f"\n{len(sick)} of {len(findings)} checks failed: {names}\n")
    return 1 if sick else 0


if __name__ == "__main__":
    sys.exit(main())
