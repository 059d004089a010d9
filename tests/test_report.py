"""From saved models to tables: the eval stage, its report, and several seeds pooled."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification

import tiny
from nova_train.augment import PASSettings
from nova_train.config import ConfigError, build_config
from nova_train.evaluate import estimate, evaluate_model
from nova_train.model import give_own_pad_token, load_tokenizer
from nova_train.plots import draw
from nova_train.report import Comparison, Table, comparisons, pool, write_report
from nova_train.samples import Prompt
from nova_train.stages.eval import EvalConfig, run
from nova_train.state import StateError
from small_tokenizers import byte_level

CATEGORIES = ["a", "b", "a", "b", "b", "a", "a", "b"]


def model_results(scores: dict[str, list[float]], learned: bool = False) -> dict[str, Any]:
    return {
        "scores": scores,
        "learned": {t: [2 * x for x in values] for t, values in scores.items()} if learned else {},
        "by_function": {t: {"score": float(np.mean(values)), "other": None} for t, values in scores.items()},
        "tokens": dict.fromkeys(scores, 4.25),
        "finished": dict.fromkeys(scores, 0.875),
    }


def results(seed: int = 0, *, learned: bool = False, augmented: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    old = {"1": rng.random(8).tolist(), "0": rng.random(8).tolist()}
    new = {t: [x + 0.25 + 0.01 * seed for x in values] for t, values in old.items()}
    keys = [f"k{i}" for i in range(8)]
    both = {"without": model_results(old), "with": model_results(new)}
    augmentation = {"keys": keys, "categories": CATEGORIES, "examples": [], "models": {"sft": both}}
    return {
        "seed": seed,
        "temperatures": ["1", "0"],
        "keys": keys,
        "categories": CATEGORIES,
        "models": {"sft": model_results(old, learned), "grpo": model_results(new, learned)},
        "baselines": {"grpo": ["sft"]},
        "reward_model": None,
        "augmentation": augmentation if augmented else None,
        "curves": {},
    }


def save(folder: Path, found: dict[str, Any]) -> Path:
    path = folder / f"results-{found['seed']}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def cells(markdown: str, first: str) -> list[list[str]]:
    """The cells of every table row that begins with `first`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    return [row for row in rows if row[0] == first]


def test_differences_are_paired() -> None:
    found = {(c.label, c.temperature): c for c in comparisons(results(augmented=True))}
    assert list(found) == [
        ("grpo - sft", "1"),
        ("sft with PAS - without", "1"),
        ("grpo - sft", "0"),
        ("sft with PAS - without", "0"),
    ]
    difference = found["grpo - sft", "1"].over_prompts()
    assert difference.mean == pytest.approx(0.25)
    assert difference.half_width == pytest.approx(0.0, abs=1e-9)
    uneven = Comparison("models", "x", "1", np.array([1.0, 0, 0, 0]), ["a", "b", "b", "b"], ["p", "q", "r", "s"])
    assert uneven.over_prompts().mean == 0.25
    assert uneven.over_categories().mean == 0.5


def test_markdown_has_the_numbers(tmp_path: Path) -> None:
    made = results(learned=True, augmented=True)
    made["reward_model"] = {
        "accuracy": [0.75, 0.125, 40],
        "correlation": [0.5, None, 80],
        "margins": [1.0, -0.5] * 20,
        "categories": ["a"] * 40,
        "packed_difference": 2e-7,
    }
    text = write_report(tmp_path, made).read_text(encoding="utf-8")
    found = estimate(made["models"]["sft"]["scores"]["0"])
    assert cells(text, "sft")[0][2] == f"{found.mean:.3f} ± {found.half_width:.3f}"
    by_category = estimate(made["models"]["sft"]["scores"]["1"], strata=CATEGORIES)
    assert cells(text, "sft")[1][1] == f"{by_category.mean:.3f} ± {by_category.half_width:.3f}"
    assert cells(text, "grpo - sft")[0] == ["grpo - sft", "+0.250 ± 0.000*", "+0.250 ± 0.000*"]
    assert len(cells(text, "sft with PAS - without")) == 3, "over prompts, and per category at two temperatures"
    assert cells(text, "pair accuracy") == [["pair accuracy", "0.750 ± 0.125"]]
    assert cells(text, "rank correlation with absolute scores")[0][1] == "0.500"
    assert "8 held-out prompts in 2 categories, sampling seed 0" in text
    assert "| model | T = 1 | greedy |" in text
    assert "4.2, 87.5 %" in text
    for name in ("scores.png", "categories.png", "calibration.png"):
        assert f"]({name})" in text
        assert (tmp_path / name).stat().st_size > 5_000


