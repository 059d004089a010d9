"""Compiles Triton kernels for sm_90 without a GPU, and prints what each needs.

    python tests/triton_compile.py [name of a file in tests/triton_cases ...]

A process of its own, without TRITON_INTERPRET: interpreted kernels cannot be compiled. Each file of triton_cases has

    MODULE    the module with the kernels
    CASES     [(kernel, types of its run-time arguments, constants, warps)], a type such as "*bf16:16" or "i32:16" with
              ":16" where the value is divisible by 16; an argument without a type or constant is None

One JSON object a line: file, kernel, types, constants, warps, registers and spilled bytes of a thread, shared bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "triton_cases"


def load_cases(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"triton_cases_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_case(kernel, types: dict[str, str], constants: dict[str, object], warps: int):  # type: ignore[no-untyped-def]
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    unknown = (types.keys() | constants.keys()) - set(names)
    assert not unknown, f"{kernel.__name__} has no {sorted(unknown)}"
    signature = {name: types[name].removesuffix(":16") if name in types else "constexpr" for name in names}
    values = {(names.index(name),): constants.get(name) for name in names if name not in types}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name].endswith(":16")}
    source = triton.compiler.ASTSource(kernel, signature, values, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def resources(compiled) -> dict[str, int]:  # type: ignore[no-untyped-def]
    """From the machine code, by the cuobjdump that comes with triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
    }


def main(names: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    for path in sorted(FOLDER.glob("*.py")):
        if names and path.stem not in names:
            continue
        cases = load_cases(path)
        kernels = importlib.import_module(cases.MODULE)
        for name, types, constants, warps in cases.CASES:
            compiled = compile_case(getattr(kernels, name), types, constants, warps)
            row = {"file": path.stem, "module": cases.MODULE, "kernel": name, "types": types, "constants": constants}
            print(json.dumps({**row, "warps": warps, **resources(compiled)}, default=str), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
