"""``python -m smart_fast``: which backends work here, what they run on, and what would fix those that do not."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys

import torch

from . import __version__, available_backends
from .backends import default_backend

_FIXES = {
    "is not installed": "pip install triton (Linux; the CUDA build of torch brings its own)",
    "no GPU is visible": "install a CUDA build of torch and check that nvidia-smi lists a device",
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


def main() -> int:
    print("\n".join(_lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
