"""The divergence part of the backend contract in PyTorch operations, by formulas that do not cancel.

With p = softmax(x), q = softmax(t), d = x - t, everything is written in the log-ratio

    r = log p - log q = d - D,    D = log1p(sum q expm1(d))   where max |d| <= 1
                                  D = lse(x) - lse(t)         elsewhere: expm1 would overflow

so that losses of nearly equal sides keep their digits. fp32 inside, float64 for float64 logits. For losses that need
more than `smart_fast.backends.pytorch` (which is smart-pytorch's order of operations) and have no kernel at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .base import DivergenceSpec

name = "log_ratio"
differentiable = False  # by itself; see `smart_fast.autograd`

_BLOCK = 1 << 16  # elements; half a dozen temporaries of that many floats fit a core's cache


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
    """See `Backend.divergence_forward`."""
    losses, kept = [], []
    for x, t, keep in _blocks(input, target, mask):
        sides = _sides(x, t, spec, keep)
        stats = merge(_measure(sides).unsqueeze(0))
        ratio = _ratio(sides, stats)
        if spec.output == "terms":
            losses.append(_terms(ratio, spec, keep).to(_promoted(input, target)))
        else:
            losses.append(_rows(ratio, spec, keep))
            if spec.kind == "kl":
                stats[:, 5] = losses[-1]
        kept.append(stats)
    loss = torch.cat(losses)
    if spec.output == "terms":
        loss = loss.view(input.shape)
    else:
        loss = spec.weight * (loss.sum() if spec.output == "sum" else loss.view(input.shape[:-1]))
    return loss, torch.cat(kept) if want_input or want_target else None


def divergence_backward(
    grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None,
    want_input: bool, want_target: bool, reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """See `Backend.divergence_backward`. ``reduce`` completes sums ``[2, rows, 1]`` over the columns at hand where
    these are a slice of the vocabulary; only gradients of terms need it."""
    if spec.output == "terms":
        grad = grad.reshape(-1, input.shape[-1])
    else:
        grad = (grad * spec.weight).expand(input.shape[:-1]).reshape(-1, 1)
    dx = torch.empty(input.shape, dtype=input.dtype, device=input.device) if want_input else None
    dt = torch.empty(target.shape, dtype=target.dtype, device=target.device) if want_target else None
    first = 0
    for x, t, keep in _blocks(input, target, mask, whole=reduce is not None):
        rows = slice(first, first + x.shape[0])
        ratio = _ratio(_sides(x, t, spec, keep), stats[rows])
        g = grad[rows].to(ratio.r.dtype) * spec.scale
        found: tuple[Tensor | None, Tensor | None]
        if spec.output == "terms":
            found = _backward_of_terms(g, ratio, spec, reduce)
        else:
            found = _backward_of_rows(g, ratio, stats[rows, 5:], spec, want_input, want_target)
        for out, gradient in zip((dx, dt), found, strict=True):
            if out is not None and gradient is not None:
                part = gradient if keep is None else torch.where(keep.unsqueeze(-1), gradient, 0.0)
                out.view(-1, out.shape[-1])[rows] = part
        first = rows.stop
    return dx, dt


def divergence_measure(input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    """See `Backend.divergence_measure`."""
    return torch.cat([_measure(_sides(x, t, spec, keep)) for x, t, keep in _blocks(input, target, mask)])


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
    """See `Backend.divergence_finish`."""
    return _from_statistics(_rows, input, target, stats, spec, mask)


def terms(input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    """The elementwise terms of the columns at hand, in the promoted dtype of the logits; masked rows give zeros."""
    found = _from_statistics(_terms, input, target, stats, spec, mask)
    return found.to(_promoted(input, target)).view(input.shape)


def _from_statistics(
    function: Callable[[_Ratio, DivergenceSpec, Tensor | None], Tensor], input: Tensor, target: Tensor, stats: Tensor,
    spec: DivergenceSpec, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    parts, first = [], 0
    for x, t, keep in _blocks(input, target, mask):
        ratio = _ratio(_sides(x, t, spec, keep), stats[first : first + x.shape[0]])
        parts.append(function(ratio, spec, keep))
        first += x.shape[0]
    return torch.cat(parts)


def _blocks(
    input: Tensor, target: Tensor, mask: Tensor | None, whole: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Some rows at a time, ``[rows, V]``: on a CPU the many temporaries then stay in its cache."""
    input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1, target.shape[-1])
    mask = None if mask is None else mask.reshape(-1)
    count, width = input.shape
    whole = whole or input.device.type != "cpu" or torch.compiler.is_compiling()
    size = count if whole else max(_BLOCK // width, 1)
    for first in range(0, count, size):
        rows = slice(first, first + size)
        yield input[rows], target[rows], None if mask is None else mask[rows]


def _promoted(input: Tensor, target: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, target.dtype)


def _measure(sides: _Sides) -> Tensor:
    x, t, d = sides
    max_x, exp_x = _shifted_exp(x)
    max_t, exp_t = _shifted_exp(t)
    low, high = d.aminmax(dim=-1)
    columns = (max_x, exp_x.sum(-1), max_t, exp_t.sum(-1), torch.maximum(-low, high), (d.expm1().mul_(exp_t)).sum(-1))
    return torch.stack(columns, -1)


def _rows(ratio: _Ratio, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    """Sums of terms that are not negative: q f(r) and p f(-r), f(r) = expm1(r) - r; their sum is (p - q) r."""
    r, p, q, gap = ratio
    if spec.kind == "js":
        columns = spec.alpha * _times(p + q, _log_cosh(0.5 * r))
    elif spec.kind == "sym_kl" and spec.alpha == 1.0:
        columns = _times(gap, r)
    else:
        near = r.abs() < 0.5
        columns = torch.where(near, q * _series(r), gap - _times(q, r))
        if spec.kind == "sym_kl":
            columns = spec.alpha * columns + torch.where(near, p * _series(-r), _times(p, r) - gap)
    rows = columns.sum(-1)
    return rows if mask is None else torch.where(mask, rows, 0.0)


def _terms(ratio: _Ratio, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    r, p, q, gap = ratio
    if spec.kind == "kl":
        values = -_times(q, r)
    elif spec.kind == "sym_kl":
        values = _times(gap, r) + (1.0 - spec.alpha) * _times(q, r)
    else:
        values = spec.alpha * _times(p + q, _log_cosh(0.5 * r))
    return values if mask is None else torch.where(mask.unsqueeze(-1), values, 0.0)


def _backward_of_rows(
    g: Tensor, ratio: _Ratio, kl: Tensor, spec: DivergenceSpec, want_input: bool, want_target: bool
) -> tuple[Tensor | None, Tensor | None]:
    if spec.kind == "kl":
        dx = g * ratio.gap if want_input else None
        return dx, -g * _times(ratio.q, ratio.r + kl) if want_target else None
    to_input, to_target = (spec.alpha, -1.0) if spec.kind == "sym_kl" else (0.5 * spec.alpha, -0.5 * spec.alpha)
    return (
        (to_input * g) * ratio.gap if want_input else None,
        (to_target * g) * ratio.gap if want_target else None,
    )


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
    return peak, (logits - torch.where(peak == -math.inf, 0.0, peak).unsqueeze(-1)).exp_()


def _ratio(sides: _Sides, stats: Tensor) -> _Ratio:
    x, t, d = sides
    max_t, inverse_t, max_x, inverse_x, shift, _ = stats.unsqueeze(1).unbind(-1)
    r = d - shift
    p, q = (x - max_x).exp_().mul_(inverse_x), (t - max_t).exp_().mul_(inverse_t)
    return _Ratio(r, p, q, torch.where(r.abs() < 0.5, r.expm1().mul_(q), p - q))


def _times(probability: Tensor, value: Tensor) -> Tensor:
    """Their product, zero where the probability is, whatever the value."""
    return torch.where(probability == 0, 0.0, probability * value)


def _series(r: Tensor) -> Tensor:
    """f(r) = expm1(r) - r for |r| < 1/2: r^2/2 (1 + r/3 (1 + r/4 (...))), to the precision of the dtype."""
    last = 14 if r.dtype == torch.float64 else 8
    value, one = torch.ones_like(r), r.new_ones(())
    for n in range(last, 2, -1):
        torch.addcmul(one, value, r, value=1.0 / n, out=value)
    return value.mul_(r).mul_(r).mul_(0.5)


def _log_cosh(y: Tensor) -> Tensor:
    size = y.abs()
    near = ((-size).expm1().square() / (2.0 * (-size).exp())).log1p()
    return torch.where(size < 1.0, near, size + (-2.0 * size).exp().log1p() - math.log(2.0))
