"""Stages "kernels-triton" and "kernels-native": bytes over time of each kernel, and that as a share of a copy's.

python -m bench.gpu.kernels triton
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from bench import kernels
from bench.measure import copy_bandwidth

from .lines import device, dry_run, emit, not_sound, why
from .shapes import shapes

DRY = ("perturb", "ascend inf", "sym_kl forward", "sym_kl backward", kernels.ALONE)  # the interpreter is slow
SECONDS = 0.1  # for each kernel and regime; at about a millisecond a call that is a hundred calls


def main(backend: str) -> int:
    if (reason := not_sound(backend)) is not None:
        emit("skipped", f"kernels of {backend}", backend=backend, ok=False, error=reason)
        return 1
    where, chosen, wrong, lines = device(), shapes(), 0, 0
    time: dict[str, Any] = {"seconds": 0.001, "only": DRY} if dry_run() else {"seconds": SECONDS}
    if backend == "native":
        from smart_fast.backends import build_native

        build_native()
    copy = copy_bandwidth(where, 1 << (22 if dry_run() else 32))
    emit("machine", "copy", ok=True, backend=backend, bytes_per_second=copy)
    for dtype in chosen.dtypes:
        # Wide rows first: what a cut leaves out is the smaller part of a step.
        for embeds, logits in [((), [each]) for each in chosen.logits] + [([each], ()) for each in chosen.embeds]:
            for each in kernels.measure_shapes(where, backend, dtype, embeds, logits, **time):
                lines += 1
                if isinstance(each, kernels.Failed):
                    wrong += 1
                    fields = each._asdict() | {"error": why(each.error)}
                    emit("kernel", each.kernel, ok=False, **fields)
                    continue
                fields = dataclasses.asdict(each) | {"copy_share": each.rate / copy, "copy_rate": copy}
                emit("kernel", each.kernel, ok=True, seconds=each.timing.median, **fields)
    if not lines:
        emit("skipped", f"kernels of {backend}", backend=backend, ok=False, error=f"it does not serve {where}")
    return 1 if wrong or not lines else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
