"""``python -m smart_fast``: which backends work here, what they run on, what would fix those that do not, and advice:
which backend tensors get here, and the command that would make them faster.

``python -m smart_fast build`` compiles the native backend, once for this version of smart-fast and torch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import sys

import torch

from . import __version__, available_backends, build
from .backends import build_native, default_backend, select

_FIXES = {
    "is not installed": "pip install triton (Linux; the CUDA build of torch brings its own)",
    "no GPU is visible": "install a CUDA build of torch and check that nvidia-smi lists a device",
    "not built yet": "python -m smart_fast build",
}


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # with the build, which the metadata leaves out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    found = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        capability = "{}.{}".format(*torch.cuda.get_device_capability(index))
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, {capability}, {memory:.0f} GiB")
    return found


def _auto() -> str:
    try:
        return f"auto means {default_backend()}"
    except ValueError as error:
        return str(error)


def _lines() -> list[str]:
    lines = [f"smart-fast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    lines += [f"  {package:<14} {_version(package)}" for package in ("torch", "triton", "transformers", "ninja")]
    lines += [f"  {'nvcc':<14} {shutil.which('nvcc') or 'not found'}", "devices"]
    lines += [f"  {device}" for device in _devices()]
    lines += [f"backends ({_auto()})"]
    for name, reason in available_backends().items():
        lines.append(f"  {name:<8} {'available' if reason is None else 'unavailable: ' + reason}")
        lines += [f"  {'':<8} fix: {fix}" for symptom, fix in _FIXES.items() if reason and symptom in reason]
    return lines


def _native_lines() -> list[str]:
    if available_backends()["native"] is not None:
        return []
    about = build.report(build_native().extension)
    sets = ", ".join(about["instruction_sets"])
    return [
        f"native   {about['compiler']}, torch {about['torch']}, cuda: {'yes' if about['cuda'] else 'no'}",
        f"  {'':<8} instruction sets here: {sets} (in use: {about['instruction_set']}); flags: {about['flags']}",
        f"  {'':<8} {about['file']}",
    ]


def _advice() -> list[str]:
    """For each type of device the backend that tensors get, then the one command that would make them faster."""
    try:
        devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
        got = {device: [select("auto", torch.empty(size, device=device)).name for size in _SIZES] for device in devices}
    except ValueError as error:  # a name that does not exist in SMART_FAST_BACKEND
        return ["advice", f"  unset SMART_FAST_BACKEND  ({error})"]
    lines = ["advice"]
    for device, (small, large) in got.items():
        names = large if small == large else f"{large} (small ones: {small})"
        lines.append(f"  float32, bfloat16 and float16 tensors on the {_CALLED[device]} get backend {names}")
    return [*lines, "  to make them faster: " + _faster(devices[0], got[devices[0]][1])]


#: One small tensor and one that is large to `smart_fast.backends.auto`.
_SIZES = (64,), (1 << 20,)
_CALLED = {"cuda": "GPU", "cpu": "CPU"}


def _faster(device: str, backend: str) -> str:
    """The command for tensors on ``device``, the fastest that there is, which get ``backend``."""
    reasons = available_backends()
    chosen = default_backend()
    if device == "cpu" and shutil.which("nvidia-smi") and torch.version.cuda is None and torch.version.hip is None:
        return "pip install --force-reinstall torch  (a build for your GPU; see https://pytorch.org/get-started)"
    if chosen != "auto" and backend == "torch":
        return f"unset SMART_FAST_BACKEND  (it is {chosen!r}; unset, the fastest backend is chosen)"
    if backend == "triton" and reasons["native"] is not None and build.missing() is None:
        return "python -m smart_fast build  (launches the Triton kernels from C++, once it is compiled)"
    if backend != "torch":
        return "nothing to do, this is the fastest backend here"
    if device == "cuda":
        return "pip install triton" if reasons["triton"] else "nothing to do here"
    if reasons["native"] is None:
        return "nothing to do here"
    lacking = build.missing()
    if lacking is None:
        return "python -m smart_fast build  (compiles the CPU kernels, once)"
    if "fix: pip install" in lacking:
        return "pip install ninja setuptools && python -m smart_fast build"
    return f"python -m smart_fast build, but first: {lacking}"


def _build() -> int:
    try:
        build_native()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(_native_lines()))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m smart_fast", description="What smart-fast runs on here, and advice."
    )
    parser.add_argument(
        "command", nargs="?", choices=["report", "build"], default="report", help="build: compile the native backend"
    )
    if parser.parse_args([] if arguments is None else arguments).command == "build":
        return _build()
    print("\n".join([*_lines(), *_native_lines(), *_advice()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
