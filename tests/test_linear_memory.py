"""What the ops from hidden states hold at N = 2048, V = 50,000, forward and backward: nothing that grows with N V.

[N, V] would be 102 million elements, 410 MB. Twice: the largest tensor that any step makes (the operators run as plain
functions here, because a watch sees nothing inside a registered one), and the growth of a process's peak memory.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nova_kernels import TopK, linear_cross_entropy, linear_logprobs, linear_topk_kl_div, linear_topk_select, lm_head
from nova_kernels.logprob import ops as logprob_ops
from nova_kernels.topk_kl import linear_ops
from numerics import OpWatch, undecorate

N, V, H, K = 2048, 50_000, 8, 50
BLOCK = lm_head.CHUNK_ELEMENTS["cpu"]
LARGEST = max(BLOCK, V * H, N * K)  # elements
# Bytes: two blocks of logits (the second for exponentials) with room for a third, gradients and their sums, and a few
# rows of K entries.
GROWTH = 4 * (3 * BLOCK + 4 * V * H + 24 * N * K)

PATHS: dict[str, Callable[[Tensor, Tensor, TopK], Tensor]] = {
    "cross_entropy": lambda hidden, weight, ref: linear_cross_entropy(hidden, weight, ref.ids[:, 3].long()),
    "logprobs": lambda hidden, weight, ref: terms(hidden, weight, ref, "none"),
    "logprobs-bucket": lambda hidden, weight, ref: terms(hidden, weight, ref, "bucket"),
    "select": lambda hidden, weight, ref: linear_topk_select(hidden, weight, K).lse * hidden[:, 0],
    "select-bias": lambda hidden, weight, ref: (
        linear_topk_select(hidden, weight, K, bias=weight[:, 0], softcap=9.0).lse * hidden[:, 0]
    ),
    "dense": lambda hidden, weight, ref: linear_topk_kl_div(hidden, weight, ref, backend="dense"),
    "dense-bucket": lambda hidden, weight, ref: linear_topk_kl_div(hidden, weight, ref, tail="bucket"),
    "union": lambda hidden, weight, ref: linear_topk_kl_div(hidden, weight, ref, backend="union"),
    "gather": lambda hidden, weight, ref: linear_topk_kl_div(hidden, weight, ref, backend="gather"),
}


def terms(hidden: Tensor, weight: Tensor, ref: TopK, tail: str) -> Tensor:
    found = linear_logprobs(hidden, weight, ref.ids[:, 3].long(), ref=ref, tail=tail)
    assert found.kl is not None
    return found.kl + found.logprobs


def make() -> tuple[Tensor, Tensor, TopK]:
    torch.manual_seed(0)
    ids = torch.randint(V, (N, K)).sort(dim=1).values.int() // K * K + torch.arange(K, dtype=torch.int32)
    ref = TopK(ids=ids.sort(dim=1).values, values=torch.randn(N, K), lse=torch.full((N,), 12.0))
    return torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True), ref


@pytest.mark.parametrize("path", PATHS)
def test_largest_tensor(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    undecorate(monkeypatch, logprob_ops, linear_ops)
    hidden, weight, ref = make()
    with OpWatch() as seen:
        PATHS[path](hidden, weight, ref).sum().backward()
    assert seen.elements <= LARGEST < N * V // 20


def growth(path: str) -> int:
    """Bytes by which the peak of this process rises above what it holds before."""
    inputs = make()
    PATHS[path](inputs[0][:2], inputs[1], inputs[2][:2]).sum().backward()  # what the first call of all imports
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    held = _memory("VmRSS")
    PATHS[path](*inputs).sum().backward()
    return _memory("VmHWM") - held


def _memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, field
    return 1024 * int(found[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_growth_of_the_peak_in_a_fresh_process() -> None:
    """One process for each path, forked from one that has only imported, so that none can use another's memory."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    grown = {line.split()[0]: int(line.split()[1]) for line in run.stdout.splitlines()}
    assert set(grown) == set(PATHS)
    for path, size in grown.items():
        assert size < GROWTH < 4 * N * V / 5, f"{path}: {size / 1e6:.0f} MB, the bound is {GROWTH / 1e6:.0f} MB"
        assert size > 4 * N * K, f"{path}: {size} bytes cannot be right"


def main() -> None:
    """Print the growth of each path."""
    torch.set_num_threads(1)
    for path in PATHS:
        if (child := os.fork()) == 0:
            print(path, growth(path), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
