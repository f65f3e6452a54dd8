"""Who runs a case: smart-pytorch eagerly, smart-pytorch under torch.compile, each of our backends, Liger-Kernel.

Adding a peer is a function that yields its `Contestant` here. A contestant that cannot run says why; none disappears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import smart_fast

from . import liger
from .task import Contestant, Task

EAGER = "smart-pytorch eager"
COMPILED = "smart-pytorch torch.compile"
MODEL_ONLY = "model passes only"
OURS = "smart-fast "
NOT_EAGER = ("torch.compile", "compiled", "CUDA graph")  # how contestants end that run no model eagerly


def contestants(
    task: Task, device: torch.device, backends: Sequence[str], *, compiling: bool = True
) -> Iterator[Contestant]:
    """Everyone who could run ``task`` on ``device``, in the order of the report."""
    yield Contestant(EAGER, "rival", task.call(task.smart_pytorch()))
    if compiling:
        yield Contestant(COMPILED, "rival", compiled(task))
    else:
        yield Contestant(COMPILED, "rival", None, skipped="no time was left to compile it")
    yield from liger.contestants(task, device)
    for name in backends:
        yield from _ours(task, device, name)
    if hasattr(task, "model_only"):
        yield Contestant(MODEL_ONLY, "part", task.model_only())


def _ours(task: Task, device: torch.device, backend: str) -> Iterator[Contestant]:
    reason = why_not(backend, device)
    yield Contestant(OURS + backend, "ours", None if reason else task.call(task.ours(backend)), backend, reason)
    if hasattr(task, "variants") and not reason:
        for way, function in task.variants(backend).items():
            yield Contestant(f"{OURS}{backend}, {way}", "ours", task.call(function), backend)


def compiled(task: Task) -> Callable[..., Any]:
    """The timed call with smart-pytorch's part under torch.compile, static shapes; graph breaks are allowed."""
    torch.compiler.reset()  # the cases share code objects, and each deserves a fresh cache
    return task.call(torch.compile(task.smart_pytorch(), dynamic=False))


def why_not(backend: str, device: torch.device) -> str | None:
    """Why one of our backends is not timed on ``device``, or None."""
    reason = smart_fast.available_backends()[backend]
    if reason is None and backend == "triton" and device.type == "cpu":
        return "interpreted (TRITON_INTERPRET=1): that shows correctness, its time means nothing"
    return reason


def default_backends() -> list[str]:
    """All of our backends, unavailable ones included: the report says why they are missing."""
    return list(smart_fast.available_backends())
