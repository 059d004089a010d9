"""The build reads pyproject.toml; the compiled parts are declared here.

nova_kernels._native is the C++ of csrc/, without torch.

    NOVA_KERNELS_NATIVE=auto    (default) compile it; where that fails, install without it: the plain Python
                                implementations run, and `python -m nova_kernels.doctor` says so
    NOVA_KERNELS_NATIVE=0 | 1   leave it out | fail where it cannot be compiled
"""

import hashlib
import os
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

sources, headers = ["csrc/bindings.cpp", *sorted(glob("csrc/packing/*.cpp"))], sorted(glob("csrc/packing/*.h"))
source = hashlib.sha256(b"".join(Path(path).read_bytes() for path in [*sources, *headers])).hexdigest()
native = Pybind11Extension(
    "nova_kernels._native",
    sources,
    depends=headers,
    include_dirs=["csrc"],
    define_macros=[("NOVA_SOURCE", f'"{source}"')],
    extra_compile_args=["-O3"],
    cxx_std=17,
)


class BuildNative(build_ext):
    """Leaves no older extension behind where a new one could not be built."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except BaseException:
            for built in Path("nova_kernels").glob("_native*.so"):
                built.unlink()
            raise


wanted = os.environ.get("NOVA_KERNELS_NATIVE") or "auto"
if wanted not in ("auto", "0", "1"):
    raise SystemExit(f"setup.py: NOVA_KERNELS_NATIVE must be auto, 0 or 1, got {wanted!r}")
native.optional = wanted == "auto"
setup(ext_modules=[] if wanted == "0" else [native], cmdclass={"build_ext": BuildNative})
