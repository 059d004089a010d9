from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import pytest

from nova_train.config import ConfigError, fingerprint, identity
from nova_train.stages import kinds, pipeline
from nova_train.state import StateError, claim_folder, mark_finished


@dataclass(frozen=True, kw_only=True, slots=True)
class NoteConfig:
    """A stage that writes its text after the texts of what it reads."""

    output_dir: str
    text: str = ""
    sources: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    disable_progress: bool = False


RUNS: list[str] = []  # folder names, in the order the stages ran


def run(config: NoteConfig) -> Path:
    folder = Path(config.output_dir)
    RUNS.append(folder.name)
    claim_folder(config, "note")
    if config.text == "crash":
        raise RuntimeError("crash")
    texts = [(Path(source) / "note.txt").read_text() for source in [*config.sources, *config.named.values()]]
    (folder / "note.txt").write_text("".join(texts) + config.text)
    mark_finished(folder, fingerprint(identity(config)))
    return folder


@pytest.fixture(autouse=True)
def note_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "note_stage", sys.modules[__name__])
    monkeypatch.setitem(kinds.STAGES, "note", kinds.Kind("note_stage", "NoteConfig", "write a note"))
    RUNS.clear()


TWO_PARENTS = """
    output_dir: OUT
    seed: 3
    stages:
      - {name: a, run: note, text: A}
      - {name: b, run: note, text: B, inputs: {sources: a}}
      - name: c
        run: note
        text: C
        seed: 4
        inputs: {sources: [a, b], named: {again: b}}
      - {name: d, run: note, text: D, inputs: {sources: c}}
"""


def write(tmp_path: Path, recipe: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dedent(recipe).replace("OUT", str(tmp_path / "out")), encoding="utf-8")
    return path


def plan(tmp_path: Path, recipe: str = TWO_PARENTS, **overrides: object) -> list[pipeline.PlannedStage]:
    return pipeline.plan_pipeline(write(tmp_path, recipe), overrides)


def test_stages_run_in_order_on_the_results_of_earlier_ones(tmp_path: Path) -> None:
    folders = pipeline.run_pipeline(plan(tmp_path))
    assert RUNS == ["a", "b", "c", "d"]
    assert [folder.name for folder in folders] == RUNS
    assert (tmp_path / "out" / "d" / "note.txt").read_text() == "AABABCD"


def test_planning_writes_nothing(tmp_path: Path) -> None:
    stages = plan(tmp_path)
    assert not (tmp_path / "out").exists()
    assert [stage.inputs for stage in stages] == [(), ("a",), ("a", "b"), ("c",)]


def test_seeds_are_defaults_for_every_stage(tmp_path: Path) -> None:
    assert [stage.config.seed for stage in plan(tmp_path)] == [3, 3, 4, 3]
    assert [stage.config.seed for stage in plan(tmp_path, seed="7")] == [7, 7, 4, 7]


def test_what_is_done_is_skipped(tmp_path: Path) -> None:
    pipeline.run_pipeline(plan(tmp_path), last="b")
    assert RUNS == ["a", "b"]
    pipeline.run_pipeline(plan(tmp_path))
    assert RUNS == ["a", "b", "c", "d"]
    pipeline.run_pipeline(plan(tmp_path, disable_progress=True))
    assert RUNS == ["a", "b", "c", "d"]


def test_a_stage_that_did_not_finish_runs_again(tmp_path: Path) -> None:
    crashing = TWO_PARENTS.replace("text: C", "text: crash")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="crash"):
            pipeline.run_pipeline(plan(tmp_path, crashing))
    assert RUNS == ["a", "b", "c", "c"]


def test_a_stage_that_made_nothing_may_start_again_with_other_keys(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="crash"):
        pipeline.run_pipeline(plan(tmp_path, TWO_PARENTS.replace("text: C", "text: crash")))
    pipeline.run_pipeline(plan(tmp_path))
    assert RUNS == ["a", "b", "c", "c", "d"]


