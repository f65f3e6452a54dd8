"""What the fused backends share: which kernels one ascent step takes, and the shapes their operators promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..norms import known_norm
from . import torch_backend
from .base import STATISTICS, Step, new_output


def ascend(
    measure: Callable[..., Tensor], move: Callable[..., tuple[Tensor, Tensor]], perturb: Callable[..., Any],
    embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, keep_noise: bool,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`FusedBackend.ascend` by the operators ``ascend_measure``, ``ascend`` and ``perturb`` of a backend.

    A token norm takes one kernel. A norm over more than a row is measured first (and that of the moved noise, where a
    projection needs it); one that only Python can compute is called in between. Projections that need more than norms
    of whole tensors, or a norm of the user's, are PyTorch's.
    """
    known = known_norm(step.norm_fn)
    common = (step.noise_var, step.step_size, step.update)
    norm: Tensor | None = None
    moved_norm: Tensor | None = None
    paper = step.update == "paper"
    if known is not None and known.scope == "row":
        kind, scope = known.kind, "row"
    elif known is not None:
        if embed.dim() < 2:
            step.norm_fn(embed)  # raises, saying why
        if paper and known.kind == "l1":
            return _in_pytorch(perturb, embed, grad, noise, step, mask, keep_noise, unit)
        norm = measure(grad, noise, mask, known.kind, *common, None, unit)
        if paper and known.kind == "l2":
            moved_norm = measure(grad, noise, mask, known.kind, *common, norm, unit)
        kind, scope = known.kind, "group"
    elif paper:
        return _in_pytorch(perturb, embed, grad, noise, step, mask, keep_noise, unit)
    else:
        measured = measure(grad, noise, mask, "opaque", *common, None, unit)
        norm = torch.as_tensor(step.norm_fn(measured), device=measured.device)  # a plain number is a norm too
        try:
            torch.broadcast_to(norm, measured.shape)
        except RuntimeError:
            raise ValueError(
                f"norm_fn must return a norm that broadcasts to {tuple(measured.shape)}, got shape {tuple(norm.shape)}"
            ) from None
        if norm.dim() > 0 and norm.shape[-1] != 1:
            return _elementwise_norm(perturb, embed, noise, measured, norm, step, mask, keep_noise, unit)
        norm = norm.expand(*embed.shape[:-1], 1).to(torch.float32).contiguous()
        kind, scope = "inf", "given"
    perturbed, new_noise = move(
        embed, grad, noise, norm, mask, kind, scope, *common, step.epsilon, keep_noise, moved_norm, unit
    )
    return perturbed, new_noise if keep_noise else None


def _in_pytorch(
    perturb: Callable[..., Any], embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None,
    keep_noise: bool, unit: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    perturbed, new_noise = torch_backend.ascend(
        embed, grad, _values(perturb, embed, noise, step, mask, unit), step, mask, unit
    )
    return perturbed, new_noise if keep_noise else None


def _values(
    perturb: Callable[..., Any], embed: Tensor, noise: Tensor, step: Step, mask: Tensor | None, unit: Tensor | None
) -> Tensor:
    """The noise itself, fp32, where ``noise`` may be its seed."""
    if noise.dtype != torch.int64:
        return noise
    zeros = torch.zeros_like(embed, dtype=torch.float32)
    values: Tensor = perturb(zeros, noise, float(step.noise_var), mask, unit)
    return values


def _elementwise_norm(
    perturb: Callable[..., Any], embed: Tensor, noise: Tensor, measured: Tensor, norm: Tensor, step: Step,
    mask: Tensor | None, keep_noise: bool, unit: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A user's norm that differs within a row: nothing is left to fuse."""
    scale: float | Tensor = 1.0 if unit is None else unit
    update = measured / (norm + step.epsilon * scale)
    if step.update == "sift":
        update = _values(perturb, embed, noise, step, mask, unit) + step.step_size * scale * update
    if mask is not None:
        update = torch.where(mask.unsqueeze(-1), update, 0.0)
    return (embed + update).to(embed.dtype), update if keep_noise else None


# ---- fake implementations: what the operators return, without computing it -------------------------------------------


def fake_ascend_measure(
    grad: Tensor, noise: Tensor, mask: Tensor | None, kind: str, noise_var: float, step_size: float, update: str,
    norm: Tensor | None = None, unit: Tensor | None = None,
) -> Tensor:  # fmt: skip
    shape = grad.shape if kind == "opaque" else (grad.numel() // grad.shape[-1],)
    return new_output(shape, torch.float32, grad.device)


def fake_ascend(
    embed: Tensor, grad: Tensor, noise: Tensor, norm: Tensor | None, mask: Tensor | None, kind: str, scope: str,
    noise_var: float, step_size: float, update: str, epsilon: float, keep_noise: bool,
    moved_norm: Tensor | None = None, unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    noise_out = new_output(embed.shape if keep_noise else (0,), torch.float32, embed.device)
    return new_output(embed.shape, embed.dtype, embed.device), noise_out


def fake_divergence_forward(
    input: Tensor, target: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float, weight: float,
    scale: float, relative: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    stats = (input.numel() // input.shape[-1], STATISTICS) if keep else (0,)
    dtype = torch.promote_types(input.dtype, target.dtype) if output == "terms" else torch.float32
    shape = {"terms": input.shape, "rows": input.shape[:-1], "sum": ()}[output]
    return new_output(shape, dtype, input.device), new_output(stats, torch.float32, input.device)


def fake_divergence_backward(
    grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, mask: Tensor | None, kind: str, output: str,
    alpha: float, weight: float, scale: float, relative: bool, want_input: bool, want_target: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        new_output(input.shape if want_input else (0,), input.dtype, input.device),
        new_output(target.shape if want_target else (0,), target.dtype, target.device),
    )


def fake_divergence_measure(
    input: Tensor, target: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float, weight: float,
    scale: float, relative: bool,
) -> Tensor:  # fmt: skip
    return new_output((input.numel() // input.shape[-1], STATISTICS), torch.float32, input.device)


def fake_divergence_finish(
    input: Tensor, target: Tensor, stats: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float,
    weight: float, scale: float, relative: bool,
) -> Tensor:  # fmt: skip
    return new_output((input.numel() // input.shape[-1],), torch.float32, input.device)
