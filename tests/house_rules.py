"""The rules of the house: functions `House -> violations`, each "file:line: what is wrong". RULES has them all."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath

from house import PACKAGES, House, dotted

MAX_FRONT_DOOR = 150  # lines
MAX_FILE = 400  # lines
MAX_FUNCTION = 60  # lines, docstring not counted

# What nova_kernels may import besides the standard library and itself; integrations/ may import what it integrates.
KERNEL_LIBRARIES = {"torch", "numpy", "safetensors", "triton", "flash_attn"}
INTEGRATED = {"transformers", "trl"}

FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "shared", "stuff"}
PRINTING = ("nova_kernels/doctor.py", "nova_train/__main__.py", "nova_train/report.py", "nova_train/stages/")

# Calls a module may make while it is imported: they build constants and types, and touch no state of the process.
AT_IMPORT = {
    "bool", "bytes", "dict", "enumerate", "filter", "float", "frozenset", "int", "len", "list", "map", "max", "min",
    "range", "reversed", "set", "sorted", "str", "sum", "tuple", "zip", "chr", "ord", "math.log", "math.sqrt",
    "TypeVar", "ParamSpec", "NewType", "namedtuple", "NamedTuple", "auto", "property", "MappingProxyType",
    "dataclass", "dataclasses.dataclass", "field", "dataclasses.field", "types.MappingProxyType", "str.maketrans",
    "re.compile", "logging.getLogger", "Path", "PurePosixPath", "partial", "functools.partial",
    "lru_cache", "functools.lru_cache", "wraps", "functools.wraps", "torch.no_grad", "torch.inference_mode",
    "torch.finfo", "torch.iinfo", "torch.library.custom_op", "torch.library.triton_op", "torch.library.register_fake",
    "torch.library.register_autograd", "triton.jit", "triton.heuristics", "triton.cdiv", "tl.constexpr",
}  # fmt: skip
TEXT_METHODS = {
    "join",
    "split",
    "splitlines",
    "strip",
    "format",
    "replace",
    "lower",
    "upper",
    "items",
    "keys",
    "values",
}
REGISTRATIONS = {"register_fake", "register_autograd", "register_kernel"}  # methods of our own torch.library ops

# Settings of the process belong to the program, never to a library function.
PROCESS_SETTERS = {
    "torch.set_num_threads", "torch.set_num_interop_threads", "torch.set_default_dtype", "torch.set_default_device",
    "torch.manual_seed", "torch.seed", "torch.use_deterministic_algorithms", "torch.set_float32_matmul_precision",
    "torch.distributed.init_process_group", "random.seed", "np.random.seed", "numpy.random.seed",
    "os.putenv", "os.environ.update", "os.environ.setdefault", "os.environ.pop", "logging.basicConfig",
}  # fmt: skip


def imports_run_one_way(house: House) -> list[str]:
    """reference -> fast backends -> front door -> nova_kernels -> nova_train; leaves -> loop -> stages -> __main__."""
    found = []
    for module in house.modules.values():
        in_stages = module.room in ("nova_train.stages", "nova_train.__main__")
        for node, name in house.imports_of_ours(module):
            op = ".".join(name.split(".")[:2])
            reasons = {
                "reference.py imports nothing of ours": module.stem == "reference",
                "nova_kernels does not know nova_train": module in house.kernels and name.split(".")[0] == "nova_train",
                "a backend does not import its front door": module.name != name and module.name.startswith(f"{name}."),
                "only stages know stages": op == "nova_train.stages" and not in_stages,
                "only stages know the loop": op == "nova_train.loop" and not in_stages,
                "nothing imports __main__": name.endswith("__main__"),
                "nova_train uses nova_kernels through its front doors": module not in house.kernels
                and name.startswith("nova_kernels.")
                and name.count(".") > 1
                and op != "nova_kernels.integrations",
            }
            found += [module.at(node, f"imports {name}: {reason}") for reason, broken in reasons.items() if broken]
    return found


def kernels_need_torch_only(house: House) -> list[str]:
    """Third-party imports of nova_kernels; transformers only in integrations/."""
    found = []
    for module in house.kernels:
        allowed = KERNEL_LIBRARIES | (INTEGRATED if module.room == "nova_kernels.integrations" else set())
        for node, name in house.imports(module):
            library = name.split(".")[0]
            if library not in allowed and library not in PACKAGES and library not in sys.stdlib_module_names:
                found.append(module.at(node, f"imports {library}; here only {sorted(allowed)}"))
    return found


def _circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            if (node := todo.pop()) not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        return seen

    reached = {node: reach(node) for node in graph}
    groups = {frozenset(n for n in reached[node] if node in reached.get(n, ())) for node in graph}
    return [sorted(group) for group in groups if group]


def no_circles(house: House) -> list[str]:
    """No two modules, and no two rooms, import each other, not even inside a function."""
    modules = {m.name: {name for _, name in house.imports_of_ours(m)} - {m.name} for m in house.modules.values()}
    rooms: dict[str, set[str]] = {}
    for module in house.modules.values():
        if "." in module.name:
            targets = {".".join(name.split(".")[:2]) for name in modules[module.name] if "." in name}
            rooms.setdefault(module.room, set()).update(targets - {module.room})
    found = {", ".join(circle) for circle in [*_circles(modules), *_circles(rooms)]}
    return [f"{circle}: import each other" for circle in sorted(found)]


def sizes(house: House) -> list[str]:
    found = []
    for path, text in house.files.items():
        limit = MAX_FRONT_DOOR if path.endswith("/__init__.py") else MAX_FILE
        if path.endswith(".py") and (lines := text.count("\n")) > limit:
            found.append(f"{path}:1: {lines} lines, at most {limit}")
    for module in house.modules.values():
        for node in module.walk(ast.FunctionDef, ast.AsyncFunctionDef):
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            is_kernel = any("triton.jit" in (dotted(d), dotted(getattr(d, "func", d))) for d in node.decorator_list)
            if lines > MAX_FUNCTION and not is_kernel:
                found.append(
                    module.at(node, f"{node.name} has {lines} lines without its docstring, at most {MAX_FUNCTION}")
                )
    return found


def _public(body: list[ast.stmt], *kinds: type[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, kinds) and not node.name.startswith("_"):  # type: ignore[attr-defined]
            yield node  # type: ignore[misc]


def names_are_not_module_names(house: House) -> list[str]:
    """A public function never bears its module's name, nor a front door's name that of a module behind it."""
    found = []
    for module in house.modules.values():
        for node in _public(module.tree.body, ast.FunctionDef, ast.ClassDef):
            if node.name == module.stem:
                found.append(module.at(node, f"{node.name} bears its module's name"))
        if module.is_front_door:
            for item in module.walk(ast.ImportFrom):
                assert isinstance(item, ast.ImportFrom)
                for alias in item.names:
                    full = f"{module.name}.{alias.asname or alias.name}"
                    if full in house.modules and f"{item.module}.{alias.name}" != full and item.level == 0:
                        found.append(module.at(item, f"{alias.name} hides the module {full}"))
    return found


def file_names(house: House) -> list[str]:
    parts = {path: PurePosixPath(path).with_suffix("").parts for path in house.files}
    return [f"{path}:1: the name says nothing" for path, names in parts.items() if FORBIDDEN_NAMES & set(names)]


def each_room_has_its_test(house: House) -> list[str]:
    """tests/test_<op>.py for every op; every other module has a test of its name or is imported by a test."""
    tested = {name for test in house.tests for _, name in house.imports_of_ours(test)}
    found = []
    for module in house.modules.values():
        name = module.stem.strip("_")
        named = any(path.startswith(f"tests/test_{name}") for path in house.files)
        is_op = module.is_front_door and module in house.kernels and module.stem in house.ops
        if is_op and f"tests/test_{name}.py" not in house.files:
            found.append(f"{module.path}:1: no tests/test_{name}.py")
        elif module.name.count(".") and not (
            named or module.name in tested or module.is_front_door or module.is_inside_op
        ):
            found.append(f"{module.path}:1: no tests/test_{name}.py, and no test imports it")
    return found


def each_op_has_its_page(house: House) -> list[str]:
    pages = {op: f"docs/kernels/{op}.md" for op in house.ops}
    return [f"nova_kernels/{op}/__init__.py:1: no {page}" for op, page in pages.items() if page not in house.files]


def _runs_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node that is executed when the module is imported: bodies of functions are not, their defaults are."""
    todo: list[ast.AST] = [node for node in tree.body if not _is_main_guard(node)]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        elif not isinstance(node, ast.Lambda):
            todo += ast.iter_child_nodes(node)


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def nothing_at_import(house: House) -> list[str]:
    """No calls but those that build constants and types, no writes into what other modules own."""
    found = []
    for module in house.modules.values():
        imports = [n for n in module.walk(ast.Import, ast.ImportFrom) if isinstance(n, ast.Import | ast.ImportFrom)]
        foreign = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
        ours = [n for n in imports if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] in PACKAGES]
        classes = {alias.asname or alias.name for node in ours for alias in node.names if alias.name[:1].isupper()}
        classes |= {node.name for node in module.tree.body if isinstance(node, ast.ClassDef)}
        for node in _runs_at_import(module.tree):
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                builds = name in AT_IMPORT or name in classes or method in TEXT_METHODS
                if not builds and not (method in REGISTRATIONS and name.split(".")[0] not in foreign):
                    found.append(module.at(node, f"calls {name or ast.unparse(node.func)}() at import"))
            elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                owner = dotted(node if isinstance(node, ast.Attribute) else node.value).split(".")[0]
                if owner in foreign:
                    found.append(module.at(node, f"writes {ast.unparse(node)} at import"))
    return found


