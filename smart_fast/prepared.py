"""What the attributes of a `SMARTLoss` ask for, checked and made once, kept while they stay the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from . import options
from .ascent import direction_of, modes
from .ascent.base import Direction
from .backends.base import Step
from .losses import states
from .options import Options


class Smart(Protocol):
    """What stands on a `SMARTLoss` beside its options."""

    eval_fn: Callable[..., Any]
    loss_fn: Any
    loss_last_fn: Any


class Prepared(NamedTuple):
    """Options, what is made of them, and the very objects that they were made of."""

    made_of: tuple[Any, ...]
    eval_fn: Callable[..., Any]
    options: Options
    step: Step
    direction: Direction
    #: Whether there is a static-graph DDP in ``eval_fn``.
    wrapped: bool


def prepare(smart: Smart, before: Prepared | None) -> Prepared:
    """What the attributes of ``smart`` ask for now: ``before``, while each of them is the very object that it was.

    Raises:
        TypeError, ValueError: as `SMARTLoss` does of an argument.
    """
    if before is not None and torch.compiler.is_compiling():  # which guards on the attributes by itself
        chosen = Options.of(smart)
        direction = direction_of(smart.eval_fn, chosen, before.wrapped)
        return Prepared((), smart.eval_fn, chosen, chosen.step, direction, before.wrapped)
    eval_fn = vars(smart)["_modules"].get("eval_fn")  # a Module's own way there costs as much as all that follows
    if eval_fn is None:
        eval_fn = smart.eval_fn
    now = (eval_fn, smart.loss_fn, smart.loss_last_fn, *options.values(smart))
    if before is not None and all(map(operator.is_, now, before.made_of)):
        return before
    states.check_losses("loss_fn", smart.loss_fn)
    states.check_losses("loss_last_fn", smart.loss_last_fn)
    chosen = Options.of(smart)
    chosen.check_eval_fn(eval_fn)
    wrapped = modes.prepare(eval_fn, chosen.shared_dropout)
    return Prepared(now, eval_fn, chosen, chosen.step, direction_of(eval_fn, chosen, wrapped), wrapped)
