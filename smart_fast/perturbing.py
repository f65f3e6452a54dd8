"""The ascent as a tool: a small perturbation of an embedding that makes any loss as large, or as small, as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import autograd
from .ascent import direction_of
from .ascent.accumulated import Accumulated
from .ascent.base import Direction, Passes
from .ascent.climb import climb
from .ascent.moves import Bounded, Optimized
from .backends import updates
from .checks import check_bool, check_bounds, check_callable, check_embeddings
from .norms import Norm, inf_norm
from .options import Options
from .training import ddp_fsdp

__all__ = ["Perturbation", "perturbation"]


class Perturbation(NamedTuple):
    """What `perturbation` found: tensors, or tuples of them for a tuple of embeddings.

    ``perturbed`` is ``embed`` plus the noise, in its dtype, and passes gradients on to it; ``noise`` is that noise, in
    fp32 (fp64 of fp64), without a graph; ``losses`` one detached scalar for each step, at the point that it started
    from; ``gradients`` those of the last step (None without one).
    """

    perturbed: Any
    noise: Any
    losses: tuple[Tensor, ...]
    gradients: Any


def perturbation(
    loss_of: Callable[..., Any], embed: Any, *, num_steps: int = 1, step_size: float | Tensor,
    epsilon: float | Tensor, noise_var: float | Tensor, norm: Norm = inf_norm, update: str = "paper",
    scale: str = "relative", noise: str = "normal", mask: Any = None, bounds: tuple[Any, Any] | None = None,
    targeted: bool = False, generator: torch.Generator | None = None, backend: str = "auto",
    ascent_dtype: torch.dtype | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None, accumulate: bool = False,
) -> Perturbation:  # fmt: skip
    """The ascent of `SMARTLoss` on any loss: steps from random noise, each along the gradient of ``loss_of``.

    Args:
        loss_of: ``loss_of(perturbed) -> scalar`` (of several embeddings, ``loss_of(*perturbed)``); it must depend on
            them. What else it compares with should be detached: its graph is used up by each step.
        embed: ``[..., D]``, floating point, or a tuple of them. Not written to.
        num_steps, step_size, epsilon, noise_var, update, scale, noise, generator, backend, ascent_dtype: those of
            `smart_fast.options.Options`; ``norm`` is its ``norm_fn``. `smart_fast.METHOD.md` has the update rules.
        mask: bool ``[...]``, True where there may be noise; a tuple of masks or None for a tuple of embeddings.
        bounds: ``(low, high)``: the perturbed tensor is clamped to it, as pixels are, by `torch.clamp` after the noise
            was drawn and after each step; the next step starts from what is left of the noise. Masked rows are not.
        targeted: True: descend, toward what ``loss_of`` measures the distance from.
        optimizer: makes a torch optimizer of ``[noise]``, whose steps take the place of the rule's (``step_size`` is
            not used); the ball of ``update``, "paper" or "sign", is kept after each.
        accumulate: True: the gradients that ``num_steps`` passes leave at parameters, divided by ``num_steps + 1``, are
            added to their ``.grad`` (FreeLB; Zhu et al., 2020). Finish with
            ``(loss_of(found.perturbed) / (num_steps + 1)).backward()``: one pass forward and backward a point, none
            wasted. Under `DistributedDataParallel` only that last pass reduces. Not with FSDP2.

    Works under `torch.no_grad` and `torch.inference_mode`. Formulas: Jiang et al., SMART, ACL 2020, Algorithm 1.

    Raises:
        TypeError, ValueError: as `SMARTLoss`; bounds that are no pair or do not fit; an optimizer that is none, or
            with an update that has no ball.
        RuntimeError: ``loss_of`` does not depend on what it is given; ``accumulate`` without gradients, inside
            torch.compile, or with FSDP2.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():  # the ascent needs gradients: go on with ordinary copies
            embed, mask = tree_map_only(Tensor, torch.clone, (embed, mask))
            return perturbation(
                loss_of, embed, num_steps=num_steps, step_size=step_size, epsilon=epsilon, noise_var=noise_var,
                norm=norm, update=update, scale=scale, noise=noise, mask=mask, bounds=bounds, targeted=targeted,
                generator=generator, backend=backend, ascent_dtype=ascent_dtype, optimizer=optimizer,
                accumulate=accumulate,
            )  # fmt: skip
    check_callable("loss_of", loss_of)
    check_callable("norm", norm)
    options = Options(
        norm, num_steps, step_size, epsilon, noise_var, backend=backend, update=update, scale=scale, noise=noise,
        generator=generator, ascent_dtype=ascent_dtype,
    )  # fmt: skip
    if optimizer is not None:
        check_callable("optimizer", optimizer)
        if not updates.rule(update).ball:
            raise ValueError(f"optimizer needs an update with a ball, 'paper' or 'sign', got {update!r}")
    embeds, masks = check_embeddings(embed, mask, generator)
    low, high = check_bounds("bounds", bounds, embeds)
    if any(each.numel() == 0 for each in embeds):
        return Perturbation(embed, _like(embed, [each.detach() for each in embeds]), (), None)
    watched = _Watched(loss_of, check_bool("targeted", targeted))
    if check_bool("accumulate", accumulate):
        watched.direction = accumulated = Accumulated(loss_of, ascent_dtype, 1 / (num_steps + 1))
    else:
        watched.direction = direction_of(loss_of, options, ddp_fsdp.is_wrapped(loss_of))
    start, move = autograd.perturb, autograd.ascend if optimizer is None else Optimized(optimizer, len(embeds))
    if bounds is not None:
        bounded = Bounded(low, high, move)
        start, move = bounded.start, bounded.move
    step = options.step
    found = climb(watched, Passes(watched, _first, embeds, None), masks, options, step, True, start, move)
    noises = [
        autograd.noise_values(found.backends[i], each, found.noises[i], noise_var, masks[i], found.units[i], noise)
        for i, each in enumerate(embeds)
    ]
    perturbed = accumulated.owe(found.perturbed, masks) if accumulate else found.perturbed
    gradients = None if num_steps == 0 else _like(embed, watched.grads)
    return Perturbation(_like(embed, perturbed), _like(embed, noises), tuple(watched.losses), gradients)


class _Watched:
    """``loss_of`` as a pass, and the direction that its gradients make: what it gave is kept, a step at a time."""

    direction: Direction

    def __init__(self, loss_of: Callable[..., Any], targeted: bool) -> None:
        self.loss_of, self.targeted = loss_of, targeted
        self.losses: list[Tensor] = []
        self.grads: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss ``[1]``: what rescales gradients in float16 looks at a first dimension."""
        loss = self.loss_of(*inputs)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_of must return a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss_of must return a scalar, got shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise RuntimeError("the loss has no graph: loss_of must compute it from what it is given")
        self.last = loss.detach().reshape(())  # the last attempt counts, if a pass had to be made twice
        return loss.reshape(1)

    def gradients(self, passes: Passes, perturbed: Sequence[Tensor]) -> list[Tensor]:
        self.grads = self.direction.gradients(passes, perturbed)
        self.losses.append(self.last)
        return [-each for each in self.grads] if self.targeted else self.grads


def _first(loss: Tensor, _: None) -> Tensor:
    return loss


def _like(embed: Any, each: Sequence[Any]) -> Any:
    return tuple(each) if isinstance(embed, (tuple, list)) else each[0]