def libraries_leave_the_process_alone(house: House) -> list[str]:
    """No thread, seed, dtype or environment setting in nova_kernels, at import or later."""
    found = []
    for module in house.kernels:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and dotted(node.func) in PROCESS_SETTERS:
                found.append(module.at(node, f"calls {dotted(node.func)}()"))
            if (
                isinstance(node, ast.Subscript)
                and dotted(node.value) == "os.environ"
                and not isinstance(node.ctx, ast.Load)
            ):
                found.append(module.at(node, "writes os.environ"))
    return found


def no_broad_except(house: House) -> list[str]:
    """`except Exception` only where the last statement raises the same error again."""
    found = []
    for module in house.modules.values():
        for node in module.walk(ast.ExceptHandler):
            assert isinstance(node, ast.ExceptHandler)
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in kinds)
            last = node.body[-1]
            if broad and not (isinstance(last, ast.Raise) and last.exc is None):
                found.append(module.at(node, "broad except"))
    return found


def no_print(house: House) -> list[str]:
    return [
        module.at(node, "prints; libraries log")
        for module in house.modules.values()
        if not module.path.startswith(PRINTING)
        for node in module.walk(ast.Call)
        if isinstance(node, ast.Call) and dotted(node.func) == "print"
    ]


def everything_public_is_documented(house: House) -> list[str]:
    """Every file opens with a docstring; so do the public functions and classes of nova_kernels."""
    found = [
        f"{module.path}:1: no docstring"
        for module in house.modules.values()
        if module.source.strip() and ast.get_docstring(module.tree) is None
    ]
    for module in house.kernels:
        for node in _public(module.tree.body, ast.FunctionDef, ast.ClassDef):
            if ast.get_docstring(node) is None and "overload" not in map(dotted, node.decorator_list):
                found.append(module.at(node, f"{node.name} has no docstring"))
    return found


