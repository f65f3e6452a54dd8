"""The compiled operators behind the backend contract.

Imported once the extension is loaded (`smart_fast.build`), which registers ``torch.ops.smart_fast.native_*``.
An operator in C++ costs little enough that eager mode and torch.compile take the same path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import steps
from .base import DivergenceSpec, Nodes, Step, new_output

_operators = torch.ops.smart_fast


class Native:
    """The contract by the operators of a loaded extension."""

    name = "native"
    nodes: Nodes = "eager"
    loss = None

    def __init__(self, extension: Any) -> None:
        self.extension = extension
        built = extension.built_with()
        self.kinds = frozenset(built["divergences"])
        self._cuda = bool(built["cuda"])

    def unavailable(self) -> str | None:
        return None

    def cannot_serve(self, device: torch.device, kind: str | None = None) -> str | None:
        if kind is not None and kind not in self.kinds:
            return f"the compiled operators do not know the divergence {kind!r}"
        if device.type == "cpu" or (device.type == "cuda" and self._cuda):
            return None
        if device.type == "cuda":
            return (
                "the compiled operators have no CUDA kernels (fix: install nvcc and a CUDA build of torch, build again)"
            )
        return f"the compiled operators do not run on {device.type!r} tensors"

    def perturb(
        self, embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None = None, noise_kind: str = "normal",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # On a CPU noise is read back sooner than it is computed again.
        keep_noise = keep_noise and embed.device.type == "cpu"
        perturbed, noise = _operators.native_perturb.default(embed, seed, noise_var, mask, keep_noise, unit, noise_kind)
        return perturbed, noise if keep_noise else seed

    def perturb_fresh(
        self, embed: Tensor, generator: torch.Generator | None, noise_var: Any, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None = None, noise_kind: str = "normal",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """By a seed that the operator draws as `smart_fast.noise` would."""
        perturbed, noise = self.extension.perturb(
            embed, generator, float(noise_var), mask, keep_noise, unit, noise_kind
        )
        return perturbed, noise

    def ascend(
        self, embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return steps.ascend(
            _operators.native_ascend_norm.default, self._move, self._noise_alone, embed, grad, noise, step, mask,
            keep_noise, unit,
        )  # fmt: skip

    def _noise_alone(
        self, embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, unit: Tensor | None, noise_kind: str
    ) -> Tensor:
        return self.perturb(embed, seed, noise_var, mask, False, unit, noise_kind)[0]

    def _move(self, *args: Any) -> tuple[Tensor, Tensor]:
        operator = _operators.native_ascend.default if torch.compiler.is_compiling() else self.extension.ascend
        perturbed, new_noise = operator(*args)
        return perturbed, new_noise

    def divergence(self, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
        loss: Tensor = _operators.native_divergence.default(input, target, mask, *spec)
        return loss

    def plain_divergence(
        self, input: Any, target: Any, kind: str, reduction: str, alpha: float, fewer_than: float = math.inf
    ) -> Tensor | None:
        """Without this way host time is a quarter more (``python -m bench overhead``)."""
        loss: Tensor | None = self.extension.divergence(input, target, kind, reduction, alpha, fewer_than)
        return loss

    @property
    def gradient_functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return self.extension.edge, self.extension.gradients

    def divergence_forward(
        self, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None, want_input: bool,
        want_target: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        keep = want_input or want_target
        loss, stats, _, _ = _operators.native_divergence_forward.default(input, target, mask, *spec, keep, False, False)
        return loss, stats if keep else None

    def divergence_backward(
        self, grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None,
        want_input: bool, want_target: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        d_input, d_target = _operators.native_divergence_backward.default(
            grad, input, target, stats, mask, *spec, want_input, want_target
        )
        return d_input if want_input else None, d_target if want_target else None

    def divergence_parts(self, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
        parts: Tensor = _operators.native_divergence_parts.default(input, target, mask, *spec)
        return parts

    def divergence_finish(
        self, input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None
    ) -> Tensor:
        shares: Tensor = _operators.native_divergence_finish.default(input, target, stats, mask, *spec)
        return shares

    def fisher_direction(self, logits: Tensor, wide: bool) -> Tensor:
        direction: Tensor = _operators.native_fisher_direction.default(logits, wide)
        return direction

    def empty_cache(self) -> int:
        return int(self.extension.empty_cache())


def _fake_perturb(
    embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, keep_noise: bool, unit: Tensor | None = None,
    noise_kind: str = "normal",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    noise = new_output(embed.shape if keep_noise else (0,), torch.float32, embed.device)
    return new_output(embed.shape, embed.dtype, embed.device), noise


def _fake_perturb_fresh(
    embed: Tensor, generator: torch.Generator | None, noise_var: float, mask: Tensor | None, keep_noise: bool,
    unit: Tensor | None = None, noise_kind: str = "normal",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if embed.device.type == "cuda":
        return new_output(embed.shape, embed.dtype, embed.device), new_output((1,), torch.int64, embed.device)
    return _fake_perturb(embed, embed, noise_var, mask, keep_noise)


def _fake_divergence_forward(
    input: Tensor, target: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float, weight: float,
    scale: float, from_difference: bool, keep: bool, want_input: bool, want_target: bool, rescale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = DivergenceSpec(kind, output, alpha, weight, scale, from_difference)
    loss, stats = steps.fake_divergence_forward(input, target, mask, *spec, keep)
    d_input = new_output(input.shape if want_input else (0,), input.dtype, input.device)
    return loss, stats, d_input, new_output(target.shape if want_target else (0,), target.dtype, target.device)


for _operator, _fake in (
    ("perturb", _fake_perturb),
    ("perturb_fresh", _fake_perturb_fresh),
    ("ascend_norm", steps.fake_ascend_norm),
    ("ascend", steps.fake_ascend),
    ("divergence_forward", _fake_divergence_forward),
    ("divergence_backward", steps.fake_divergence_backward),
    ("divergence_parts", steps.fake_divergence_parts),
    ("divergence_finish", steps.fake_divergence_finish),
    ("fisher_direction", steps.fake_fisher_direction),
):
    torch.library.register_fake(f"smart_fast::native_{_operator}", _fake)
