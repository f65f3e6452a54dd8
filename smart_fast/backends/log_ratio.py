"""The divergence part of the backend contract in PyTorch operations, by formulas that do not cancel.

With p = softmax(x) and q = softmax(t), everything is written in the log-ratio

    r = log p - log q = delta - L,    delta = x - t - c
    L = log1p(sum q expm1(delta))     where max |delta| <= 1
        lse(x) - lse(t) - c           elsewhere: expm1 would overflow

so that losses of nearly equal sides keep their digits. c is what softmax does not see: the mean of x - t under q, or,
far apart, the difference of the maxima. With the rounding error of x - t added back, a constant added to a row costs no
digits. fp32 inside, float64 for float64 logits. For losses that need more than `smart_fast.backends.pytorch` (which is
smart-pytorch's order of operations) and have no kernel at hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses.divergences import NAMES, Ratio, divergence, rounding_error
from .base import STATISTICS, DivergenceSpec

name = "log_ratio"
differentiable = False  # by itself; see `smart_fast.autograd`
kinds = frozenset(NAMES)

#: The columns of statistics that hold the two sums of a row.
SUMS = slice(6, STATISTICS)

_BLOCK = 1 << 16  # elements; half a dozen temporaries of that many floats fit a core's cache


class _Sides(NamedTuple):
    """Logits after scaling and masking, and their unscaled difference."""

    x: Tensor
    t: Tensor
    d: Tensor  # rounded; zero for classes that are masked on both sides
    rest: Tensor | None  # what its rounding left out (None: nothing)
    real: Tensor  # the other classes

    def delta(self, shift: Tensor, scale: float) -> Tensor:
        """The scaled differences relative to ``shift``, to their own precision."""
        delta = self.d - shift
        if self.rest is not None:
            delta += self.rest
        return torch.where(self.real, delta, 0.0).mul_(scale)


def divergence_forward(
    input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None, want_input: bool, want_target: bool
) -> tuple[Tensor, Tensor | None]:
    """See `Backend.divergence_forward`."""
    entry = divergence(spec.kind)
    losses, kept = [], []
    for x, t, keep in _blocks(input, target, mask):
        sides = _sides(x, t, spec, keep)
        stats = merge(_parts(sides, spec.scale).unsqueeze(0), spec.scale)
        if input.shape[-1] == 1:  # one class: r is zero to the last bit
            stats[:, 5:6] = sides.delta(stats[:, 4:5], spec.scale)
        ratio = _ratio(sides, stats, spec.scale)
        if spec.output == "terms":
            losses.append(_terms(ratio, spec, keep).to(_promoted(input, target)))
        else:
            stats[:, SUMS] = _row_sums(ratio, spec, keep)
            losses.append(entry.rows(stats[:, SUMS], spec.alpha))
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
    """See `Backend.divergence_backward`. ``reduce`` completes sums ``[n, rows, 1]`` over the columns at hand where
    these are a slice of the vocabulary; only gradients of terms need it."""
    if spec.output == "terms":
        grad = grad.reshape(-1, input.shape[-1])
    else:
        grad = (grad * spec.weight).expand(input.shape[:-1]).reshape(-1, 1)
    entry = divergence(spec.kind)
    dx = torch.empty(input.shape, dtype=input.dtype, device=input.device) if want_input else None
    dt = torch.empty(target.shape, dtype=target.dtype, device=target.device) if want_target else None
    first = 0
    for x, t, keep in _blocks(input, target, mask, whole=reduce is not None):
        rows = slice(first, first + x.shape[0])
        ratio = _ratio(_sides(x, t, spec, keep), stats[rows], spec.scale)
        g = grad[rows].to(ratio.r.dtype) * spec.scale
        found: tuple[Tensor | None, Tensor | None]
        if spec.output == "terms":
            found = entry.terms_to_both(g, ratio, spec.alpha, functools.partial(_totals, reduce))
        else:
            given = g, ratio, stats[rows, SUMS], spec.alpha
            found = (
                entry.rows_to_input(*given) if want_input else None,
                entry.rows_to_target(*given) if want_target else None,
            )
        for out, gradient in zip((dx, dt), found, strict=True):
            if out is not None and gradient is not None:
                part = gradient if keep is None else torch.where(keep.unsqueeze(-1), gradient, 0.0)
                out.view(-1, out.shape[-1])[rows] = part
        first = rows.stop
    return dx, dt


def divergence_parts(input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    """See `Backend.divergence_parts`."""
    return torch.cat([_parts(_sides(x, t, spec, keep), spec.scale) for x, t, keep in _blocks(input, target, mask)])


def merge(measured: Tensor, scale: float) -> Tensor:
    """Statistics ``[rows, STATISTICS]`` of whole rows from those of their slices, ``[slices, rows, PARTS]``, of logits
    that are multiplied by ``scale``; the sums of the rows are left zero."""
    max_x, sum_x, max_t, sum_t, max_d, shift, sum_e = measured.unbind(-1)
    peak_x, peak_t = max_x.amax(0), max_t.amax(0)
    share_x, share_t = (max_x - peak_x).exp(), (max_t - peak_t).exp()
    parts_t = sum_t * share_t
    total_x, total_t = (sum_x * share_x).sum(0), parts_t.sum(0)
    # Relative to the shift of the slice that counts most: exp(s) (1 + expm1(delta)) = 1 + expm1(delta + s).
    common = shift.gather(0, parts_t.argmax(0, keepdim=True))
    known = (max_x > -math.inf) | (max_t > -math.inf)
    apart = torch.where(known, (shift - common) * scale, 0.0)
    sum_e = sum_e * apart.exp() + sum_t * apart.expm1()
    near = (max_d + apart.abs()).amax(0) <= 1.0
    # Far apart, that of the maxima: log-ratios of the classes that count on both sides are not far from it.
    gap = peak_x - peak_t
    shift = torch.where(near, common.squeeze(0), torch.where(gap.isfinite(), gap / scale, 0.0))
    far = ((gap - shift * scale) + rounding_error(peak_x, peak_t, gap)) + (total_x.log() - total_t.log())
    log_ratio = torch.where(near, ((sum_e * share_t).sum(0) / total_t).log1p(), far)
    zero = torch.zeros_like(shift)
    columns = (peak_t, total_t.reciprocal(), peak_x, total_x.reciprocal(), shift, log_ratio, zero, zero)
    return torch.stack(columns, -1)


def divergence_finish(
    input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None
) -> Tensor:
    """See `Backend.divergence_finish`."""
    return _from_statistics(_row_sums, input, target, stats, spec, mask)


def terms(input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    """The elementwise terms of the columns at hand, in the promoted dtype of the logits; masked rows give zeros."""
    found = _from_statistics(_terms, input, target, stats, spec, mask)
    return found.to(_promoted(input, target)).view(input.shape)


def _from_statistics(
    function: Callable[[Ratio, DivergenceSpec, Tensor | None], Tensor], input: Tensor, target: Tensor, stats: Tensor,
    spec: DivergenceSpec, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    parts, first = [], 0
    for x, t, keep in _blocks(input, target, mask):
        ratio = _ratio(_sides(x, t, spec, keep), stats[first : first + x.shape[0]], spec.scale)
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


def _parts(sides: _Sides, scale: float) -> Tensor:
    x, t, d, _, real = sides
    max_x, exp_x = _shifted_exp(x)
    max_t, exp_t = _shifted_exp(t)
    sum_t = exp_t.sum(-1)
    shift = (exp_t * d).sum(-1) / sum_t
    shift = torch.where(shift.isfinite(), shift, 0.0)
    low, high = torch.where(real, d - shift.unsqueeze(-1), 0.0).aminmax(dim=-1)
    far = torch.maximum(-low, high) * scale
    sum_e = sides.delta(shift.unsqueeze(-1), scale).expm1_().mul_(exp_t).sum(-1)
    return torch.stack((max_x, exp_x.sum(-1), max_t, sum_t, far, shift, sum_e), -1)


def _row_sums(ratio: Ratio, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    sums = divergence(spec.kind).row_sums(ratio, spec.alpha)
    return sums if mask is None else torch.where(mask.unsqueeze(-1), sums, 0.0)


def _terms(ratio: Ratio, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
    values = divergence(spec.kind).terms(ratio, spec.alpha)
    return values if mask is None else torch.where(mask.unsqueeze(-1), values, 0.0)


def _totals(reduce: Callable[[Tensor], Tensor] | None, *columns: Tensor) -> Tensor:
    sums = torch.stack([each.sum(-1, keepdim=True) for each in columns])
    return sums if reduce is None else reduce(sums)


def _sides(input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> _Sides:
    dtype = torch.float64 if torch.float64 in (input.dtype, target.dtype) else torch.float32
    first, t = input.to(dtype), target.to(dtype)
    if mask is not None:
        first, t = (torch.where(mask.unsqueeze(-1), each, 0.0) for each in (first, t))
    real = t != -math.inf
    if spec.from_difference:
        d, rest = torch.where(real, first, 0.0), None
        x = t + d
    else:
        x, real = first, real | (first != t)
        d = torch.where(real, x - t, 0.0)
        rest = rounding_error(x, t, d)
    if spec.scale != 1.0:
        x, t = x * spec.scale, t * spec.scale
    return _Sides(x, t, d, rest, real)


def _shifted_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum over the last dimension and exp(logits - maximum); zeros where no logit is finite."""
    peak = logits.amax(-1)
    return peak, (logits - torch.where(peak == -math.inf, 0.0, peak).unsqueeze(-1)).exp_()


def _ratio(sides: _Sides, stats: Tensor, scale: float) -> Ratio:
    x, t, *_ = sides
    max_t, inverse_t, max_x, inverse_x, shift, log_ratio = stats[:, :6].unsqueeze(1).unbind(-1)
    r = sides.delta(shift, scale) - log_ratio
    p, q = (x - max_x).exp_().mul_(inverse_x), (t - max_t).exp_().mul_(inverse_t)
    return Ratio(r, p, q, torch.where(r.abs() < 0.5, r.expm1().mul_(q), p - q))
