"""The Triton kernels behind the backend contract: allocate, choose a tile, launch.

Imported only when Triton is there and a backend is asked for it. In eager mode the kernels are launched directly, by
plans (triton_plan.py); when torch.compile traces, the registered operators of `triton_launch` are called instead (see
`smart_fast.autograd`). Where the native extension is loaded, an ordinary step in eager mode is that extension's
(csrc/triton.cpp), nodes of the graph included: without it such a step costs the host more than twice as much (``python
-m bench host``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.divergence_formulas import KINDS
from ..noise import draw_seed
from . import steps, triton_plan
from . import triton_launch as ops
from .base import DivergenceSpec, Nodes, PlainDivergence, Step
from .triton_plan import Planned

Gradients = tuple[Callable[..., Any], Callable[..., Any]]


def _planned(launcher: Callable[..., Any]) -> Callable[..., Any]:
    return launcher if ops.INTERPRETED else Planned(launcher)  # interpreted kernels are not compiled


_PLANNED = {
    each: _planned(each)
    for each in (
        ops.perturb, ops.ascend_norm, ops.ascend, ops.divergence_forward, ops.divergence_backward, ops.divergence_parts,
        ops.divergence_finish, ops.fisher_direction,
    )
}  # fmt: skip


def _call(launcher: Callable[..., Any], registered: Callable[..., Any], anchor: Tensor, *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return registered(*args)
    if anchor.is_cuda and anchor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(anchor.device):  # which is where Triton launches
            return _PLANNED[launcher](*args)
    return _PLANNED[launcher](*args)


def _noise_alone(embed: Tensor, *args: Any) -> Tensor:
    perturbed: Tensor = _call(ops.perturb, torch.ops.smart_fast.perturb, embed, embed, *args)
    return perturbed


def _norm(grad: Tensor, *args: Any) -> Tensor:
    measured: Tensor = _call(ops.ascend_norm, torch.ops.smart_fast.ascend_norm, grad, grad, *args)
    return measured


def _move(embed: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    perturbed, noise = _call(ops.ascend, torch.ops.smart_fast.ascend, embed, embed, *args)
    return perturbed, noise


class Triton:
    """The contract by the launchers of triton_launch.py, as far as possible through ``extension``."""

    name = "triton"
    kinds = frozenset(KINDS)
    loss = None
    divergence: Callable[[Tensor, Tensor, DivergenceSpec, Tensor | None], Tensor] | None = None
    plain_divergence: PlainDivergence | None = None
    gradient_functions: Gradients | None = None

    def __init__(self, extension: Any = None) -> None:
        self.nodes: Nodes = "never" if extension is None else "eager"
        if extension is None:
            return
        self.extension = extension
        self.divergence = self._differentiable
        self.plain_divergence = extension.triton.plain_divergence
        self.gradient_functions = extension.edge, extension.gradients
        own = ops.perturb, ops.ascend, ops.divergence_forward, ops.divergence_backward
        triton_plan.use(extension, {each.__name__: Planned(each) for each in own})

    def unavailable(self) -> str | None:
        if ops.INTERPRETED:
            return None
        if not torch.cuda.is_available() and not (hasattr(torch, "xpu") and torch.xpu.is_available()):
            return (
                "no GPU is visible to torch; set TRITON_INTERPRET=1 before the first import to try the kernels on CPU"
            )
        return None

    def cannot_serve(self, device: torch.device, kind: str | None = None) -> str | None:
        if kind is not None and kind not in self.kinds:
            return f"the Triton kernels do not know the divergence {kind!r}"
        if device.type in ("cuda", "xpu") and not ops.INTERPRETED:
            return None
        if device.type == "cpu" and ops.INTERPRETED:
            return None
        if device.type == "cpu":
            return "CPU tensors need TRITON_INTERPRET=1 (kernels compile for GPUs only)"
        return f"Triton kernels do not run on {device.type!r} tensors"

    def _differentiable(self, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
        loss: Tensor = self.extension.triton.divergence(input, target, mask, *spec)
        return loss

    def perturb(
        self, embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None = None, noise_kind: str = "normal",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # The seed is all that is kept: a GPU computes noise again sooner than it reads it back.
        return _noise_alone(embed, seed, noise_var, mask, unit, noise_kind), seed

    def perturb_fresh(
        self, embed: Tensor, generator: torch.Generator | None, noise_var: Any, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None, noise_kind: str = "normal",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self.nodes == "eager":
            perturbed, seed = self.extension.triton.perturb(embed, generator, float(noise_var), mask, unit, noise_kind)
            return perturbed, seed
        seed = draw_seed(embed.device, generator)
        return self.perturb(embed, seed, float(noise_var), mask, keep_noise, unit, noise_kind)

    def ascend(
        self, embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        move = self.extension.triton.ascend if self.nodes == "eager" and not torch.compiler.is_compiling() else _move
        return steps.ascend(_norm, move, _noise_alone, embed, grad, noise, step, mask, keep_noise, unit)

    def empty_cache(self) -> int:
        return 0

    def divergence_forward(
        self,
        input: Tensor,
        target: Tensor,
        spec: DivergenceSpec,
        mask: Tensor | None,
        want_input: bool,
        want_target: bool,
    ) -> tuple[Tensor, Tensor | None]:
        keep = want_input or want_target
        loss, stats = _call(
            ops.divergence_forward, torch.ops.smart_fast.divergence_forward, input, input, target, mask, *spec, keep
        )
        return loss, stats if keep else None

    def divergence_backward(
        self, grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None,
        want_input: bool, want_target: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        dx, dt = _call(
            ops.divergence_backward, torch.ops.smart_fast.divergence_backward, input, grad, input, target, stats, mask,
            *spec, want_input, want_target,
        )  # fmt: skip
        return dx if want_input else None, dt if want_target else None

    def divergence_parts(self, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
        partials: Tensor = _call(
            ops.divergence_parts, torch.ops.smart_fast.divergence_parts, input, input, target, mask, *spec
        )
        return partials

    def divergence_finish(
        self, input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None
    ) -> Tensor:
        losses: Tensor = _call(
            ops.divergence_finish, torch.ops.smart_fast.divergence_finish, input, input, target, stats, mask, *spec
        )
        return losses

    def fisher_direction(self, logits: Tensor, wide: bool) -> Tensor:
        direction: Tensor = _call(ops.fisher_direction, torch.ops.smart_fast.fisher_direction, logits, logits, wide)
        return direction


TRITON = Triton()


def through(extension: Any) -> Triton:
    """`TRITON` by way of the native extension. Interpreted kernels are not launched."""
    return TRITON if ops.INTERPRETED else Triton(extension)
