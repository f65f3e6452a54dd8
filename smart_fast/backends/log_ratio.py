"""The divergence part of the backend contract in PyTorch operations, by formulas that do not cancel.

With p = softmax(x), q = softmax(t), d = x - t, everything is written in the log-ratio

    r = log p - log q = d - D,    D = log1p(sum q expm1(d))   where max |d| <= 1
                                  D = lse(x) - lse(t)         elsewhere: expm1 would overflow

so that losses of nearly equal sides keep their digits. fp32 inside, float64 for float64 logits. For losses that need
more than `smart_fast.backends.pytorch` (which is smart-pytorch's order of operations) and have no kernel at hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses.divergences import NAMES, Ratio, divergence
from .base import STATISTICS, DivergenceSpec

name = "log_ratio"
differentiable = False  # by itself; see `smart_fast.autograd`
kinds = frozenset(NAMES)

#: The columns of statistics that hold the two sums of a row.
SUMS = slice(5, STATISTICS)

_BLOCK = 1 << 16  # elements; half a dozen temporaries of that many floats fit a core's cache


class _Sides(NamedTuple):
    """Logits after scaling and masking, and their difference; classes that are masked on both sides have d = 0."""

    x: Tensor
    t: Tensor
    d: Tensor


def divergence_forward(
    input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None, want_input: bool, want_target: bool
) -> tuple[Tensor, Tensor | None]:
    """See `Backend.divergence_forward`."""
    entry = divergence(spec.kind)
    losses, kept = [], []
    for x, t, keep in _blocks(input, target, mask):
        sides = _sides(x, t, spec, keep)
        stats = merge(_parts(sides).unsqueeze(0))
        ratio = _ratio(sides, stats)
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
        ratio = _ratio(_sides(x, t, spec, keep), stats[rows])
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
    return torch.cat([_parts(_sides(x, t, spec, keep)) for x, t, keep in _blocks(input, target, mask)])


def merge(measured: Tensor) -> Tensor:
    """Statistics ``[rows, STATISTICS]`` of whole rows from those of their slices, ``[slices, rows, PARTS]``; the sums
    of the rows are left zero."""
    max_x, sum_x, max_t, sum_t, max_d, sum_e = measured.unbind(-1)
    peak_x, peak_t = max_x.amax(0), max_t.amax(0)
    share_x, share_t = (max_x - peak_x).exp(), (max_t - peak_t).exp()
    total_x, total_t = (sum_x * share_x).sum(0), (sum_t * share_t).sum(0)
    near = ((sum_e * share_t).sum(0) / total_t).log1p()
    far = (peak_x - peak_t) + (total_x.log() - total_t.log())
    shift = torch.where(max_d.amax(0) <= 1.0, near, far)
    zero = torch.zeros_like(shift)
    return torch.stack((peak_t, total_t.reciprocal(), peak_x, total_x.reciprocal(), shift, zero, zero), -1)


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


def _parts(sides: _Sides) -> Tensor:
    x, t, d = sides
    max_x, exp_x = _shifted_exp(x)
    max_t, exp_t = _shifted_exp(t)
    low, high = d.aminmax(dim=-1)
    columns = (max_x, exp_x.sum(-1), max_t, exp_t.sum(-1), torch.maximum(-low, high), (d.expm1().mul_(exp_t)).sum(-1))
    return torch.stack(columns, -1)


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
    if spec.scale != 1.0:
        first, t = first * spec.scale, t * spec.scale
    if spec.from_difference:
        d = torch.where(t == -math.inf, 0.0, first)
        return _Sides(t + d, t, d)
    return _Sides(first, t, torch.where((first == t) & t.isinf(), 0.0, first - t))


def _shifted_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum over the last dimension and exp(logits - maximum); zeros where no logit is finite."""
    peak = logits.amax(-1)
    return peak, (logits - torch.where(peak == -math.inf, 0.0, peak).unsqueeze(-1)).exp_()


def _ratio(sides: _Sides, stats: Tensor) -> Ratio:
    x, t, d = sides
    max_t, inverse_t, max_x, inverse_x, shift = stats[:, :5].unsqueeze(1).unbind(-1)
    r = d - shift
    p, q = (x - max_x).exp_().mul_(inverse_x), (t - max_t).exp_().mul_(inverse_t)
    return Ratio(r, p, q, torch.where(r.abs() < 0.5, r.expm1().mul_(q), p - q))
