"""torch's own chunked linear loss, where the installed torch has one (2.13 does, as a prototype).

There is none of a divergence. The nearest, the cross-entropy of projected hidden states with one class a token, shows
what a loss costs that never makes whole logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .divergences import LinearDivergence, compare_linear, linear64
from .task import Contestant, Finding, Task

CHUNKED = "torch linear_cross_entropy"
NOTE = (
    "the mean cross-entropy of the input's logits with one class a token (its chunks take no distribution), gradients "
    "to input and weight: three GEMMs, less work than a divergence"
)


def contestants(task: Task) -> Iterator[Contestant]:
    """The chunked cross-entropy beside a case of linear divergences."""
    if not isinstance(task, LinearDivergence):
        return
    if reason := why_not():
        yield Contestant(CHUNKED, "other", None, skipped=reason, note=NOTE)
        return
    labels = torch.arange(task.rows, device=task.device) * 7919 % task.width
    options = nn.LinearCrossEntropyOptions()

    def loss(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = F.linear_cross_entropy(input, weight, labels, options=options)
        return result

    def check(run: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Finding]:
        waiting = labels

        def exact(x: Tensor, t: Tensor) -> Tensor:
            nonlocal waiting  # blocks of rows come in order
            chosen, waiting = waiting[: len(x)], waiting[len(x) :]
            return F.cross_entropy(x, chosen, reduction="sum") / task.rows

        return compare_linear(run(*inputs), linear64(inputs, exact, sides=1))

    yield Contestant(CHUNKED, "other", task.call(loss, sides=1), check=check, note=NOTE)


def why_not() -> str | None:
    """Why the installed torch cannot run it, or None."""
    if hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"
