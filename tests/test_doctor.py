from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nova_kernels import doctor
from nova_kernels.backend import BackendUnavailableError


def run_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "nova_kernels.doctor"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_names_versions_backends_and_results() -> None:
    result = run_doctor()
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"torch {torch.__version__.split('+')[0]}" in result.stdout
    for op in doctor.CHECKS:
        assert f"ok  cpu   {op:<11} error" in result.stdout
    assert "varlen_attention: runs on backend 'reference'" in result.stdout
    assert "NOVA_KERNELS_BACKEND not set" in result.stdout


def test_every_op_is_well_here() -> None:
    assert [str(finding) for finding in doctor.examine() if not finding.healthy] == []


def broken(device: str) -> torch.Tensor:
    raise BackendUnavailableError("op: backend 'fast' cannot run: no GPU")


@pytest.mark.parametrize(
    ("check", "says"),
    [
        pytest.param(
            broken, "BAD cpu   op          BackendUnavailableError: op: backend 'fast' cannot run", id="fails"
        ),
        pytest.param(lambda device: torch.tensor([0.0, 0.5]), "BAD cpu   op          error 5.0e-01", id="wrong"),
        pytest.param(lambda device: torch.tensor([torch.nan]), "BAD cpu   op          error nan", id="nan"),
    ],
)
def test_what_is_wrong_is_said(
    check: object, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {"op": check})
    monkeypatch.setattr(doctor, "devices", lambda: ["cpu"])
    assert doctor.main() == 1
    printed = capsys.readouterr()
    assert says in printed.out and "1 of 1 checks failed: op on cpu" in printed.err
