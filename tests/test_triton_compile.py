"""Every Triton kernel compiles for sm_90, GPU or not, and spills no register that is not on record."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
FILES = sorted(path.stem for path in (ROOT / "tests" / "triton_cases").glob("*.py"))
# (file, kernel): bytes of a thread that may lie in memory; 0 for all others.
SPILLED: dict[tuple[str, str], int] = {
    ("topk_kl", "collect_candidates"): 16,  # of float32 logits
    ("ulysses", "_unpack"): 8,  # of float64 heads
}


def jitted(path: Path) -> tuple[set[str], set[str]]:
    """Functions under @triton.jit, and which of them another one calls."""
    functions = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    names = {function.name for function in functions}
    calls = {node.func for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)}
    return names, {call.id for call in calls if isinstance(call, ast.Name)} & names


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:  # type: ignore[type-arg]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "triton_compile.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_is_compiled(compiled: list[dict]) -> None:  # type: ignore[type-arg]
    """Of each module of kernels, all that no other kernel calls: those are compiled inside their callers."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "nova_kernels").rglob("*.py")
        if jitted(path)[0]
    }
    assert "nova_kernels.topk_kl.triton_kernels" in modules
    for module, path in modules.items():
        names, called = jitted(path)
        have = {row["kernel"] for row in compiled if row["module"] == module}
        assert have >= names - called, f"{module}: no case for {sorted(names - called - have)}"


@pytest.mark.parametrize("file", FILES)
def test_resources(file: str, compiled: list[dict]) -> None:  # type: ignore[type-arg]
    rows = [row for row in compiled if row["file"] == file]
    assert rows
    for row in rows:
        print(
            f"{row['kernel']:20} {row['warps']:2} warps {row['registers']:4} registers "
            f"{row['spilled_bytes']:4} B spilled {row['shared_bytes']:6} B shared  {row['constants']}"
        )
        assert row["registers"] * row["warps"] * 32 <= 65_536 and row["shared_bytes"] <= 227 * 1024, row
        assert row["spilled_bytes"] <= SPILLED.get((file, row["kernel"]), 0), row
