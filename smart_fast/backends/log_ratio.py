"""The divergence part of the backend contract in PyTorch operations, by formulas that do not cancel.

With p = softmax(x), q = softmax(t), d = x - t, everything is written in the log-ratio

    r = log p - log q = d - D,    D = log1p(sum q expm1(d))   where max |d| <= 1
                                  D = lse(x) - lse(t)         elsewhere: expm1 would overflow

so that losses of nearly equal sides keep their digits. fp32 inside, float64 for float64 logits. For losses that need
more than `smart_fast.backends.torch_backend` (which is smart-pytorch's order of operations) and have no kernel at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .base import STATISTICS, DivergenceSpec

name = "log_ratio"


class _Sides(NamedTuple):
    """Logits after scaling and masking, and their difference; classes that are masked on both sides have d = 0."""

    x: Tensor
    t: Tensor
    d: Tensor


class _Ratio(NamedTuple):
    r: Tensor
    p: Tensor
    q: Tensor
    gap: Tensor  # p - q


def divergence_forward(
    input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None, want_input: bool, want_target: bool
) -> tuple[Tensor, Tensor | None]:
    """See `FusedBackend.divergence_forward`."""
    stats = merge(divergence_measure(input, target, spec, mask).unsqueeze(0))
    rows = None
    if spec.output != "terms" or spec.kind == "kl":
        rows = divergence_finish(input, target, stats, spec, mask)
        if spec.kind == "kl":
            stats[:, 5] = rows
    if spec.output == "terms":
        loss = terms(input, target, stats, spec, mask)
    else:
        assert rows is not None
        loss = spec.weight * (rows.sum() if spec.output == "sum" else rows.view(input.shape[:-1]))
    return loss, stats if want_input or want_target else None


def divergence_backward(
    grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None,
    want_input: bool, want_target: bool, reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """See `FusedBackend.divergence_backward`. ``reduce`` completes sums ``[2, ..., 1]`` over the columns at hand where
    these are a slice of the vocabulary; only gradients of terms need it."""
    sides = _sides(input, target, spec, mask)
    ratio = _ratio(sides, stats)
    if spec.output == "terms":
        dx, dt = _backward_of_terms(grad.to(ratio.r.dtype), ratio, spec, reduce)
    else:
        weighted = grad.to(ratio.r.dtype) * spec.weight
        dx, dt = _backward_of_rows(weighted.unsqueeze(-1), ratio, stats, spec)

    def finished(gradient: Tensor, like: Tensor) -> Tensor:
        gradient = gradient * spec.scale
        return (gradient if mask is None else torch.where(mask.unsqueeze(-1), gradient, 0.0)).to(like.dtype)

    return finished(dx, input) if want_input else None, finished(dt, target) if want_target else None


def divergence_measure(input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    """See `FusedBackend.divergence_measure`."""
    x, t, d = _sides(input, target, spec, mask)
    max_x, exp_x = _shifted_exp(x)
    max_t, exp_t = _shifted_exp(t)
    columns = (max_x, exp_x.sum(-1), max_t, exp_t.sum(-1), d.abs().amax(-1), (exp_t * d.expm1()).sum(-1))
    return torch.stack(columns, -1).view(-1, STATISTICS)


def merge(measured: Tensor) -> Tensor:
    """Statistics ``[rows, 6]`` of whole rows from those of their slices, ``[slices, rows, 6]``; the KL is left zero."""
    max_x, sum_x, max_t, sum_t, max_d, sum_e = measured.unbind(-1)
    peak_x, peak_t = max_x.amax(0), max_t.amax(0)
    share_x, share_t = (max_x - peak_x).exp(), (max_t - peak_t).exp()
    total_x, total_t = (sum_x * share_x).sum(0), (sum_t * share_t).sum(0)
    near = ((sum_e * share_t).sum(0) / total_t).log1p()
    far = (peak_x - peak_t) + (total_x.log() - total_t.log())
    shift = torch.where(max_d.amax(0) <= 1.0, near, far)
    columns = (peak_t, total_t.reciprocal(), peak_x, total_x.reciprocal(), shift, torch.zeros_like(shift))
    return torch.stack(columns, -1)


def divergence_finish(
    input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None
) -> Tensor:
    """See `FusedBackend.divergence_finish`. Sums of terms that are not negative, q f(r) with f(r) = expm1(r) - r."""
    r, p, q, gap = _ratio(_sides(input, target, spec, mask), stats)
    if spec.kind == "js":
        columns = spec.alpha * _times(p + q, _log_cosh(0.5 * r))
    else:
        near, series = r.abs() < 0.5, _series(r)
        columns = torch.where(near, q * series, gap - _times(q, r))
        if spec.kind == "sym_kl":
            opposite = torch.where(near, p * _series(-r), _times(p, r) - gap)
            columns = spec.alpha * columns + opposite
    rows = columns.sum(-1)
    return (rows if mask is None else torch.where(mask, rows, 0.0)).reshape(-1)


def terms(input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    """The elementwise terms of the columns at hand, in the promoted dtype of the logits; masked rows give zeros."""
    r, p, q, gap = _ratio(_sides(input, target, spec, mask), stats)
    if spec.kind == "kl":
        values = -_times(q, r)
    elif spec.kind == "sym_kl":
        values = _times(gap, r) + (1.0 - spec.alpha) * _times(q, r)
    else:
        values = spec.alpha * _times(p + q, _log_cosh(0.5 * r))
    if mask is not None:
        values = torch.where(mask.unsqueeze(-1), values, 0.0)
    return values.to(torch.promote_types(input.dtype, target.dtype))


def _backward_of_rows(g: Tensor, ratio: _Ratio, stats: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    r, _, q, gap = ratio
    if spec.kind == "kl":
        return g * gap, -g * _times(q, r + stats[:, 5].view(*r.shape[:-1], 1))
    if spec.kind == "sym_kl":
        return spec.alpha * g * gap, -g * gap
    dx = 0.5 * spec.alpha * g * gap
    return dx, -dx


def _backward_of_terms(
    g: Tensor, ratio: _Ratio, spec: DivergenceSpec, reduce: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """From d/dx_j sum_i c_i log p_i = c_j - p_j S(c), S(c) the sum of c over the row, with p = q + gap where q nearly
    cancels."""
    r, p, q, gap = ratio
    if spec.kind == "js":
        factors = [0.5 * g * (p + q)]
    else:
        factors = [g * q, g * (q - _times(q, r)) if spec.kind == "kl" else g * p]
    sums = torch.stack([each.sum(-1, keepdim=True) for each in factors])
    if reduce is not None:
        sums = reduce(sums)
    first = sums[0]
    if spec.kind == "js":
        dx = spec.alpha * (p * (first - g) + 0.5 * g * gap)
        return dx, spec.alpha * (q * (first - g) - 0.5 * g * gap)
    dx = gap * first + q * (first - g)
    second = sums[1]
    if spec.kind == "kl":
        return dx, q * (g - second) - g * _times(q, r)
    return spec.alpha * dx, q * second - g * p


def _sides(input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> _Sides:
    dtype = torch.float64 if torch.float64 in (input.dtype, target.dtype) else torch.float32
    first, t = input.to(dtype), target.to(dtype)
    if mask is not None:
        first, t = (torch.where(mask.unsqueeze(-1), each, 0.0) for each in (first, t))
    if spec.scale != 1.0:
        first, t = first * spec.scale, t * spec.scale
    if spec.relative:
        d = torch.where(t == -math.inf, 0.0, first)
        return _Sides(t + d, t, d)
    return _Sides(first, t, torch.where((first == t) & t.isinf(), 0.0, first - t))


def _shifted_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum over the last dimension and exp(logits - maximum); zeros where no logit is finite."""
    peak = logits.amax(-1)
    return peak, (logits - torch.where(peak == -math.inf, 0.0, peak).unsqueeze(-1)).exp()


