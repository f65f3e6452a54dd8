"""``ascent="perturbed"``: the gradient of the ascent loss at the perturbed embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import autograd
from ..losses import states
from ..training import ddp_fsdp
from . import modes, precision
from .base import Passes
from .input_gradients import InputGradients


@dataclass(frozen=True)
class Perturbed:
    """The gradient of the loss at the perturbed embeddings, to these alone.

    ``eval_fn`` is what a pass runs, whose modes are set meanwhile (`Options` says how). ``faithful``: gradients in
    float16 are not rescaled, so that they stay smart-pytorch's bit for bit. ``wrapped``: there is a static-graph DDP in
    ``eval_fn``, whose ascent a compiler must not trace.
    """

    eval_fn: Callable[..., Any]
    dtype: torch.dtype | None
    loss_scale: Any
    faithful: bool
    freeze_parameters: bool | None
    dropout: bool
    wrapped: bool
    input_gradients: InputGradients

    def gradients(self, passes: Passes, perturbed: Sequence[Tensor]) -> list[Tensor]:
        """Where a loss scale is at work they are in fp32 and have been divided by it."""
        compiling = torch.compiler.is_compiling()
        if self.wrapped and compiling:
            return ddp_fsdp.eagerly(self.gradients, passes, perturbed)
        clean = states.detach(passes.state)
        rescaled = self.loss_scale is None and not self.faithful and precision.underflows(perturbed[0], self.dtype)
        in_group, frozen = ddp_fsdp.in_use(), not compiling and self._freezes()
        outside = not torch.is_grad_enabled() or in_group or frozen or not self.dropout
        as_it_is = not rescaled and self.loss_scale is None and self.dtype is None
        if as_it_is and not outside and not compiling:  # the usual case: nothing around the call
            return self.input_gradients(
                lambda *inputs: passes.compare(passes.run(*inputs), clean),
                [autograd.track(each) for each in perturbed],
            )
        device = perturbed[0].device
        scale = None if self.loss_scale is None else precision.current_scale(self.loss_scale, device)

        def loss_of(*inputs: Tensor) -> Tensor:
            if rescaled:
                *inputs, carrier = inputs  # type: ignore[assignment]
            state = passes.run(*inputs)
            loss: Tensor = passes.compare(_rescale(carrier, inputs, state) if rescaled else state, clean)
            if rescaled:  # a gradient to it, zero, even where nothing was rescaled
                loss = loss + 0.0 * carrier.sum()
            if in_group:
                ddp_fsdp.check_loss(loss)
            return loss if scale is None else loss * scale

        in_autocast = modes.in_autocast(loss_of, self.dtype, device.type)
        if not outside:
            grads = self.input_gradients(in_autocast, _tracked(perturbed, rescaled))
        else:
            with (
                torch.enable_grad(),
                ddp_fsdp.ascent(self.eval_fn),
                modes.in_ascent(self.eval_fn, frozen, self.dropout),  # to the end: checkpoints run it again
            ):
                grads = self.input_gradients(in_autocast, _tracked(perturbed, rescaled))
        if rescaled:
            *grads, scale = grads
            scale = torch.where(scale > 0, scale, 1.0)
            return [precision.unscale(grad, precision.like_samples(scale, grad)) for grad in grads]
        return grads if scale is None else [precision.unscale(grad, scale) for grad in grads]

    def _freezes(self) -> bool:
        """Not asked by a compiler, whose graph holds only gradients that are used."""
        return modes.is_compiled(self.eval_fn) if self.freeze_parameters is None else self.freeze_parameters


def _tracked(perturbed: Sequence[Tensor], rescaled: bool) -> list[Tensor]:
    inputs = [autograd.track(each) for each in perturbed]
    if rescaled:
        first = perturbed[0]
        inputs.append(autograd.track(torch.ones(first.shape[:1] if first.dim() > 1 else 1, device=first.device)))
    return inputs


def _rescale(carrier: Tensor, inputs: Sequence[Tensor], state: Any) -> Any:
    """``state`` whose tensors pass their gradients on rescaled. What else it holds stays as it is."""
    leaves, structure = tree_flatten(state)
    places = [place for place, each in enumerate(leaves) if isinstance(each, Tensor) and each.is_floating_point()]
    if not places:  # an object of the user's: only loss_scale reaches into it
        return state
    tensors = [leaves[place] for place in places]
    rescaled = precision.Rescale.apply(carrier, precision.by_sample(inputs, tensors), *tensors)
    for place, each in zip(places, rescaled, strict=True):
        leaves[place] = each
    return tree_unflatten(leaves, structure)
