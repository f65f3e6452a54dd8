"""The loop: noise, a gradient, a step along it, again. `SMARTLoss` and `smart_fast.perturbation` are made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .. import autograd
from ..backends import select
from ..backends.base import Backend, Step
from ..noise import token_rms
from .base import Direction, Passes

if TYPE_CHECKING:
    from ..options import Options


class Climbed(NamedTuple):
    """What a climb ends with, a list of one entry for each embedding.

    ``noises`` is the last noise as its backend keeps it, if it was to be kept, ``first`` the initial one; ``grads`` the
    gradients of the last step (None if there was none); ``units`` those of rows, or None.
    """

    perturbed: list[Any]
    noises: list[Any]
    first: list[Any]
    grads: list[Any]
    backends: list[Backend]
    units: list[Tensor | None]


def climb(
    direction: Direction, passes: Passes, masks: Sequence[Tensor | None], options: Options, step: Step, keep: bool,
    start: Callable[..., Any] = autograd.perturb, move: Callable[..., Any] = autograd.ascend,
) -> Climbed:  # fmt: skip
    """``options.num_steps`` steps from fresh noise along what ``direction`` finds.

    ``keep``: the last noise is kept. ``start`` and ``move`` are what makes the first noise and what makes a step, with
    the arguments and results of `smart_fast.autograd`'s. Plain loops: host time is most of what a small call takes.
    """
    embeds, num_steps, relative = passes.embeds, options.num_steps, options.scale == "relative"
    found = Climbed([], [], [], [None] * len(embeds), [], [])
    perturbed, noises, first, grads, backends, units = found
    for embed, mask in zip(embeds, masks, strict=True):
        backend = select(options.backend, embed, numbers=step.tensors)
        unit = token_rms(embed) if relative else None
        moved, noise = start(
            backend, embed, step.noise_var, options.generator, mask, num_steps > 0 or keep, unit, step.noise
        )
        perturbed.append(moved)
        noises.append(noise)
        first.append(noise)
        backends.append(backend)
        units.append(unit)
    for taken in range(1, num_steps + 1):
        grads[:] = direction.gradients(passes, perturbed)
        for i, embed in enumerate(embeds):
            perturbed[i], noises[i] = move(
                backends[i], embed, grads[i], noises[i], step, masks[i], taken < num_steps or keep, units[i]
            )
    return found
