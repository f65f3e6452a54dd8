"""Stage "sweep", of the second call: `bench tune` for the three launch choices that matter.

Of a step with a language model's logits, the forward divergence moves 2 N V elements and the backward 4 N V: nothing
else is as large, and at V = 128256 in bfloat16, which nearly everyone trains in, both walk over their rows in blocks,
where block, warps and loads ahead are free. Of an encoder's step `ascend` is the kernel that every ascent step runs,
3 N D. The rest is small beside them, or follows one of the three.
"""

from __future__ import annotations

import os
import pathlib

from bench import tune
from bench.tune_targets import Target, targets

from .lines import device, dry_run, emit

CHOICES = ("divergence_backward", 128256), ("divergence_forward", 128256), ("ascend", 768)


def chosen() -> list[Target]:
    return [
        next(each for each in targets(kernel) if each.kernel == kernel and each.shape[1] == width)
        for kernel, width in CHOICES
    ]


def main() -> int:
    if dry_run():
        for target in chosen():
            emit("skipped", target.name, error="interpreted kernels have no launch choices to time")
        return 0
    path, wrong = pathlib.Path(os.environ.get("OUT") or "bench/out/gpu") / "tuned.json", 0
    for target in chosen():  # one at a time, so that each has its line before the next begins
        table = tune.sweep([target], device(), path, seconds=0.1)
        if target.name in table["failed"]:
            emit("sweep", target.name, ok=False, error=table["failed"][target.name])
            wrong += 1
        else:
            entry = table["entries"][-1]
            emit("sweep", target.name, ok=True, choice=entry["choice"], measured=entry["measured"])
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
