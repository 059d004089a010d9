"""The build reads pyproject.toml; the compiled parts are declared here.

nova_kernels._native is the C++ of csrc/, nova_kernels._cuda the CUDA kernels of csrc/cuda/; both without torch.

    NOVA_KERNELS_NATIVE=auto    (default) compile it; where that fails, install without it: the plain Python
                                implementations run, and `python -m nova_kernels.doctor` says so
    NOVA_KERNELS_NATIVE=0 | 1   leave it out | fail where it cannot be compiled
    NOVA_KERNELS_CUDA=auto      (default) compile it where nvcc is found; where that fails, install without it
    NOVA_KERNELS_CUDA=0 | 1     leave it out | fail where it cannot be compiled
    NOVA_KERNELS_CUDA_ARCHS     compute capabilities it is compiled for, "90" by default, "80;90;100" for several; newer
                                GPUs run the last one's PTX
"""

import hashlib
import os
import shutil
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup


def choice(variable):
    wanted = os.environ.get(variable) or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: {variable} must be auto, 0 or 1, got {wanted!r}")
    return wanted


def digest(paths):
    """Of what a library is built from; it carries this, so that an older one is noticed."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


def native_extension():
    sources, headers = ["csrc/bindings.cpp", *sorted(glob("csrc/packing/*.cpp"))], sorted(glob("csrc/packing/*.h"))
    return Pybind11Extension(
        "nova_kernels._native",
        sources,
        depends=headers,
        include_dirs=["csrc"],
        define_macros=[("NOVA_SOURCE", f'"{digest([*sources, *headers])}"')],
        extra_compile_args=["-O3"],
        cxx_std=17,
        optional=NATIVE == "auto",
    )


def cuda_library():
    return Extension(
        "nova_kernels._cuda",
        sorted(glob("csrc/cuda/*.cu")),
        depends=sorted(glob("csrc/cuda/*.*h")),
        optional=CUDA == "auto",
    )


def find_nvcc():
    """The one on the PATH, or else that of CUDA_HOME."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))


def nvcc_command(ext, library):
    archs = [arch.strip() for arch in (os.environ.get("NOVA_KERNELS_CUDA_ARCHS") or "90").split(";")]
    if not all(arch.removesuffix("a").isdigit() for arch in archs):
        raise SystemExit(f'NOVA_KERNELS_CUDA_ARCHS must be like "90" or "80;90", got {";".join(archs)!r}')
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    source = digest(sorted([*ext.sources, *ext.depends]))
    flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-Icsrc", f'-DNOVA_SOURCE="{source}"']
    return [find_nvcc() or "nvcc", *flags, *code, *ext.sources, "-o", library]


class BuildNative(build_ext):
    """Leaves no older library behind where a new one could not be built."""

    def build_extension(self, ext):
        try:
            if ext.name == "nova_kernels._cuda":
                library = self.get_ext_fullpath(ext.name)
                self.mkpath(os.path.dirname(library))
                self.spawn(nvcc_command(ext, library))
            else:
                super().build_extension(ext)
        except BaseException:
            for built in Path("nova_kernels").glob(f"{ext.name.rpartition('.')[2]}*.so"):
                built.unlink()
            raise


NATIVE, CUDA = choice("NOVA_KERNELS_NATIVE"), choice("NOVA_KERNELS_CUDA")
extensions = [] if NATIVE == "0" else [native_extension()]
if CUDA == "1" or (CUDA == "auto" and find_nvcc()):
    extensions.append(cuda_library())
setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative})
