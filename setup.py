"""What pyproject.toml cannot say: the C++ sources install as smart_fast.csrc where there are any, and
SMART_FAST_BUILD_EXT=1 compiles them at installation instead of on first use (pip install --no-build-isolation)."""

import importlib.util
import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

packages = [
    "smart_fast",
    *sorted(f"smart_fast.{each.parent.name}" for each in (ROOT / "smart_fast").glob("*/__init__.py")),
    "smart_fast.kernels",
]
if CSRC.is_dir():
    packages += [
        "smart_fast.csrc",
        *(f"smart_fast.csrc.{each.name}" for each in sorted(CSRC.iterdir()) if each.is_dir()),
    ]


def extension():
    """smart_fast._native, as build.py builds it; that file is read without importing the package."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    spec = importlib.util.spec_from_file_location("build", ROOT / "smart_fast" / "build.py")
    native_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native_build)
    cuda = [f"csrc/{path.relative_to(CSRC)}" for path in native_build.cuda_sources(CSRC)]
    kind = CUDAExtension if cuda else CppExtension
    flags = native_build.FLAGS + (["-DSMART_FAST_CUDA"] if cuda else [])
    return {
        "ext_modules": [
            kind(
                "smart_fast._native",
                [f"csrc/{each}" for each in native_build.CPU_SOURCES] + cuda,
                include_dirs=[str(CSRC)],
                extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20"]} if cuda else flags,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
    }


setup(packages=packages, **(extension() if os.environ.get("SMART_FAST_BUILD_EXT") == "1" else {}))
