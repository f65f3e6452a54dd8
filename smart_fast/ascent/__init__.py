"""What finds the direction of the ascent, and how `eval_fn` runs meanwhile. Knows nothing of SMARTLoss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .base import Direction
from .fisher import Fisher
from .input_gradients import InputGradients
from .perturbed import Perturbed

if TYPE_CHECKING:
    from ..options import Options


def direction_of(eval_fn: Callable[..., Any], options: Options, wrapped: bool) -> Direction:
    """The direction that ``options.ascent`` names, for passes of ``eval_fn``; ``wrapped``: there is a DDP in it."""
    return DIRECTIONS[options.ascent](eval_fn, options, wrapped)


def _fisher(eval_fn: Callable[..., Any], options: Options, wrapped: bool) -> Direction:
    return Fisher(eval_fn, options.backend)


def _perturbed(eval_fn: Callable[..., Any], options: Options, wrapped: bool) -> Direction:
    return Perturbed(
        eval_fn,
        options.ascent_dtype,
        options.loss_scale,
        # smart-pytorch's own rule is to be what it is there, bit for bit.
        faithful=options.update == "smart-pytorch" and options.scale == "absolute",
        freeze_parameters=options.freeze_parameters,
        dropout=options.ascent_dropout,
        wrapped=wrapped,
        input_gradients=InputGradients(),
    )


#: By the name of the option ``ascent``.
DIRECTIONS: dict[str, Callable[[Callable[..., Any], Options, bool], Direction]] = {
    "perturbed": _perturbed,
    "fisher": _fisher,
}
