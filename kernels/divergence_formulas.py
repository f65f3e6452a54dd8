"""Row-wise divergences of logits, with gradients, in formulas that do not cancel.

Per row, with logits x (input) and t (target), p = softmax(x), q = softmax(t), d = x - t, everything follows from the
log-ratio r = log p - log q = d - D:

    D = log1p(sum q * expm1(d))       while max |d| <= 1,
    D = logsumexp(x) - logsumexp(t)   otherwise;

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
`upstream_terms` and `elementwise_gradients`. A KIND without one does not compile.

Logits of minus infinity on both sides (masked classes) contribute nothing. A row that is minus infinity throughout is
NaN, as its softmax. Arithmetic is fp32 for every dtype.

Logits may be scaled (by 1 / temperature) as they are read, and d may be given in place of x (FROM_DIFFERENCE).
"""

import triton
import triton.language as tl

#: What the functions on KIND know.
KINDS = ("kl", "sym_kl", "js", "jsd")
#: Those of `loss_of_moments`: one reading makes the loss of near rows.
WITH_MOMENTS = ("kl", "sym_kl")

NEG_INF = tl.constexpr(float("-inf"))

# Row statistics kept for the backward pass, one fp32 each.
STAT_MAX_T = tl.constexpr(0)
STAT_INV_SUM_T = tl.constexpr(1)
STAT_MAX_X = tl.constexpr(2)
STAT_INV_SUM_X = tl.constexpr(3)
STAT_SHIFT = tl.constexpr(4)
STAT_LOG_RATIO = tl.constexpr(5)
STAT_FIRST = tl.constexpr(6)  # the two row sums: see `loss_of_sums`
STAT_SECOND = tl.constexpr(7)
STATS = tl.constexpr(8)

# Partial statistics of a slice of the columns, one fp32 each.
PART_MAX_X = tl.constexpr(0)
PART_SUM_X = tl.constexpr(1)
PART_MAX_T = tl.constexpr(2)
PART_SUM_T = tl.constexpr(3)
PART_MAX_D = tl.constexpr(4)  # of |d - shift|
PART_SHIFT = tl.constexpr(5)
PART_EXPM1_SUM = tl.constexpr(6)  # sum exp(t - max_t) expm1(d - shift), meaningful while max |d - shift| <= 1
PARTS = tl.constexpr(7)

LOG2_E = tl.constexpr(1.4426950408889634)
#: What a maximum may be short of the true one: sums of exponentials stay far from overflow.
REACH = tl.constexpr(60.0)


