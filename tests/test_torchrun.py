"""The command line on several ranks: said once, ended together, continued after a rank was lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from nova_train.metrics import read_metrics
from nova_train.stages.pipeline import plan_pipeline, run_pipeline
from rank_commands import on_two_ranks

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
TRAINED = {"optim": "adamw", "muon_learning_rate": None, "dtype": "float64", "logging_steps": 1}
SMALL: dict[str, dict[str, Any]] = {
    "world": {
        **dict.fromkeys(("sft_rows", "annotate_prompts", "annotate_heldout_prompts"), 40),
        **dict.fromkeys(("specialist_rows", "rollout_prompts", "pas_rows", "heldout_prompts"), 16),
        "pas_heldout_prompts": 12,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "initializer_range": 0.3,
    },
    "sft": {**TRAINED, "global_batch_size": 2, "max_steps": 2},
    "annotate": {"max_completion_length": 3, "num_generations": 3, "temperature": 2.0},
    "reward": {**TRAINED, "per_device_train_batch_size": 1, "global_batch_size": 3, "max_steps": 2},
    "grpo": {**TRAINED, "per_device_train_batch_size": 2, "global_batch_size": 4, "max_steps": 2}
    | {"max_completion_length": 4, "beta": 0.1},
    "pas": {**TRAINED, "max_steps": 2},
    "eval": {"max_completion_length": 4, "temperatures": [1.0]},
}
SFT = [
    "sft", "--model_name_or_path", "model", "--max_length", "128", "--logging_steps", "1", "--disable_progress", "true",
    "--learning_rate", "1e-3", "--max_steps", "3", "--global_batch_size", "2",
]  # fmt: skip
ON_ALL = [*SFT, "--dataset_name", "sft.jsonl"]
DRILL = ["drill", "--output_dir", "out"]
COMMANDS = {
    "overview": ["--help"],
    "keys": ["drill", "--help"],
    "dry": ["alone", "--output_dir", "out", "--dry_run"],
    "typo": ["sft", "--outptu_dir", "out"],
    "mistake": DRILL,
    "first": [*DRILL, "--on", "0"],
    "second": [*DRILL, "--on", "1"],
    "bug": [*DRILL, "--fault", "bug"],
    "second-bug": [*DRILL, "--fault", "bug", "--on", "1"],
    "own": [*DRILL, "--fault", "own"],
    "split": [*DRILL, "--sequence_parallel_size", "3"],
    "alone": ["alone", "--output_dir", "out"],
    "alone-mistake": ["alone", "--output_dir", "out", "--fault", "mistake"],
    "alone-interrupted": ["alone", "--output_dir", "out", "--fault", "interrupt"],
    "no-data": [*SFT, "--dataset_name", "missing.jsonl", "--output_dir", "out"],
    "other-keys": [*ON_ALL, "--output_dir", "other-keys", "--seed", "{rank}"],
    "other-data": [
        "FOLDER={folder}/{rank}",
        *SFT,
        "--dataset_name",
        "rows.jsonl",
        "--output_dir",
        "{folder}/other-data",
    ],
    "other-weights": [
        "FOLDER={folder}/own/{rank}",
        *SFT,
        "--dataset_name",
        "{folder}/sft.jsonl",
        "--output_dir",
        "{folder}/other-weights",
    ],
    "interrupted": ["SIGNALLED=2", "ON=1", *ON_ALL, "--output_dir", "interrupted"],
    "terminated": ["SIGNALLED=15", "ON=0 1", *ON_ALL, "--output_dir", "terminated"],
    "continued": [*ON_ALL, "--output_dir", "interrupted"],
}
PIPELINE = {
    "pipeline": ["pipeline", "pipeline.yaml"],
    "pipeline-again": ["pipeline", "pipeline.yaml"],
}


def small_quickstart(output_dir: Path) -> dict[str, Any]:
    """The recipe of the quickstart with little data, a tiny model and a few steps."""
    recipe: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    recipe |= {"output_dir": str(output_dir), "num_threads": 1, "disable_progress": True}
    for stage in recipe["stages"]:
        if stage["run"] in ("sft", "reward", "pas", "grpo"):
            stage.pop("gradient_accumulation_steps", None)
        stage |= SMALL.get(stage["run"], {})
    return recipe


@dataclass(frozen=True)
class Said:
    """What two ranks said of one command."""

    folder: Path
    name: str

    def texts(self, stream: str) -> tuple[str, str]:
        first, second = ((self.folder / f"{self.name}.{rank}.{stream}").read_text() for rank in range(2))
        return first, second

    @property
    def codes(self) -> tuple[str, str]:
        return self.texts("code")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All commands have run here on two ranks."""
    folder = tmp_path_factory.mktemp("commands")
    tiny.save_model(folder / "model")
    tiny.sft_file(folder / "sft.jsonl")
    for rank in range(2):
        (folder / str(rank)).mkdir()
        (folder / str(rank) / "model").symlink_to(folder / "model")
        tiny.sft_file(folder / str(rank) / "rows.jsonl", 20 + rank)
        tiny.save_model(folder / "own" / str(rank) / "model", seed=rank)
    on_two_ranks(COMMANDS, folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline has run here on two ranks, twice."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(small_quickstart(folder / "pipeline")))
    on_two_ranks(PIPELINE, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "starts"),
    [("overview", "usage: nova-train <command>"), ("keys", "usage: nova-train drill"), ("dry", "stage: alone")],
)
def test_questions_are_answered_once(folder: Path, name: str, starts: str) -> None:
    said = Said(folder, name)
    assert said.codes == ("0", "0")
    assert said.texts("out")[0].startswith(starts)
    assert (said.texts("out")[1], said.texts("err")) == ("", ("", ""))


