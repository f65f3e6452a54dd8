"""The divergences as tasks, of logits and of projected hidden states, with their float64 references.

References are computed in blocks of rows: the float64 graph of a large vocabulary would not fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import smart_pytorch
import torch
import torch.nn.functional as F
from torch import Tensor

import smart_fast

from .task import TOLERANCE, Finding, deviation, finding

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
REFERENCE_ELEMENTS = 1 << 26  # elements of a float64 block of logits

Exact = Callable[[Tensor, Tensor], Tensor]  # two float64 blocks of logits [rows, V] -> the sum of their losses


def divergence64(kind: str, x: Tensor, t: Tensor) -> Tensor:
    """The sum over rows, in float64, with smart-pytorch's rule of what is held constant."""
    log_p, log_q = x.log_softmax(-1), t.log_softmax(-1)
    if kind == "kl":
        return (log_q.exp() * (log_q - log_p)).sum()
    p, q = log_p.detach().exp(), log_q.detach().exp()
    if kind == "sym_kl":
        return (q * (q.log() - log_p)).sum() + (p * (p.log() - log_q)).sum()
    m = (p + q) / 2
    return (m * (2 * m.log() - log_p - log_q)).sum()


class _Task:
    """What both kinds of tasks share: which loss of smart-pytorch, at its default reduction."""

    kind: str
    rows: int

    def exact(self, x: Tensor, t: Tensor) -> Tensor:
        """The part of a block of rows in the loss of all."""
        return divergence64(self.kind, x, t) / (self.rows if self.kind == "kl" else 1)

    def theirs(self) -> Callable[..., Any]:
        loss: Callable[..., Any] = getattr(smart_pytorch, f"{self.kind}_loss")
        return loss


