"""``ascent="perturbed"``: the gradient of the ascent loss at the perturbed embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import autograd
from ..training import ddp_fsdp
from . import modes, precision


def gradients(
    smart: Any, run: Callable[..., Any], perturbed: Sequence[Tensor], clean: Any, args: Any, kwargs: Any
) -> list[Tensor]:
    """Gradients of ``loss_fn`` of ``smart`` to each of ``perturbed``; ``run`` is how its ``eval_fn`` is called.

    Where a loss scale is at work they are in fp32 and have been divided by it.
    """
    if smart._wrapped and torch.compiler.is_compiling():
        return ddp_fsdp.eagerly(gradients, smart, run, perturbed, clean, args, kwargs)
    scale = None
    # smart-pytorch's own rule is to be what it is there, bit for bit.
    faithful = smart.update == "smart-pytorch" and smart.scale == "absolute"
    rescaled = smart.loss_scale is None and not faithful and precision.underflows(perturbed[0], smart.ascent_dtype)
    in_group, frozen = ddp_fsdp.in_use(), _freezes(smart)
    outside = not torch.is_grad_enabled() or in_group or frozen or not smart.ascent_dropout
    as_it_is = not rescaled and smart.loss_scale is None and smart.ascent_dtype is None
    if as_it_is and not outside and not torch.compiler.is_compiling():  # the usual case, without further ado
        return smart._input_gradients(
            lambda *inputs: smart._compare("loss_fn", smart.loss_fn, run(*inputs, *args, **kwargs), clean),
            [autograd.track(each) for each in perturbed],
        )
    device = perturbed[0].device
    if smart.loss_scale is not None:
        scale = precision.current_scale(smart.loss_scale, device)

    def loss_of(*inputs: Tensor) -> Tensor:
        if rescaled:
            *inputs, carrier = inputs  # type: ignore[assignment]
        state = run(*inputs, *args, **kwargs)
        loss = smart._compare("loss_fn", smart.loss_fn, _rescale(carrier, inputs, state) if rescaled else state, clean)
        if rescaled:  # a gradient to it, zero, even where nothing was rescaled
            loss = loss + 0.0 * carrier.sum()
        if in_group:
            ddp_fsdp.check_loss(loss)
        return loss if scale is None else loss * scale

    in_autocast = modes.in_autocast(loss_of, smart.ascent_dtype, device.type)
    if not outside:
        grads = smart._input_gradients(in_autocast, _tracked(perturbed, rescaled))
    else:
        with (
            torch.enable_grad(),
            ddp_fsdp.ascent(smart.eval_fn),
            modes.in_ascent(smart.eval_fn, frozen, smart.ascent_dropout),  # to the end: checkpoints run it again
        ):
            grads = smart._input_gradients(in_autocast, _tracked(perturbed, rescaled))
    if rescaled:
        *grads, scale = grads
        scale = torch.where(scale > 0, scale, 1.0)
        return [precision.unscale(grad, precision.like_samples(scale, grad)) for grad in grads]
    return grads if scale is None else [precision.unscale(grad, scale) for grad in grads]


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


def _freezes(smart: Any) -> bool:
    if torch.compiler.is_compiling():
        return False  # what nobody asks for is not in the graph
    frozen: bool | None = smart.freeze_parameters
    return modes.is_compiled(smart.eval_fn) if frozen is None else frozen
