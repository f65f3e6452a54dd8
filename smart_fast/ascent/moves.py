"""Steps other than a fused one, for `climb`: by a torch optimizer, and within bounds of the perturbed embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import autograd
from ..backends import updates
from ..backends.base import Backend, Step


class Optimized:
    """Steps of a torch optimizer on the noise, then the ball of the update rule. Kernels have no part in them.

    ``factory([noise])`` makes the optimizer of each embedding, once in a climb of ``count`` of them, which take turns.
    """

    def __init__(self, factory: Callable[[list[Tensor]], torch.optim.Optimizer], count: int) -> None:
        self.factory, self.count = factory, count
        self.running: list[tuple[Tensor, torch.optim.Optimizer]] = []
        self.calls = 0

    def __call__(
        self, backend: Backend, embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None,
        keep_noise: bool, unit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `smart_fast.autograd.ascend`."""
        noise = autograd.noise_values(backend, embed, noise, step.noise_var, mask, unit, step.noise).detach()
        if len(self.running) < self.count:
            made = torch.empty_like(noise, dtype=_wide(noise)).requires_grad_()
            optimizer = self.factory([made])
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(
                    f"optimizer must make a torch.optim.Optimizer of [noise], it made {type(optimizer).__name__}"
                )
            self.running.append((made, optimizer))
        leaf, optimizer = self.running[self.calls % self.count]
        self.calls += 1
        with torch.no_grad():
            real = grad.isfinite().all(-1, keepdim=True)
            if mask is not None:
                real = real & mask.unsqueeze(-1)
                unit = None if unit is None else torch.where(mask.unsqueeze(-1), unit, 0.0)
            leaf.copy_(noise)
            leaf.grad = torch.where(real, -grad, 0.0).to(leaf.dtype)  # optimizers descend
            optimizer.step()
            moved, _ = updates.rule(step.update).finish(leaf, step.norm_fn, step.epsilon, unit)
            moved = moved.clone() if mask is None else torch.where(mask.unsqueeze(-1), moved, 0.0)
            perturbed = (embed.detach() + moved).to(embed.dtype)
        return autograd.shift(embed, perturbed, mask), moved


class Bounded:
    """Noise within ``low <= embed + noise <= high``: what is outside is clamped, in PyTorch, after each ``move``.

    Of an embedding inside of the bounds clamping only makes noise smaller, entry by entry: what was in a ball stays in
    it. The noise that the next step starts from is what is left; masked rows are left alone.
    """

    def __init__(self, low: Any, high: Any, move: Callable[..., Any] = autograd.ascend) -> None:
        self.low, self.high, self.moved = low, high, move

    def start(
        self, backend: Backend, embed: Tensor, noise_var: Any, generator: torch.Generator | None, mask: Tensor | None,
        keep_noise: bool, unit: Tensor | None = None, noise_kind: str = "normal",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `smart_fast.autograd.perturb`."""
        given = backend, embed, noise_var, generator, mask, True, unit, noise_kind
        perturbed, noise = autograd.perturb(*given)
        noise = autograd.noise_values(backend, embed, noise, noise_var, mask, unit, noise_kind)
        return self._within(embed, perturbed, noise, mask)

    def move(
        self, backend: Backend, embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None,
        keep_noise: bool, unit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `smart_fast.autograd.ascend`."""
        perturbed, noise = self.moved(backend, embed, grad, noise, step, mask, True, unit)
        return self._within(embed, perturbed, noise, mask)

    def _within(self, embed: Tensor, perturbed: Tensor, noise: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        clean, found, noise = embed.detach(), perturbed.detach(), noise.detach()
        clamped = found.clamp(self.low, self.high)
        inside = clamped == found
        if mask is not None:
            inside = inside | ~mask.unsqueeze(-1)
        noise = torch.where(inside, noise, clamped.to(_wide(noise)) - clean)
        return autograd.shift(embed, torch.where(inside, found, clamped), mask), noise


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
