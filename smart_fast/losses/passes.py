"""The losses of projected hidden states and their gradients, chunk by chunk around the divergence of a backend.

Gradients to logits become gradients to hidden states, weights and biases before the next chunk begins. No autograd
here; `smart_fast.autograd` calls `losses`, `gradients` and `finished`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import STATISTICS
from . import sharded
from .chunks import Chunk, Operands, Plan, chunks
from .divergences import Matrix, divergence
from .gemms import accumulate, product


class Wanted(NamedTuple):
    """Which gradients."""

    input: bool
    target: bool
    weight: bool
    bias: bool
    target_weight: bool = False
    target_bias: bool = False

    def weights(self, head: int) -> tuple[bool, bool]:
        """Of weight and bias of one projection: the first (or only) one, or the target's."""
        return (self.target_weight, self.target_bias) if head else (self.weight, self.bias)

    def of(self, part: Part) -> tuple[bool, bool, bool]:
        """Whether ``part`` is wanted for hidden states, weight and bias."""
        hidden = part.hidden is not None and any(
            wanted and factor is not None for wanted, factor in zip(self, part.hidden, strict=False)
        )
        weight, bias = self.weights(part.head) if part.weight is not None else (False, False)
        return hidden, weight, bias


class Part(NamedTuple):
    """A matrix of gradients to logits ``[n, V]``, and what it is multiplied with."""

    matrix: int  #: the backend's gradient to the logits of the input (0) or of the target (1)
    slope: int | None  #: what `Capped.slope` of the softcap multiplies that by
    hidden: Matrix | None  #: with the projection's weight: the sides that get it, and their factors
    weight: Matrix | None  #: with these multiples of hidden states: the gradient to the weight
    head: int  #: the projection: the first (or only) one, or the target's


def parts(plan: Plan) -> tuple[float, tuple[Part, ...]]:
    """The parameter that the backend's gradients are asked for under, and the products that are made of them.

    With one projection and no softcap each matrix makes two products, whichever sides it serves. Otherwise each side
    needs its own. Where a softcap tells the sides of one matrix M apart, by slopes s and s', the gradient to the weight
    that they share is (s' M)^T (a input + b target) + a ((s - s') M)^T input: of a difference of hidden states and a
    difference of slopes, both taken before they are rounded.
    """
    alpha, matrices = divergence(plan.kind).matrices(plan.alpha)
    if plan.shared and plan.inner is None:
        return alpha, tuple(Part(index, None, matrix, matrix, 0) for index, matrix in enumerate(matrices))
    found = []
    for index, matrix in enumerate(matrices):
        both = plan.shared and None not in matrix
        for side, alone in enumerate((Matrix(matrix.to_input, None), Matrix(None, matrix.to_target))):
            if alone[side] is None:
                continue
            weight = alone if not both else (None, matrix)[side]
            slope, head = None if plan.inner is None else side, 0 if plan.shared else side
            found.append(Part(index, slope, alone, weight, head))
        if both:
            found.append(Part(index, 2, None, Matrix(matrix.to_input, None), 0))
    return alpha, tuple(found)


class Gradients(NamedTuple):
    """Gradients of the sum of the losses, times `Plan.gain`; `finished` makes them what autograd is given."""

    hidden: list[Tensor | None]  # [N, H] for each of the `parts`, before its multipliers
    weights: list[Tensor | None]  # weight, bias, target_weight, target_bias


class Sums:
    """Gradients as they grow chunk by chunk."""

    def __init__(self, plan: Plan, operands: Operands, wanted: Wanted) -> None:
        self._plan, self._wanted = plan, wanted
        self._heads = operands.weight, operands.target_weight
        alpha, self._parts = parts(plan)
        self._spec = plan.spec(alpha, plan.gain)
        needed = [part.matrix for part in self._parts if any(wanted.of(part))]
        self._needed = 0 in needed, 1 in needed
        self._started: set[int] = set()
        # The first chunk overwrites; only masked tokens, which no chunk may hold, need zeros.
        make = functools.partial(
            torch.empty if operands.mask is None else torch.zeros, dtype=plan.precision, device=operands.input.device
        )
        leaves = operands[2:6]
        self.result = Gradients(
            [make(operands[:2][part.head].shape) if wanted.of(part)[0] else None for part in self._parts],
            [make(leaf.shape) if want and leaf is not None else None
             for leaf, want in zip(leaves, wanted[2:], strict=True)],
        )  # fmt: skip

    def add(self, chunk: Chunk, stats: Tensor, upstream: Tensor | None) -> None:
        """The part of one chunk; ``upstream`` (None: ones) multiplies the parts of weights and biases."""
        precision = self._plan.precision
        ones = stats.new_ones(()).expand(chunk.input.shape[:1])
        to_logits = self._plan.backend.divergence_backward(
            ones, chunk.first, chunk.logits, stats, self._spec, chunk.mask, *self._needed
        )
        for part, to_hidden in zip(self._parts, self.result.hidden, strict=True):
            matrix, projection = to_logits[part.matrix], self._heads[part.head]
            if matrix is None or projection is None or not any(self._wanted.of(part)):
                continue
            if chunk.capped is not None and part.slope is not None:
                matrix = matrix * chunk.capped.slope(part.slope)
            matrix = matrix.to(projection.dtype)
            if to_hidden is not None:
                to_hidden[chunk.tokens] = product(matrix, projection, precision)
            if part.weight is None:
                continue
            weight, bias = self.result.weights[2 * part.head :][:2]
            if weight is not None:
                combined = _combine(part.weight, chunk, upstream).to(matrix.dtype)
                accumulate(weight, matrix.t(), combined, part.head in self._started)
            if bias is not None:
                factor = (ones if upstream is None else upstream).to(matrix.dtype).unsqueeze(1)
                share = product(matrix.t(), factor, precision).squeeze(1)
                share *= sum(each for each in part.weight if each is not None)
                bias.copy_(share if part.head not in self._started else bias + share)
            self._started.add(part.head)


