"""What a case hands to the bench once it is built on a device, and how results are compared with a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Finding(NamedTuple):
    """One comparison: what was compared, how far off it is, and how far off it may be."""

    what: str
    error: float
    tolerance: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.tolerance  # NaN is wrong too


class Task(Protocol):
    """A case on a device. ``backend`` is one of ours by name, or None for smart-pytorch."""

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """Fresh random arguments of a call; the same for the same seed."""
        ...

    def smart_pytorch(self) -> Callable[..., Any]:
        """smart-pytorch's own code for this work: what is run eagerly, and what torch.compile is given."""
        ...

    def ours(self, backend: str) -> Callable[..., Any]:
        """The same work by one of our backends."""
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
