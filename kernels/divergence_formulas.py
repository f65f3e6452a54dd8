"""Row-wise divergences of logits, with gradients, in formulas that do not cancel.

Per row, with logits x (input) and t (target), p = softmax(x), q = softmax(t) and delta = x - t - c, everything follows
from the log-ratio r = log p - log q = delta - L:

    L = log1p(sum q * expm1(delta))       while max |delta| <= 1,
    L = logsumexp(x) - logsumexp(t) - c   otherwise,

with a constant c of the row, which softmax does not see, near all x - t where these are alike (divergence_rows.py);
and from f(r) = expm1(r) - r >= 0, whose series is exact near zero. For |r| < 1 the terms are written in r, for larger
|r| in p and q, so that neither nearly equal nor far apart distributions lose precision, and probabilities that
underflow contribute their limit:

    kl      KL(q || p)                           = sum q f(r)                 (p - q) - q r       far apart
    sym_kl  alpha * KL(q || p) + KL(p || q)      KL(p || q) = sum p f(-r)     p r - (p - q)       far apart
    js      alpha * (KL(m || p) + KL(m || q))    = alpha * sum (p + q) log cosh(r / 2),   m = (p + q) / 2

    jsd     beta * KL(q || m) + (1 - beta) * KL(p || m)    = beta * sum q f(u) + (1 - beta) * sum p f(v)

with m = beta q + (1 - beta) p, u = log m - log q and v = log m - log p for jsd, whose ``alpha`` is beta (Agarwal et
al., On-policy distillation of language models, 2024): u = log1p((1 - beta) expm1(r)) for r <= 0, v = log1p(beta
expm1(-r)) for r > 0, and u - v = r gives the other.

No term of these sums is negative. The gradients of a row sum (targets detached as smart-pytorch detaches them, both
sides of jsd whole):

    kl      dx = p - q = q expm1(r)     dt = -q (r + KL)
    sym_kl  dx = alpha (p - q)          dt = -(p - q)
    js      dx = alpha / 2 (p - q)      dt = -dx
    jsd     dx = -(1 - beta) p (v + KL(p || m))            dt = -beta q (u + KL(q || m))

One difference remains: far apart, v and KL(p || m) (u and KL(q || m)) of jsd are both near the logarithm of the weight
of p (of q), and the gradient of such a row, nearly zero, is exact to the last digit of that, not to its own.

A divergence is one branch on KIND in each of: `row_terms`, `elementwise_terms`, `loss_of_sums`, `row_gradients`,
`upstream_terms` and `elementwise_gradients`. A KIND without one does not compile. Those in WITH_MOMENTS have one in
`loss_of_moments` too.

Logits of minus infinity on both sides (masked classes) contribute nothing. A row that is minus infinity throughout is
NaN, as its softmax. Arithmetic is fp32 for every dtype.

Logits may be scaled (by 1 / temperature) as they are read, and x - t may be given in place of x (FROM_DIFFERENCE).
"""

import triton
import triton.language as tl

#: What the functions on KIND know.
KINDS = ("kl", "sym_kl", "js", "jsd")
#: Those of `loss_of_moments`, with the order of the moments: one reading makes the loss of near rows.
WITH_MOMENTS = {"kl": 2, "sym_kl": 2, "js": 4}

