"""The source of the project as `ast` sees it: modules, what they import, what they run when imported.

Nothing of the project is imported. The rules that are read from here stand in house_rules.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

PACKAGES = ("nova_kernels", "nova_train")


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{head}.{node.attr}" if (head := dotted(node.value)) else ""
    return ""


@dataclass(frozen=True)
class Module:
    path: str  # from the repository's root, with slashes
    source: str
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", ast.parse(self.source, self.path))

    @property
    def is_front_door(self) -> bool:
        return self.path.endswith("/__init__.py")

    @property
    def name(self) -> str:
        return ".".join(PurePosixPath(self.path).with_suffix("").parts).removesuffix(".__init__")

    @property
    def stem(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def room(self) -> str:
        """The package's part the module belongs to: nova_kernels.topk_kl, nova_train.loop."""
        return ".".join(self.name.split(".")[:2])

    @property
    def is_inside_op(self) -> bool:
        """A part of an op or of another package behind a front door of its own: tested through that door."""
        return self.name.count(".") > 1 and self.room not in ("nova_train.stages", "nova_kernels.integrations")

    def at(self, node: ast.AST, text: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {text}"

    def walk(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


@dataclass(frozen=True)
class House:
    files: Mapping[str, str]  # path -> text, every Python source and every documentation page

    @classmethod
    def read(cls, root: Path) -> House:
        folders = [*PACKAGES, "tests", "benchmarks", "docs"]
        paths = [path for folder in folders for kind in ("*.py", "*.md") for path in (root / folder).rglob(kind)]
        return cls({path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)})

    @cached_property
    def modules(self) -> dict[str, Module]:
        ours = [path for path in self.files if path.endswith(".py") and path.split("/")[0] in PACKAGES]
        return {module.name: module for module in (Module(path, self.files[path]) for path in ours)}

    @cached_property
    def tests(self) -> list[Module]:
        return [
            Module(path, text)
            for path, text in self.files.items()
            if path.startswith("tests/") and path.endswith(".py")
        ]

    @cached_property
    def kernels(self) -> list[Module]:
        return [module for module in self.modules.values() if module.path.startswith("nova_kernels/")]

    @cached_property
    def ops(self) -> list[str]:
        """The packages of nova_kernels that are an op with a contract of its own."""
        doors = [module for module in self.kernels if module.is_front_door and module.name.count(".") == 1]
        return [door.stem for door in doors if door.stem != "integrations"]

    def imports(self, module: Module) -> Iterator[tuple[ast.AST, str]]:
        """(statement, full name) of everything imported anywhere in the module, inside functions as well.

        `from a import b` is a.b where that is one of our modules, and a otherwise.
        """
        package = module.name if module.is_front_door else module.name.rpartition(".")[0]
        for node in module.walk(ast.Import, ast.ImportFrom):
            if isinstance(node, ast.Import):
                yield from ((node, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parent, base]).rstrip(".")
                for alias in node.names:
                    yield node, full if (full := f"{base}.{alias.name}") in self.modules else base

    def imports_of_ours(self, module: Module) -> Iterator[tuple[ast.AST, str]]:
        return ((node, name) for node, name in self.imports(module) if name.split(".")[0] in PACKAGES)
