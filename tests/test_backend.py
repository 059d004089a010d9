"""backend: the first candidate that can run, or the one asked for, or an error that says why not."""

from __future__ import annotations

import logging

import pytest
import torch

from nova_kernels import backend
from nova_kernels.backend import BackendUnavailableError, choose

REASONS = {"cuda": "the tensors are on the CPU", "chunked": None, "reference": None}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_said", set())


def test_first_that_can_run() -> None:
    assert choose("op", None, REASONS) == "chunked"
    assert choose("op", None, {"cuda": None, "reference": None}) == "cuda"


def test_named_backend_runs_or_refuses() -> None:
    assert choose("op", "reference", REASONS) == "reference"
    with pytest.raises(BackendUnavailableError, match=r"op: backend 'cuda' cannot run: the tensors are on the CPU"):
        choose("op", "cuda", REASONS)
    with pytest.raises(ValueError, match=r"op: unknown backend 'fast'; expected one of \['cuda', 'chunked', 'refer"):
        choose("op", "fast", REASONS)


def test_no_backend_can_run() -> None:
    with pytest.raises(BackendUnavailableError, match=r"op: no backend can run: not 'a': x; not 'b': y"):
        choose("op", None, {"a": "x", "b": "y"})


def test_environment_names_the_default(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert choose("op", None, REASONS) == "reference"
    assert choose("op", "chunked", REASONS) == "chunked"
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(BackendUnavailableError, match="cannot run"):
        choose("op", None, REASONS)
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "flash")
    with caplog.at_level(logging.INFO, logger="nova_kernels.backend"):
        assert choose("op", None, REASONS) == "chunked"
    assert "NOVA_KERNELS_BACKEND=flash is no backend of this op" in caplog.text


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nova_kernels.backend"):
        for _ in range(3):
            choose("op", None, REASONS)
        choose("other", None, REASONS)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"{op}: runs on backend 'chunked' (not 'cuda': the tensors are on the CPU)" for op in ("op", "other")
    ]


def test_silent_while_compiling(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with caplog.at_level(logging.INFO, logger="nova_kernels.backend"):
        assert choose("op", None, REASONS) == "chunked"
    assert caplog.records == []