NEG_INF = tl.constexpr(float("-inf"))

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """exp(x) by the hardware's exp2: without the range checks of `tl.exp`, for which denormal results are flushed."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def f_near(r):
    """f(r) = expm1(r) - r for |r| <= 1: a Chebyshev fit of f(r) / r^2, relative error below 6e-9 before rounding."""
    s = 2.81265463e-6 * r + 2.53586449e-5
    s = s * r + 1.98369867e-4
    s = s * r + 1.38853949e-3
    s = s * r + 8.33334525e-3
    s = s * r + 4.16667367e-2
    s = s * r + 1.66666666e-1
    s = s * r + 0.5
    return s * r * r


@triton.jit
def log1p(z):
    """log(1 + z), z > -1, relative precision near zero by 2 artanh(z / (2 + z))."""
    small = tl.abs(z) < 0.25
    s = tl.where(small, z, 0.0)
    s = s / (2.0 + s)
    w = s * s
    series = 2.0 * s * (1.0 + w * (1.0 / 3 + w * (1.0 / 5 + w * (1.0 / 7 + w * (1.0 / 9)))))
    return tl.where(small, series, tl.log(tl.where(small, 1.0, 1.0 + z)))


@triton.jit
def _log_cosh_half(r):
    """log cosh(r / 2), relative error below 2e-8 before rounding: for |r| < 1 a Chebyshev fit in r^2, beyond it
    |r| / 2 - log 2 + log1p(exp(-|r|)) with one of log1p(e) / e for e <= exp(-1): shorter than a logarithm."""
    s = r * r
    near = s * (0.125 + s * (-5.20831922e-3 + s * (3.47107682e-4 + s * (-2.60233506e-5 + s * 1.74239017e-6))))
    a = tl.abs(r)
    e = exp(-a)
    log1p_ratio = 0.333275877 + e * (-0.249020515 + e * (0.191860338 + e * (-0.130281271 + e * 0.0526921389)))
    log1p_ratio = 0.999999995 + e * (-0.499998719 + e * log1p_ratio)
    return tl.where(a < 1.0, near, (0.5 * a - 0.6931471805599453) + e * log1p_ratio)


@triton.jit
def finite_max(m):
    """A maximum that is safe to subtract: rows of minus infinity keep their entries at exp(-inf) = 0."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def times(q, r):
    """q * r with 0 * inf = 0: an event of probability zero adds nothing."""
    return tl.where(q == 0.0, 0.0, q * r)


@triton.jit
def p_minus_q(p, q, r):
    """p - q, by q * expm1(r) where the two are close."""
    near = tl.abs(r) < 1.0
    s = tl.where(near, r, 0.0)
    return tl.where(near, q * (s + f_near(s)), p - q)


@triton.jit
def _log_mixture(r, beta):
    """``(u, v)`` = (log m - log q, log m - log p) of m = beta q + (1 - beta) p. Their signs differ, and u - v = r."""
    a = tl.abs(r)
    near = a < 1.0
    s = tl.where(near, -a, 0.0)
    e = tl.where(near, s + f_near(s), exp(-a) - 1.0)
    less = r <= 0.0
    smaller = log1p(tl.where(less, 1.0 - beta, beta) * e)
    return tl.where(less, smaller, smaller + r), tl.where(less, smaller - r, smaller)


@triton.jit
def _mixture_terms(p, q, r, beta):
    """``(q f(u), p f(v))``, the terms of KL(q || m) and KL(p || m). Far from 0, q expm1(u) is written as m - q, and
    p expm1(v) as m - p."""
    u, v = _log_mixture(r, beta)
    near_q, near_p = tl.abs(u) < 1.0, tl.abs(v) < 1.0
    from_q = tl.where(near_q, q * f_near(tl.where(near_q, u, 0.0)), (1.0 - beta) * (p - q) - times(q, u))
    from_p = tl.where(near_p, p * f_near(tl.where(near_p, v, 0.0)), beta * (q - p) - times(p, v))
    return from_q, from_p


@triton.jit
def row_terms(p, q, r, alpha, KIND: tl.constexpr):
    """The terms, none negative, of the two sums over a row that `loss_of_sums` and `row_gradients` take."""
    near = tl.abs(r) < 1.0
    s = tl.where(near, r, 0.0)
    f = f_near(s)
    if KIND == "kl":
        first = tl.where(near, q * f, (p - q) - times(q, r))
        second = tl.zeros_like(r)
    elif KIND == "sym_kl":
        forward = tl.where(near, q * f, (p - q) - times(q, r))
        first = alpha * forward + tl.where(near, q * (s * (s + f) - f), times(p, r) - (p - q))
        second = tl.zeros_like(r)
    elif KIND == "js":
        total = p + q
        first = alpha * tl.where(total == 0.0, 0.0, total * _log_cosh_half(r))
        second = tl.zeros_like(r)
    elif KIND == "jsd":
        first, second = _mixture_terms(p, q, r, alpha)
    else:
        tl.static_assert(False, "unknown divergence")
    return first, second


