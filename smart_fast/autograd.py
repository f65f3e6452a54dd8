"""The operations of SMART as autograd sees them, whichever backend computes them.

The only file that knows `save_for_backward`. Fused gradients are computed by kernels and are not differentiable
themselves (no double backward); ``backend="torch"`` is ordinary PyTorch and is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import torch_backend
from .backends.base import DivergenceSpec, FusedBackend, Step
from .noise import draw_normal, draw_seed


class _Shift(torch.autograd.Function):
    """embed -> embed + something constant: the gradient passes through, except at masked rows."""

    @staticmethod
    def forward(ctx: Any, embed: Tensor, perturbed: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return _as_output(ctx, perturbed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        if mask is not None:
            grad = torch.where(mask.unsqueeze(-1), grad, 0.0)
        return grad, None, None


class _Track(torch.autograd.Function):
    """A tensor that requires grad and is no leaf: unlike a leaf, ``eval_fn`` may modify it in place."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, perturbed: Tensor) -> Tensor:
        return _as_output(ctx, perturbed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _as_output(ctx: Any, perturbed: Tensor) -> Tensor:
    """The input itself, as autograd allows where it was modified; a view could not be modified in place later on."""
    if torch.compiler.is_compiling():
        return perturbed.view_as(perturbed)
    ctx.mark_dirty(perturbed)
    return perturbed


def track(perturbed: Tensor) -> Tensor:
    """``perturbed``, requiring grad as smart-pytorch's does even for frozen embeddings."""
    if perturbed.requires_grad:
        return perturbed
    if torch.compiler.is_compiling():
        return perturbed.requires_grad_()
    tracked: Tensor = _Track.apply(torch.empty((), requires_grad=True), perturbed)
    return tracked


def perturb(
    backend: FusedBackend | None,
    embed: Tensor,
    noise_var: Any,
    generator: torch.Generator | None,
    mask: Tensor | None,
    keep_noise: bool,
) -> tuple[Tensor, Tensor]:
    """``embed`` plus fresh noise, and that noise, as `ascend` of the same backend takes it (if ``keep_noise``)."""
    if backend is None:
        return torch_backend.perturb(embed, draw_normal(embed, generator), noise_var, mask)
    seed = draw_seed(embed.device, generator)
    perturbed, noise = backend.perturb(embed.detach(), seed, float(noise_var), mask, keep_noise)
    return _shift(embed, perturbed, mask), noise


def ascend(
    backend: FusedBackend | None, embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None,
    keep_noise: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``embed`` plus the noise moved along ``grad``, and that noise if another step will need it."""
    if backend is None:
        return torch_backend.ascend(embed, grad, noise, step, mask)
    perturbed, noise_out = backend.ascend(embed.detach(), grad.detach(), noise, step, mask, keep_noise)
    return _shift(embed, perturbed, mask), noise_out


def _shift(embed: Tensor, perturbed: Tensor, mask: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and embed.requires_grad:
        shifted: Tensor = _Shift.apply(embed, perturbed, mask)
        return shifted
    return perturbed


class _Divergence(torch.autograd.Function):
    """Row statistics are saved, probabilities recomputed."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, mask: Tensor | None, backend: FusedBackend, spec: DivergenceSpec
    ) -> Tensor:
        want_input, want_target = ctx.needs_input_grad[:2]
        loss, stats = backend.divergence_forward(input, target, spec, mask, want_input, want_target)
        if want_input or want_target:
            ctx.save_for_backward(input, target, mask, stats)
            ctx.options = backend, spec
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, target, mask, stats = ctx.saved_tensors
        backend, spec = ctx.options
        gradients = backend.divergence_backward(grad, input, target, stats, spec, mask, *ctx.needs_input_grad[:2])
        return *gradients, None, None, None


def divergence(
    backend: FusedBackend | None, input: Tensor, target: Tensor, kind: str, reduction: str, alpha: Any,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """The divergence ``kind`` of logits ``[..., V]``, reduced as `torch.nn.functional.kl_div` reduces."""
    if backend is None:
        return torch_backend.divergence(input, target, kind, reduction, alpha, mask)
    weight = 1.0
    if reduction == "batchmean":
        weight = 1.0 / input.size(0)
    elif reduction == "mean" and mask is None:
        weight = 1.0 / input.numel()
    spec = DivergenceSpec(kind, "terms" if reduction == "none" else "sum", float(alpha), weight)
    loss: Tensor = _Divergence.apply(input, target, mask, backend, spec)
    if reduction == "mean" and mask is not None:
        loss = loss / (mask.sum() * input.size(-1)).clamp(min=1)
    return loss