def test_curves_are_drawn(tmp_path: Path) -> None:
    made = results()
    steps = range(1, 30)
    made["curves"] = {
        "grpo": {
            "kl": [[step, step / 100] for step in steps],
            "rewards/reward_model/mean": [[step, math.sin(step)] for step in steps],
            "rewards/score/mean": [[step, step / 30] for step in steps],
            "eval_rewards/score/mean": [[10, 0.3], [20, 0.6]],
        },
        "sft": {"loss": [[step, 1 / step] for step in steps], "eval_loss": [[10, 0.2]]},
        "empty": {"grad_norm": [[1, 2.0]]},
    }
    text = write_report(tmp_path, made).read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.glob("curve-*.png")) == ["curve-grpo.png", "curve-sft.png"]
    assert "](curve-grpo.png)" in text


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw(tmp_path, {"temperatures": [], "models": {}, "categories": [], "reward_model": None}) == []
    assert not list(tmp_path.iterdir())


def test_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write_report(tmp_path, results()).read_text(encoding="utf-8")
    assert "No plots: matplotlib is not installed (`pip install nova-kernels[report]`)" in text
    assert cells(text, "grpo - sft")
    assert not list(tmp_path.glob("*.png"))


def test_table_in_the_terminal() -> None:
    shown = io.StringIO()
    Console(width=60, file=shown).print(Table("Score", ["model", "T = 1"], [["a|b", "0.5"]]).rich())
    assert "a|b" in shown.getvalue()
    assert "0.5" in shown.getvalue()


def test_seeds_are_pooled(tmp_path: Path) -> None:
    """The same prompts under three seeds: the interval is that of each prompt's mean difference."""
    runs = [results(seed) for seed in range(3)]
    rng = np.random.default_rng(9)
    for made in runs:
        made["models"]["grpo"]["scores"]["1"] = rng.random(8).tolist()
    text = pool([save(tmp_path, made) for made in runs])
    scores = [made["models"] for made in runs]
    differences = np.array([np.subtract(m["grpo"]["scores"]["1"], m["sft"]["scores"]["1"]) for m in scores])
    expected = estimate(differences.mean(axis=0))
    (row, greedy, *_) = cells(text, "grpo - sft")
    assert row[1] == "T = 1"
    assert row[2:5] == [f"{mean:+.3f}" for mean in differences.mean(axis=1)]
    assert not expected.excludes_zero
    assert row[5] == f"{expected.mean:+.3f} ± {expected.half_width:.3f}"
    assert row[6] == f"{differences.mean(axis=1).std(ddof=1):.3f}"
    assert greedy[2:] == ["+0.250", "+0.260", "+0.270", "+0.260 ± 0.000*", "0.010", "yes"]
    assert "| difference | sampling | seed 0 | seed 1 | seed 2 | pooled | spread of seeds | all seeds agree |" in text
    assert "### Pooled, mean over categories" in text


