"""Plain PyTorch: smart-pytorch 0.0.4's operations in smart-pytorch's order, and masks on top of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..losses import divergences
from ..noise import draw_noise
from . import log_ratio, updates
from .base import DIVERGENCES, Nodes, Step


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
    rule = updates.rule(step.update)
    if rule.wide:
        noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
        grad = grad.to(noise.dtype)
    added, divided = rule.step(grad, step.norm_fn, step.step_size, step.epsilon, unit)
    moved, divided_last = rule.finish(noise + added, step.norm_fn, step.epsilon, unit)
    denominator = divided if divided_last is None else divided_last
    if denominator is not None and unit is not None:  # an embedding of zeros has no noise
        moved = torch.where(denominator != 0, moved, noise)
    elif denominator is not None and not isinstance(step.epsilon, Tensor) and step.epsilon == 0:
        keep = (denominator != 0) | finite if rule.keeps_nan else denominator != 0
        moved = torch.where(keep, moved, noise)
    noise = moved.detach()
    if mask is not None:
        noise = torch.where(mask.unsqueeze(-1), noise, 0.0)
    return _add(embed, noise, mask), noise


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


class PyTorch:
    """The contract by the functions of this file; what smart-pytorch has nothing of, by those of log_ratio.py."""

    name = "torch"
    nodes: Nodes = "always"
    kinds = frozenset(DIVERGENCES)
    plain_divergence = None
    gradient_functions = None

    def unavailable(self) -> str | None:
        return None

    def cannot_serve(self, device: torch.device, kind: str | None = None) -> str | None:
        return None

    def perturb_fresh(
        self, embed: Tensor, generator: torch.Generator | None, noise_var: Any, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None, noise_kind: str = "normal",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return perturb(embed, draw_noise(embed, generator, noise_kind), noise_var, mask, unit)

    def perturb(
        self, embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None, noise_kind: str = "normal",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """By the noise of a generator that starts at the seed, which is read on the host."""
        generator = torch.Generator(embed.device).manual_seed(int(seed))
        return perturb(embed, draw_noise(embed, generator, noise_kind), noise_var, mask, unit)

    def ascend(
        self, embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return ascend(embed, grad, noise, step, mask, unit)

    loss = staticmethod(divergence)
    divergence = None
    divergence_forward = staticmethod(log_ratio.divergence_forward)
    divergence_backward = staticmethod(log_ratio.divergence_backward)
    divergence_parts = staticmethod(log_ratio.divergence_parts)
    divergence_finish = staticmethod(log_ratio.divergence_finish)

    def fisher_direction(self, logits: Tensor, wide: bool) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        largest = logits.argmax(-1, keepdim=True)
        q = logits.softmax(-1, dtype=dtype).scatter(-1, largest, 0.0)
        q = q.scatter(-1, largest, -q.sum(-1, keepdim=True))
        return q if wide else q.to(logits.dtype)

    def empty_cache(self) -> int:
        return 0


PYTORCH = PyTorch()