def _combine(matrix: Matrix, chunk: Chunk, upstream: Tensor | None) -> Tensor:
    """What the gradient to the weight multiplies a matrix with. Where the multipliers are opposite that is a
    difference of hidden states, taken before it is rounded."""
    sides = zip(matrix, (chunk.input, chunk.target), strict=True)
    parts = [states if factor == 1.0 else factor * states for factor, states in sides if factor is not None]
    combined = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return combined if upstream is None else combined * upstream.unsqueeze(-1)


def losses(
    plan: Plan, operands: Operands, keep: bool, now: Wanted | None
) -> tuple[Tensor, Tensor | None, Gradients | None]:
    """The loss of each token ``[N]``, statistics for `gradients` (if ``keep``), and the gradients ``now`` wanted."""
    operands = operands.cast(plan)
    count, device = operands.input.shape[0], operands.input.device
    loss = torch.zeros(count, dtype=plan.precision, device=device)
    kept = torch.empty((count, STATISTICS), dtype=plan.precision, device=device) if keep else None
    sums = None if now is None else Sums(plan, operands, now)
    spec = plan.spec(plan.alpha)
    for chunk in chunks(plan, operands):
        sides = chunk.first, chunk.logits
        stats: Tensor | None
        if plan.group is not None:
            rows, stats, _ = sharded.rows(plan.backend, *sides, spec, chunk.mask, plan.group)
        else:
            rows, stats = plan.backend.divergence_forward(*sides, spec, chunk.mask, keep, keep)
        loss[chunk.tokens] = rows
        if kept is not None:
            assert stats is not None
            kept[chunk.rows] = stats
        if sums is not None:
            assert stats is not None
            sums.add(chunk, stats, None)
    return loss, kept, None if sums is None else sums.result


def gradients(plan: Plan, operands: Operands, stats: Tensor, upstream: Tensor, wanted: Wanted) -> Gradients:
    """Gradients, the logits being computed once more. Those to weights and biases are those of
    ``(upstream * losses).sum()``, ``upstream`` ``[N]``; those to hidden states still lack that factor.
    """
    operands = operands.cast(plan)
    sums = Sums(plan, operands, wanted)
    for chunk in chunks(plan, operands):
        sums.add(chunk, stats[chunk.rows], upstream[chunk.tokens].to(plan.precision))
    return sums.result


def finished(
    plan: Plan, sums: Gradients, wanted: Wanted, upstream: Tensor, common: Tensor, dtypes: list[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """Gradients to the first six of `Operands` in ``dtypes``. ``sums`` are used up.

    ``upstream`` (a scalar, or ``[N]``) multiplies those to hidden states, the scalar ``common`` the others. With the
    vocabulary sharded, those to hidden states are partial sums: one all_reduce of ``[N, H]`` for each matrix.
    """
    sides: list[Tensor | None] = [None, None]
    for part, hidden in zip(parts(plan)[1], sums.hidden, strict=True):
        if hidden is None or part.hidden is None:
            continue
        if plan.group is not None:
            sharded.all_reduce(hidden, plan.group)
        for side, factor in enumerate(part.hidden):
            if wanted[side] and factor is not None:
                scaled = hidden * (upstream * (factor / plan.gain)).unsqueeze(-1)
                sides[side] = scaled.to(dtypes[side])
    rest = [None if each is None else each.mul_(common / plan.gain).to(dtype)
            for each, dtype in zip(sums.weights, dtypes[2:], strict=True)]  # fmt: skip
    return *sides, *rest