@pytest.mark.parametrize(
    ("name", "teller", "message"),
    [
        ("typo", 0, "nova-train sft: sft: unknown key 'outptu_dir'; did you mean 'output_dir'?"),
        ("mistake", 0, "nova-train drill: odd"),
        ("first", 0, "nova-train drill: odd"),
        ("second", 1, "nova-train drill: rank 1: odd"),
        ("alone-mistake", 0, "nova-train alone: odd"),
        ("split", 0, "nova-train drill: sequence_parallel_size 3 does not divide the 2 ranks that were started; "),
        ("no-data", 0, "nova-train sft: missing.jsonl: no such file"),
        ("other-keys", 0, "nova-train sft: the configuration: rank 1 has {'seed': 1}, rank 0 has {'seed': 0}; all"),
        ("other-weights", 0, "nova-train sft: the weights of model: rank 1 has '"),
        ("other-data", 0, "nova-train sft: sft: the data of the run: rank 1 has '"),
    ],
)
def test_a_mistake_is_told_once_and_ends_all_ranks(folder: Path, name: str, teller: int, message: str) -> None:
    said = Said(folder, name)
    told = said.texts("err")
    assert said.codes == ("2", "2")
    assert told[teller].splitlines()[-1].startswith(message)
    assert told[teller].count("nova-train") == 1
    assert told[1 - teller] == ""


def test_of_different_failures_the_first_is_told(folder: Path) -> None:
    said = Said(folder, "own")
    assert said.codes == ("2", "2")
    assert sorted(text[-48:] for text in said.texts("err"))[0] == ""
    assert any(f"disk {rank} is full" in text for rank, text in enumerate(said.texts("err")))


@pytest.mark.parametrize(("name", "teller"), [("bug", 0), ("second-bug", 1)])
def test_a_fault_of_ours_comes_with_one_traceback(folder: Path, name: str, teller: int) -> None:
    said = Said(folder, name)
    told = said.texts("err")
    assert said.codes[teller] == "1"
    assert said.codes[1 - teller] == "2"
    assert "Traceback (most recent call last)" in told[teller]
    assert told[teller].endswith("KeyError: 'bug'\n")
    assert told[teller].startswith("nova-train drill: rank 1: KeyError\n") == (teller == 1)
    assert told[1 - teller] == ""


def test_what_one_rank_does_alone_is_done_once(folder: Path) -> None:
    said = Said(folder, "alone")
    assert (said.codes, said.texts("out"), said.texts("err")) == (("0", "0"), ("alone on rank 0\n", ""), ("", ""))
    said = Said(folder, "alone-interrupted")
    assert (said.codes, said.texts("err")[1]) == (("130", "130"), "")
    assert said.texts("err")[0].startswith("nova-train alone: interrupted\ncontinue with: the same torchrun options")


