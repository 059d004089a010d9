from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nova_train.__main__ import main
from nova_train.config import ConfigError
from nova_train.loop import Interrupted
from nova_train.stages import kinds
from nova_train.state import StateError


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    """Keys of toy."""

    output_dir: str  # where it goes
    rate: float = 0.5  # peak
    fault: str | None = None


FAULTS = {
    "config": ConfigError("rate is odd"),
    "state": StateError("folder\n  is taken"),
    "value": ValueError("not for users"),
    "file": FileNotFoundError(2, "No such file", "x"),
    "interrupt": KeyboardInterrupt(),
    "saved": Interrupted(7, Path("out")),
    "bug": KeyError("bug"),
}


def run(config: ToyConfig) -> Path:
    if config.fault is not None:
        raise FAULTS[config.fault]
    Path(config.output_dir).write_text(str(config.rate))
    return Path(config.output_dir)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "toy_stage", sys.modules[__name__])
    monkeypatch.setitem(kinds.STAGES, "toy", kinds.Kind("toy_stage", "ToyConfig", "do little"))


def test_a_stage_runs_with_its_recipe_and_flags(tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(f"output_dir: {tmp_path / 'result'}\nrate: 1\n", encoding="utf-8")
    assert main(["toy", str(recipe), "--rate", "2e-3"]) == 0
    assert (tmp_path / "result").read_text() == "0.002"


def test_a_dry_run_prints_the_keys_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--output_dir", str(tmp_path / "result"), "--dry_run"]) == 0
    assert capsys.readouterr().out == f"stage: toy\noutput_dir: {tmp_path / 'result'}\nrate: 0.5\nfault: null\n"
    assert not (tmp_path / "result").exists()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in (*kinds.STAGES, *kinds.COMMANDS, "pipeline", "env"):
        assert f"\n  {command} " in shown


def test_help_of_a_stage_lists_typed_keys_with_their_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--output_dir STR" in shown
    assert "where it goes" in shown
    assert "--rate FLOAT" in shown


@pytest.mark.parametrize("stage", sorted(kinds.STAGES | kinds.COMMANDS))
def test_every_command_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stage, "--help"]) == 0
    assert f"usage: nova-train {stage}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("config", "nova-train toy: rate is odd\n"),
        ("state", "nova-train toy: folder is taken\n"),
        ("value", "nova-train toy: not for users (ValueError; --traceback shows where)\n"),
        ("file", "nova-train toy: [Errno 2] No such file: 'x' (FileNotFoundError; --traceback shows where)\n"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(fault: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--output_dir", "out", "--fault", fault]) == 2
    assert capsys.readouterr() == ("", message)


def test_a_traceback_is_shown_on_demand() -> None:
    with pytest.raises(ValueError, match="not for users"):
        main(["toy", "--traceback", "--output_dir", "out", "--fault", "value"])


def test_a_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(KeyError, match="bug"):
        main(["toy", "--output_dir", "out", "--fault", "bug"])


@pytest.mark.parametrize(
    ("fault", "said"), [("interrupt", "interrupted"), ("saved", "interrupted after step 7; saved in out")]
)
def test_ctrl_c_tells_how_to_continue(fault: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--output_dir", "a b", "--fault", fault]) == 130
    shown = capsys.readouterr().err
    assert shown.startswith(f"nova-train toy: {said}")
    assert f"continue with: nova-train toy --output_dir 'a b' --fault {fault}\n" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tpy"], "unknown command 'tpy'; did you mean 'toy'?"),
        (["toy", "--output_dir", "o", "--rat", "1"], "unknown key 'rat'; did you mean 'rate'?"),
        (["toy"], "toy needs output_dir"),
        (["toy", "missing.yaml"], "missing.yaml: expected a readable YAML recipe: No such file or directory"),
        (["toy", "--output_dir", "o", "--dry_run", "yes"], "--dry_run takes no value, got 'yes'"),
        (["toy", "-o", "x"], "expected --key value, got '-o'"),
        (["pipeline", "--from", "a"], "expected a recipe"),
        (["pipeline", "x.yaml", "--from", "a", "b"], "--from takes the name of one stage, got ['a', 'b']"),
        (["sft", "--output_dir", "o", "--dataset_name", "d"], "model_name_or_path is missing"),
    ],
)
def test_bad_commands_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_pipeline_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    stages = [{"name": "a", "run": "toy"}]
    recipe.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "stages": stages}), encoding="utf-8")
    assert main(["pipeline", str(recipe), "--dry_run"]) == 0
    assert "# [1/1] a: toy (to do)" in capsys.readouterr().out
    assert main(["pipeline", str(recipe), "--until", "b"]) == 2
    assert "--until: unknown stage 'b'" in capsys.readouterr().err
