"""The tail of a language model as a task: a divergence of projected hidden states, with gradients to all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import smart_pytorch
import torch
import torch.nn.functional as F
from torch import Tensor

import smart_fast

from .operations import GRADIENT_TOLERANCE, TOLERANCE, divergence64
from .task import Finding, finding

REFERENCE_ELEMENTS = 1 << 24  # float64 logits at a time, a dozen times over


class LinearDivergence:
    """``kind`` of ``input @ weight.T`` against ``target @ weight.T``: hidden states ``[N, H]``, weight ``[V, H]``, at
    the loss's default reduction, forward and gradients to all three.

    smart-pytorch is given whole logits; ours never makes them, nor, for comparison, spares them (`whole`).
    """

    def __init__(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.kind, (self.tokens, self.hidden, self.vocabulary), self.dtype, self.device = kind, shape, dtype, device

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, generator=generator)

        # Logits of order one that differ by as much: nearer ones cancel in whole-logits formulas.
        target = normal(self.tokens, self.hidden)
        moved = target + normal(self.tokens, self.hidden)
        weight = normal(self.vocabulary, self.hidden) / math.sqrt(self.hidden)
        moved, target, weight = (each.to(self.dtype).requires_grad_() for each in (moved, target, weight))
        return moved, target, weight

    def smart_pytorch(self) -> Callable[..., Any]:
        return self._of_logits(getattr(smart_pytorch, f"{self.kind}_loss"))

    def ours(self, backend: str) -> Callable[..., Any]:
        loss = getattr(smart_fast, f"linear_{self.kind}_loss")
        return lambda input, target, weight: loss(input, target, weight, backend=backend)

    def whole(self, backend: str) -> Callable[..., Any]:
        """Our loss of whole logits."""
        loss = getattr(smart_fast, f"{self.kind}_loss")
        return self._of_logits(lambda input, target: loss(input, target, backend=backend))

    def _of_logits(self, loss: Callable[..., Tensor]) -> Callable[..., Any]:
        return lambda input, target, weight: loss(F.linear(input, weight), F.linear(target, weight))

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def forward_backward(*inputs: Tensor) -> tuple[Tensor, ...]:
            loss = function(*inputs)
            return loss, *torch.autograd.grad(loss, inputs)

        return forward_backward

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        """In blocks of tokens, so that the float64 graph fits in memory."""
        loss, *grads = (t.detach() for t in run(*inputs))
        x, t, w = (each.detach().double() for each in inputs)
        w.requires_grad_()
        weight = 1 / self.tokens if self.kind == "kl" else 1.0
        step = max(1, REFERENCE_ELEMENTS // self.vocabulary)
        total, d_weight, off, size = 0.0, torch.zeros_like(w), [0.0, 0.0], [0.0, 0.0]
        for start in range(0, self.tokens, step):
            block = slice(start, start + step)
            sides = [each[block].requires_grad_() for each in (x, t)]
            exact = weight * divergence64(self.kind, F.linear(sides[0], w), F.linear(sides[1], w))
            total += exact.item()
            *to_hidden, to_weight = torch.autograd.grad(exact, (*sides, w))
            d_weight += to_weight
            for side, expected in enumerate(to_hidden):
                off[side] += (grads[side][block].double() - expected).square().sum().item()
                size[side] += expected.square().sum().item()
        tolerance = GRADIENT_TOLERANCE[self.dtype]
        return [
            finding("loss", abs(loss.item() - total) / abs(total), TOLERANCE[self.dtype]),
            finding("gradient to the input", math.sqrt(off[0] / size[0]), tolerance),
            finding("gradient to the target", math.sqrt(off[1] / size[1]), tolerance),
            finding("gradient to the weight", (grads[2].double() - d_weight).norm() / d_weight.norm(), tolerance),
        ]
