"""The settings of a `SMARTLoss`: checked before a call, if one has changed since the last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ascent import precision
from .backends import check_name
from .backends.base import UPDATES, Step
from .checks import check_bool, check_callable, check_choice, check_count, check_number
from .losses import states

ASCENTS = ("perturbed", "fisher")
SCALES = ("absolute", "relative")

NAMES = frozenset(
    (
        *("eval_fn", "loss_fn", "loss_last_fn", "norm_fn", "num_steps", "step_size", "epsilon", "noise_var"),
        *("backend", "update", "ascent", "scale", "ascent_dtype", "generator", "loss_scale", "freeze_parameters"),
        *(
            "ascent_dropout",
            "shared_dropout",
            "freeze_batch_norm",
            "every_n_steps",
            "start_step",
            "skip_in_eval",
            "diagnose",
        ),
    )
)


def check(smart: Any) -> Step:
    """Check the attributes ``NAMES`` of ``smart``; those of an ascent step."""
    check_callable("eval_fn", smart.eval_fn)
    states.check_losses("loss_fn", smart.loss_fn)
    states.check_losses("loss_last_fn", smart.loss_last_fn)
    check_callable("norm_fn", smart.norm_fn)
    check_count("num_steps", smart.num_steps)
    for name in ("step_size", "epsilon", "noise_var"):
        check_number(name, getattr(smart, name))
    check_name(smart.backend)
    check_choice("update", smart.update, UPDATES)
    check_choice("ascent", smart.ascent, ASCENTS)
    if smart.update == "paper" and not isinstance(smart.epsilon, Tensor) and smart.epsilon < 0:
        raise ValueError(f"epsilon, the radius of a ball, must not be negative, got {smart.epsilon}")
    if smart.ascent == "fisher" and smart.num_steps > 1:
        raise ValueError(f"ascent='fisher' takes one step: num_steps must be 0 or 1, got {smart.num_steps}")
    check_choice("scale", smart.scale, SCALES)
    if smart.generator is not None and not isinstance(smart.generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(smart.generator).__name__}")
    _check_precision(smart.ascent_dtype, smart.loss_scale)
    _check_controls(smart)
    numbers = smart.noise_var, smart.step_size, smart.epsilon
    tensors = tuple(each for each in numbers if isinstance(each, Tensor))
    return Step(smart.norm_fn, *numbers, smart.update, tensors)


def _check_precision(ascent_dtype: Any, loss_scale: Any) -> None:
    if ascent_dtype is not None and not isinstance(ascent_dtype, torch.dtype):
        raise TypeError(f"ascent_dtype must be a torch.dtype or None, got {type(ascent_dtype).__name__}")
    if ascent_dtype not in (None, *precision.HALF):
        raise ValueError(f"ascent_dtype must be None or one of {list(precision.HALF)}, got {ascent_dtype}")
    precision.check_loss_scale(loss_scale)


def _check_controls(smart: Any) -> None:
    check_count("every_n_steps", smart.every_n_steps, least=1)
    check_count("start_step", smart.start_step)
    for name in ("ascent_dropout", "shared_dropout", "freeze_batch_norm", "skip_in_eval", "diagnose"):
        check_bool(name, getattr(smart, name))
    if smart.freeze_parameters is not None:
        check_bool("freeze_parameters", smart.freeze_parameters)
    needs_module = {
        "freeze_parameters=True": smart.freeze_parameters,
        "ascent_dropout=False": not smart.ascent_dropout,
        "shared_dropout=True": smart.shared_dropout,
        "freeze_batch_norm=True": smart.freeze_batch_norm,
    }
    for setting, used in needs_module.items():
        if used and not isinstance(smart.eval_fn, nn.Module):
            raise ValueError(f"{setting} needs an eval_fn that is a Module, got {type(smart.eval_fn).__name__}")
