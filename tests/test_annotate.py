"""Preference pairs from a model's own answers: best against worst, with an annotator's mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from nova_train.config import ConfigError
from nova_train.datasets import read_rows
from nova_train.samples import Prompt
from nova_train.stages import annotate

PROMPT = Prompt(ids=[1], prompt=[{"role": "user", "content": "q"}], columns={}, category="c", key="k")


def config(**options: Any) -> annotate.AnnotateConfig:
    defaults: dict[str, Any] = {
        "output_dir": "-",
        "model_name_or_path": "-",
        "dataset_name": ["-"],
        "reward_funcs": ["nova_train.world.reward:score"],
        "num_generations": 3,
    }
    return annotate.AnnotateConfig(**{**defaults, **options})


def contents(row: dict[str, Any]) -> tuple[str, str]:
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_the_best_is_chosen_over_the_worst() -> None:
    rows = annotate.pairs_of([PROMPT], [["b", "a", "c"]], [[0.5, 0.9, 0.1]], config())
    assert [contents(row) for row in rows] == [("a", "c")]
    assert (rows[0]["chosen_score"], rows[0]["rejected_score"], rows[0]["category"]) == (0.9, 0.1, "c")


def test_answers_that_all_score_the_same_give_no_pair() -> None:
    assert annotate.pairs_of([PROMPT], [["a", "b", "c"]], [[0.3, 0.3, 0.3]], config()) == []


def test_rates_of_mistakes_and_of_missing_scores() -> None:
    n = 2000
    rows = annotate.pairs_of(
        [PROMPT] * n, [["a", "c"]] * n, [[0.9, 0.1]] * n, config(num_generations=2, flip_rate=0.1, score_rate=0.7)
    )
    flipped = sum(contents(row) == ("c", "a") for row in rows) / n
    scored = sum("chosen_score" in row for row in rows) / n
    assert flipped == pytest.approx(0.1, abs=0.03) and scored == pytest.approx(0.7, abs=0.04)
    assert all(row.get("chosen_score", 1) > row.get("rejected_score", 0) for row in rows), "scores follow the choice"


def test_a_run_writes_rows_that_the_reward_stage_reads(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model")
    tiny.prompt_file(tmp_path / "prompts.jsonl")
    (tmp_path / "rewards.py").write_text(
        "def length(prompts, completions, **columns):\n    return [len(c[0]['content']) for c in completions]\n"
    )
    options = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": [str(tmp_path / "prompts.jsonl")],
        "reward_funcs": [f"{tmp_path / 'rewards.py'}:length"],
        "max_completion_length": 5,
    }
    out = annotate.run(config(output_dir=str(tmp_path / "out"), **options))
    rows = read_rows([str(out / "pairs.jsonl")], kind="preference")
    assert 0 < len(rows) <= 16 and all(row["chosen_score"] > row["rejected_score"] for row in rows)
    assert json.loads((out / "finished.json").read_text())["pairs"] == len(rows)
    again = annotate.run(config(output_dir=str(tmp_path / "again"), **options, batch_size=7))
    assert (again / "pairs.jsonl").read_bytes() == (out / "pairs.jsonl").read_bytes(), "whatever the batching"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="reward_funcs is empty"):
        config(reward_funcs=[])
    with pytest.raises(ConfigError, match=r"flip_rate must lie in \[0, 1\], got 2"):
        config(flip_rate=2)
    with pytest.raises(ConfigError, match="num_generations must be at least 2"):
        config(num_generations=1)