def no_stubs(house: House) -> list[str]:
    """No function that only passes, no NotImplementedError, no notes about later; protocols may be empty."""
    found = []
    for module in house.modules.values():
        for owner in [module.tree, *module.walk(ast.ClassDef)]:
            if "Protocol" in {dotted(getattr(base, "value", base)) for base in getattr(owner, "bases", [])}:
                continue
            for node in (
                n for n in getattr(owner, "body", []) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            ):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                empty = all(isinstance(s, ast.Pass) or ast.unparse(s) == "..." for s in body)
                if empty and not {"overload", "abstractmethod"} & set(map(dotted, node.decorator_list)):
                    found.append(module.at(node, f"{node.name} does nothing"))
        for node in module.walk(ast.Name):
            if isinstance(node, ast.Name) and node.id == "NotImplementedError":
                found.append(module.at(node, "NotImplementedError"))
    for path, text in house.files.items():
        lines = enumerate(text.splitlines(), 1)
        found += [f"{path}:{n}: {mark}" for n, line in lines for mark in ("TO" + "DO", "FIX" + "ME") if mark in line]
    return found


def errors_speak(house: House) -> list[str]:
    """Every assert and every raised error carries a message."""
    found = []
    for module in house.modules.values():
        for node in module.walk(ast.Assert, ast.Raise):
            if isinstance(node, ast.Assert) and node.msg is None:
                found.append(module.at(node, "assert without a message"))
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call | ast.Name):
                name = dotted(node.exc.func) if isinstance(node.exc, ast.Call) else dotted(node.exc)
                mute = isinstance(node.exc, ast.Name) or not (node.exc.args or node.exc.keywords)
                if mute and name.endswith(("Error", "Exception")):
                    found.append(module.at(node, f"{name} without a message"))
    return found


def configs_are_frozen(house: House) -> list[str]:
    found = []
    for module in house.modules.values():
        for node in module.walk(ast.ClassDef):
            assert isinstance(node, ast.ClassDef)
            calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and dotted(d.func).endswith("dataclass")]
            flags = {k.arg for call in calls for k in call.keywords if ast.unparse(k.value) == "True"}
            if node.name.endswith("Config") and not {"frozen", "kw_only"} <= flags:
                found.append(module.at(node, f"{node.name} is not a frozen, keyword-only dataclass"))
    return found


RULES: tuple[Callable[[House], list[str]], ...] = (
    imports_run_one_way,
    kernels_need_torch_only,
    no_circles,
    sizes,
    names_are_not_module_names,
    file_names,
    each_room_has_its_test,
    each_op_has_its_page,
    nothing_at_import,
    libraries_leave_the_process_alone,
    no_broad_except,
    no_print,
    everything_public_is_documented,
    no_stubs,
    errors_speak,
    configs_are_frozen,
)
