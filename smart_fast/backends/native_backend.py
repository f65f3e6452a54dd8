"""The compiled operators behind the backend contract.

Imported once the extension is loaded (`smart_fast.native_build`), which registers ``torch.ops.smart_fast.native_*``.
An operator in C++ costs little enough that eager mode and torch.compile take the same path.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import fused
from .base import Step, new_output

name = "native"

_perturb = torch.ops.smart_fast.native_perturb.default
_ascend_measure = torch.ops.smart_fast.native_ascend_measure.default
_ascend = torch.ops.smart_fast.native_ascend.default
_divergence_forward = torch.ops.smart_fast.native_divergence_forward.default
_divergence_backward = torch.ops.smart_fast.native_divergence_backward.default

extension: ModuleType | None = None  # set by smart_fast.backends


def perturb(
    embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, keep_noise: bool
) -> tuple[Tensor, Tensor]:
    # On a CPU noise is read back sooner than it is computed again.
    keep_noise = keep_noise and embed.device.type == "cpu"
    perturbed, noise = _perturb(embed, seed, noise_var, mask, keep_noise)
    return perturbed, noise if keep_noise else seed


def _noise_alone(embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None) -> Tensor:
    return perturb(embed, seed, noise_var, mask, False)[0]


def ascend(
    embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, keep_noise: bool
) -> tuple[Tensor, Tensor | None]:
    return fused.ascend(_ascend_measure, _ascend, _noise_alone, embed, grad, noise, step, mask, keep_noise)


def divergence_forward(
    input: Tensor, target: Tensor, kind: str, elementwise: bool, alpha: float, weight: float, mask: Tensor | None,
    want_input: bool, want_target: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, Tensor | None] | None]:  # fmt: skip
    wanted = want_input or want_target
    # Gradients beside the loss save a CPU a second reading of the logits. Not in fp16, where they could underflow
    # before a loss scale reaches them; not for a compiler, which owns the backward pass.
    now = (
        wanted
        and not elementwise
        and input.device.type == "cpu"
        and input.dtype != torch.float16
        and target.dtype != torch.float16
        and not torch.compiler.is_compiling()
    )
    loss, stats, d_input, d_target = _divergence_forward(
        input, target, mask, kind, elementwise, alpha, weight, wanted and not now, now and want_input,
        now and want_target,
    )  # fmt: skip
    if now:
        return loss, None, (d_input if want_input else None, d_target if want_target else None)
    return loss, stats if wanted else None, None


def divergence_backward(
    grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, kind: str, elementwise: bool, alpha: float,
    weight: float, mask: Tensor | None, want_input: bool, want_target: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    d_input, d_target = _divergence_backward(
        grad, input, target, stats, mask, kind, elementwise, alpha, weight, want_input, want_target
    )
    return d_input if want_input else None, d_target if want_target else None


def cannot_serve(device: torch.device) -> str | None:
    """Why tensors on ``device`` cannot be served, or None."""
    if device.type == "cpu" or (device.type == "cuda" and extension is not None and extension.built_with()["cuda"]):
        return None
    if device.type == "cuda":
        return "the compiled operators have no CUDA kernels (fix: install nvcc and a CUDA build of torch, build again)"
    return f"the compiled operators do not run on {device.type!r} tensors"


def _fake_perturb(
    embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, keep_noise: bool
) -> tuple[Tensor, Tensor]:
    noise = new_output(embed.shape if keep_noise else (0,), torch.float32, embed.device)
    return new_output(embed.shape, embed.dtype, embed.device), noise


def _fake_divergence_forward(
    input: Tensor, target: Tensor, mask: Tensor | None, kind: str, elementwise: bool, alpha: float, weight: float,
    keep: bool, want_input: bool, want_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, stats = fused.fake_divergence_forward(input, target, mask, kind, elementwise, alpha, weight, keep)
    d_input = new_output(input.shape if want_input else (0,), input.dtype, input.device)
    return loss, stats, d_input, new_output(target.shape if want_target else (0,), target.dtype, target.device)


for _operator, _fake in (
    ("perturb", _fake_perturb),
    ("ascend_measure", fused.fake_ascend_measure),
    ("ascend", fused.fake_ascend),
    ("divergence_forward", _fake_divergence_forward),
    ("divergence_backward", fused.fake_divergence_backward),
):
    torch.library.register_fake(f"smart_fast::native_{_operator}", _fake)