class Divergence(_Task):
    """``kl``, ``sym_kl`` or ``js`` of logits ``[..., V]``: forward, and with ``backward`` both gradients."""

    def __init__(
        self, kind: str, shape: tuple[int, ...], dtype: torch.dtype, backward: bool, device: torch.device
    ) -> None:
        self.kind, self.shape, self.dtype, self.backward, self.device = kind, shape, dtype, backward, device
        self.rows = shape[0]

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed(seed)
        target = torch.randn(self.shape, device=self.device, generator=generator)
        # Logits that differ by O(1): nearer ones cancel in smart-pytorch's formulas, and rivals must be right to count.
        moved = torch.randn(self.shape, device=self.device, generator=generator).add_(target)
        return tuple(each.to(self.dtype).requires_grad_(self.backward) for each in (moved, target))

    def smart_pytorch(self) -> Callable[..., Any]:
        return self.theirs()

    def ours(self, backend: str) -> Callable[..., Any]:
        loss = getattr(smart_fast, f"{self.kind}_loss")
        return lambda input, target: loss(input, target, backend=backend)

    def call(self, function: Callable[..., Any], sides: int = 2) -> Callable[..., Any]:
        """Gradients to the first ``sides`` of input and target."""

        def forward_backward(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            loss = function(input, target)
            return (loss, *torch.autograd.grad(loss, (input, target)[:sides])) if self.backward else (loss,)

        return forward_backward

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        return check_logits(run(*inputs), inputs, self.exact)


class LinearDivergence(_Task):
    """A divergence of ``input @ weight.T`` from ``target @ weight.T``: forward, gradients to all three.

    Hidden states are ``[N, H]``, the weight is ``[V, H]``. smart-pytorch is given whole logits; ours never makes them,
    or does for comparison (`variants`).
    """

    def __init__(self, kind: str, rows: int, hidden: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kind, self.rows, self.hidden, self.width = kind, rows, hidden, width
        self.dtype, self.device = dtype, device
        self._reference: tuple[Tensor, tuple[float, list[Tensor]]] | None = None

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed(seed)
        states = torch.randn((2, self.rows, self.hidden), device=self.device, generator=generator)
        weight = torch.randn((self.width, self.hidden), device=self.device, generator=generator)
        weight /= math.sqrt(self.hidden)  # logits of order one, that differ by as much
        tensors = states[0] + states[1], states[1], weight
        return tuple(each.to(self.dtype, copy=True).requires_grad_() for each in tensors)

    def smart_pytorch(self) -> Callable[..., Any]:
        return self._on_whole_logits(self.theirs())

    def _on_whole_logits(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        return lambda input, target, weight: loss(F.linear(input, weight), F.linear(target, weight))

    def ours(self, backend: str) -> Callable[..., Any]:
        loss = getattr(smart_fast, f"linear_{self.kind}_loss")
        return lambda input, target, weight: loss(input, target, weight, backend=backend)

    def variants(self, backend: str) -> dict[str, Callable[..., Any]]:
        """Our loss of whole logits; by the torch backend that is smart-pytorch's own operations, timed already."""
        loss = getattr(smart_fast, f"{self.kind}_loss")
        whole = self._on_whole_logits(lambda x, t: loss(x, t, backend=backend))
        return {} if backend == "torch" else {"whole logits": whole}

    def call(self, function: Callable[..., Any], sides: int = 2) -> Callable[..., Any]:
        """Gradients to the first ``sides`` of input and target, and to the weight."""

        def forward_backward(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            loss = function(input, target, weight)
            return loss, *torch.autograd.grad(loss, (*(input, target)[:sides], weight))

        return forward_backward

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        if self._reference is None or self._reference[0] is not inputs[0]:  # the same for every contestant
            self._reference = inputs[0], linear64(inputs, self.exact)
        return compare_linear(run(*inputs), self._reference[1])


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, REFERENCE_ELEMENTS // width)
    return (slice(start, start + step) for start in range(0, rows, step))


def check_logits(results: Sequence[Tensor], inputs: Sequence[Tensor], exact: Exact) -> list[Finding]:
    """``(loss, *gradients)`` against ``exact`` of both ``inputs`` ``[..., V]``; as many gradients as are given."""
    loss, *grads = (each.detach() for each in results)
    width = inputs[0].shape[-1]
    pair = [each.detach().reshape(-1, width) for each in inputs]
    total, off, size = 0.0, [0.0] * len(grads), [0.0] * len(grads)
    for block in _blocks(len(pair[0]), width):
        sides = [each[block].double().requires_grad_(bool(grads)) for each in pair]
        value = exact(*sides)
        total += value.item()
        for side, expected in enumerate(torch.autograd.grad(value, sides[: len(grads)]) if grads else ()):
            off[side] += (grads[side].reshape(-1, width)[block].double() - expected).square().sum().item()
            size[side] += expected.square().sum().item()
    found = [finding("loss", abs(loss.item() - total) / abs(total), TOLERANCE[inputs[0].dtype])]
    for name, o, s in zip(("input", "target"), off, size, strict=False):
        found.append(finding(f"gradient to the {name}", math.sqrt(o / s), GRADIENT_TOLERANCE[inputs[0].dtype]))
    return found


def linear64(inputs: Sequence[Tensor], exact: Exact, sides: int = 2) -> tuple[float, list[Tensor]]:
    """Loss, and gradients to the first ``sides`` of input and target and to the weight, where the others are constant.

    Computed in float64, kept in fp32.
    """
    *hidden, weight = (each.detach() for each in inputs)
    wide = weight.double()
    gradients = [torch.zeros_like(each, dtype=torch.float64) for each in (*hidden[:sides], weight)]
    total = 0.0
    for block in _blocks(len(hidden[0]), len(weight)):
        states = [each[block].double() for each in hidden]
        logits = [(each @ wide.t()).requires_grad_() for each in states]
        value = exact(*logits)
        total += value.item()
        for side, grad in enumerate(torch.autograd.grad(value, logits[:sides])):
            gradients[side][block] = grad @ wide
            gradients[-1].addmm_(grad.t(), states[side])
    return total, [each.float() for each in gradients]


def compare_linear(results: Sequence[Tensor], reference: tuple[float, list[Tensor]]) -> list[Finding]:
    """``(loss, *gradients)`` against what `linear64` gives."""
    loss, *grads = (each.detach() for each in results)
    total, expected = reference
    dtype = grads[0].dtype
    names = [*("input", "target")[: len(grads) - 1], "weight"]
    found = [finding("loss", abs(loss.item() - total) / abs(total), TOLERANCE[dtype])]
    for name, grad, exact in zip(names, grads, expected, strict=True):
        found.append(finding(f"gradient to the {name}", deviation([grad], [exact]), GRADIENT_TOLERANCE[dtype]))
    return found