@triton.jit
def exp(x):
    """exp(x) by the hardware's exp2: without the range checks of `tl.exp`, for which denormal results are flushed."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def f_near(r):
    """f(r) = expm1(r) - r for |r| <= 1: its Taylor series, relative error below 3e-8 before rounding."""
    s = 1.0 / 3628800
    s = s * r + 1.0 / 362880
    s = s * r + 1.0 / 40320
    s = s * r + 1.0 / 5040
    s = s * r + 1.0 / 720
    s = s * r + 1.0 / 120
    s = s * r + 1.0 / 24
    s = s * r + 1.0 / 6
    s = s * r + 0.5
    return s * r * r


@triton.jit
def _log1p(z):
    """log(1 + z), z > -1, relative precision near zero by 2 artanh(z / (2 + z))."""
    small = tl.abs(z) < 0.25
    s = tl.where(small, z, 0.0)
    s = s / (2.0 + s)
    w = s * s
    series = 2.0 * s * (1.0 + w * (1.0 / 3 + w * (1.0 / 5 + w * (1.0 / 7 + w * (1.0 / 9)))))
    return tl.where(small, series, tl.log(tl.where(small, 1.0, 1.0 + z)))


@triton.jit
def _log_cosh_half(r):
    """log cosh(r / 2): Taylor series for |r| < 1, |r|/2 - log 2 + log(1 + exp(-|r|)) beyond."""
    y = 0.5 * tl.where(tl.abs(r) < 1.0, r, 0.0)
    s = y * y
    series = s * 2.5658e-4 - 691.0 / 935550
    series = s * series + 31.0 / 14175
    series = s * series - 17.0 / 2520
    series = s * series + 1.0 / 45
    series = s * series - 1.0 / 12
    series = s * (s * series + 0.5)
    a = tl.abs(r)
    far = 0.5 * a - 0.6931471805599453 + tl.log(1.0 + exp(-a))
    return tl.where(a < 1.0, series, far)


@triton.jit
def load_pair(
    x_ptr, t_ptr, x_base, t_base, col, inside, shift, scale, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr
):
    """``(x, t, delta)`` of a tile: delta = (x - t) - shift, with what rounding takes from x - t put back (Knuth's
    two-difference). Outside, and where both are minus infinity: minus infinity, and delta zero.

    FROM_DIFFERENCE: ``x_ptr`` holds x - t, and t alone tells which classes there are. Scaled last: differences keep
    their precision.
    """
    x = tl.load(x_ptr + x_base[:, None] + col[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + t_base[:, None] + col[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    if FROM_DIFFERENCE:
        delta = tl.where(t == NEG_INF, 0.0, x - shift[:, None])
        x = t + x
    else:
        d = x - t
        back = d - x
        rest = (x - (d - back)) - (t + back)
        delta = d - shift[:, None]
        delta = tl.where(tl.abs(delta) < float("inf"), delta + rest, delta)
        delta = tl.where((x == NEG_INF) & (t == NEG_INF), 0.0, delta)
    if SCALED:
        x = x * scale
        t = t * scale
        delta = delta * scale
    return x, t, delta


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
    smaller = _log1p(tl.where(less, 1.0 - beta, beta) * e)
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
def loss_of_moments(sum_t, sum_delta, sum_f, sum_product, log_ratio, alpha, KIND: tl.constexpr):
    """``(loss, settled)`` of near rows from the sums of `parts_of_blocks`, where it has moments.

    With means over q, D' the log-ratio of `log_ratio_of`, and u = expm1(delta) = delta + f(delta):

        KL(q || p) = E[f] - f(D')        KL(q || p) + KL(p || q) = (E[u delta] - E[u] E[delta]) / (1 + E[u])

    Each subtracts what the shift is short of D, squared: settled rows are those in which that is small enough.
    """
    inverse = 1.0 / sum_t
    mean_f = sum_f * inverse
    mean_delta = sum_delta * inverse
    mean_u = mean_delta + mean_f
    forward = mean_f - f_near(log_ratio)
    if KIND == "kl":
        loss = forward
    elif KIND == "sym_kl":
        both = (sum_product * inverse - mean_u * mean_delta) / (1.0 + mean_u)
        loss = both + (alpha - 1.0) * forward
    else:
        tl.static_assert(False, "a divergence without moments")
    return loss, mean_u * mean_u <= mean_f


@triton.jit
def any_of(real, MASKED: tl.constexpr):
    """Whether a program has anything to read."""
    if MASKED:
        return tl.max(real.to(tl.int32), axis=0) != 0
    else:
        return True


@triton.jit
def lane_sum(values, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of four neighbors, which one thread holds: a loop adds them up without a word between threads."""
    return tl.sum(tl.reshape(values, [ROWS, BLOCK // 4, 4]), axis=2)


@triton.jit
def _lane_max(values, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    return tl.max(tl.reshape(values, [ROWS, BLOCK // 4, 4]), axis=2)


@triton.jit
def store_terms(
    out_ptr, p, q, r, alpha, row, col, valid, real, width, KIND: tl.constexpr, OUTPUT: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile's share of the two sums over each row, `lane_sum`s. OUTPUT "terms" writes the terms instead, zeros in masked
    rows: their gradients need no sum that could be had here, and it is zero."""
    inside = real[:, None] & (col < width)[None, :]
    if OUTPUT == "terms":
        terms = tl.where(inside, elementwise_terms(p, q, r, alpha, KIND), 0.0)
        if MASKED:
            everywhere = valid[:, None] & (col < width)[None, :]
        else:
            everywhere = inside
        tl.store(out_ptr + (row * width)[:, None] + col[None, :], terms.to(out_ptr.dtype.element_ty), mask=everywhere)
        one = tl.zeros([ROWS, BLOCK // 4], tl.float32)
        two = one
    else:
        first, second = row_terms(p, q, r, alpha, KIND)
        one = lane_sum(tl.where(inside, first, 0.0), ROWS, BLOCK)
        two = lane_sum(tl.where(inside, second, 0.0), ROWS, BLOCK)
    return one, two


@triton.jit
def _four_sums(a, b, c, d):
    """The sums over the columns of four tiles, by one exchange between threads."""
    sums = tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=1)
    left, right = tl.split(sums)
    a, b = tl.split(left)
    c, d = tl.split(right)
    return a, b, c, d


@triton.jit
def two_sums(a, b):
    return tl.split(tl.sum(tl.join(a, b), axis=1))


@triton.jit
def _two_maxima(a, b):
    return tl.split(tl.max(tl.join(a, b), axis=1))


@triton.jit
def first_look(
    x_ptr, t_ptr, x_base, t_base, real, first, width, scale, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``(max_x, max_t, shift)`` of the first block of a row: references for the sums over all of it.

    The shift (unscaled) is the mean of x - t under the softmax of t, near D where the block is like the row.
    """
    col = first + tl.arange(0, BLOCK)
    inside = real[:, None] & (col < width)[None, :]
    zero = tl.zeros([ROWS], tl.float32)
    x, t, d = load_pair(x_ptr, t_ptr, x_base, t_base, col, inside, zero, scale, FROM_DIFFERENCE, False)
    max_x, max_t = _two_maxima(x, t)
    max_t = finite_max(max_t)
    e = exp((t - max_t[:, None]) * scale)
    sum_t, sum_d = two_sums(e, e * d)
    shift = sum_d / sum_t
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    if SCALED:
        max_x = max_x * scale
        max_t = max_t * scale
    return finite_max(max_x), max_t, shift


@triton.jit
def _near_sums(
    x_ptr, t_ptr, x_base, t_base, real, first, width, shift, scale, base,
    FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, MOMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With e = exp(t - base), u = expm1(delta) and f = u - delta: the sums of e, e delta, e f and e u delta (zero without
    MOMENTS), and the largest |delta| and t."""
    sum_e = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    sum_delta = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    sum_f = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    sum_product = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    widest = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    top = tl.full([ROWS, BLOCK // 4], float("-inf"), tl.float32)
    for block in tl.range(BLOCKS, num_stages=STAGES):
        col = first + block * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        x, t, delta = load_pair(x_ptr, t_ptr, x_base, t_base, col, inside, shift, scale, FROM_DIFFERENCE, SCALED)
        e = exp(t - base[:, None])
        f = f_near(delta)
        weighted = e * delta
        sum_e += lane_sum(e, ROWS, BLOCK)
        sum_delta += lane_sum(weighted, ROWS, BLOCK)
        sum_f += lane_sum(e * f, ROWS, BLOCK)
        if MOMENTS:
            sum_product += lane_sum(weighted * (delta + f), ROWS, BLOCK)
        widest = tl.maximum(widest, _lane_max(tl.abs(delta), ROWS, BLOCK))
        top = tl.maximum(top, _lane_max(t, ROWS, BLOCK))
    sum_e, sum_delta, sum_f, sum_product = _four_sums(sum_e, sum_delta, sum_f, sum_product)
    widest, top = _two_maxima(widest, top)
    return sum_e, sum_delta, sum_f, sum_product, widest, top


@triton.jit
def _far_sums(
    x_ptr, t_ptr, x_base, t_base, real, first, width, scale, base_x, base_t,
    FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums of exp(x - base_x) and exp(t - base_t), and the largest x and t."""
    sum_x = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    sum_t = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    top_x = tl.full([ROWS, BLOCK // 4], float("-inf"), tl.float32)
    top_t = tl.full([ROWS, BLOCK // 4], float("-inf"), tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    for block in tl.range(BLOCKS, num_stages=STAGES):
        col = first + block * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        x, t, _ = load_pair(x_ptr, t_ptr, x_base, t_base, col, inside, zero, scale, FROM_DIFFERENCE, SCALED)
        sum_x += lane_sum(exp(x - base_x[:, None]), ROWS, BLOCK)
        sum_t += lane_sum(exp(t - base_t[:, None]), ROWS, BLOCK)
        top_x = tl.maximum(top_x, _lane_max(x, ROWS, BLOCK))
        top_t = tl.maximum(top_t, _lane_max(t, ROWS, BLOCK))
    sum_x, sum_t = two_sums(sum_x, sum_t)
    top_x, top_t = _two_maxima(top_x, top_t)
    return sum_x, sum_t, top_x, top_t


@triton.jit
def _any_row(flags):
    return tl.max(flags.to(tl.int32), axis=0) != 0


@triton.jit
def _astray(base, top):
    """Whether exponentials relative to ``base`` overflow, or vanish, where the largest exponent is ``top``."""
    return (tl.abs(finite_max(top) - base) > REACH) & (base != finite_max(top))


@triton.jit
def parts_of_blocks(
    x_ptr, t_ptr, x_base, t_base, real, first, width, scale,
    MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, MOMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What is known of BLOCKS blocks of columns from ``first`` on: ``(base_x, sum_x, base_t, sum_t, widest, shift, sum_u,
    sum_delta, sum_f, sum_product)``.

    The sums of exponentials are relative to the bases, which are within REACH of the maxima. ``widest`` is the largest
    |delta|, delta = x - t - shift (scaled); while it is at most one, ``sum_u`` is the sum of e expm1(delta), with
    e = exp(t - base_t), and the last three are those of e delta, e f(delta) and, if MOMENTS, of e expm1(delta) delta.
    """
    base_x = tl.full([ROWS], 0.0, tl.float32)
    base_t = tl.full([ROWS], 0.0, tl.float32)
    shift = tl.zeros([ROWS], tl.float32)
    widest = tl.zeros([ROWS], tl.float32)
    sum_x = tl.zeros([ROWS], tl.float32)
    sum_t = tl.zeros([ROWS], tl.float32)
    sum_delta = tl.zeros([ROWS], tl.float32)
    sum_f = tl.zeros([ROWS], tl.float32)
    sum_product = tl.zeros([ROWS], tl.float32)
    if any_of(real, MASKED):
        base_x, base_t, shift = first_look(
            x_ptr, t_ptr, x_base, t_base, real, first, width, scale, FROM_DIFFERENCE, SCALED, ROWS, BLOCK
        )
        # More than one try where a later block shows that the first one was no guide to the largest logit.
        tries: tl.constexpr = 1 if BLOCKS == 1 else 2
        attempt = 0
        while attempt < tries:
            sum_t, sum_delta, sum_f, sum_product, widest, top = _near_sums(
                x_ptr, t_ptr, x_base, t_base, real, first, width, shift, scale, base_t, FROM_DIFFERENCE, SCALED, MOMENTS,
                ROWS, BLOCK, BLOCKS, STAGES,
            )  # fmt: skip
            astray = _astray(base_t, top)
            base_t = tl.where(astray, finite_max(top), base_t)
            attempt = tl.where(_any_row(astray & (widest <= 1.0)), attempt + 1, tries)
        # exp(x) = exp(t + shift) (1 + expm1(delta))
        sum_x = sum_t + (sum_delta + sum_f)
        if SCALED:
            near_x = base_t + shift * scale
        else:
            near_x = base_t + shift
        far = widest > 1.0
        if _any_row(far):
            attempt = 0
            while attempt < tries:
                far_x, far_t, top_x, top_t = _far_sums(
                    x_ptr, t_ptr, x_base, t_base, real, first, width, scale, base_x, base_t, FROM_DIFFERENCE, SCALED,
                    ROWS, BLOCK, BLOCKS, STAGES,
                )  # fmt: skip
                astray = far & (_astray(base_x, top_x) | _astray(base_t, top_t))
                base_x = tl.where(astray, finite_max(top_x), base_x)
                base_t = tl.where(astray, finite_max(top_t), base_t)
                attempt = tl.where(_any_row(astray), attempt + 1, tries)
                sum_x = tl.where(far, far_x, sum_x)
                sum_t = tl.where(far, far_t, sum_t)
            shift = tl.where(far, 0.0, shift)
        base_x = tl.where(far, base_x, near_x)
    return base_x, sum_x, base_t, sum_t, widest, shift, sum_delta + sum_f, sum_delta, sum_f, sum_product


@triton.jit
def log_ratio_of(base_x, sum_x, base_t, sum_t, widest, sum_u):
    """log sum exp(x) - log sum exp(t) - shift, which D - shift is: from the expression that keeps its precision."""
    far = (base_x - base_t) + tl.log(sum_x / sum_t)
    return tl.where(widest <= 1.0, _log1p(sum_u / sum_t), far)


@triton.jit
def finish_blocks(
    x_ptr, t_ptr, out_ptr, x_base, t_base, row, valid, real, first, width, scale, alpha,
    max_x, inv_x, max_t, inv_t, shift, log_ratio,
    KIND: tl.constexpr, OUTPUT: tl.constexpr, MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The two row sums over BLOCKS blocks of columns from ``first`` on, from the row's statistics. With OUTPUT "terms"
    the terms are written, and the sums are zero."""
    one = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    two = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    if any_of(real, MASKED and OUTPUT != "terms"):
        for block in tl.range(BLOCKS, num_stages=STAGES):
            col = first + block * BLOCK + tl.arange(0, BLOCK)
            inside = real[:, None] & (col < width)[None, :]
            x, t, delta = load_pair(x_ptr, t_ptr, x_base, t_base, col, inside, shift, scale, FROM_DIFFERENCE, SCALED)
            p = exp(x - max_x[:, None]) * inv_x[:, None]
            q = exp(t - max_t[:, None]) * inv_t[:, None]
            r = delta - log_ratio[:, None]
            more, more_two = store_terms(
                out_ptr, p, q, r, alpha, row, col, valid, real, width, KIND, OUTPUT, MASKED, ROWS, BLOCK
            )
            one += more
            two += more_two
    return two_sums(one, two)


@triton.jit
def store_statistics(
    stats_ptr, row, valid, real, max_x, inv_x, max_t, inv_t, shift, log_ratio, MASKED: tl.constexpr
):
    """All but the two sums; zeros in masked rows."""
    if MASKED:
        max_x = tl.where(real, max_x, 0.0)
        inv_x = tl.where(real, inv_x, 0.0)
        max_t = tl.where(real, max_t, 0.0)
        inv_t = tl.where(real, inv_t, 0.0)
        shift = tl.where(real, shift, 0.0)
        log_ratio = tl.where(real, log_ratio, 0.0)
    stats = stats_ptr + row * STATS
    tl.store(stats + STAT_MAX_T, max_t, mask=valid)
    tl.store(stats + STAT_INV_SUM_T, inv_t, mask=valid)
    tl.store(stats + STAT_MAX_X, max_x, mask=valid)
    tl.store(stats + STAT_INV_SUM_X, inv_x, mask=valid)
    tl.store(stats + STAT_SHIFT, shift, mask=valid)
    tl.store(stats + STAT_LOG_RATIO, log_ratio, mask=valid)


@triton.jit
def store_sums(stats_ptr, row, valid, first, second):
    tl.store(stats_ptr + row * STATS + STAT_FIRST, first, mask=valid)
    tl.store(stats_ptr + row * STATS + STAT_SECOND, second, mask=valid)


@triton.jit
def load_sums(stats_ptr, row, real):
    """The two sums of each row. What a KIND does not use is not loaded once compiled."""
    first = tl.load(stats_ptr + row * STATS + STAT_FIRST, mask=real, other=0.0)
    return first, tl.load(stats_ptr + row * STATS + STAT_SECOND, mask=real, other=0.0)


@triton.jit
def load_statistics(stats_ptr, row, real):
    """``(max_x, inv_sum_x, max_t, inv_sum_t, shift, log_ratio)`` of each row."""
    stats = stats_ptr + row * STATS
    max_x = tl.load(stats + STAT_MAX_X, mask=real, other=0.0)
    inv_x = tl.load(stats + STAT_INV_SUM_X, mask=real, other=0.0)
    max_t = tl.load(stats + STAT_MAX_T, mask=real, other=0.0)
    inv_t = tl.load(stats + STAT_INV_SUM_T, mask=real, other=0.0)
    shift = tl.load(stats + STAT_SHIFT, mask=real, other=0.0)
    return max_x, inv_x, max_t, inv_t, shift, tl.load(stats + STAT_LOG_RATIO, mask=real, other=0.0)
