"""What is made on the working machine and carried to the one with the GPU, which can fetch nothing.

Objects of csrc/cuda, compiled by the nvcc of the other machine's version for its GPU: they take minutes on two cores,
and none of them needs torch. And smart-pytorch, if it is not there.
"""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from .stages import DEPS, ROOT

FOLDER = ROOT / "bench" / "out" / "carry"
CUDA = ROOT / "csrc" / "cuda"
DIGEST = "sources.sha256"
PACKAGES = ("smart-pytorch==0.0.4",)
NVCC = (
    "nvcc", "-std=c++20", "-O3", "-gencode=arch=compute_90,code=sm_90", "-Xcompiler", "-fPIC", "-c",
)  # fmt: skip


def digest() -> str:
    """Of all that the objects are made of: the sources and headers of csrc, and the command."""
    found = hashlib.sha256(" ".join(NVCC).encode())
    for path in sorted(each for each in (ROOT / "csrc").rglob("*") if each.suffix in (".cu", ".h")):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def carried_objects() -> list[str]:
    """An object for every source of csrc/cuda, if they were made of these very sources; else none."""
    mark = FOLDER / DIGEST
    objects = [FOLDER / f"{each.stem}.o" for each in sorted(CUDA.glob("*.cu"))]
    if not mark.is_file() or mark.read_text() != digest() or not all(each.is_file() for each in objects):
        return []
    return [str(each) for each in objects]


def prepare() -> list[str]:
    """Make what is carried; what was done, for people."""
    return [_objects(), *map(_package, PACKAGES)]


def _objects() -> str:
    if carried_objects():
        return "CUDA objects: up to date"
    if shutil.which("nvcc") is None:
        return "CUDA objects: there is no nvcc here, they are compiled on the other machine"
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    sources = sorted(CUDA.glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_compile, sources))
    (FOLDER / DIGEST).write_text(digest())
    return f"CUDA objects: {len(sources)} compiled for sm_90"


def _compile(source: pathlib.Path) -> None:
    command = [*NVCC, str(source), "-o", str(FOLDER / f"{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stderr[-2000:]}")


def _package(requirement: str) -> str:
    name, _, version = requirement.partition("==")
    if any(DEPS.glob(f"{name.replace('-', '_')}-{version}.dist-info")):
        return f"{requirement}: up to date"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(DEPS)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    return f"{requirement}: {'in ' + DEPS.name if done.returncode == 0 else 'not to be had, its lines will say so'}"


def carried() -> list[str]:
    """The ignored paths that there are to carry, relative to the repository."""
    return [str(each.relative_to(ROOT)) for each in (FOLDER, DEPS) if each.is_dir()]
