"""Joules of a call, where the device counts them: NVML on NVIDIA GPUs, RAPL on CPUs.

Both count the whole device: what it draws when idle, and other programs' work, are in the figure.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .measure import synchronize

MIN_SECONDS = 0.3  # counters are refreshed every few dozen milliseconds
POWERCAP = pathlib.Path("/sys/class/powercap")

Counter = Callable[[], float]  # joules since some moment


def counter(device: torch.device) -> Counter | None:
    """The energy counter of ``device``, or None where there is none that can be read."""
    return _nvml(device) if device.type == "cuda" else _rapl(POWERCAP)


def joules_per_call(
    run: Callable[..., Any], sets: Sequence[tuple[Any, ...]], device: torch.device, count: Counter, seconds: float
) -> float:
    """Joules of one call of ``seconds``, the mean over a loop of at least `MIN_SECONDS`."""
    calls = max(1, math.ceil(MIN_SECONDS / seconds))
    turn = itertools.islice(itertools.cycle(sets), calls)
    synchronize(device)
    before = count()
    for arguments in turn:
        run(*arguments)
    synchronize(device)
    return (count() - before) / calls


def _nvml(device: torch.device) -> Counter | None:
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]

        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers devices for torch, not for NVML: the UUID is the same for both.
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, a device that does not count: no energy, whatever the reason
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _rapl(folder: pathlib.Path) -> Counter | None:
    """The sum over the packages below ``folder``; counters start over at their maximum."""
    packages: list[tuple[pathlib.Path, int]] = []
    try:
        for each in sorted(folder.glob("intel-rapl:*")):
            if each.name.count(":") == 1:  # the others are parts of a package
                packages.append((each / "energy_uj", int((each / "max_energy_range_uj").read_text()) + 1))
        last = [int(path.read_text()) for path, _ in packages]
    except (OSError, ValueError):  # often only root may read them
        return None

    total = 0

    def joules() -> float:
        nonlocal last, total
        now = [int(path.read_text()) for path, _ in packages]
        total += sum((n - before) % size for n, before, (_, size) in zip(now, last, packages, strict=True))
        last = now
        return total / 1e6

    return joules if packages else None
