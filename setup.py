"""The build reads pyproject.toml; the compiled parts are declared here.

nova_kernels._native is the C++ of csrc/, without torch. Where no compiler works, the package installs without it and
the plain Python implementations run; `python -m nova_kernels.doctor` says so.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

native = Pybind11Extension(
    "nova_kernels._native",
    ["csrc/bindings.cpp", *sorted(glob("csrc/packing/*.cpp"))],
    depends=sorted(glob("csrc/packing/*.h")),
    include_dirs=["csrc"],
    extra_compile_args=["-O3"],
    cxx_std=17,
)
native.optional = True
setup(ext_modules=[native])
