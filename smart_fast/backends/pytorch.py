"""Plain PyTorch: smart-pytorch 0.0.4's operations in smart-pytorch's order, and masks on top of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..losses import divergences
from . import balls
from .base import Step

name = "torch"


def perturb(
    embed: Tensor, normal: Tensor, noise_var: float | Tensor, mask: Tensor | None, unit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(embed + noise, noise)``. Masked rows are passed on as constants."""
    noise = normal * noise_var if unit is None else normal * (noise_var * unit)
    if mask is not None:
        noise = torch.where(mask.unsqueeze(-1), noise, 0.0)
    return _add(embed, noise, mask), noise


def ascend(
    embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, unit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One update of ``noise``; returns ``(embed + noise, noise)``."""
    finite = _movable_rows(grad, mask)
    grad = torch.where(finite, grad, 0.0) if isinstance(finite, Tensor) else grad
    if unit is not None and mask is not None:  # of masked rows it may be anything
        unit = torch.where(mask.unsqueeze(-1), unit, 0.0)
    step_size: float | Tensor = step.step_size if unit is None else step.step_size * unit
    epsilon: float | Tensor = step.epsilon if unit is None else step.epsilon * unit
    if step.update == "paper":
        noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
        moved = noise + step_size * balls.direction(grad.to(noise.dtype), step.norm_fn)
        moved = _into_ball(moved, step, unit)
    elif step.update == "sift":
        scale = step.norm_fn(grad) + epsilon
        moved = noise + step_size * (grad / scale)
    else:
        moved = noise + step_size * grad
        scale = step.norm_fn(moved) + epsilon
        moved = moved / scale
    if step.update != "paper" and unit is not None:  # an embedding of zeros has no noise
        moved = torch.where(scale != 0, moved, noise)
    elif step.update != "paper" and not isinstance(step.epsilon, Tensor) and step.epsilon == 0:
        # Nothing to divide by: smart-pytorch's NaN only where smart-pytorch has it.
        moved = torch.where((scale != 0) | (finite & (step.update != "sift")), moved, noise)
    noise = moved.detach()
    if mask is not None:
        noise = torch.where(mask.unsqueeze(-1), noise, 0.0)
    return _add(embed, noise, mask), noise


def _into_ball(noise: Tensor, step: Step, unit: Tensor | None) -> Tensor:
    if unit is None:
        return balls.project(noise, step.norm_fn, step.epsilon)
    known = unit > 0  # an embedding of zeros has no noise
    return torch.where(
        known, balls.project(noise / torch.where(known, unit, 1.0), step.norm_fn, step.epsilon) * unit, 0.0
    )


def _movable_rows(grad: Tensor, mask: Tensor | None) -> Tensor | bool:
    """Rows ``[..., 1]`` that are unmasked and have a finite gradient; the others stay where they are.

    True if that is known to be all of them. Finding out costs a pass over the gradient on CPU; elsewhere it would
    synchronize. Selecting rows changes no bits of theirs.
    """
    looks = grad.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and mask is None and math.isfinite(grad.detach().sum().abs()):
        return True
    finite = torch.norm(grad, p=float("inf"), dim=-1, keepdim=True).isfinite()
    return finite if mask is None else finite & mask.unsqueeze(-1)


def _add(embed: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
    perturbed = (embed + noise).to(embed.dtype)
    return perturbed if mask is None else torch.where(mask.unsqueeze(-1), perturbed, embed.detach())


def divergence(
    input: Tensor, target: Tensor, kind: str, reduction: str, alpha: float | Tensor, mask: Tensor | None,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """The divergence ``kind`` of the logits by its reference in the table (`smart_fast.losses.divergences`).

    That of smart-pytorch's losses runs in the dtype of the logits, as theirs does. Others run in fp32 (float64 for
    float64) and give scalars in it, and elementwise terms in the promoted dtype of the logits.
    """
    entry = divergences.divergence(kind)
    if entry.drop_in:
        return _divergence(entry, input, target, reduction, alpha, mask, temperature)
    dtype = torch.promote_types(input.dtype, target.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    loss = _divergence(entry, input.to(wide), target.to(wide), reduction, alpha, mask, temperature)
    return loss.to(dtype) if reduction == "none" else loss


def _divergence(
    entry: divergences.Divergence, input: Tensor, target: Tensor, reduction: str, alpha: float | Tensor,
    mask: Tensor | None, temperature: float,
) -> Tensor:  # fmt: skip
    if temperature != 1.0:
        input, target = input / temperature, target / temperature
        return _divergence(entry, input, target, reduction, alpha, mask, 1.0) * temperature**2
    if mask is None:
        return entry.reference(input, target, reduction, alpha)
    rows = mask.unsqueeze(-1)
    # Masked logits may hold anything, NaN included: they leave the graph before they can reach a gradient.
    input = torch.where(rows, input, 0.0)
    target = torch.where(rows, target, 0.0)
    terms = torch.where(rows, entry.reference(input, target, "none", alpha), 0.0)
    if reduction == "none":
        return terms
    total = terms.sum()
    if reduction == "batchmean":
        return total / input.size(0)
    if reduction == "mean":
        return total / (mask.sum() * input.size(-1)).clamp(min=1)
    return total