@pytest.mark.parametrize("name", ["interrupted", "terminated"])
def test_a_signal_to_any_rank_saves_once_and_ends_all(folder: Path, name: str) -> None:
    said = Said(folder, name)
    assert said.codes == ("130", "130")
    assert f"nova-train sft: interrupted after step 2; saved in {name}/checkpoint-2" in said.texts("err")[0]
    assert said.texts("err")[1] == ""
    assert (folder / name / "checkpoint-2").is_dir()


def test_an_interrupted_run_continues(folder: Path) -> None:
    assert Said(folder, "continued").codes == ("0", "0")
    assert [line["step"] for line in read_metrics(folder / "interrupted")] == [1, 2, 3]


@pytest.mark.slow
def test_the_pipeline_runs_to_the_report_as_on_one_rank(pipeline: Path) -> None:
    folder, said = pipeline, Said(pipeline, "pipeline")
    assert said.codes == ("0", "0"), said.texts("err")[0]
    assert said.texts("out")[0].count("report: ") == 1
    assert "[11/11] eval: done in" in said.texts("err")[0]
    assert (said.texts("out")[1], said.texts("err")[1]) == ("", "")
    recipe = small_quickstart(folder / "one")
    (folder / "one.yaml").write_text(yaml.safe_dump(recipe))
    run_pipeline(plan_pipeline(folder / "one.yaml", {}))
    for stage in ("sft", "reward", "grpo", "pas"):
        lines, expected = read_metrics(folder / "pipeline" / stage), read_metrics(folder / "one" / stage)
        assert len(lines) == len(expected) > 0
        for line, wanted in zip(lines, expected, strict=True):
            assert line == pytest.approx(wanted, rel=1e-6, abs=1e-9), stage


@pytest.mark.slow
def test_a_finished_pipeline_is_skipped_on_all_ranks(pipeline: Path) -> None:
    said = Said(pipeline, "pipeline-again")
    assert said.codes == ("0", "0")
    assert said.texts("err")[0].count("done before, skipped") == 11


# Runs the command line; FAULTS has, by attempt of the launcher, the rank, the step and how it fails there.
FAULTY = """
import json, os, signal, sys, time
from pathlib import Path
from nova_train import loop
from nova_train.__main__ import main
Path(f"pid.{os.getpid()}").touch()
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
ailing, at, kind = json.loads(os.environ["FAULTS"]).get(attempt, ["", 0, ""])
step = loop.train_step
def faulty(run):
    if rank == ailing and run.step == at:
        Path(f"failed.{attempt}").touch()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("out of luck")
    return step(run)
loop.train_step = faulty
sys.exit(main(sys.argv[1:]))
"""


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_torchrun_goes_on_when_a_rank_is_killed_and_ends_when_it_fails(tmp_path: Path) -> None:
    """First attempt: killed. Second: goes on from the last save, and fails. The same command again: it ends well."""
    recipe = small_quickstart(tmp_path / "out")
    recipe["stages"] = recipe["stages"][:2]
    recipe["stages"][1] |= {"max_steps": 6, "save_steps": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "faulty.py").write_text(FAULTY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]

    def run(faults: dict[str, Any]) -> tuple[int, str]:
        environment = {**os.environ, "FAULTS": json.dumps(faults), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [*torchrun, "faulty.py", "pipeline", "recipe.yaml"]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        return ended.returncode, ended.stderr

    code, told = run({"0": ["1", 3, "kill"], "1": ["1", 5, "raise"]})
    assert (tmp_path / "failed.1").exists(), told
    assert time.time() - (tmp_path / "failed.1").stat().st_mtime < 30
    assert code == 1
    assert "nova-train pipeline: rank 1: out of luck (RuntimeError; --traceback shows where)\n" in told
    assert told.count("[1/2] world: done before, skipped") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "out" / "sft")] == [1, 2, 3, 4, 5]
    assert run({})[0] == 0
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("pid.*")]
    assert len(pids) == 6
    assert not [pid for pid in pids if alive(pid)]
    recipe["output_dir"] = str(tmp_path / "one")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe))
    run_pipeline(plan_pipeline(tmp_path / "one.yaml", {}))
    lines, expected = read_metrics(tmp_path / "out" / "sft"), read_metrics(tmp_path / "one" / "sft")
    for line, wanted in zip(lines, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-6, abs=1e-9)
