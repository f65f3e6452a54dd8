"""Stage "bert": a training step of BERT-base with SMART, in the bench's own case (training.py), checked and timed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench import cases, models, peers
from bench.run import run_case
from bench.task import Contestant, Task

from .lines import device, dry_run, emit, not_sound
from .shapes import shapes

SECONDS = 4.0


def main() -> int:
    layers, width, batch, tokens = shapes().bert
    where = "cpu" if dry_run() else "cuda"
    case = cases.training("bert-base classifier", (batch, tokens), where, functools.partial(models.bert, layers, width))
    backends = []
    for backend in ("triton", "native"):
        reason = not_sound(backend)
        if dry_run() and backend == "triton":
            reason = "interpreted, a step takes seconds"
        if reason is None and backend == "native":
            from smart_fast.backends import build_native

            build_native()
        if reason is None:
            backends.append(backend)
        else:
            emit("skipped", case.name, backend=backend, error=reason)
    seconds = 0.05 if dry_run() else SECONDS
    wrong = 0
    for row in run_case(case, device(), backends, seconds=seconds, entrants=_entrants):
        ok = row.wrong is None and (row.timing is not None or not (row.skipped or "").startswith("failed"))
        fields: dict[str, Any] = {"contestant": row.contestant, "ok": ok, "errors": row.checked, "speed": row.speed}
        if row.timing is not None:
            fields |= {"seconds": row.timing.median, "beside_model": row.beside_model, "peak": row.peak}
        emit("step" if row.skipped is None else "skipped", case.name, error=row.wrong or row.skipped, **fields)
        wrong += not ok
    return 1 if wrong else 0


def _entrants(task: Task, where: torch.device, backends: Sequence[str]) -> Iterator[Contestant]:
    """Those that need no minutes of compiling: the time is for the step."""
    if importlib.util.find_spec("smart_pytorch"):
        yield Contestant(peers.EAGER, "rival", task.call(task.smart_pytorch()))
    else:
        yield Contestant(peers.EAGER, "rival", None, skipped="smart-pytorch is not installed: carry .gpu_deps")
    for backend in ("torch", *backends):
        yield Contestant(peers.OURS + backend, "ours", task.call(task.ours(backend)), backend)
    variants: Any = getattr(task, "variants", None)
    if variants is not None and where.type == "cuda":
        for backend in backends:
            graph = task.call(variants(backend)["CUDA graph"])
            yield Contestant(f"{peers.OURS}{backend}, CUDA graph", "ours", graph, backend)
    passes: Any = getattr(task, "model_only", None)
    yield Contestant(peers.MODEL_ONLY, "part", passes())


if __name__ == "__main__":
    raise SystemExit(main())
