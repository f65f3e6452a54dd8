"""Who runs a case: smart-pytorch eagerly and under torch.compile, mt-dnn's formulas, Liger-Kernel, torch's own chunked
loss, each of our backends.

Adding a peer is a function that yields its `Contestant` here, and its line in `roster`. A contestant that cannot run
says why; none disappears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

import smart_fast

from . import chunked, liger, mtdnn
from .task import Contestant, Task

EAGER = "smart-pytorch eager"
COMPILED = "smart-pytorch torch.compile"
MODEL_ONLY = "model passes only"
OURS = "smart-fast "
MODES = ("max-autotune-no-cudagraphs", "reduce-overhead")  # of torch.compile, on a GPU besides the default
NOT_EAGER = ("torch.compile", "compiled", "CUDA graph", *MODES)  # how contestants end that run no model eagerly
KEEPS_MEMORY = ("CUDA graph", "reduce-overhead")  # how those end whose memory is not allocated by the call
MODE_SECONDS, TUNING_SECONDS = 30.0, 180.0  # time left without which no further mode is compiled; a whole model tuned
NO_TIME = "no time was left to compile it"
NOTES = {
    EAGER: "smart-pytorch's own functions as they are: the work of the case; what it lacks (masks, units, the paper's "
    "projection, the Fisher direction) as it would be written in PyTorch",
    COMPILED: "the same functions under torch.compile, static shapes, its default mode; graph breaks are allowed",
    f"{COMPILED} {MODES[0]}": "the same, every kernel and GEMM tuned",
    f"{COMPILED} {MODES[1]}": "the same as CUDA graphs, which hold their memory between calls: it is not measured",
    MODEL_ONLY: "the model's own passes of such a call and nothing beside them: not checked",
}


class Peer(NamedTuple):
    """A line of `roster`: what a contestant computes, and why it is not timed (None where it is)."""

    name: str
    note: str
    reason: str | None


def roster(device: torch.device, backends: Sequence[str]) -> list[Peer]:
    """Everyone who may run some case on ``device``."""
    theirs = [Peer(name, NOTES[name], None) for name in (EAGER, COMPILED)]
    theirs += [Peer(f"{COMPILED} {mode}", NOTES[f"{COMPILED} {mode}"], _no_modes(device)) for mode in MODES]
    theirs += [Peer(mtdnn.MTDNN + name, note, None) for name, note in mtdnn.NOTES.items()]
    theirs += [Peer(liger.LIGER + name, note, liger.why_not(device)) for name, note in liger.NOTES.items()]
    theirs.append(Peer(chunked.CHUNKED, chunked.NOTE, chunked.why_not()))
    return theirs + [Peer(OURS + name, _note(name), why_not(name, device)) for name in backends]


def contestants(
    task: Task,
    device: torch.device,
    backends: Sequence[str],
    *,
    compiling: bool = True,
    time_left: float = float("inf"),
) -> Iterator[Contestant]:
    """Everyone who could run ``task`` on ``device``, in the order of the report; ``time_left`` in seconds."""
    yield Contestant(EAGER, "rival", task.call(task.smart_pytorch()), note=NOTES[EAGER])
    if compiling:
        yield Contestant(COMPILED, "rival", compiled(task), note=NOTES[COMPILED])
    else:
        yield Contestant(COMPILED, "rival", None, skipped=NO_TIME, note=NOTES[COMPILED])
    for mode in MODES:
        yield _in_mode(mode, task, device, time_left if compiling else 0.0)
    yield from mtdnn.contestants(task)
    yield from liger.contestants(task, device)
    yield from chunked.contestants(task)
    for name in backends:
        yield from _ours(task, device, name)
    if hasattr(task, "model_only"):
        yield Contestant(MODEL_ONLY, "part", task.model_only(), note=NOTES[MODEL_ONLY])


def _in_mode(mode: str, task: Task, device: torch.device, time_left: float) -> Contestant:
    tuning = mode.startswith("max-autotune") and hasattr(task, "model_only")  # every GEMM of the model is tuned
    reason = _no_modes(device)
    if reason is None and time_left < (TUNING_SECONDS if tuning else MODE_SECONDS):
        reason = NO_TIME
    name = f"{COMPILED} {mode}"
    return Contestant(name, "rival", None if reason else compiled(task, mode), skipped=reason, note=NOTES[name])


def _no_modes(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "a mode for GPUs"


def _ours(task: Task, device: torch.device, backend: str) -> Iterator[Contestant]:
    reason, note = why_not(backend, device), _note(backend)
    run = None if reason else task.call(task.ours(backend))
    yield Contestant(OURS + backend, "ours", run, backend, reason, note=note)
    if hasattr(task, "variants") and not reason:
        for way, function in task.variants(backend).items():
            yield Contestant(f"{OURS}{backend}, {way}", "ours", task.call(function), backend, note=f"{note}, {way}")


def _note(backend: str) -> str:
    return f"the same work by smart-fast's backend {backend!r}"


def compiled(task: Task, mode: str | None = None) -> Callable[..., Any]:
    """The timed call with smart-pytorch's part under torch.compile, static shapes; graph breaks are allowed.

    Results in the mode "reduce-overhead" live in the memory of CUDA graphs, until the next call.
    """
    torch.compiler.reset()  # the cases share code objects, and each deserves a fresh cache
    call = task.call(torch.compile(task.smart_pytorch(), dynamic=False, mode=mode))
    if mode != "reduce-overhead":
        return call

    def fresh(*inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # nobody reads the results of the call before
        return call(*inputs)

    return fresh


def why_not(backend: str, device: torch.device) -> str | None:
    """Why one of our backends is not timed on ``device``, or None."""
    reason = smart_fast.available_backends()[backend]
    if reason is None and backend == "triton" and device.type == "cpu":
        return "interpreted (TRITON_INTERPRET=1): that shows correctness, its time means nothing"
    return reason


def default_backends() -> list[str]:
    """All of our backends, unavailable ones included: the report says why they are missing."""
    return list(smart_fast.available_backends())