def _ratio(sides: _Sides, stats: Tensor) -> _Ratio:
    x, t, d = sides
    max_t, inverse_t, max_x, inverse_x, shift, _ = stats.view(*x.shape[:-1], STATISTICS).unsqueeze(-2).unbind(-1)
    r = d - shift
    p, q = (x - max_x).exp() * inverse_x, (t - max_t).exp() * inverse_t
    return _Ratio(r, p, q, torch.where(r.abs() < 0.5, q * r.expm1(), p - q))


def _times(probability: Tensor, value: Tensor) -> Tensor:
    """Their product, zero where the probability is, whatever the value."""
    return torch.where(probability == 0, 0.0, probability * value)


def _series(r: Tensor) -> Tensor:
    """f(r) = expm1(r) - r for |r| < 1/2: r^2/2 (1 + r/3 (1 + r/4 (...))), to the precision of the dtype."""
    last = 14 if r.dtype == torch.float64 else 8
    value = torch.ones_like(r)
    for n in range(last, 2, -1):
        value.mul_(r).div_(n).add_(1.0)
    return value.mul_(r).mul_(r).mul_(0.5)


def _log_cosh(y: Tensor) -> Tensor:
    size = y.abs()
    near = ((-size).expm1().square() / (2.0 * (-size).exp())).log1p()
    return torch.where(size < 1.0, near, size + (-2.0 * size).exp().log1p() - math.log(2.0))
