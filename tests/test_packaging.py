"""What pyproject.toml asks for, constraints.txt pins, and the source imports agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tomllib

from house import PACKAGES, House

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULE_OF = {"pyyaml": "yaml", "flash-attn": "flash_attn"}  # where a distribution's module has another name


def names(requirements: list[str]) -> set[str]:
    """Distribution names, lower case, ours expanded to what its extras ask for."""
    found: set[str] = set()
    for requirement in requirements:
        name = re.split(r"[\[<>=!~; ]", requirement.lower(), maxsplit=1)[0]
        if name == PROJECT["name"]:
            extras = re.findall(r"[\w-]+", requirement.partition("[")[2])
            found |= set().union(*(names(EXTRAS[extra]) for extra in extras))
        else:
            found.add(name)
    return found


def test_the_makefile_installs_pinned_versions_only() -> None:
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8").lower(), re.MULTILINE)
    asked = names([*PROJECT["dependencies"], *EXTRAS["dev"]]) | {"triton", "setuptools"}
    assert asked - set(pins) == set()
    assert len(pins) == len(set(pins))


def test_every_import_is_declared() -> None:
    """Whatever nova_train imports, at the top or inside a function, comes with some extra."""
    declared = names([*PROJECT["dependencies"], *(r for requirements in EXTRAS.values() for r in requirements)])
    modules = {MODULE_OF.get(name, name) for name in declared} | set(PACKAGES) | {"triton"}  # torch brings it
    house = House.read(ROOT)
    imported = {name.split(".")[0] for m in house.modules.values() for _, name in house.imports(m)}
    assert imported - modules - set(sys.stdlib_module_names) == set()


def test_nova_kernels_asks_for_three_packages() -> None:
    assert names(PROJECT["dependencies"]) == {"torch", "numpy", "safetensors"}
