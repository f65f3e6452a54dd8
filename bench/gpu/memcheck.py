"""Stage "sanitize": `bench.sanitize`'s small, odd native cases, watched by compute-sanitizer.

Started by hand with ``--watched`` it runs the cases without the tool.
"""

from __future__ import annotations

import os
import shutil
import sys

import torch

from .lines import device, dry_run, emit, not_sound, why

BACKEND = "native"
ERROR = 9  # the tool's exit status where it has seen a bad access


def main(arguments: list[str]) -> int:
    if arguments != ["--watched"] and not dry_run():
        if (reason := not_sound(BACKEND)) is not None:
            emit("skipped", "compute-sanitizer", backend=BACKEND, error=reason)
            return 1
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            emit("skipped", "compute-sanitizer", backend=BACKEND, error="it is not on PATH")
            return 1
        # An allocation for every tensor: the tool then knows where it ends.
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        command = [tool, "--tool", "memcheck", "--error-exitcode", str(ERROR), sys.executable]
        os.execv(tool, [*command, "-m", "bench.gpu.memcheck", "--watched"])
    return watched()


def watched() -> int:
    from bench import sanitize
    from smart_fast.backends import build_native

    build_native()
    torch.manual_seed(0)
    passed = ""
    try:
        for passed in sanitize.checks(BACKEND, device()):
            emit("check", passed, backend=BACKEND, ok=True)
    except Exception as error:
        emit("check", f"what follows {passed!r}", backend=BACKEND, ok=False, error=why(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
