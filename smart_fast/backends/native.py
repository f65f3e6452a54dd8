"""The compiled operators behind the backend contract.

Imported once the extension is loaded (`smart_fast.build`), which registers ``torch.ops.smart_fast.native_*``.
An operator in C++ costs little enough that eager mode and torch.compile take the same path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import steps
from .base import DivergenceSpec, Step, new_output

name = "native"

#: Operators bring their own autograd nodes; see `smart_fast.autograd`.
differentiable = True

_operators = torch.ops.smart_fast
_perturb = _operators.native_perturb.default
_ascend_measure = _operators.native_ascend_measure.default
_ascend = _operators.native_ascend.default
_divergence = _operators.native_divergence.default
_divergence_forward = _operators.native_divergence_forward.default
_divergence_backward = _operators.native_divergence_backward.default
_divergence_measure = _operators.native_divergence_measure.default
_divergence_finish = _operators.native_divergence_finish.default
_fisher_direction = _operators.native_fisher_direction.default

extension: Any = None  # the loaded module; set by smart_fast.backends


def perturb(
    embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, keep_noise: bool, unit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    # On a CPU noise is read back sooner than it is computed again.
    keep_noise = keep_noise and embed.device.type == "cpu"
    perturbed, noise = _perturb(embed, seed, noise_var, mask, keep_noise, unit)
    return perturbed, noise if keep_noise else seed


def perturb_fresh(
    embed: Tensor, generator: torch.Generator | None, noise_var: float, mask: Tensor | None, keep_noise: bool,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`perturb` with its autograd node, by a seed that the operator draws as `smart_fast.noise` would."""
    perturbed, noise = extension.perturb(embed, generator, noise_var, mask, keep_noise, unit)
    return perturbed, noise


def _noise_alone(
    embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, unit: Tensor | None = None
) -> Tensor:
    return perturb(embed, seed, noise_var, mask, False, unit)[0]


def _move(*args: Any) -> tuple[Tensor, Tensor]:
    operator = _ascend if torch.compiler.is_compiling() else extension.ascend
    perturbed, new_noise = operator(*args)
    return perturbed, new_noise


def ascend(
    embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, keep_noise: bool,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return steps.ascend(
        _ascend_measure, _move, _noise_alone, embed, grad, noise, step, mask, keep_noise, unit, folds_groups=True
    )


def divergence(input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    """The loss of `divergence_forward`, with its autograd node."""
    loss: Tensor = _divergence(input, target, mask, *spec)
    return loss


def plain_divergence(input: Any, target: Any, kind: str, reduction: str, alpha: float) -> Tensor | None:
    """The reduced divergence of two ordinary CPU tensors of one shape, at the least cost; None for anything else."""
    loss: Tensor | None = extension.divergence(input, target, kind, reduction, alpha)
    return loss


def divergence_forward(
    input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None, want_input: bool, want_target: bool
) -> tuple[Tensor, Tensor | None]:
    keep = want_input or want_target
    loss, stats, _, _ = _divergence_forward(input, target, mask, *spec, keep, False, False)
    return loss, stats if keep else None


def divergence_backward(
    grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None,
    want_input: bool, want_target: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    d_input, d_target = _divergence_backward(grad, input, target, stats, mask, *spec, want_input, want_target)
    return d_input if want_input else None, d_target if want_target else None


def divergence_measure(input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    parts: Tensor = _divergence_measure(input, target, mask, *spec)
    return parts


def divergence_finish(
    input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None
) -> Tensor:
    shares: Tensor = _divergence_finish(input, target, stats, mask, *spec)
    return shares


def fisher_direction(logits: Tensor, wide: bool) -> Tensor:
    direction: Tensor = _fisher_direction(logits, wide)
    return direction


def cannot_serve(device: torch.device) -> str | None:
    """Why tensors on ``device`` cannot be served, or None."""
    if device.type == "cpu" or (device.type == "cuda" and extension is not None and extension.built_with()["cuda"]):
        return None
    if device.type == "cuda":
        return "the compiled operators have no CUDA kernels (fix: install nvcc and a CUDA build of torch, build again)"
    return f"the compiled operators do not run on {device.type!r} tensors"


def _fake_perturb(
    embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, keep_noise: bool, unit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    noise = new_output(embed.shape if keep_noise else (0,), torch.float32, embed.device)
    return new_output(embed.shape, embed.dtype, embed.device), noise


def _fake_perturb_fresh(
    embed: Tensor, generator: torch.Generator | None, noise_var: float, mask: Tensor | None, keep_noise: bool,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if embed.device.type == "cuda":
        return new_output(embed.shape, embed.dtype, embed.device), new_output((1,), torch.int64, embed.device)
    return _fake_perturb(embed, embed, noise_var, mask, keep_noise)


def _fake_divergence_forward(
    input: Tensor, target: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float, weight: float,
    scale: float, relative: bool, keep: bool, want_input: bool, want_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = DivergenceSpec(kind, output, alpha, weight, scale, relative)
    loss, stats = steps.fake_divergence_forward(input, target, mask, *spec, keep)
    d_input = new_output(input.shape if want_input else (0,), input.dtype, input.device)
    return loss, stats, d_input, new_output(target.shape if want_target else (0,), target.dtype, target.device)


for _operator, _fake in (
    ("perturb", _fake_perturb),
    ("perturb_fresh", _fake_perturb_fresh),
    ("ascend_measure", steps.fake_ascend_measure),
    ("ascend", steps.fake_ascend),
    ("divergence_forward", _fake_divergence_forward),
    ("divergence_backward", steps.fake_divergence_backward),
    ("divergence_measure", steps.fake_divergence_measure),
    ("divergence_finish", steps.fake_divergence_finish),
    ("fisher_direction", steps.fake_fisher_direction),
):
    torch.library.register_fake(f"smart_fast::native_{_operator}", _fake)
