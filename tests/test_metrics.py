from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nova_train.metrics import MetricsLog, Window, read_metrics


def test_a_window_has_means_and_maxima_and_survives_a_restart() -> None:
    window, again = Window(), Window()
    window.add("loss", torch.tensor(6.0), 2)
    window.add_maximum("ratio", torch.tensor(-2.0))
    again.load_state_dict(json.loads(json.dumps(window.state_dict())))
    for w in (window, again):
        w.add("loss", 3.0, 4)
        w.add("never", 1.0, 0)
        w.add_maximum("ratio", -3.0)
        assert w.figures() == {"loss": 1.5, "ratio": -2.0}
        assert w.figures() == {}


def test_windows_of_ranks_are_merged() -> None:
    ranks = [Window(), Window(), Window()]
    for number, window in enumerate(ranks[:2]):
        window.add("loss", 2.0, number)
        window.add_maximum("ratio", number / 2)
    assert Window.merged([window.take() for window in ranks]).figures() == {"loss": 4.0, "ratio": 0.5}


def test_lines_after_the_restored_step_are_cut_and_so_is_half_a_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step})
        log.write_timing(step, {"step_time": 0.1})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = MetricsLog(tmp_path, step=2)
    again.write(3, {"loss": 1 / 3})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 2


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    MetricsLog(tmp_path, step=0).write(1, {"a": float("nan"), "b": 0.1 + 0.2})
    assert read_metrics(tmp_path) == [{"step": 1, "a": None, "b": 0.3}]


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report_to: expected some of .* got 'mlflow'"):
        MetricsLog(tmp_path, step=0, report_to=["mlflow"])
