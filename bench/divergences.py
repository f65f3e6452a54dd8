"""The divergences as tasks, of logits and of projected hidden states, with their float64 references.

References are computed in blocks of rows: the float64 graph of a large vocabulary would not fit in memory.

Every case is of one of two regimes, since kernels take another branch in each. "far" logits differ by O(1), as a
student's from a teacher's. "near" ones differ by 0.01 (max|x - t| <= 1), as a perturbed pass of SMART from the clean
one. There formulas of log-softmax and softmax cancel: their rounding may exceed the result. They are what people run,
so they are timed all the same, but held to what such a formula allows (`rounding_of_formulas`), and every row of the
results says how far off it was. Our kernels are held to the same tolerance in both regimes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import smart_fast

from .task import TOLERANCE, Finding, deviation, finding

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
REFERENCE_ELEMENTS = 1 << 26  # elements of a float64 block of logits
WEIGHT = 0.3  # of the regularizer in a loss: what gradients are multiplied by
REGIMES = {"far": 1.0, "near": 0.01}  # how far apart logits are: standard deviation of x - t

Exact = Callable[[Tensor, Tensor], Tensor]  # two float64 blocks of logits [rows, V] -> the sum of their losses
Rounding = Callable[[Tensor, Tensor], tuple[float, Tensor]]  # the same blocks -> `rounding_of_formulas`


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


def rounding_of_formulas(x: Tensor, t: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
    """What a formula of log-softmax and softmax in ``dtype`` may be off by, of float64 blocks ``[rows, V]``.

    Its terms are p (log p - log q), and log p is rounded to a unit in its last place: ``(loss, gradient)``, the sum of
    ulp p (1 + |log p|) over both sides, and that product for each class, which is what p in a gradient is off by.
    Logits are rounded by as much when they come from a GEMM: hence the |x|.
    """
    ulp = torch.finfo(dtype).eps
    parts = [each.log_softmax(-1) for each in (x, t)]
    off = sum(p.exp() * (1 + p.abs().clamp(max=1e4) + each.abs()) for p, each in zip(parts, (x, t), strict=True))
    assert isinstance(off, Tensor)
    return ulp * float(off.sum()), ulp * off


class _Task:
    """What both kinds of tasks share: which loss of smart-pytorch, at its default reduction."""

    kind: str
    rows: int
    dtype: torch.dtype
    regime: str

    def exact(self, x: Tensor, t: Tensor) -> Tensor:
        """The part of a block of rows in the loss of all."""
        return divergence64(self.kind, x, t) / (self.rows if self.kind == "kl" else 1)

    def theirs(self) -> Callable[..., Any]:
        import smart_pytorch  # not at the top: our own side runs where it is not installed

        loss: Callable[..., Any] = getattr(smart_pytorch, f"{self.kind}_loss")
        return loss

    def rounding(self) -> Rounding | None:
        """What a formula is allowed; None in the far regime, where nothing cancels."""
        if self.regime != "near":
            return None

        def of(x: Tensor, t: Tensor) -> tuple[float, Tensor]:
            loss, gradient = rounding_of_formulas(x, t, self.dtype)
            return (loss / self.rows, gradient / self.rows) if self.kind == "kl" else (loss, gradient)

        return of


class Divergence(_Task):
    """``kl``, ``sym_kl`` or ``js`` of logits ``[..., V]``: forward, and with ``backward`` both gradients."""

    def __init__(
        self, kind: str, shape: tuple[int, ...], dtype: torch.dtype, backward: bool, regime: str, device: torch.device
    ) -> None:
        self.kind, self.shape, self.dtype, self.backward, self.device = kind, shape, dtype, backward, device
        self.rows, self.regime = shape[0], regime

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed(seed)
        target = torch.randn(self.shape, device=self.device, generator=generator)
        moved = torch.randn(self.shape, device=self.device, generator=generator).mul_(REGIMES[self.regime]).add_(target)
        return tuple(each.to(self.dtype).requires_grad_(self.backward) for each in (moved, target))

    def smart_pytorch(self) -> Callable[..., Any]:
        return self.theirs()

    def ours(self, backend: str) -> Callable[..., Any]:
        loss = getattr(smart_fast, f"{self.kind}_loss")
        return lambda input, target: loss(input, target, backend=backend)

    def call(self, function: Callable[..., Any], sides: int = 2) -> Callable[..., Any]:
        """Gradients of WEIGHT times the loss to the first ``sides`` of input and target."""

        def forward_backward(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            loss = function(input, target)
            return (loss, *torch.autograd.grad(WEIGHT * loss, (input, target)[:sides])) if self.backward else (loss,)

        return forward_backward

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        # Our backend "torch" computes smart-pytorch's own formula.
        rounding = self.rounding() if backend in (None, "torch") else None
        return check_logits(run(*inputs), inputs, self.exact, rounding)


class LinearDivergence(_Task):
    """A divergence of ``input @ weight.T`` from ``target @ weight.T``: forward, gradients to all three.

    Hidden states are ``[N, H]``, the weight is ``[V, H]``. smart-pytorch is given whole logits; ours never makes them,
    or does for comparison (`variants`).
    """

    def __init__(
        self, kind: str, rows: int, hidden: int, width: int, dtype: torch.dtype, regime: str, device: torch.device
    ) -> None:
        self.kind, self.rows, self.hidden, self.width = kind, rows, hidden, width
        self.dtype, self.regime, self.device = dtype, regime, device
        self._reference: tuple[Tensor, Reference] | None = None

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed(seed)
        states = torch.randn((2, self.rows, self.hidden), device=self.device, generator=generator)
        weight = torch.randn((self.width, self.hidden), device=self.device, generator=generator)
        weight /= math.sqrt(self.hidden)  # logits of order one, that differ by as much as the hidden states
        tensors = REGIMES[self.regime] * states[0] + states[1], states[1], weight
        return tuple(each.to(self.dtype, copy=True).requires_grad_() for each in tensors)

    def smart_pytorch(self) -> Callable[..., Any]:
        return self._on_whole_logits(self.theirs())

    def _on_whole_logits(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        return lambda input, target, weight: loss(F.linear(input, weight), F.linear(target, weight))

    def ours(self, backend: str) -> Callable[..., Any]:
        loss = getattr(smart_fast, f"linear_{self.kind}_loss")
        return lambda input, target, weight: loss(input, target, weight, backend=backend)

    def variants(self, backend: str) -> dict[str, Callable[..., Any]]:
        """Our loss of whole logits; by the torch backend that is smart-pytorch's own operations, timed already, and
        near ones are lost in the rounding of the logits, whatever is computed of them."""
        loss = getattr(smart_fast, f"{self.kind}_loss")
        whole = self._on_whole_logits(lambda x, t: loss(x, t, backend=backend))
        return {} if backend == "torch" or self.regime == "near" else {"whole logits": whole}

    def call(self, function: Callable[..., Any], sides: int = 2) -> Callable[..., Any]:
        """Gradients of WEIGHT times the loss to the first ``sides`` of input and target, and to the weight."""

        def forward_backward(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            loss = function(input, target, weight)
            return loss, *torch.autograd.grad(WEIGHT * loss, (*(input, target)[:sides], weight))

        return forward_backward

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        if self._reference is None or self._reference[0] is not inputs[0]:  # the same for every contestant
            self._reference = inputs[0], linear64(inputs, self.exact, rounding=self.rounding())
        reference = self._reference[1]
        if backend is not None:
            reference = reference._replace(rounding=None)  # ours project the difference, in which nothing cancels
        return compare_linear(run(*inputs), reference)


class Reference(NamedTuple):
    """Loss and gradients in float64, and what `rounding_of_formulas` comes to in each of them."""

    loss: float
    gradients: list[Tensor]
    rounding: tuple[float, list[float]] | None = None


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, REFERENCE_ELEMENTS // width)
    return (slice(start, start + step) for start in range(0, rows, step))


def check_logits(
    results: Sequence[Tensor], inputs: Sequence[Tensor], exact: Exact, rounding: Rounding | None = None
) -> list[Finding]:
    """``(loss, *gradients of WEIGHT times it)`` against ``exact`` of both ``inputs``; as many as are given. With
    ``rounding``, that much more is allowed."""
    loss, *grads = (each.detach() for each in results)
    width = inputs[0].shape[-1]
    pair = [each.detach().reshape(-1, width) for each in inputs]
    total, off, size = 0.0, [0.0] * len(grads), [0.0] * len(grads)
    more, more_of_grads = 0.0, 0.0
    for block in _blocks(len(pair[0]), width):
        sides = [each[block].double().requires_grad_(bool(grads)) for each in pair]
        if rounding is not None:
            loss_off, grad_off = rounding(*(each.detach() for each in sides))
            more, more_of_grads = more + loss_off, more_of_grads + (WEIGHT * grad_off).square().sum().item()
        value = exact(*sides)
        total += value.item()
        for side, expected in enumerate(torch.autograd.grad(WEIGHT * value, sides[: len(grads)]) if grads else ()):
            off[side] += (grads[side].reshape(-1, width)[block].double() - expected).square().sum().item()
            size[side] += expected.square().sum().item()
    dtype = inputs[0].dtype
    found = [finding("loss", abs(loss.item() - total) / abs(total), TOLERANCE[dtype] + more / abs(total))]
    for name, o, s in zip(("input", "target"), off, size, strict=False):
        allowed = GRADIENT_TOLERANCE[dtype] + math.sqrt(more_of_grads / s)
        found.append(finding(f"gradient to the {name}", math.sqrt(o / s), allowed))
    return found


def linear64(inputs: Sequence[Tensor], exact: Exact, sides: int = 2, rounding: Rounding | None = None) -> Reference:
    """Loss, and gradients of WEIGHT times it to the first ``sides`` of input and target and to the weight, the other
    sides being constant.

    Computed in float64, kept in fp32. What ``rounding`` allows each class goes through the same projections, with
    random signs.
    """
    *hidden, weight = (each.detach() for each in inputs)
    wide = weight.double()
    gradients = [torch.zeros_like(each, dtype=torch.float64) for each in (*hidden[:sides], weight)]
    signs = torch.Generator(weight.device).manual_seed(0)
    total, more, more_of_hidden, more_of_weight = 0.0, 0.0, 0.0, torch.zeros_like(wide)
    for block in _blocks(len(hidden[0]), len(weight)):
        states = [each[block].double() for each in hidden]
        logits = [(each @ wide.t()).requires_grad_() for each in states]
        value = exact(*logits)
        total += value.item()
        for side, grad in enumerate(torch.autograd.grad(WEIGHT * value, logits[:sides])):
            gradients[side][block] = grad @ wide
            gradients[-1].addmm_(grad.t(), states[side])
        if rounding is not None:
            loss_off, grad_off = rounding(*(each.detach() for each in logits))
            drawn = torch.rand(grad_off.shape, dtype=torch.float64, device=wide.device, generator=signs)
            grad_off = WEIGHT * torch.where(drawn < 0.5, grad_off, -grad_off)
            more, more_of_hidden = more + loss_off, more_of_hidden + (grad_off @ wide).square().sum().item()
            more_of_weight.addmm_(grad_off.t(), states[-1])
    kept = [each.float() for each in gradients]
    if rounding is None:
        return Reference(total, kept)
    # Which of the two sides is of no account: both are allowed what their sum may be off by.
    return Reference(total, kept, (more, [math.sqrt(more_of_hidden)] * sides + [more_of_weight.norm().item()]))


def compare_linear(results: Sequence[Tensor], reference: Reference) -> list[Finding]:
    """``(loss, *gradients)`` against what `linear64` gives."""
    loss, *grads = (each.detach() for each in results)
    dtype, total = grads[0].dtype, reference.loss
    names = [*("input", "target")[: len(grads) - 1], "weight"]
    more, more_of_grads = reference.rounding or (0.0, [0.0] * len(grads))
    found = [finding("loss", abs(loss.item() - total) / abs(total), TOLERANCE[dtype] + more / abs(total))]
    for name, grad, exact, allowed in zip(names, grads, reference.gradients, more_of_grads, strict=True):
        tolerance = GRADIENT_TOLERANCE[dtype] + (allowed / float(exact.norm()) if allowed else 0.0)
        found.append(finding(f"gradient to the {name}", deviation([grad], [exact]), tolerance))
    return found
