"""The rules of the house hold, and each of them catches what it forbids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import house_rules as rules
from house import House

ROOT = Path(__file__).parent.parent

TOTAL = 'def total(x):\n    """Sum."""\n    return x\n'

# A house in order: every planted violation below is one change to it.
IN_ORDER = {
    "nova_kernels/__init__.py": '"""Names."""\nfrom nova_kernels.sum_op import total\n',
    "nova_kernels/backend.py": '"""Choice."""\nimport logging\n\nlog = logging.getLogger(__name__)\n',
    "nova_kernels/sum_op/__init__.py": '"""Contract."""\nfrom nova_kernels.sum_op.fast import total\n',
    "nova_kernels/sum_op/fast.py": f'"""Fast."""\nfrom nova_kernels import backend\nfrom . import reference\n{TOTAL}',
    "nova_kernels/sum_op/reference.py": f'"""Definition."""\nimport torch\n{TOTAL}',
    "nova_kernels/integrations/__init__.py": "",
    "nova_kernels/integrations/transformers.py": '"""Plug."""\nimport transformers\n',
    "nova_train/__init__.py": '"""Trainer."""\n',
    "nova_train/__main__.py": '"""Command."""\nfrom nova_train.stages import sft\n\nprint\n',
    "nova_train/losses.py": '"""Losses."""\nfrom nova_kernels.sum_op import total\n',
    "nova_train/loop.py": '"""Loop."""\nfrom nova_train import losses\n',
    "nova_train/stages/__init__.py": '"""Stages."""\n',
    "nova_train/stages/sft.py": '"""SFT."""\nfrom nova_train import loop, losses\n',
    "tests/test_sum_op.py": "",
    "tests/test_rest.py": (
        "import nova_kernels.backend, nova_kernels.integrations.transformers\n"
        "import nova_train.__main__, nova_train.losses, nova_train.loop\nfrom nova_train.stages import sft\n"
    ),
    "docs/kernels/sum_op.md": "# sum_op\n",
}  # fmt: skip

DOOR, FAST, REFERENCE = (f"nova_kernels/sum_op/{name}.py" for name in ("__init__", "fast", "reference"))
BACKEND, LOSSES = "nova_kernels/backend.py", "nova_train/losses.py"
CONFIG = "from dataclasses import dataclass\n@dataclass\nclass AConfig:\n    x: int\n"

PLANTED = [
    (rules.imports_run_one_way, REFERENCE, "from nova_kernels import backend", "imports nothing of ours"),
    (rules.imports_run_one_way, REFERENCE, "from ..backend import choose", "imports nothing of ours"),
    (rules.imports_run_one_way, FAST, "def f():\n    import nova_train.loop", "does not know nova_train"),
    (rules.imports_run_one_way, FAST, "from nova_kernels.sum_op import total", "does not import its front door"),
    (rules.imports_run_one_way, LOSSES, "from nova_train.stages.sft import run", "only stages know stages"),
    (rules.imports_run_one_way, LOSSES, "from nova_train import loop", "only stages know the loop"),
    (rules.imports_run_one_way, "nova_train/stages/sft.py", "import nova_train.__main__", "nothing imports __main__"),
    (rules.imports_run_one_way, LOSSES, "from nova_kernels.sum_op import fast", "through its front doors"),
    (rules.kernels_need_torch_only, FAST, "def f():\n    import transformers", "imports transformers"),
    (rules.kernels_need_torch_only, "nova_kernels/integrations/transformers.py", "import yaml", "imports yaml"),
    (rules.no_circles, LOSSES, "def f():\n    from nova_train import loop", "nova_train.loop, nova_train.losses"),
    (rules.no_circles, BACKEND, "import nova_kernels.sum_op.reference", "nova_kernels.backend, nova_kernels.sum_op"),
    (rules.sizes, DOOR, "\n" * 150, "153 lines, at most 150"),
    (rules.sizes, FAST, "\n" * 400, "lines, at most 400"),
    (rules.sizes, "tests/test_sum_op.py", "\n" * 400, "lines, at most 400"),
    (rules.sizes, LOSSES, "def long():\n" + "    x = 1\n" * 60, "long has 61 lines"),
    (rules.names_are_not_module_names, LOSSES, "def losses():\n    return 1", "losses bears its module's name"),
    (rules.names_are_not_module_names, DOOR, "from math import e as fast", "hides"),
    (rules.file_names, "nova_kernels/sum_op/utils.py", '"""Bits."""', "the name says nothing"),
    (rules.each_room_has_its_test, "nova_kernels/other/__init__.py", '"""Op."""', "no tests/test_other.py"),
    (rules.each_room_has_its_test, "nova_train/stages/ppo.py", '"""PPO."""', "no test imports it"),
    (rules.each_op_has_its_page, "nova_kernels/other/__init__.py", '"""Op."""', "no docs/kernels/other.md"),
    (rules.nothing_at_import, LOSSES, "import torch\ntorch.set_num_threads(1)", "calls torch.set_num_threads()"),
    (rules.nothing_at_import, LOSSES, "import torch\nX = torch.cuda.is_available()", "cuda.is_available()"),
    (rules.nothing_at_import, LOSSES, "import torch\ndef f(d=torch.rand(1)):\n    return d", "calls torch.rand()"),
    (rules.nothing_at_import, LOSSES, "import os\nos.environ['A'] = '1'", "writes os.environ['A']"),
    (rules.nothing_at_import, LOSSES, "import torch\ntorch.nn.Linear.forward = None", "writes torch.nn.Linear.forward"),
    (rules.libraries_leave_the_process_alone, FAST, "def f():\n    os.environ['A'] = '1'", "os.environ"),
    (rules.libraries_leave_the_process_alone, FAST, "def f():\n    torch.manual_seed(0)", "manual_seed"),
    (rules.no_broad_except, LOSSES, "try:\n    x = 1\nexcept Exception:\n    x = 2", "broad except"),
    (rules.no_broad_except, LOSSES, "try:\n    x = 1\nexcept (OSError, Exception):\n    x = 2", "broad except"),
    (rules.no_broad_except, LOSSES, "try:\n    x = 1\nexcept:\n    x = 2", "broad except"),
    (rules.no_print, LOSSES, "def f():\n    print(1)", "prints"),
    (rules.everything_public_is_documented, FAST, "def open_one():\n    return 1", "open_one has no docstring"),
    (rules.everything_public_is_documented, "nova_train/kl.py", "x = 1", "kl.py:1: no docstring"),
    (rules.no_stubs, LOSSES, "def later():\n    ...", "later does nothing"),
    (rules.no_stubs, LOSSES, "class A:\n    def later(self):\n        pass", "later does nothing"),
    (rules.no_stubs, LOSSES, "def later():\n    raise NotImplementedError", "NotImplementedError"),
    (rules.no_stubs, "docs/kernels/sum_op.md", "TO" + "DO: more", "sum_op.md:2: TO" + "DO"),
    (rules.errors_speak, LOSSES, "def f():\n    raise ValueError()", "ValueError without a message"),
    (rules.errors_speak, LOSSES, "def f(x):\n    assert x", "assert without a message"),
    (rules.configs_are_frozen, LOSSES, CONFIG, "AConfig"),
]  # fmt: skip


def broken(rule: Callable[[House], list[str]]) -> str:
    return rule.__name__  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def house() -> House:
    return House.read(ROOT)


@pytest.mark.parametrize("rule", rules.RULES, ids=broken)
def test_rule_holds(rule: Callable[[House], list[str]], house: House) -> None:
    if violations := rule(house):
        pytest.fail("\n".join([f"{len(violations)} violations", *violations]), pytrace=False)


@pytest.mark.parametrize("rule", rules.RULES, ids=broken)
def test_a_house_in_order_passes(rule: Callable[[House], list[str]]) -> None:
    assert rule(House(IN_ORDER)) == []


@pytest.mark.parametrize(("rule", "path", "addition", "says"), PLANTED)
def test_rule_catches(rule: Callable[[House], list[str]], path: str, addition: str, says: str) -> None:
    violations = rule(House({**IN_ORDER, path: f"{IN_ORDER.get(path, '')}{addition}\n"}))
    assert any(path in v or path.split("/")[-1].removesuffix(".py") in v for v in violations), violations
    assert any(says in violation for violation in violations), violations


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, *_ in PLANTED} == set(rules.RULES)


def test_the_house_is_read(house: House) -> None:
    """An empty reading would pass every rule."""
    assert {"nova_kernels.backend", "nova_kernels.packing", "nova_train.loop"} <= set(house.modules)
    assert "packing" in house.ops


def test_import_allowances() -> None:
    """Constants, types and loggers are built at import; a script's main block runs only as a script."""
    text = (
        "import re, logging\nfrom dataclasses import dataclass, field\nfrom nova_kernels.backend import Choice\n"
        "NUMBER = re.compile('[0-9]')\nWORDS = frozenset(w.strip() for w in 'a b'.split())\nX = Choice(name='x')\n"
        "@dataclass(frozen=True)\nclass A:\n    x: list = field(default_factory=list)\n"
        "if __name__ == '__main__':\n    print(A())\n"
    )
    assert rules.nothing_at_import(House({**IN_ORDER, LOSSES: f'"""Losses."""\n{text}'})) == []
