"""``python -m smart_fast``: which backends work here, what they run on, and what would fix those that do not.

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
from .backends import build_native, default_backend

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


def _build() -> int:
    try:
        build_native()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(_native_lines()))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m smart_fast", description="Environment report of smart-fast.")
    parser.add_argument(
        "command", nargs="?", choices=["report", "build"], default="report", help="build: compile the native backend"
    )
    if parser.parse_args([] if arguments is None else arguments).command == "build":
        return _build()
    print("\n".join([*_lines(), *_native_lines()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
