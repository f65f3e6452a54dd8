"""Run a case: check every contestant, time the right ones, keep what was measured."""

from __future__ import annotations

import gc
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Case
from .energy import Counter, joules_per_call
from .measure import (
    Samples,
    Timing,
    host_time,
    input_sets,
    interleaved_samples,
    peak_memory,
    speed_interval,
    synchronize,
)
from .peers import KEEPS_MEMORY, MODEL_ONLY, NOT_EAGER, contestants
from .task import Contestant, Finding, Task

CHECK_SEED = 1000


@dataclass
class Row:
    """One contestant in one case. Times in seconds, rates in bytes or FLOPs per second; None: not measured.

    ``speed`` is the median of the fastest right rival divided by this one's: above one is faster than every rival;
    ``speed_low`` and ``speed_high`` are its 95 % interval (`measure.speed_interval`). ``host``: until a call on a GPU
    returns. ``energy``: joules of a call.
    ``beside_model`` is the share of the time that is not the model's own passes. ``error`` is the largest deviation
    found, relative where the reference is not zero. ``bytes`` and ``flops`` are the case's floor, whatever the
    contestant moves or multiplies. ``copy_share`` and ``gemm_share`` are filled in by the report. ``note`` says what
    the contestant computes, ``checked`` what was compared, with what, and how far off it was.
    """

    case: str
    group: str
    contestant: str
    role: str
    timing: Timing | None = None
    error: float | None = None
    wrong: str | None = None
    skipped: str | None = None
    bytes: int | None = None
    bandwidth: float | None = None
    copy_share: float | None = None
    speed: float | None = None
    peak: int | None = None
    beside_model: float | None = None
    dtype: str | None = None
    flops: int | None = None
    gemm_share: float | None = None
    note: str | None = None
    speed_low: float | None = None
    speed_high: float | None = None
    checked: str | None = None
    host: float | None = None
    energy: float | None = None


def run_case(
    case: Case,
    device: torch.device,
    backends: Sequence[str],
    *,
    seconds: float,
    say: Callable[[str], None] = lambda doing: None,
    entrants: Callable[..., Iterable[Contestant]] = contestants,
    count: Counter | None = None,
) -> list[Row]:
    """All rows of ``case``, in order. ``say`` is told what is going on; ``entrants`` makes the contestants; ``count``
    counts joules, which are measured where it is given."""
    if case.needs is not None and importlib.util.find_spec(case.needs) is None:
        return [Row(case.name, case.group, "everyone", "rival", skipped=f"{case.needs} is not installed")]
    say("building")
    try:
        task = case.build(device)
        checked = task.inputs(CHECK_SEED)
    except torch.OutOfMemoryError:
        return [Row(case.name, case.group, "everyone", "rival", skipped="the inputs do not fit in the device's memory")]
    field = list(entrants(task, device, backends))
    rows = {each.name: _checked(case, task, each, checked, device, say) for each in field}
    del checked  # large cases need its memory
    runs = {each.name: each.run for each in field if each.run is not None and _right(rows[each.name])}
    samples: dict[str, Samples] = {}
    if runs:
        say("timing")
        sets = input_sets(task.inputs, device)
        samples = interleaved_samples(runs, sets, device, seconds)
        for name, run in runs.items():
            rows[name].timing = timing = samples[name].timing()
            if device.type == "cuda":
                rows[name].host = host_time(run, sets, device)
            if count is not None:
                say(f"measuring the energy of {name}")
                rows[name].energy = joules_per_call(run, sets, device, count, timing.median)
        say("measuring memory")
        for name, run in runs.items():
            if name.endswith(KEEPS_MEMORY):
                continue
            rows[name].peak = peak_memory(run, sets[0], device)
    _derive(list(rows.values()), case, samples)
    del task, field, runs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


def _checked(
    case: Case,
    task: Task,
    contestant: Contestant,
    inputs: tuple[Any, ...],
    device: torch.device,
    say: Callable[[str], None],
) -> Row:
    """The contestant's row before timing: skipped, wrong, or right with its error."""
    row = Row(
        case.name,
        case.group,
        contestant.name,
        contestant.role,
        skipped=contestant.skipped,
        dtype=str(case.dtype).removeprefix("torch."),
        note=contestant.note,
    )
    if contestant.run is None or contestant.role == "part":
        return row
    say(f"checking {contestant.name}")
    try:
        # Compiled randomness must be the eager one, or smart-pytorch's noise could not be told in advance.
        with torch._inductor.config.patch(fallback_random=case.needs_same_noise):
            if contestant.check is None:
                findings = task.check(contestant.run, inputs, contestant.backend)
            else:
                findings = contestant.check(contestant.run, inputs)
        synchronize(device)
    except Exception as error:
        row.skipped = f"failed: {plain_error(error)}"
        return row
    row.error = max(found.error for found in findings)
    row.wrong = "; ".join(_describe(found) for found in findings if found.wrong) or None
    against = "the case's float64 reference" if contestant.check is None else "what it computes, in float64"
    row.checked = f"against {against}: {'; '.join(map(_describe, findings))}"
    return row


def _describe(found: Finding) -> str:
    return f"{found.what} off by {found.error:.2g}, allowed {found.tolerance:.2g}"


def _right(row: Row) -> bool:
    return row.wrong is None and row.skipped is None


def plain_error(error: Exception) -> str:
    """Type and first line of an error, without the machine's paths."""
    first = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"(/[\w.+-]+){2,}", "(path)", f"{type(error).__name__}: {first}")[:200]


def _derive(rows: list[Row], case: Case, samples: dict[str, Samples]) -> None:
    """What follows from the times."""
    medians = {row.contestant: row.timing.median for row in rows if row.timing is not None}
    rivals = [row.contestant for row in rows if row.role == "rival" and row.timing is not None]
    model = medians.get(MODEL_ONLY)
    for row in rows:
        if row.timing is None or row.role not in ("rival", "ours"):
            continue
        if rivals:
            row.speed = min(medians[each] for each in rivals) / row.timing.median
            row.speed_low, row.speed_high = speed_interval([samples[each] for each in rivals], samples[row.contestant])
        if case.bytes is not None:
            row.bytes, row.bandwidth = case.bytes, case.bytes / row.timing.median
        row.flops = case.flops
        # The model's passes were timed eagerly: they say nothing about a compiled model's.
        if model is not None and not row.contestant.endswith(NOT_EAGER):
            row.beside_model = 1 - model / row.timing.median
