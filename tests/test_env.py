from __future__ import annotations

import pytest
import torch

from nova_train.__main__ import main
from nova_train.stages import env


def test_env_reports_versions_threads_and_devices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOVA_KERNELS_BACKEND", "reference")
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["NOVA_KERNELS_BACKEND"] == "reference"
    assert "usable" in lines["cpu"]
    assert any(name.startswith("cuda") for name in lines)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_OPTIONAL", ("no-such-distribution",))
    assert "no-such-distribution  not installed" in env.environment_report()
