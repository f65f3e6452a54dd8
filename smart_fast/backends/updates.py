"""The update rules of the ascent, one row each: what a step adds to the noise, and what becomes of the sum.

With u the unit of a row (1 unless ``scale="relative"``) and g the gradient, 0 for rows where it is not finite:

    smart-pytorch   s = noise + step_size u g                            noise <- s / (norm(s) + epsilon u)
    sift            s = noise + step_size u g / (norm(g) + epsilon u)    noise <- s
    paper           s = noise + step_size u g / norm(g)                  noise <- u project(s / u onto norm <= epsilon)
    sign            s = noise + step_size u sign(g)                      noise <- clip(s, -epsilon u, epsilon u)

where g / norm(g) is 0 if g is. In PyTorch, in smart-pytorch's order of operations; kernels/ascend.py, csrc/cpu/ascend.h
and csrc/cuda/ascend.cu hold the same rules, and refuse a name that they do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..norms import Norm
from . import balls

Number = float | Tensor


@dataclass(frozen=True)
class Update:
    """One rule. ``step(grad, norm_fn, step_size, epsilon, unit)`` is what a step adds, and ``finish(moved, norm_fn,
    epsilon, unit)`` the new noise; each with the denominator that it divided by, None if it takes care of zeros itself.

    ``wide``: computed in fp32 at least. ``keeps_nan``: rows of finite gradients whose denominator is zero become NaN,
    as in smart-pytorch; otherwise such rows keep their noise. ``ball``: epsilon is the radius of a ball, not added to a
    norm. ``asks_norm``: the rule depends on the norm.
    """

    step: Callable[[Tensor, Norm, Number, Number, Tensor | None], tuple[Tensor, Any]]
    finish: Callable[[Tensor, Norm, Number, Tensor | None], tuple[Tensor, Any]]
    wide: bool = False
    keeps_nan: bool = False
    ball: bool = False
    asks_norm: bool = True


def in_units(number: Number, unit: Tensor | None) -> Number:
    return number if unit is None else number * unit


def _along_gradient(
    grad: Tensor, norm_fn: Norm, step_size: Number, epsilon: Number, unit: Tensor | None
) -> tuple[Tensor, None]:
    return in_units(step_size, unit) * grad, None


def _along_damped_direction(
    grad: Tensor, norm_fn: Norm, step_size: Number, epsilon: Number, unit: Tensor | None
) -> tuple[Tensor, Any]:
    denominator = norm_fn(grad) + in_units(epsilon, unit)
    return in_units(step_size, unit) * (grad / denominator), denominator


def _along_direction(
    grad: Tensor, norm_fn: Norm, step_size: Number, epsilon: Number, unit: Tensor | None
) -> tuple[Tensor, None]:
    return in_units(step_size, unit) * balls.direction(grad, norm_fn), None


def _along_signs(
    grad: Tensor, norm_fn: Norm, step_size: Number, epsilon: Number, unit: Tensor | None
) -> tuple[Tensor, None]:
    return in_units(step_size, unit) * grad.sign(), None


def _normalized(moved: Tensor, norm_fn: Norm, epsilon: Number, unit: Tensor | None) -> tuple[Tensor, Any]:
    denominator = norm_fn(moved) + in_units(epsilon, unit)
    return moved / denominator, denominator


def _as_it_is(moved: Tensor, norm_fn: Norm, epsilon: Number, unit: Tensor | None) -> tuple[Tensor, None]:
    return moved, None


def _into_ball(moved: Tensor, norm_fn: Norm, epsilon: Number, unit: Tensor | None) -> tuple[Tensor, None]:
    if unit is None:
        return balls.project(moved, norm_fn, epsilon), None
    known = unit > 0  # an embedding of zeros has no noise
    projected = balls.project(moved / torch.where(known, unit, 1.0), norm_fn, epsilon)
    return torch.where(known, projected * unit, 0.0), None


def _into_box(moved: Tensor, norm_fn: Norm, epsilon: Number, unit: Tensor | None) -> tuple[Tensor, None]:
    bound: Any = in_units(epsilon, unit)  # number or tensor, which the types of clamp keep apart
    return moved.clamp(-bound, bound), None


RULES = {
    "smart-pytorch": Update(_along_gradient, _normalized, keeps_nan=True),
    "sift": Update(_along_damped_direction, _as_it_is),
    "paper": Update(_along_direction, _into_ball, wide=True, ball=True),
    "sign": Update(_along_signs, _into_box, wide=True, ball=True, asks_norm=False),
}


def rule(name: str) -> Update:
    """The rule of a name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    try:
        return RULES[name]
    except KeyError:
        raise ValueError(f"update must be one of {list(RULES)}, got {name!r}") from None
