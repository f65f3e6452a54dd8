"""Builds the whole native extension, CUDA kernels included, against a CUDA build of torch, loads it and lists its
operators. Needs nvcc; no GPU.

    python tests/link_cuda.py [--csrc DIRECTORY] [--arch 9.0] [--keep DIRECTORY]

Run it with a Python whose torch is a CUDA build (``pip install torch ninja setuptools`` from the package index).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def cuda_home() -> str | None:
    """Where nvcc's toolkit lies, also when the nvcc on PATH is a script that calls another."""
    try:
        dry = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    except OSError:
        return None
    for line in dry.splitlines():
        if line.startswith("#$ _HERE_="):
            return str(Path(line.split("=", 1)[1]).parent)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csrc", type=Path, default=CSRC)
    parser.add_argument("--arch", default="9.0", help="as TORCH_CUDA_ARCH_LIST takes it")
    parser.add_argument("--keep", type=Path, help="where to build (default: a temporary directory)")
    arguments = parser.parse_args()
    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} is not a CUDA build")
    home = os.environ.setdefault("CUDA_HOME", cuda_home() or "")
    if not home:
        sys.exit("nvcc is not on PATH")
    os.environ["TORCH_CUDA_ARCH_LIST"] = arguments.arch
    os.environ.setdefault("MAX_JOBS", "2")
    from torch.utils import cpp_extension

    csrc = arguments.csrc
    sources = [*sorted(csrc.glob("*.cpp")), *sorted((csrc / "cpu").glob("*.cpp"))]
    sources += [*sorted((csrc / "cuda").glob("*.cpp")), *sorted((csrc / "cuda").glob("*.cu"))]
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        module = cpp_extension.load(
            name="smart_fast_link_check",
            sources=[str(each) for each in sources if each.is_file()],
            extra_cflags=["-O2", "-std=c++20", "-fopenmp", "-DSMART_FAST_CUDA"],
            extra_include_paths=[str(csrc)],
            build_directory=str(directory),
            with_cuda=True,
        )
        print(
            f"torch {torch.__version__}, CUDA {torch.version.cuda}, {arguments.arch}: {time.monotonic() - start:.0f} s"
        )
        print(f"{module.__file__}: {Path(module.__file__).stat().st_size / 2**20:.1f} MiB")
        for schema in torch._C._jit_get_all_schemas():
            if schema.name.startswith("smart_fast::"):
                keys = [
                    key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, key)
                ]
                print(f"{'+'.join(keys):>9}  {schema}")


if __name__ == "__main__":
    main()
