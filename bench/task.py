"""What a case hands to the bench once it is built on a device, who runs it, and how results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# The low-precision rivals compute in the dtype of their inputs, so their tolerances are those of its rounding.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


class Finding(NamedTuple):
    """One comparison: what was compared, how far off it is, and how far off it may be."""

    what: str
    error: float
    tolerance: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.tolerance  # NaN is wrong too


@dataclass(frozen=True)
class Contestant:
    """Who runs a case.

    ``role``: "ours"; "rival", which does the same work; "other", which does related work and is compared with nobody;
    or "part" for a piece of the work. ``run`` is the timed call, None if it is ``skipped`` (the reason). ``check``
    takes ``run`` and its inputs, where the task's own check does not apply. ``note`` says what the contestant computes.
    """

    name: str
    role: str
    run: Callable[..., Any] | None
    backend: str | None = None
    skipped: str | None = None
    check: Callable[[Callable[..., Any], tuple[Any, ...]], list[Finding]] | None = None
    note: str | None = None


class Task(Protocol):
    """A case on a device. ``backend`` is one of ours by name, or None for smart-pytorch."""

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """Fresh random arguments of a call; the same for the same seed."""
        ...

    def smart_pytorch(self) -> Callable[..., Any]:
        """smart-pytorch's own code for this work: what is run eagerly, and what torch.compile is given."""
        ...

    def ours(self, backend: str) -> Callable[..., Any]:
        """The same work by one of our backends; a task may have ``variants(backend)``, other ways of ours by name."""
        ...

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What is timed: a call of ``function`` on the inputs, with the gradients that the case asks for."""
        ...

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        """Run the timed call once and compare its results with a float64 reference."""
        ...


def finding(what: str, error: Tensor | float, tolerance: float) -> Finding:
    return Finding(what, float(error), tolerance)


def deviation(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Euclidean distance of the results from the expected tensors, relative to the length of the latter."""
    off = sum(float((r.detach().double() - e.double()).square().sum()) for r, e in zip(results, expected, strict=True))
    size = sum(float(e.double().square().sum()) for e in expected)
    return math.sqrt(off / size) if size > 0 else math.sqrt(off)
