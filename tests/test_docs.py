"""The documentation tells the truth: its links, commands, keys, recipes, files and marked examples exist and work.

A fence that opens with ```python run is executed; the fences of one page share their names, as a reader would. Further
words are libraries that it needs: it is left out where one of them is not installed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from nova_train.__main__ import overview
from nova_train.stages.kinds import COMMANDS, STAGES

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
}

FENCE = re.compile(r"^( *)```(\S*) *(.*?)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OUR_FILE = re.compile(r"`((?:nova_kernels|nova_train|tests|docs|recipes|benchmarks|csrc)/[\w./-]+\.\w+)`")
INLINE = re.compile(r"`[^`\n]+`")
COMMAND = re.compile(r"(?:nova-train|-m nova_train) +([a-z][\w-]*)((?:\\\n|[^\n`#|>])*)")
TARGET = re.compile(r"(?:^|`) *make ([a-z][\w-]*)", re.MULTILINE)
PIPELINE_KEYS = {"from", "until", "dry_run", "output_dir", "seed", "num_threads", "disable_progress"}


def line_of(page: str, position: int) -> int:
    return page.count("\n", 0, position) + 1


def code(page: str) -> str:
    """The page with all that is not code blanked, line by line as it was."""
    kept = [match.span() for match in FENCE.finditer(page)]
    kept += [m.span() for m in INLINE.finditer(page) if not any(start <= m.start() < stop for start, stop in kept)]
    wanted = {place for start, stop in kept for place in range(start, stop)}
    return "".join(char if place in wanted or char == "\n" else " " for place, char in enumerate(page))


def anchors(page: str) -> set[str]:
    """The names GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(pages: Mapping[str, str], root: Path) -> Iterator[str]:
    for name, page in pages.items():
        for match in LINK.finditer(FENCE.sub(lambda m: "\n" * m.group().count("\n"), page)):
            target, _, anchor = match[1].partition("#")
            path = (root / name).parent / target if target else root / name
            if re.match(r"[a-z]+:", match[1]):
                continue
            if not path.exists():
                yield f"{name}:{line_of(page, match.start())}: no file {target}"
            elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text(encoding="utf-8")):
                yield f"{name}:{line_of(page, match.start())}: no heading #{anchor} in {target or name}"
        for match in OUR_FILE.finditer(page):
            if "<" not in match[1] and not (root / match[1]).exists():
                yield f"{name}:{line_of(page, match.start())}: no file {match[1]}"


def broken_commands(pages: Mapping[str, str], root: Path) -> Iterator[str]:
    """`nova-train <command> [recipe] [--key value]` and `make <target>`: each exists, and so do recipe and keys."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = set(re.findall(r"^  ([a-z][\w-]*)  ", overview(), re.MULTILINE))
    for name, page in pages.items():
        text = code(page)
        for match in COMMAND.finditer(text):
            where, command = f"{name}:{line_of(page, match.start())}", match[1]
            if command not in commands:
                yield f"{where}: no command nova-train {command}"
                continue
            words = [word for word in match[2].split() if not word.startswith(("[", "<", ".", "\\"))]
            recipes = [word for word in words if word.startswith("recipes/")]
            yield from (f"{where}: no recipe {recipe}" for recipe in recipes if not (root / recipe).exists())
            keys = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
            unknown = sorted(keys - known_keys(command)) if keys else []
            yield from (f"{where}: nova-train {command} has no key {key}" for key in unknown)
        for match in TARGET.finditer(text):
            if match[1] not in targets:
                yield f"{name}:{line_of(page, match.start())}: no target make {match[1]}"


def known_keys(command: str) -> set[str]:
    if command == "pipeline":
        return PIPELINE_KEYS
    kind = (STAGES | COMMANDS).get(command)
    fields = dataclasses.fields(kind.load()[0]) if kind is not None else ()
    return {field.name for field in fields} | {"dry_run", "help", "traceback"}


def broken_yaml(pages: Mapping[str, str]) -> Iterator[str]:
    for name, page in pages.items():
        for match in FENCE.finditer(page):
            if match[2] in ("yaml", "yml"):
                try:
                    yaml.safe_load(match[4])
                except yaml.YAMLError as error:
                    yield f"{name}:{line_of(page, match.start())}: {str(error).splitlines()[0]}"


def examples(page: str) -> Iterator[tuple[int, str]]:
    """(line of the first statement, source) of every fence that is to be run."""
    for match in FENCE.finditer(page):
        run, *libraries = match[3].split() or [""]
        if match[2] == "python" and run == "run" and all(map(find_spec, libraries)):
            source = "\n".join(line.removeprefix(match[1]) for line in match[4].splitlines())
            yield line_of(page, match.start()) + 1, source


def run_examples(name: str, page: str) -> None:
    names: dict[str, object] = {"__name__": name}
    for line, source in examples(page):
        exec(compile("\n" * (line - 1) + source, name, "exec"), names)


def expect_none(broken: Iterable[str]) -> None:
    if lines := list(broken):
        pytest.fail("\n".join(lines), pytrace=False)


def test_links() -> None:
    expect_none(broken_links(PAGES, ROOT))


def test_commands() -> None:
    expect_none(broken_commands(PAGES, ROOT))


def test_yaml() -> None:
    expect_none(broken_yaml(PAGES))


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if any(examples(page))])
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples(name, PAGES[name])


def test_every_recipe_is_documented() -> None:
    text = "\n".join(PAGES.values())
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    expect_none(f"{path.relative_to(ROOT)}: named on no page" for path in recipes if path.name not in text)


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("[x](docs/nowhere.md)", "a.md:1: no file docs/nowhere.md"),
        ("# Here\n[x](#there)", "a.md:2: no heading #there in a.md"),
        ("See `nova_train/nowhere.py`.", "a.md:1: no file nova_train/nowhere.py"),
        ("\n`nova-train sfft`", "a.md:2: no command nova-train sfft"),
        ("```\nnova-train sft recipes/nowhere.yaml\n```", "a.md:2: no recipe recipes/nowhere.yaml"),
        ("nova-train is prose, `nova-train env` and `make test` are not", None),
        ("```\nnova-train sft \\\n  --learning_rat 1\n```", "a.md:2: nova-train sft has no key learning_rat"),
        ("`nova-train sft --learning_rat 1`", "a.md:1: nova-train sft has no key learning_rat"),
        ("`make coffee`", "a.md:1: no target make coffee"),
        ("```yaml\na: [1\n```", "a.md:1: while parsing a flow sequence"),
    ],
)
def test_broken_pages_are_found(page: str, says: str | None, tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("test: lint\n")
    (tmp_path / "a.md").write_text(page)
    pages = {"a.md": page}
    found = [*broken_links(pages, tmp_path), *broken_commands(pages, tmp_path), *broken_yaml(pages)]
    assert found == ([says] if says else [])


def test_examples_wait_for_their_libraries() -> None:
    fences = [f"```python run {libraries}\nraise OSError\n```\n" for libraries in ("no_such_library", "json ast")]
    run_examples("a.md", fences[0])
    with pytest.raises(OSError):
        run_examples("a.md", fences[1])


def test_examples_share_names_and_fail_at_their_line() -> None:
    page = "Text\n```python run\nx = 1\n```\n```python\nx = 2\n```\n  ```python run\n  assert x == 1\n  1 / 0\n  ```\n"
    with pytest.raises(ZeroDivisionError) as caught:
        run_examples("a.md", page)
    assert caught.traceback[-1].lineno == 9  # counted from 0
