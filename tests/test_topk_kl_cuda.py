"""topk_kl.cuda: the kernels compile without spills, the loader says why they cannot run, and on a GPU they are exact.

The kernels' logic runs on the CPU too, against a stable sort: csrc/tests/topk_select_test.cpp, by `make sanitize`.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nova_kernels import backend
from nova_kernels.backend import BackendUnavailableError
from nova_kernels.topk_kl import cuda, reference
from numerics import assert_as_accurate

ROOT = Path(__file__).parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def built() -> ctypes.CDLL:
    try:
        return backend.cuda_library()
    except BackendUnavailableError as reason:
        pytest.skip(str(reason))


def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    if (nvcc := shutil.which("nvcc")) is None or shutil.which("g++") is None:
        pytest.skip("no nvcc, or no host compiler for it")
    options = ["-std=c++17", "-O3", "-arch=sm_90", "-cubin", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    command = [nvcc, *options, str(ROOT / "csrc/cuda/topk_select.cu"), "-o", str(tmp_path / "topk_select.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '\w*?(topk_\w+?_kernel)INS0_\d+(\w+?)E.*?(\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    for name, format, _, _, registers in sorted(kernels):
        print(f"{name}<{format}>: {registers} registers, no spills")
    assert len(kernels) == 6, done.stderr
    assert all(stored == loaded == "0" for _, _, stored, loaded, _ in kernels), done.stderr
    assert all(int(registers) <= 64 for *_, registers in kernels), "two CTAs of 512 threads do not fit on an SM"


def test_nvcc_means_the_library_is_of_these_sources() -> None:
    """Without this an older library would be tested."""
    library = built()
    paths = sorted(path for path in (ROOT / "csrc/cuda").iterdir() if path.is_file())
    library.nova_cuda_source.restype = ctypes.c_char_p
    source = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    assert library.nova_cuda_source().decode() == source, "built from other sources: install again"


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = cuda.why_not(CPU)
    assert reason is not None
    if reason.startswith("the CUDA library was not built"):
        assert "NOVA_KERNELS_CUDA=1" in reason
    else:
        assert reason == "CUDA kernels run on CUDA, the tensors are on cpu"
    monkeypatch.setattr(backend, "_cuda", lambda: "the CUDA library was not built")
    assert cuda.why_not(GPU) == "the CUDA library was not built"
    with pytest.raises(BackendUnavailableError, match="was not built"):
        backend.cuda_library()


def test_inputs_that_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(cuda, "_why_not_device", lambda index: None)
    device = torch.device("cuda", 0)
    assert cuda.why_not(device, torch.bfloat16, 4096) is None
    assert cuda.why_not(device, torch.float32, 4097) == "the CUDA kernels keep 2 to 4096 entries, not 4097"
    assert "not torch.float64" in str(cuda.why_not(device, torch.float64))


def test_tensors_on_the_cpu_are_refused() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(BackendUnavailableError, match=r"topk_select: backend 'cuda' cannot run: .*"):
        cuda.topk_select(logits, 2, 1.0)
    with pytest.raises(BackendUnavailableError, match=r"topk_kl_div_from_logits: backend 'cuda' cannot run: .*"):
        cuda.topk_kl_div_from_logits(logits, logits, 2, 1.0, "policy_ref", None)


def test_the_launchers_refuse_what_no_kernel_can_do() -> None:
    """Before CUDA is asked for anything, so that it can be seen without a GPU."""
    built()
    library = cuda._library()
    for vocabulary, k, temperature, format in [
        (10, 1, 1.0, 0),
        (10, 11, 1.0, 0),
        (9000, 4097, 1.0, 0),
        (10, 5, 0.0, 0),
        (10, 5, float("nan"), 0),
        (10, 5, 1.0, 3),
        (2**26, 5, 1.0, 0),
        (2**40, 5, 1.0, 0),
    ]:
        assert library.nova_topk_select(0, None, format, None, vocabulary, 3, vocabulary, k, temperature, *[None] * 3)
    assert library.nova_topk_select(0, None, 0, None, 10, 0, 10, 5, 1.0, *[None] * 3) == 0  # no rows: nothing to do
    assert cuda._error(1) == "invalid argument"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come before the launch, so that they can be seen without a GPU."""
    monkeypatch.setattr(cuda, "why_not", lambda device, dtype, k: None)
    logits, select, diverge = torch.zeros(3, 50), cuda.topk_select, cuda.topk_kl_div_from_logits
    for k in (1, 51):
        with pytest.raises(ValueError, match=f"topk_select: k must lie between 2 and V = 50, got {k}"):
            select(logits, k, 1.0)
    for temperature in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
            select(logits, 5, temperature)
    with pytest.raises(ValueError, match=r"expected logits \[n, V\] with unit stride over V, got \[50, 3\]"):
        select(logits.T, 2, 1.0)
    with pytest.raises(ValueError, match="expected policy_logits .* with unit stride over V"):
        diverge(torch.zeros(50, 3).T, logits, 5, 1.0, "policy_ref", None)
    with pytest.raises(ValueError, match=r"expected policy_logits \[3, 50\] on cpu, got \[2, 50\] on cpu"):
        diverge(logits[:2], logits, 5, 1.0, "policy_ref", None)
    with pytest.raises(ValueError, match="direction must be 'policy_ref' or 'ref_policy', got 'forward'"):
        diverge(logits, logits, 5, 1.0, "forward", None)
    for mask in (torch.ones(2, dtype=torch.bool), torch.ones(3), torch.ones(1, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"expected mask bool \[3\] on cpu, got"):
            diverge(logits, logits, 5, 1.0, "policy_ref", mask)


def adversarial(vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Rows that are hard for some way of selecting, with an odd stride and an odd start."""
    infinity, generator = float("inf"), torch.Generator().manual_seed(vocabulary)
    noise = 3 * torch.randn(14, vocabulary, generator=generator)
    share = torch.rand(14, vocabulary, generator=generator)
    rows = noise.clone()
    rows[1] = 7.0
    rows[2] = noise[2].round().clamp(-2, 2)
    rows[3][share[3] < 0.5] = -infinity
    rows[4] = -infinity
    rows[5][share[5] < 0.01] = float("nan")
    rows[6][share[6] < 0.01] = infinity
    rows[7], rows[8] = noise[7].sort().values, noise[8].sort(descending=True).values
    rows[9] = torch.where(share[9] < 0.5, 0.0, -0.0)
    rows[10] = torch.where(share[10] < 3 / vocabulary, noise[10], -infinity)
    rows[11] *= 1e-30
    rows[12] = torch.where(share[12] < 0.3, float("nan"), torch.where(share[12] < 0.6, -infinity, noise[12]))
    buffer = torch.empty(14, vocabulary + 5, dtype=dtype, device=GPU)
    logits = buffer[:, 3 : vocabulary + 3]
    logits.copy_(rows)
    return logits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 33, 1271, 4099, 128_256, 151_936, 2**20])
def test_selection_is_a_stable_sort(vocabulary: int, dtype: torch.dtype) -> None:
    logits = adversarial(vocabulary, dtype)
    for k in sorted({min(vocabulary, k) for k in (2, 33, 500, 4096)}):
        ids, values, lse = cuda.topk_select(logits, k, 0.7)
        expected_ids, expected = reference.topk_select(logits.float(), k)
        assert torch.equal(ids, expected_ids)
        assert torch.equal(values.view(torch.int32), expected.view(torch.int32))
        peer, truth = ((logits.to(kind) / 0.7).logsumexp(1) for kind in (torch.float32, torch.float64))
        finite = truth.isfinite()
        assert_as_accurate(lse[finite], peer[finite], truth[finite])
        assert torch.equal(lse[~finite].nan_to_num(), peer[~finite].nan_to_num())


@pytest.mark.gpu
def test_selection_repeats_itself_bit_for_bit() -> None:
    logits = torch.randn(3000, 5003, device=GPU).bfloat16()
    first = cuda.topk_select(logits, 500, 1.0)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, cuda.topk_select(logits, 500, 1.0), strict=True))


@pytest.mark.gpu
def test_more_than_two_to_the_31_entries() -> None:
    logits = torch.zeros(2, 2**31 + 8, dtype=torch.float16, device=GPU).as_strided((2, 1000), (2**31 + 8, 1))
    logits[1, 7:9] = 1
    assert cuda.topk_select(logits, 2, 1.0)[0].tolist() == [[0, 1], [7, 8]]


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence(dtype: torch.dtype, direction: str) -> None:
    ref = torch.randn(700, 1271, device=GPU).to(dtype)
    policy = ref.float() + torch.logspace(-5, 0.5, 700, device=GPU).unsqueeze(1) * torch.randn_like(ref.float())
    mask = torch.rand(700, device=GPU) < 0.8
    kl, by_kept, ids = cuda.topk_kl_div_from_logits(policy, ref, 100, 0.7, direction, mask)
    expected_ids, values = reference.topk_select(ref.float(), 100)
    assert torch.equal(ids[mask], expected_ids[mask])
    assert (ids[~mask] == -1).all() and (kl[~mask] == 0).all() and (kl >= 0).all()
    assert by_kept is not None and (by_kept[~mask] == 0).all()
    results = []
    for kind in (torch.float32, torch.float64):
        kept = reference.kept_logits(policy.to(kind), expected_ids) / 0.7
        results.append(reference.kl_terms(kept, values.to(kind) / 0.7, direction)[:2])
    (peer, peer_by), (truth, truth_by) = results
    assert peer_by is not None and truth_by is not None
    assert_as_accurate(kl[mask], peer[mask], truth[mask])
    assert_as_accurate(by_kept[mask], peer_by[mask] / 0.7, truth_by[mask] / 0.7)
    same, none, _ = cuda.topk_kl_div_from_logits(ref, ref, 100, 0.7, direction, None, gradient=False)
    assert none is None and (same == 0).all()


@pytest.mark.gpu
def test_no_rows() -> None:
    empty = torch.empty(0, 50, device=GPU)
    assert [list(x.shape) for x in cuda.topk_select(empty, 5, 1.0)] == [[0, 5], [0, 5], [0]]
    kl, by_kept, ids = cuda.topk_kl_div_from_logits(empty, empty, 5, 1.0, "policy_ref", None)
    assert kl.shape == (0,) and by_kept is not None and by_kept.shape == ids.shape == (0, 5)
