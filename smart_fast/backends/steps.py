"""What the fused backends share: which kernels one ascent step takes, and the shapes their operators promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..norms import KnownNorm, known_norm
from . import pytorch, updates
from .base import PARTS, STATISTICS, Step, new_output

_NO_NORM = KnownNorm("inf", "row")  # of rules that ask for none: a kernel has to be compiled for one


def ascend(
    measure: Callable[..., Tensor], move: Callable[..., tuple[Tensor, Tensor]], perturb: Callable[..., Any],
    embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, keep_noise: bool,
    unit: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`Backend.ascend` by the operators ``ascend_norm``, ``ascend`` and ``perturb`` of a backend.

    A token norm, or a rule that asks for none, takes one kernel. A norm over a group of rows is measured first, for
    paper and l2 twice; one that only Python can compute is called in between. Where paper's projection needs more than
    that, PyTorch makes the step.
    """
    known = known_norm(step.norm_fn) if updates.RULES[step.update].asks_norm else _NO_NORM
    if known is not None and known.scope == "group" and embed.dim() < 2:
        step.norm_fn(embed)  # raises, saying why
    paper = step.update == "paper"
    common = (step.noise_var, step.step_size, step.update)
    noise_kind = step.noise
    norm: Tensor | None = None
    moved_norm: Tensor | None = None
    if known is not None and (known.scope == "row" or not paper or known.kind != "l1"):
        kind, scope = known
        if scope == "group":
            norm = measure(grad, noise, None, mask, unit, kind, *common, noise_kind)
            if paper and kind == "l2":
                moved_norm = measure(grad, noise, norm, mask, unit, kind, *common, noise_kind)
    elif paper:
        return _in_pytorch(perturb, embed, grad, noise, step, mask, keep_noise, unit)
    else:
        kind, scope = "inf", "given"  # any kind
        found = _broadcastable(
            step.norm_fn(measure(grad, noise, None, mask, unit, "opaque", *common, noise_kind)), grad
        )
        if found.dim() > 0 and found.shape[-1] != 1:
            return _in_pytorch(perturb, embed, grad, noise, step, mask, keep_noise, unit)
        norm = found.expand(*grad.shape[:-1], 1).to(grad.device, torch.float32).contiguous()
    perturbed, new_noise = move(
        embed, grad, noise, norm, moved_norm, mask, unit, kind, scope, *common, step.epsilon, keep_noise, noise_kind
    )
    return perturbed, new_noise if keep_noise else None


def _broadcastable(norm: Any, grad: Tensor) -> Tensor:
    """What a norm returned, checked."""
    norm = torch.as_tensor(norm, device=grad.device)  # a plain number is a norm too
    try:
        torch.broadcast_to(norm, grad.shape)
    except RuntimeError:
        raise ValueError(
            f"norm_fn must return a norm that broadcasts to {tuple(grad.shape)}, got shape {tuple(norm.shape)}"
        ) from None
    return norm


def _in_pytorch(
    perturb: Callable[..., Any], embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None,
    keep_noise: bool, unit: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """For norms that differ within a row, and other cases where little is left to fuse."""
    if noise.dtype == torch.int64:
        zeros = torch.zeros_like(embed, dtype=torch.float32)
        noise = perturb(zeros, noise, float(step.noise_var), mask, unit, step.noise)
    perturbed, new_noise = pytorch.ascend(embed, grad.float(), noise, step, mask, unit)
    return perturbed, new_noise if keep_noise else None


# ---- fake implementations: what the operators return, without computing it -------------------------------------------


def fake_ascend_norm(
    grad: Tensor, noise: Tensor, norm: Tensor | None, mask: Tensor | None, unit: Tensor | None, kind: str,
    noise_var: float, step_size: float, update: str, noise_kind: str = "normal",
) -> Tensor:  # fmt: skip
    shape = grad.shape if kind == "opaque" else (grad.numel() // grad.shape[-1],)
    return new_output(shape, torch.float32, grad.device)


def fake_ascend(
    embed: Tensor, grad: Tensor, noise: Tensor, norm: Tensor | None, moved_norm: Tensor | None, mask: Tensor | None,
    unit: Tensor | None, kind: str, scope: str, noise_var: float, step_size: float, update: str, epsilon: float,
    keep_noise: bool, noise_kind: str = "normal",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    noise_out = new_output(embed.shape if keep_noise else (0,), torch.float32, embed.device)
    return new_output(embed.shape, embed.dtype, embed.device), noise_out


def fake_divergence_forward(
    input: Tensor, target: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float, weight: float,
    scale: float, from_difference: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    stats = (input.numel() // input.shape[-1], STATISTICS) if keep else (0,)
    dtype = torch.promote_types(input.dtype, target.dtype) if output == "terms" else torch.float32
    shape = {"terms": input.shape, "rows": input.shape[:-1], "sum": ()}[output]
    return new_output(shape, dtype, input.device), new_output(stats, torch.float32, input.device)


def fake_divergence_backward(
    grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, mask: Tensor | None, kind: str, output: str,
    alpha: float, weight: float, scale: float, from_difference: bool, want_input: bool, want_target: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        new_output(input.shape if want_input else (0,), input.dtype, input.device),
        new_output(target.shape if want_target else (0,), target.dtype, target.device),
    )


def fake_divergence_parts(
    input: Tensor, target: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float, weight: float,
    scale: float, from_difference: bool,
) -> Tensor:  # fmt: skip
    return new_output((input.numel() // input.shape[-1], PARTS), torch.float32, input.device)


def fake_divergence_finish(
    input: Tensor, target: Tensor, stats: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float,
    weight: float, scale: float, from_difference: bool,
) -> Tensor:  # fmt: skip
    return new_output((input.numel() // input.shape[-1], 2), torch.float32, input.device)


def fake_fisher_direction(logits: Tensor, wide: bool) -> Tensor:
    return new_output(logits.shape, torch.float32 if wide else logits.dtype, logits.device)
