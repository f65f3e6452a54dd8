"""The table of divergences: what each is, in PyTorch operations that do not cancel. Everything else asks it.

With p = softmax(x) of the input, q = softmax(t) of the target, every formula is written in the log-ratio
r = log p - log q (how it is found without cancellation is `smart_fast.backends.log_ratio`'s business) and in functions
that are exact near zero. They serve float32 and float64 alike.

A new divergence is one row here, its formula in kernels/divergence_formulas.py and in csrc/divergence.h, its name in
csrc/rows.h, and its public functions in `smart_fast.losses.logits` and `smart_fast.losses.linear`.

Imports neither backends nor autograd: both import this.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_number


class Ratio(NamedTuple):
    """Two distributions ``[rows, V]`` (or any slice of V) as formulas see them, all float32 or all float64."""

    r: Tensor  #: log p - log q
    p: Tensor
    q: Tensor
    gap: Tensor  #: p - q, to the precision of r where the two are near


class Matrix(NamedTuple):
    """What one gradient to logits is multiplied by to give those to the input's and the target's (None: no part)."""

    to_input: float | None
    to_target: float | None


class Matrices(NamedTuple):
    """The gradients to logits that linear losses multiply with hidden states and weights, and what makes them.

    The first matrix is the gradient to the input's logits under the parameter ``alpha``, the second (if there is one)
    that to the target's. Where the two sides' gradients are multiples of one another, one matrix and one GEMM serve
    both.
    """

    alpha: float
    parts: tuple[Matrix, ...]


class Parameter(NamedTuple):
    """The number that a divergence takes."""

    name: str
    default: float
    #: Returns the value, or raises TypeError or ValueError.
    check: Callable[[Any], Any]


#: Sums over a row: any number of ``[rows, columns]`` give as many ``[rows, 1]``, stacked, completed over the slices of
#: a vocabulary that is sharded.
Totals = Callable[..., Tensor]


@dataclass(frozen=True)
class Divergence:
    """A row of the table.

    In the signatures below ``g`` is an upstream gradient that broadcasts to ``[rows, V]``, ``sums`` ``[rows, 2]`` are
    the `row_sums` of whole rows, and ``alpha`` is the parameter's value whatever its name. Columns of probability zero
    on both sides contribute nothing, whatever r is there.
    """

    name: str
    #: What it computes, and from where.
    doc: str
    #: The reduction of its loss where none is asked for.
    reduction: str
    parameter: Parameter | None
    #: ``(input, target, reduction, alpha)``: the loss of logits in ordinary PyTorch operations. Differentiable.
    reference: Callable[[Tensor, Tensor, str, Any], Tensor]
    #: Whether `reference` is smart-pytorch's, bit for bit and in the dtype of the logits. Any other is given float32
    #: or float64.
    drop_in: bool
    #: ``(ratio, alpha)``: columns ``[rows, V]``, one or two, none of them negative, whose sums make the loss of a row.
    row_terms: Callable[[Ratio, float], tuple[Tensor, ...]]
    #: ``(first, second, alpha)``: the loss of rows from the sums of those columns.
    loss_of_sums: Callable[[Tensor, Tensor, float], Tensor]
    #: ``(ratio, alpha)``: the elementwise terms ``[rows, V]`` of ``reduction="none"``.
    terms: Callable[[Ratio, float], Tensor]
    #: ``(g, ratio, sums, alpha)``: the gradient of row losses to the input's logits, and that to the target's.
    rows_to_input: Callable[[Tensor, Ratio, Tensor, float], Tensor]
    rows_to_target: Callable[[Tensor, Ratio, Tensor, float], Tensor]
    #: Whether these two read ``sums``.
    needs_sums: bool
    #: ``(g, ratio, alpha, totals)``: the gradients of `terms` to both sides.
    terms_to_both: Callable[[Tensor, Ratio, float, Totals], tuple[Tensor, Tensor]]
    #: ``(alpha)``: the structure of the gradients of row losses.
    matrices: Callable[[float], Matrices]

    @property
    def alpha(self) -> float:
        """The parameter where none is given; of divergences without one, one."""
        return 1.0 if self.parameter is None else self.parameter.default

    def row_sums(self, ratio: Ratio, alpha: float) -> Tensor:
        """``[rows, 2]``: the sums of `row_terms` over the columns at hand; zeros for a second that there is not."""
        sums = [columns.sum(-1) for columns in self.row_terms(ratio, alpha)]
        return torch.stack((sums[0], sums[1] if len(sums) > 1 else torch.zeros_like(sums[0])), -1)

    def rows(self, sums: Tensor, alpha: float) -> Tensor:
        """The losses ``[rows]`` of rows with these `row_sums`."""
        return self.loss_of_sums(sums[..., 0], sums[..., 1], alpha)

    def check(self, value: Any) -> Any:
        """A value of the parameter, checked under its name. Divergences without one take any finite number, unused."""
        return check_number("alpha", value) if self.parameter is None else self.parameter.check(value)


def _beta(value: Any) -> float:
    """A number between zero and one, no tensor.

    Raises:
        TypeError: no real number.
        ValueError: outside (0, 1); the message says what the limits are.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"beta must be a real number, got {type(value).__name__}")
    if not 0.0 < value < 1.0:  # type: ignore[operator]
        raise ValueError(
            f"beta must be greater than 0 and less than 1, got {value}: the limits, divided by beta or by 1 - beta, "
            "are kl_loss(input, target) for 0 and kl_loss(target, input) for 1"
        )
    return float(value)