@triton.jit
def elementwise_terms(p, q, r, alpha, KIND: tl.constexpr):
    """The terms as `torch.nn.functional.kl_div(reduction="none")` defines them, of which single ones may be negative.
    Those of jsd are not: near, they are those of `row_terms`; farther, what is added to both sides adds up to zero."""
    if KIND == "kl":
        terms = -times(q, r)
    elif KIND == "sym_kl":
        terms = times(p_minus_q(p, q, r), r) + (1.0 - alpha) * times(q, r)
    elif KIND == "js":
        total = p + q
        terms = alpha * tl.where(total == 0.0, 0.0, total * _log_cosh_half(r))
    elif KIND == "jsd":
        u, v = _log_mixture(r, alpha)
        near = tl.abs(r) < 1.0
        to_q = tl.where(near, q * f_near(tl.where(near, u, 0.0)), -times(q, u))
        to_p = tl.where(near, p * f_near(tl.where(near, v, 0.0)), -times(p, v))
        terms = alpha * to_q + (1.0 - alpha) * to_p
    else:
        tl.static_assert(False, "unknown divergence")
    return terms


@triton.jit
def loss_of_sums(first, second, alpha, KIND: tl.constexpr):
    """The loss of each row from its two sums."""
    if (KIND == "kl" or KIND == "sym_kl") or KIND == "js":
        loss = first
    elif KIND == "jsd":
        loss = alpha * first + (1.0 - alpha) * second
    else:
        tl.static_assert(False, "unknown divergence")
    return loss


@triton.jit
def row_gradients(g, p, q, r, first, second, alpha, KIND: tl.constexpr):
    """``(dx, dt)`` of a tile, of row losses under the upstream gradient ``g`` of each row, from the two row sums."""
    if KIND == "kl":
        dx = g[:, None] * p_minus_q(p, q, r)
        dt = -g[:, None] * times(q, r + first[:, None])
    elif KIND == "sym_kl":
        diff = g[:, None] * p_minus_q(p, q, r)
        dx = diff * alpha
        dt = -diff
    elif KIND == "js":
        g = 0.5 * g * alpha
        dx = g[:, None] * p_minus_q(p, q, r)
        dt = -dx
    elif KIND == "jsd":
        u, v = _log_mixture(r, alpha)
        dx = (g * (alpha - 1.0))[:, None] * times(p, v + second[:, None])
        dt = (g * -alpha)[:, None] * times(q, u + first[:, None])
    else:
        tl.static_assert(False, "unknown divergence")
    return dx, dt


@triton.jit
def upstream_terms(p, q, r, h, first, alpha, KIND: tl.constexpr):
    """The terms of the two sums over a row that `elementwise_gradients` takes, under the upstream gradient
    g = h + ``first`` (that of the row's first class)."""
    if KIND == "kl":
        one = q * h
        two = times(q, (h + first[:, None]) * r)
    elif KIND == "sym_kl" or KIND == "js":
        one = p * h
        two = q * h
    elif KIND == "jsd":
        u, v = _log_mixture(r, alpha)
        one = times(p, (h + first[:, None]) * v)
        two = times(q, (h + first[:, None]) * u)
    else:
        tl.static_assert(False, "unknown divergence")
    return one, two


