"""Stage "host": what a call of SMARTLoss (K = 1) costs beside its kernels: host time until it returns, its time in all
and replayed as a CUDA graph; that replays draw fresh noise; that nothing waits for the device.

The step is a user's: ``(0.3 * regularizer(embed, state)).backward()``, of a head on pooled features.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from bench.captured import Captured
from bench.host import REFERENCE, step
from bench.measure import host_time, interleaved
from bench.models import pooled_head

from .lines import device, dry_run, emit, not_sound, why
from .shapes import shapes

SECONDS = 0.5  # for each way of a head
SETS = 16


def main() -> int:
    wrong = 0
    for batch, width, classes in shapes().heads:
        torch.manual_seed(0)
        model = pooled_head(width, classes).to(device())
        embeds = [torch.randn(batch, width, device=device()).requires_grad_() for _ in range(SETS)]
        sets = [(embed, model(embed).detach()) for embed in embeds]
        for backend in (REFERENCE, "torch", "triton", "native"):
            what = f"SMARTLoss K=1, head {width} to {classes}, [{batch}, {width}]"
            reason = _missing(backend)
            if reason is not None:
                emit("skipped", what, backend=backend, error=reason)
                continue
            try:
                _measure(what, backend, step(model, backend), sets)
            except Exception as error:
                emit("host", what, backend=backend, ok=False, error=why(error))
                wrong += 1
    return 1 if wrong else 0


def _missing(backend: str) -> str | None:
    if backend == REFERENCE:
        return None if importlib.util.find_spec("smart_pytorch") else "smart-pytorch is not installed: carry .gpu_deps"
    if backend == "native":
        from smart_fast.backends import build_native

        build_native()
    return None if backend == "torch" else not_sound(backend)


def _measure(what: str, backend: str, step: Callable[..., Tensor], sets: list[tuple[Tensor, Tensor]]) -> None:
    where, about = device(), {"backend": backend, "dtype": "float32"}
    timing = interleaved({what: step}, sets, where, 0.05 if dry_run() else SECONDS)[what]
    finite = all(each.isfinite().all() for each in (step(*sets[0]), sets[0][0].grad) if each is not None)
    host = host_time(step, sets, where, *([2] if dry_run() else []))
    emit("host", what, ok=finite, seconds=timing.median, host_seconds=host, **about)
    if where.type != "cuda":
        emit("skipped", f"{what}, CUDA graph and synchronization", error="a CPU has neither", **about)
        return
    if backend != REFERENCE:  # which tests its gradients on the host
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*sets[0])
        except RuntimeError as error:
            emit("host", f"{what}, no synchronization", ok=False, error=why(error), **about)
        else:
            emit("host", f"{what}, no synchronization", ok=True, **about)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    _replay(what, about, step, sets)


def _replay(what: str, about: dict[str, str], step: Callable[..., Tensor], sets: list[tuple[Tensor, Tensor]]) -> None:
    where, name = device(), f"{what}, CUDA graph"
    try:
        graph = Captured(step)
        losses = [float(graph(*sets[0])) for _ in range(3)]
    except Exception as error:
        emit("host", name, ok=False, error=why(error), **about)
        return
    fresh = len(set(losses)) == len(losses)
    timing = interleaved({what: graph}, sets, where, SECONDS)[what]
    host = host_time(functools.partial(graph), sets, where)
    emit("host", name, ok=fresh, seconds=timing.median, host_seconds=host, fresh_noise=fresh, **about)


if __name__ == "__main__":
    raise SystemExit(main())