# ---- functions without cancellation ----------------------------------------------------------------------------------


def times(probability: Tensor, value: Tensor) -> Tensor:
    """Their product, zero where the probability is, whatever the value."""
    return torch.where(probability == 0, 0.0, probability * value)


def rounding_error(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
    """x - t - d, exactly, where d is x - t as it was rounded (Knuth's two-sum); zero where that is not a number."""
    back = d - x
    rest = (x - (d - back)) - (t + back)
    return torch.where(rest.isfinite(), rest, 0.0)


def series(r: Tensor) -> Tensor:
    """f(r) = expm1(r) - r for |r| < 1/2: r^2/2 (1 + r/3 (1 + r/4 (...))), to the precision of the dtype."""
    last = 14 if r.dtype == torch.float64 else 8
    value, one = torch.ones_like(r), r.new_ones(())
    in_place = not r.requires_grad
    for n in range(last, 2, -1):
        value = torch.addcmul(one, value, r, value=1.0 / n, out=value if in_place else None)
    if in_place:
        return value.mul_(r).mul_(r).mul_(0.5)
    return value * r * r * 0.5


def log_cosh(y: Tensor) -> Tensor:
    """log(cosh(y))."""
    size = y.abs()
    near = ((-size).expm1().square() / (2.0 * (-size).exp())).log1p()
    return torch.where(size < 1.0, near, size + (-2.0 * size).exp().log1p() - math.log(2.0))


_LARGE = 87.0  # the exponential of which float32 still holds


def log_mix(z: Tensor, weight: float) -> Tensor:
    """log(1 - weight + weight exp(z)) for a weight in (0, 1): zero for zero, finite for minus infinity."""
    near = (weight * z.clamp(max=_LARGE).expm1()).log1p()
    return torch.where(z <= _LARGE, near, z + math.log(weight))


# ---- kl --------------------------------------------------------------------------------------------------------------


def _kl_reference(input: Tensor, target: Tensor, reduction: str, alpha: Any) -> Tensor:
    return F.kl_div(F.log_softmax(input, dim=-1), F.softmax(target, dim=-1), reduction=reduction)


def _kl_columns(ratio: Ratio) -> Tensor:
    """q f(r)."""
    r, _, q, gap = ratio
    return torch.where(r.abs() < 0.5, q * series(r), gap - times(q, r))


def _kl_terms(ratio: Ratio, alpha: float) -> Tensor:
    return -times(ratio.q, ratio.r)


def _kl_to_target(g: Tensor, ratio: Ratio, sums: Tensor, alpha: float) -> Tensor:
    return -g * times(ratio.q, ratio.r + sums[:, :1])


def _log_p_under_q(g: Tensor, ratio: Ratio, total: Tensor) -> Tensor:
    """The gradient to x of the sum of -g q log p, q constant; ``total`` is the sum of g q."""
    return ratio.gap * total + ratio.q * (total - g)


def _kl_terms_to_both(g: Tensor, ratio: Ratio, alpha: float, totals: Totals) -> tuple[Tensor, Tensor]:
    r, _, q, _ = ratio
    first, second = totals(g * q, g * (q - times(q, r)))
    return _log_p_under_q(g, ratio, first), q * (g - second) - g * times(q, r)


# ---- sym_kl ----------------------------------------------------------------------------------------------------------


def _sym_kl_reference(input: Tensor, target: Tensor, reduction: str, alpha: Any) -> Tensor:
    forward = F.kl_div(F.log_softmax(input, dim=-1), F.softmax(target.detach(), dim=-1), reduction=reduction)
    reverse = F.kl_div(F.log_softmax(target, dim=-1), F.softmax(input.detach(), dim=-1), reduction=reduction)
    return alpha * forward + reverse


def _sym_kl_row_terms(ratio: Ratio, alpha: float) -> tuple[Tensor, ...]:
    """alpha q f(r) + p f(-r), whose sum is (p - q) r where alpha is one."""
    r, p, _, gap = ratio
    if alpha == 1.0:
        return (times(gap, r),)
    reverse = torch.where(r.abs() < 0.5, p * series(-r), times(p, r) - gap)
    return (alpha * _kl_columns(ratio) + reverse,)


def _sym_kl_terms(ratio: Ratio, alpha: float) -> Tensor:
    return times(ratio.gap, ratio.r) + (1.0 - alpha) * times(ratio.q, ratio.r)


def _sym_kl_terms_to_both(g: Tensor, ratio: Ratio, alpha: float, totals: Totals) -> tuple[Tensor, Tensor]:
    _, p, q, _ = ratio
    first, second = totals(g * q, g * p)
    return alpha * _log_p_under_q(g, ratio, first), q * second - g * p


# ---- js --------------------------------------------------------------------------------------------------------------


def _js_reference(input: Tensor, target: Tensor, reduction: str, alpha: Any) -> Tensor:
    mean = 0.5 * (F.softmax(input.detach(), dim=-1) + F.softmax(target.detach(), dim=-1))
    return alpha * (
        F.kl_div(F.log_softmax(input, dim=-1), mean, reduction=reduction)
        + F.kl_div(F.log_softmax(target, dim=-1), mean, reduction=reduction)
    )


def _js_terms(ratio: Ratio, alpha: float) -> Tensor:
    return alpha * times(ratio.p + ratio.q, log_cosh(0.5 * ratio.r))


def _js_terms_to_both(g: Tensor, ratio: Ratio, alpha: float, totals: Totals) -> tuple[Tensor, Tensor]:
    _, p, q, gap = ratio
    (total,) = totals(0.5 * g * (p + q))
    return alpha * (p * (total - g) + 0.5 * g * gap), alpha * (q * (total - g) - 0.5 * g * gap)


# ---- jsd: u = log m - log q, v = log m - log p, m = beta q + (1 - beta) p --------------------------------------------


def _u(ratio: Ratio, beta: float) -> Tensor:
    return log_mix(ratio.r, 1.0 - beta)


def _v(ratio: Ratio, beta: float) -> Tensor:
    return log_mix(-ratio.r, beta)


def _jsd_row_terms(ratio: Ratio, beta: float) -> tuple[Tensor, ...]:
    """q f(u) and p f(v), which sum to KL(q || m) and KL(p || m)."""
    u, v = _u(ratio, beta), _v(ratio, beta)
    return (
        torch.where(u.abs() < 0.5, ratio.q * series(u), (1.0 - beta) * ratio.gap - times(ratio.q, u)),
        torch.where(v.abs() < 0.5, ratio.p * series(v), -beta * ratio.gap - times(ratio.p, v)),
    )


def _jsd_loss_of_sums(first: Tensor, second: Tensor, beta: float) -> Tensor:
    return beta * first + (1.0 - beta) * second


def _jsd_terms(ratio: Ratio, beta: float) -> Tensor:
    """-beta q u - (1 - beta) p v by terms that are not negative: beta (m - q) + (1 - beta) (m - p) is zero."""
    first, second = _jsd_row_terms(ratio, beta)
    return _jsd_loss_of_sums(first, second, beta)


def _jsd_rows_to_input(g: Tensor, ratio: Ratio, sums: Tensor, beta: float) -> Tensor:
    return ((beta - 1.0) * g) * times(ratio.p, _v(ratio, beta) + sums[:, 1:])


def _jsd_rows_to_target(g: Tensor, ratio: Ratio, sums: Tensor, beta: float) -> Tensor:
    return (-beta * g) * times(ratio.q, _u(ratio, beta) + sums[:, :1])


def _jsd_terms_to_both(g: Tensor, ratio: Ratio, beta: float, totals: Totals) -> tuple[Tensor, Tensor]:
    to_p = ((beta - 1.0) * g) * times(ratio.p, _v(ratio, beta))
    to_q = (-beta * g) * times(ratio.q, _u(ratio, beta))
    first, second = totals(to_p, to_q)
    return to_p - ratio.p * first, to_q - ratio.q * second


def _jsd_reference(input: Tensor, target: Tensor, reduction: str, beta: Any) -> Tensor:
    """The same formulas, differentiable: no branch that is not taken gives a gradient that is not finite."""
    x, t = torch.broadcast_tensors(input, target)
    p, q = F.softmax(x, dim=-1), F.softmax(t, dim=-1)
    # Classes that one side leaves out are far enough apart; those that both leave out have no difference.
    one, other = x == -math.inf, t == -math.inf
    known = ~(one | other)
    known_x, known_t = torch.where(known, x, 0.0), torch.where(known, t, 0.0)
    d = known_x - known_t
    with torch.no_grad():
        limit = torch.where(one == other, 0.0, torch.where(one, -1e4, 1e4))
        # What softmax does not see, and what the rounding of d left out: neither has a gradient.
        shift = (q * torch.where(known, d, limit)).sum(-1, keepdim=True)
        rest = rounding_error(known_x, known_t, d) if x.shape[-1] > 1 else torch.zeros_like(d)
        near = (torch.where(known, d, limit) - shift).abs().amax(-1, keepdim=True) <= 1.0
        peak_x, peak_t = x.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
        gap = peak_x - peak_t
        shift = torch.where(near, shift, gap)
    delta = torch.where(known, (d - shift) + rest, limit - torch.where(one == other, 0.0, shift))
    log_ratio = torch.where(
        near,
        (q * torch.where(near, delta, 0.0).expm1()).sum(-1, keepdim=True).log1p(),
        (x - peak_x).logsumexp(-1, keepdim=True)
        - (t - peak_t).logsumexp(-1, keepdim=True)
        + rounding_error(peak_x, peak_t, gap),
    )
    r = delta - log_ratio
    close = r.abs() < 1.0
    u, v = log_mix(r, 1.0 - beta), log_mix(-r, beta)
    small_u, small_v = torch.where(close, u, 0.0), torch.where(close, v, 0.0)
    terms = torch.where(
        close,
        beta * q * _f(small_u) + (1.0 - beta) * p * _f(small_v),
        -beta * q * u - (1.0 - beta) * p * v,
    )
    if reduction == "none":
        return terms
    if reduction == "mean":
        return terms.mean()
    total = terms.sum()
    return total / input.size(0) if reduction == "batchmean" else total


def _f(z: Tensor) -> Tensor:
    """expm1(z) - z."""
    small = z.abs() < 0.5
    return torch.where(small, series(torch.where(small, z, 0.0)), z.expm1() - z)


# ---- the table -------------------------------------------------------------------------------------------------------


def _alpha(value: Any) -> Any:
    return check_number("alpha", value)


def _first(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    return first


def _gap_times(factor: Callable[[float], float]) -> Callable[[Tensor, Ratio, Tensor, float], Tensor]:
    def gradient(g: Tensor, ratio: Ratio, sums: Tensor, alpha: float) -> Tensor:
        return (factor(alpha) * g) * ratio.gap

    return gradient


_TWO_MATRICES = (Matrix(1.0, None), Matrix(None, 1.0))

TABLE: dict[str, Divergence] = {
    each.name: each
    for each in (
        Divergence(
            name="kl",
            doc="KL(q || p), differentiable in both; smart-pytorch's kl_loss.",
            reduction="batchmean",
            parameter=None,
            reference=_kl_reference,
            drop_in=True,
            row_terms=lambda ratio, alpha: (_kl_columns(ratio),),
            loss_of_sums=_first,
            terms=_kl_terms,
            rows_to_input=lambda g, ratio, sums, alpha: g * ratio.gap,
            rows_to_target=_kl_to_target,
            needs_sums=True,
            terms_to_both=_kl_terms_to_both,
            matrices=lambda alpha: Matrices(1.0, _TWO_MATRICES),
        ),
        Divergence(
            name="sym_kl",
            doc="alpha KL(q || p) + KL(p || q), each first argument constant; smart-pytorch's sym_kl_loss.",
            reduction="sum",
            parameter=Parameter("alpha", 1.0, _alpha),
            reference=_sym_kl_reference,
            drop_in=True,
            row_terms=_sym_kl_row_terms,
            loss_of_sums=_first,
            terms=_sym_kl_terms,
            rows_to_input=_gap_times(lambda alpha: alpha),
            rows_to_target=_gap_times(lambda alpha: -1.0),
            needs_sums=False,
            terms_to_both=_sym_kl_terms_to_both,
            matrices=lambda alpha: Matrices(1.0, (Matrix(alpha, -1.0),)),
        ),
        Divergence(
            name="js",
            doc="alpha (KL(m || p) + KL(m || q)), m = (p + q) / 2 constant; smart-pytorch's js_loss.",
            reduction="sum",
            parameter=Parameter("alpha", 1.0, _alpha),
            reference=_js_reference,
            drop_in=True,
            row_terms=lambda ratio, alpha: (_js_terms(ratio, alpha),),
            loss_of_sums=_first,
            terms=_js_terms,
            rows_to_input=_gap_times(lambda alpha: 0.5 * alpha),
            rows_to_target=_gap_times(lambda alpha: -0.5 * alpha),
            needs_sums=False,
            terms_to_both=_js_terms_to_both,
            matrices=lambda alpha: Matrices(1.0, (Matrix(alpha, -alpha),)),
        ),
        Divergence(
            name="jsd",
            doc="beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, with gradients through m, too; "
            'Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024.',
            reduction="batchmean",
            parameter=Parameter("beta", 0.5, _beta),
            reference=_jsd_reference,
            drop_in=False,
            row_terms=_jsd_row_terms,
            loss_of_sums=_jsd_loss_of_sums,
            terms=_jsd_terms,
            rows_to_input=_jsd_rows_to_input,
            rows_to_target=_jsd_rows_to_target,
            needs_sums=True,
            terms_to_both=_jsd_terms_to_both,
            matrices=lambda beta: Matrices(beta, _TWO_MATRICES),
        ),
    )
}

#: Their names.
NAMES: tuple[str, ...] = tuple(TABLE)


def divergence(kind: str) -> Divergence:
    """The row of the table that is called ``kind``.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    found = TABLE.get(kind)
    if found is None:
        raise ValueError(f"kind must be one of {list(NAMES)}, got {kind!r}")
    return found