def test_what_cannot_be_pooled(tmp_path: Path) -> None:
    one, other = results(0), results(1)
    other["baselines"] = {}
    with pytest.raises(ConfigError, match="'grpo - sft' at T = 0 is in one only"):
        pool([save(tmp_path, one), save(tmp_path, other)])
    with pytest.raises(ConfigError, match="at least one results.json, got none"):
        pool([])
    with pytest.raises(ConfigError, match=r"missing.json: expected a results.json"):
        pool([tmp_path / "missing.json"])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="list.json is not a results.json"):
        pool([tmp_path / "list.json"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a reward model, a PAS model, prompts and pairs."""
    folder = tmp_path_factory.mktemp("world")
    for seed in (0, 1):
        tiny.save_model(folder / f"model-{seed}", seed)
    tokenizer = load_tokenizer(folder / "model-0")
    scorer = AutoModelForSequenceClassification.from_pretrained(folder / "model-0", num_labels=1)
    give_own_pad_token(scorer, tokenizer, tokenizer.eos_token_id)
    scorer.save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    shutil.copytree(folder / "model-1", folder / "pas")
    PASSettings(prompt_style="short", max_completion_length=6).save(folder / "pas")
    tiny.prompt_file(folder / "prompts.jsonl", 16)
    tiny.pair_file(folder / "pairs.jsonl", 12)
    (folder / "grpo").mkdir()
    lines = [{"step": step, "kl": step / 10, "rewards/score/mean": 0.1, "bad": None} for step in (1, 2)]
    tiny.write_rows(folder / "grpo" / "metrics.jsonl", lines)
    return folder


def config(world: Path, output: Path, **options: Any) -> EvalConfig:
    values: dict[str, Any] = {
        "output_dir": str(output),
        "models": {"first": str(world / "model-0"), "second": str(world / "model-1")},
        "dataset_name": str(world / "prompts.jsonl"),
        "reward_funcs": "nova_train.world.reward:score",
        "baselines": {"second": ["first"]},
        "temperatures": [1, 0],
        "max_completion_length": 4,
        "disable_progress": True,
    }
    return build_config(EvalConfig, values | options, where="eval")


def test_stage(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = config(
        world,
        tmp_path / "out",
        reward_model=str(world / "rm"),
        pairs=str(world / "pairs.jsonl"),
        augmenter={
            "model": str(world / "pas"),
            "dataset_name": str(world / "prompts.jsonl"),
            "answer_models": ["second"],
            "category_column": "difficulty",
        },
        training_runs={"grpo": str(world / "grpo")},
    )
    folder = run(made)
    found = json.loads((folder / "results.json").read_text())
    assert list(found["models"]) == ["first", "second"]
    assert len(found["keys"]) == len(found["categories"]) == len(found["models"]["first"]["learned"]["0"]) == 16
    assert found["reward_model"]["accuracy"][2] == 12
    assert found["reward_model"]["packed_difference"] < 1e-5
    assert list(found["augmentation"]["models"]) == ["second"]
    assert set(found["augmentation"]["categories"]) <= {"0", "1", "2", "3"}
    without = found["augmentation"]["models"]["second"]["without"]
    assert without["scores"] == found["models"]["second"]["scores"], "the same prompts, the same random numbers"
    assert found["curves"]["grpo"] == {"kl": [[1, 0.1], [2, 0.2]], "rewards/score/mean": [[1, 0.1], [2, 0.1]]}
    answers = [json.loads(line) for line in (folder / "answers" / "second.jsonl").read_text().splitlines()]
    assert [answer["scores"]["0"] for answer in answers] == found["models"]["second"]["scores"]["0"]
    assert "### Paired differences" in (folder / "report.md").read_text()
    assert "second - first" in capsys.readouterr().out
    before = (folder / "results.json").stat().st_mtime_ns
    run(made)
    assert (folder / "results.json").stat().st_mtime_ns == before, "a finished evaluation is left as it is"
    assert "second - first" in capsys.readouterr().out
    with pytest.raises(StateError, match="holds another run"):
        run(config(world, tmp_path / "out", seed=1))


def test_augmented_prompts_keep_their_random_numbers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Prompt]] = []

    def spy(model: Any, chat: Any, prompts: list[Prompt], *rest: Any, **options: Any) -> Any:
        seen.append(list(prompts))
        return evaluate_model(model, chat, prompts, *rest, **options)

    monkeypatch.setattr("nova_train.stages.eval.evaluate_model", spy)
    augmenter = {"model": str(world / "pas"), "dataset_name": str(world / "prompts.jsonl"), "answer_models": ["first"]}
    run(config(world, tmp_path / "out", models={"first": str(world / "model-0")}, baselines={}, augmenter=augmenter))
    _, without, longer = seen
    assert [prompt.key for prompt in longer] == [prompt.key for prompt in without]
    assert any(len(b.ids) > len(a.ids) for a, b in zip(without, longer, strict=True))


def test_stage_pools(world: Path, tmp_path: Path) -> None:
    paths = [run(config(world, tmp_path / f"seed-{seed}", seed=seed)) / "results.json" for seed in (0, 1)]
    assert [json.loads(path.read_text())["seed"] for path in paths] == [0, 1]
    only = build_config(
        EvalConfig,
        {"output_dir": str(tmp_path / "pool"), "pool": [str(path) for path in paths], "disable_progress": True},
        where="eval",
    )
    text = (run(only) / "report.md").read_text()
    assert cells(text, "second - first")[0][1] == "T = 1"
    assert text.rstrip("\n").endswith(pool(paths).rstrip("\n"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"models": {}}, "models is empty: name at least one saved model"),
        ({"dataset_name": []}, "dataset_name is empty"),
        ({"reward_funcs": []}, "reward_funcs is empty"),
        ({"temperatures": [-1]}, "temperatures must be at least 0 .greedy., got -1"),
        ({"baselines": {"third": ["first"]}}, r"baselines.third: 'third' is not under models \['first', 'second'\]"),
        ({"pairs": ["p.jsonl"]}, r"pairs \['p.jsonl'\] need a reward_model"),
        ({"augmenter": {"model": "m"}}, "augmenter: augmenter needs dataset_name"),
        (
            {"augmenter": {"model": "m", "dataset_name": "d", "answer_models": ["x"]}},
            "augmenter.answer_models: 'x' is not under models",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": 1}, "unknown key 'temperature'; did you mean 'temperatures'"),
    ],
)
def test_refusals(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        config(tmp_path, tmp_path, **options)


def test_column_that_is_not_there(world: Path, tmp_path: Path) -> None:
    augmenter = {"model": str(world / "pas"), "dataset_name": str(world / "prompts.jsonl"), "category_column": "kind"}
    with pytest.raises(ConfigError, match="augmenter: row 1 has no column 'kind', only prompt, "):
        run(config(world, tmp_path / "out", augmenter=augmenter))


def test_reward_model_with_another_tokenizer(world: Path, tmp_path: Path) -> None:
    """It would read the policy's ids as other text: refused before anything is generated."""
    shutil.copytree(world / "rm", tmp_path / "rm")
    byte_level().save_pretrained(tmp_path / "rm")
    with pytest.raises(ConfigError, match="its tokenizer has .*; train the reward model on the policy's tokenizer"):
        run(config(world, tmp_path / "out", reward_model=str(tmp_path / "rm")))