def test_from_and_until_bound_the_run(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="--from c: stage 'a' before it is not finished"):
        pipeline.run_pipeline(plan(tmp_path), first="c")
    pipeline.run_pipeline(plan(tmp_path), last="b")
    pipeline.run_pipeline(plan(tmp_path), first="c", last="c")
    assert RUNS == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="--from: unknown stage 'zzz'; expected one of a, b, c, d"):
        pipeline.run_pipeline(plan(tmp_path), first="zzz")
    with pytest.raises(ConfigError, match="--from c stands after --until b"):
        pipeline.run_pipeline(plan(tmp_path), first="c", last="b")


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    pipeline.run_pipeline(plan(tmp_path))
    changed = TWO_PARENTS.replace("text: C", "text: X")
    with pytest.raises(StateError, match=r"c holds another run of stage 'c' \(text: 'C' there, 'X' here\)"):
        pipeline.run_pipeline(plan(tmp_path, changed))
    assert (tmp_path / "out" / "c" / "note.txt").read_text() == "AABABC"
    assert RUNS == ["a", "b", "c", "d"]


def test_a_change_upstream_reaches_every_stage_below(tmp_path: Path) -> None:
    before, after = plan(tmp_path), plan(tmp_path, TWO_PARENTS.replace("text: B", "text: X"))
    changed = [old.name for old, new in zip(before, after, strict=True) if old.fingerprint != new.fingerprint]
    assert changed == ["b", "c", "d"]
    pipeline.run_pipeline(before)
    for name in ("b", "c"):
        for file in (tmp_path / "out" / name).iterdir():
            file.unlink()
    with pytest.raises(StateError, match=r"d holds another run of stage 'd' \(same keys, but c changed\)"):
        pipeline.run_pipeline(after)
    assert RUNS == ["a", "b", "c", "d"]


def test_a_mapping_may_be_given_in_two_parts(tmp_path: Path) -> None:
    recipe = """
        output_dir: OUT
        stages:
          - {name: a, run: note}
          - {name: b, run: note, named: {outside: /data/x}, inputs: {named: {inside: a/sub}}}
    """
    named = plan(tmp_path, recipe)[1].config.named
    assert named == {"outside": "/data/x", "inside": str(tmp_path / "out" / "a" / "sub")}


FIRST = "output_dir: OUT\nstages:\n  - {name: a, run: note}\n"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("stages: [{name: a, run: note}]", "output_dir must name the folder of all stages, got None"),
        ("output_dir: OUT\nstages: []", r"stages must be a list of at least one stage, got \[\]"),
        (FIRST + "sead: 1", "unknown key 'sead'; did you mean 'seed'"),
        (FIRST + "  - note", "stage 2: expected a mapping with name, run .* got 'note'"),
        (FIRST + "  - {run: note}", "stage 2: name must be a plain folder name, got None"),
        (FIRST + "  - {name: ../b, run: note}", "name must be a plain folder name, got '../b'"),
        (FIRST + "  - {name: a, run: note}", r"stage 2 \(a\): the name 'a' is taken by an earlier stage"),
        (FIRST + "  - {name: b, run: ntoe}", r"stage 2 \(b\): unknown stage 'ntoe'; did you mean 'note'"),
        (FIRST + "  - {name: b}", "unknown stage 'None'"),
        (FIRST + "  - {name: b, run: note, txet: x}", r"stage 2 \(b\): unknown key 'txet'; did you mean 'text'"),
        (FIRST + "  - {name: b, run: note, text: 1}", r"stage 2 \(b\): text: expected text"),
        (FIRST + "  - {name: b, run: note, output_dir: x}", "remove its output_dir 'x'"),
        (FIRST + "  - {name: b, run: note, inputs: a}", "inputs must map keys to earlier stages, got 'a'"),
        (
            FIRST + "  - {name: b, run: note, inputs: {sources: [a, c/x]}}",
            r"inputs.sources\[1\]: no earlier stage is called 'c' \(earlier stages: a\)",
        ),
        (FIRST + "  - {name: b, run: note, inputs: {sources: b}}", "no earlier stage is called 'b'"),
        (FIRST + "  - {name: b, run: note, inputs: {sources: a/../x}}", "or stage/path, got 'a/../x'"),
        (FIRST + "  - {name: b, run: note, inputs: {sources: 1}}", "expected the name of an earlier stage, .* got 1"),
        (
            FIRST + "  - {name: b, run: note, sources: [x], inputs: {sources: a}}",
            "'sources' is given both as a key and under inputs",
        ),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_runs(tmp_path: Path, recipe: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, recipe)
    assert not (tmp_path / "out").exists()


def test_the_plan_shows_what_is_done(tmp_path: Path) -> None:
    pipeline.run_pipeline(plan(tmp_path), last="a")
    text = pipeline.plan_text(plan(tmp_path))
    assert "# [1/4] a: note (done)" in text
    assert "# [2/4] b: note (to do)" in text
    assert f"- {tmp_path / 'out' / 'a'}" in text
