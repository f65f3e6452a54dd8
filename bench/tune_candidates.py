"""Other launch choices than the default, and whether they give its results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from smart_fast.kernels import launch, tuning
from smart_fast.kernels.launch import Choice
from torch import Tensor

from .tune_targets import Call

FLAT = ("perturb", "perturb_stream", "divergence_backward")  # a tile a program; the others walk over their rows
ORDER = 1e-5  # a bound on what differs between two orders of adding up, as a share of the largest number


def default_choice(kernel: str, width: int) -> Choice:
    """The default as a choice."""
    tile = launch.DEFAULTS[kernel](width)
    return Choice(tile.block, tile.warps, tile.rows)


def candidates(kernel: str, width: int) -> list[Choice]:
    """Powers of two around the default, without it."""
    default = default_choice(kernel, width)
    widest = max(tuning.MIN_BLOCK, launch.next_power_of_two(width))
    several = kernel != "perturb_stream" and default.block < launch.TILE
    found = []
    for b, w, r in itertools.product((0.5, 1, 2, 4), (0.5, 1, 2), (0.5, 1, 2, 4) if several else (1,)):
        block, warps, rows = int(default.block * b), int(default.warps * w), int(default.rows * r)
        if tuning.MIN_BLOCK <= block <= widest and _reasonable(block * rows, warps):
            found.append(Choice(block, warps, rows))
    return [each for each in found if each != default]


def _reasonable(elements: int, warps: int) -> bool:
    """No idle threads, and not more in a thread than its registers could hold."""
    return 1 <= warps <= tuning.MAX_WARPS and elements <= tuning.MAX_TILE and 1 <= elements / (32 * warps) <= 32


def refinements(kernel: str, width: int, best: Choice) -> list[Choice]:
    """What is tried once the tile is known, on it and on the default's: loads ahead, other numbers of programs."""
    found = []
    for base in dict.fromkeys((best, default_choice(kernel, width))):
        if kernel not in FLAT and base.block < width:
            found += [base._replace(stages=stages) for stages in (2, 3, 4)]
        if kernel == "divergence_split":
            found += [base._replace(programs=programs) for programs in (1, 4, 8)]
    return found


class Launches:
    """A launchers' ``wrap`` that keeps the compiled kernels (None where they are interpreted)."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []

    def __call__(self, kernel: Any) -> Any:
        launches = self

        class Launcher:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *args, **options: launches.compiled.append(kernel[grid](*args, **options))

        return Launcher()

    @property
    def spills(self) -> bool:
        return any(getattr(each, "n_spills", 0) for each in self.compiled)


def flaw(kernel: str, choice: Choice, call: Call, inputs: tuple[Tensor, ...]) -> str | None:
    """What is wrong with a choice: it "fails" (to compile or be launched), "spills", or is "wrong"; None: nothing."""
    with tuning.override(kernel, None):
        expected = call(*inputs)
    launches = Launches()
    try:
        with tuning.override(kernel, choice):
            found = call(*inputs, wrap=launches)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return "fails"
    if launches.spills:
        return "spills"
    return None if all(map(_close, found, expected)) else "wrong"


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal to what another order of adding up, and one rounding to the dtype, can change. NaN where the other has."""
    if not expected.numel():
        return not found.numel()
    allowed = ORDER * expected.abs().amax().float() + torch.finfo(expected.dtype).eps * expected.abs()
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((same | ((found.float() - expected.float()).abs() <= allowed)).all())