@triton.jit
def elementwise_gradients(p, q, r, h, first, one, two, alpha, KIND: tl.constexpr):
    """``(dx, dt)`` of a tile, of the terms under any upstream gradient. With g that gradient, g0 the first of the row,
    h = g - g0, and S_c = sum c h over the row:

        kl      dx = (p - q) (g0 + S_q) + q (S_q - h)        dt = q (h - S_q) - q (g r - sum q g r)
        sym_kl  dx = alpha (the kl dx)                       dt = q (S_p - h) - g (p - q)
        js      dx = alpha (p (S_m - h) + g (p - q) / 2)     dt = alpha (q (S_m - h) - g (p - q) / 2)
        jsd     dx = -(1 - beta) p (g v - sum p g v)         dt = -beta q (g u - sum q g u)

    written so that a constant g, the usual case, cancels exactly instead of to rounding.
    """
    g = h + first[:, None]
    if KIND == "kl":
        dx = p_minus_q(p, q, r) * (first + one)[:, None] + q * (one[:, None] - h)
        dt = q * (h - one[:, None]) - (times(q, g * r) - q * two[:, None])
    elif KIND == "sym_kl":
        diff = p_minus_q(p, q, r)
        dx = alpha * (diff * (first + two)[:, None] + q * (two[:, None] - h))
        dt = q * (one[:, None] - h) - g * diff
    elif KIND == "js":
        diff = p_minus_q(p, q, r)
        sum_m = 0.5 * (one + two)[:, None]
        dx = alpha * (p * (sum_m - h) + 0.5 * g * diff)
        dt = alpha * (q * (sum_m - h) - 0.5 * g * diff)
    elif KIND == "jsd":
        u, v = _log_mixture(r, alpha)
        dx = (alpha - 1.0) * (times(p, g * v) - p * one[:, None])
        dt = -alpha * (times(q, g * u) - q * two[:, None])
    else:
        tl.static_assert(False, "unknown divergence")
    return dx, dt


@triton.jit
def loss_of_moments(sum_t, sum_delta, sum_f, sum_product, sum_fourth, log_ratio, widest, alpha, KIND: tl.constexpr):
    """``(loss, settled)`` of near rows from the sums of `parts_of_blocks`, where it has moments.

    With means over q, u = expm1(delta) = delta + f(delta), P = E[u delta] and F = E[f]:

        KL(q || p) = F - f(L)           KL(q || p) + KL(p || q) = (P - E[u] E[delta]) / (1 + E[u])
        js = (KL(q || p) + KL(p || q)) / 4 + E[expm1(r) r^3] / 96        to 2e-7 for |r| <= 0.1

    and E[expm1(r) r^3], r = delta - L, from that of delta, 6 (P - 2 F) for E[delta^3] and 2 F for E[delta^2]: within
    4e-7 of js while |L| w (w + 6 |L|) <= 2e-5, w the largest |delta|. Each subtracts the square of what c is short of
    c + L: settled rows are those in which that is small enough.
    """
    inverse = 1.0 / sum_t
    mean_f = sum_f * inverse
    mean_delta = sum_delta * inverse
    mean_u = mean_delta + mean_f
    product = sum_product * inverse
    settled = mean_u * mean_u <= mean_f
    forward = mean_f - f_near(log_ratio)
    both = (product - mean_u * mean_delta) / (1.0 + mean_u)
    if KIND == "kl":
        loss = forward
    elif KIND == "sym_kl":
        loss = both + (alpha - 1.0) * forward
    elif KIND == "js":
        size = tl.abs(log_ratio)
        settled = settled & (widest <= 0.1) & (size * widest * (widest + 6.0 * size) <= 2e-5)
        square = 0.125 * log_ratio * log_ratio
        moved = square * (mean_f * (1.0 - 0.5 * log_ratio) - 2.0 * square)
        moved -= 0.25 * log_ratio * (product - 2.0 * mean_f)
        loss = alpha * (0.25 * both + (sum_fourth * inverse * (1.0 / 96) + moved))
    else:
        tl.static_assert(False, "a divergence without moments")
    return loss, settled
