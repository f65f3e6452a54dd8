"""Stages "smoke-triton" and "smoke-native": does each operator compute what float64 says? One backend a process.

    python -m bench.gpu.smoke native

The checks are the bench's own (operations.py, divergences.py); a case that raises is a line too, and the next is tried.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from bench import cases
from bench.measure import synchronize

from .lines import device, dry_run, emit, why
from .shapes import BF16, FP32


def smoke_cases() -> Iterator[cases.Case]:
    """Few, since Triton compiles each when it meets it, before anything is compiled ahead. The shape that asks for
    the most shared memory of a block comes last: what it may break has been tried by then."""
    if dry_run():
        yield cases.perturb((64, 128), FP32, "cuda")
        yield cases.ascend((4, 32), FP32, "cuda")
        yield cases.divergence("sym_kl", (4, 33), FP32, "cuda")
        yield cases.divergence("sym_kl", (4, 33), FP32, "cuda", "near")
        yield cases.direction((4, 33), FP32, "cuda")
        return
    yield cases.perturb((4096, 768), FP32, "cuda")
    yield cases.perturb((4096, 768), BF16, "cuda", variant="masked")
    yield cases.ascend((4096, 768), FP32, "cuda")
    yield cases.ascend((4096, 768), BF16, "cuda", update="paper")
    for kind in ("kl", "sym_kl", "js"):
        yield cases.divergence(kind, (512, 1001), FP32, "cuda")
    yield cases.divergence("sym_kl", (512, 1001), FP32, "cuda", "near")
    yield cases.direction((4096, 1001), FP32, "cuda")
    yield cases.divergence("sym_kl", (4096, 2), FP32, "cuda")
    for regime in ("far", "near"):
        yield cases.divergence("sym_kl", (8192, 10000), BF16, "cuda", regime)


def main(backend: str) -> int:
    where, wrong = device(), 0
    for case in smoke_cases():
        try:
            if backend == "native":
                from smart_fast.backends import build_native

                build_native()
            task = case.build(where)
            found = task.check(task.call(task.ours(backend)), task.inputs(0), backend)
            synchronize(where)
        except Exception as error:
            emit("check", case.name, backend=backend, ok=False, error=why(error))
            wrong += 1
            continue
        for each in found:
            what = f"{case.name}: {each.what}"
            emit("check", what, backend=backend, ok=not each.wrong, error=each.error, tolerance=each.tolerance)
            wrong += each.wrong
        if where.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
