"""Compiles csrc/cuda for GPUs that need not be present.

    python tests/compile_cuda.py sm_90            one JSON line per kernel: registers, bytes of stack

Bytes of stack are what the assembler itself reports: none means that nothing was spilled.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")


def compile_source(source: Path, target: str) -> Iterator[dict[str, Any]]:
    """Compile one file; what the assembler says of each of its kernels. Warnings are errors."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["nvcc", "-std=c++17", f"-arch={target}", "-Werror", "all-warnings", "-Xptxas", "-v", "-c"]
        command += [str(source), "-o", f"{directory}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for {target}:\n{done.stderr}{done.stdout}")
    report = done.stderr + done.stdout
    found = re.findall(
        r"Compiling entry function '(\S+)' for .*?(\d+) bytes stack frame.*?Used (\d+) registers", report, re.DOTALL
    )
    for name, stack, registers in found:
        yield {"kernel": _readable(name), "target": target, "registers": int(registers), "stack": int(stack)}


def _readable(mangled: str) -> str:
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|smart_fast::(cuda::)?|^void ", "", name)
    return re.sub(r"\((?!Kind|Norm).*$", "", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    for source in SOURCES:
        for kernel in compile_source(source, parser.parse_args().target):
            print(json.dumps(kernel), flush=True)


if __name__ == "__main__":
    main()
