"""Row-wise KL, symmetric KL and JS divergence of logits, with gradients, in formulas that do not cancel.

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

No term of these sums is negative. The gradients of a row sum (targets detached as smart-pytorch detaches them):

    kl      dx = p - q = q expm1(r)     dt = -q (r + KL)
    sym_kl  dx = alpha (p - q)          dt = -(p - q)
    js      dx = alpha / 2 (p - q)      dt = -dx

Logits of minus infinity on both sides (masked classes) contribute nothing. A row that is minus infinity throughout is
NaN, as its softmax. Arithmetic is fp32 for every dtype.
"""

import triton
import triton.language as tl

from .indexing import as_fp32, row_offset

NEG_INF = tl.constexpr(float("-inf"))

# Row statistics kept for the backward pass, one fp32 each.
STAT_MAX_T = tl.constexpr(0)
STAT_INV_SUM_T = tl.constexpr(1)
STAT_MAX_X = tl.constexpr(2)
STAT_INV_SUM_X = tl.constexpr(3)
STAT_D = tl.constexpr(4)
STAT_KL = tl.constexpr(5)
STATS = tl.constexpr(6)


@triton.jit
def _f_near(r):
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
    far = 0.5 * a - 0.6931471805599453 + tl.log(1.0 + tl.exp(-a))
    return tl.where(a < 1.0, series, far)


@triton.jit
def _difference(x, t):
    """x - t, zero where both are minus infinity."""
    return tl.where((x == NEG_INF) & (t == NEG_INF), 0.0, x - t)


@triton.jit
def _load(ptr, base, col, inside):
    return tl.load(ptr + base[:, None] + col[None, :], mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _finite_max(m):
    """A maximum that is safe to subtract: rows of minus infinity keep their entries at exp(-inf) = 0."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def _expm1_sum(e, d):
    """sum e * expm1(d) over the columns, meaningful while |d| <= 1."""
    d = tl.minimum(tl.maximum(d, -1.0), 1.0)
    return tl.sum(e * (d + _f_near(d)), axis=1)


@triton.jit
def _log_ratio_shift(max_x, sum_x, max_t, sum_t, expm1_sum, max_d):
    """D = logsumexp(x) - logsumexp(t), from the expression that keeps its precision."""
    far = (max_x - max_t) + tl.log(sum_x / sum_t)
    z = expm1_sum / sum_t
    return tl.where(max_d <= 1.0, _log1p(z), far)


@triton.jit
def _times(q, r):
    """q * r with 0 * inf = 0: an event of probability zero adds nothing."""
    return tl.where(q == 0.0, 0.0, q * r)


@triton.jit
def _p_minus_q(p, q, r):
    """p - q, by q * expm1(r) where the two are close."""
    near = tl.abs(r) < 1.0
    s = tl.where(near, r, 0.0)
    return tl.where(near, q * (s + _f_near(s)), p - q)


@triton.jit
def _row_terms(p, q, r, alpha, KIND: tl.constexpr):
    """The non-negative terms whose sum is the divergence of the row."""
    near = tl.abs(r) < 1.0
    s = tl.where(near, r, 0.0)
    f = _f_near(s)
    if KIND == "js":
        total = p + q
        return alpha * tl.where(total == 0.0, 0.0, total * _log_cosh_half(r))
    forward = tl.where(near, q * f, (p - q) - _times(q, r))
    if KIND == "kl":
        return forward
    reverse = tl.where(near, q * (s * (s + f) - f), _times(p, r) - (p - q))
    return alpha * forward + reverse


@triton.jit
def _elementwise_terms(p, q, r, alpha, KIND: tl.constexpr):
    """The terms as `torch.nn.functional.kl_div(reduction="none")` defines them; single terms may be negative."""
    if KIND == "kl":
        return -_times(q, r)
    elif KIND == "sym_kl":
        return _times(_p_minus_q(p, q, r), r) + (1.0 - alpha) * _times(q, r)
    else:
        total = p + q
        return alpha * tl.where(total == 0.0, 0.0, total * _log_cosh_half(r))


@triton.jit
def divergence_forward_kernel(
    x_ptr, t_ptr, mask_ptr, out_ptr, stats_ptr,
    rows, width, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    alpha, weight,
    KIND: tl.constexpr, ELEMENTWISE: tl.constexpr, TOTAL: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Writes ``out``: the terms ``[rows, width]`` (ELEMENTWISE), else ``weight`` times the divergence of each row
    (fp32 ``[rows]``) or, if one program holds every row (TOTAL), their sum (fp32 scalar). KEEP also writes the row
    statistics, fp32 ``[rows, STATS]``. Masked rows are not read; their loss is zero.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    x_base = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    t_base = row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2)
    alpha = as_fp32(alpha)
    weight = as_fp32(weight)

    if BLOCKS == 1:
        col = tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        x = _load(x_ptr, x_base, col, inside)
        t = _load(t_ptr, t_base, col, inside)
        d = _difference(x, t)
        max_d = tl.max(tl.abs(d), axis=1)
        max_x = _finite_max(tl.max(x, axis=1))
        max_t = _finite_max(tl.max(t, axis=1))
        p = tl.exp(x - max_x[:, None])
        q = tl.exp(t - max_t[:, None])
        sum_x = tl.sum(p, axis=1)
        sum_t = tl.sum(q, axis=1)
        shift = _log_ratio_shift(max_x, sum_x, max_t, sum_t, _expm1_sum(q, d), max_d)
        if BLOCK == 4:  # one class: p = q = 1, and r must be zero to the last bit
            shift = tl.where(width == 1, tl.sum(tl.where(inside, d, 0.0), axis=1), shift)
        inv_x = 1.0 / sum_x
        inv_t = 1.0 / sum_t
        p = p * inv_x[:, None]
        q = q * inv_t[:, None]
        r = d - shift[:, None]
        if ELEMENTWISE:
            terms = tl.where(real[:, None], _elementwise_terms(p, q, r, alpha, KIND), 0.0)
            if MASKED:
                inside = valid[:, None] & (col < width)[None, :]
            out = terms.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (row * width)[:, None] + col[None, :], out, mask=inside)
            loss = tl.sum(tl.where(inside, terms, 0.0), axis=1)
        else:
            loss = tl.sum(tl.where(inside, _row_terms(p, q, r, alpha, KIND), 0.0), axis=1)
    else:
        max_x = tl.full([ROWS], float("-inf"), tl.float32)
        max_t = tl.full([ROWS], float("-inf"), tl.float32)
        max_d = tl.zeros([ROWS], tl.float32)
        sum_x = tl.zeros([ROWS], tl.float32)
        sum_t = tl.zeros([ROWS], tl.float32)
        expm1_sum = tl.zeros([ROWS], tl.float32)
        for block in range(BLOCKS):
            col = block * BLOCK + tl.arange(0, BLOCK)
            inside = real[:, None] & (col < width)[None, :]
            x = _load(x_ptr, x_base, col, inside)
            t = _load(t_ptr, t_base, col, inside)
            d = _difference(x, t)
            max_d = tl.maximum(max_d, tl.max(tl.abs(d), axis=1))
            new_x = tl.maximum(max_x, tl.max(x, axis=1))
            new_t = tl.maximum(max_t, tl.max(t, axis=1))
            safe_x = _finite_max(new_x)
            safe_t = _finite_max(new_t)
            scale_t = tl.exp(max_t - safe_t)
            q = tl.exp(t - safe_t[:, None])
            sum_x = sum_x * tl.exp(max_x - safe_x) + tl.sum(tl.exp(x - safe_x[:, None]), axis=1)
            sum_t = sum_t * scale_t + tl.sum(q, axis=1)
            expm1_sum = expm1_sum * scale_t + _expm1_sum(q, d)
            max_x = new_x
            max_t = new_t
        max_x = _finite_max(max_x)
        max_t = _finite_max(max_t)
        shift = _log_ratio_shift(max_x, sum_x, max_t, sum_t, expm1_sum, max_d)
        inv_x = 1.0 / sum_x
        inv_t = 1.0 / sum_t
        loss = tl.zeros([ROWS], tl.float32)
        for block in range(BLOCKS):
            col = block * BLOCK + tl.arange(0, BLOCK)
            inside = real[:, None] & (col < width)[None, :]
            x = _load(x_ptr, x_base, col, inside)
            t = _load(t_ptr, t_base, col, inside)
            p = tl.exp(x - max_x[:, None]) * inv_x[:, None]
            q = tl.exp(t - max_t[:, None]) * inv_t[:, None]
            r = _difference(x, t) - shift[:, None]
            if ELEMENTWISE:
                terms = tl.where(real[:, None], _elementwise_terms(p, q, r, alpha, KIND), 0.0)
                if MASKED:
                    inside = valid[:, None] & (col < width)[None, :]
                out = terms.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + (row * width)[:, None] + col[None, :], out, mask=inside)
                loss += tl.sum(tl.where(inside, terms, 0.0), axis=1)
            else:
                loss += tl.sum(tl.where(inside, _row_terms(p, q, r, alpha, KIND), 0.0), axis=1)

    if MASKED:
        loss = tl.where(real, loss, 0.0)
    if not ELEMENTWISE:
        if TOTAL:
            tl.store(out_ptr, weight * tl.sum(tl.where(valid, loss, 0.0), axis=0))
        else:
            tl.store(out_ptr + row, weight * loss, mask=valid)
    if KEEP:
        stats = stats_ptr + row * STATS
        if MASKED:
            inv_x = tl.where(real, inv_x, 0.0)
            inv_t = tl.where(real, inv_t, 0.0)
            shift = tl.where(real, shift, 0.0)
        tl.store(stats + STAT_MAX_T, max_t, mask=valid)
        tl.store(stats + STAT_INV_SUM_T, inv_t, mask=valid)
        tl.store(stats + STAT_MAX_X, max_x, mask=valid)
        tl.store(stats + STAT_INV_SUM_X, inv_x, mask=valid)
        tl.store(stats + STAT_D, shift, mask=valid)
        tl.store(stats + STAT_KL, loss, mask=valid)


@triton.jit
def _probabilities(x, t, stats, real):
    """p, q and r of a tile from the saved statistics of its rows."""
    max_t = tl.load(stats + STAT_MAX_T, mask=real, other=0.0)[:, None]
    inv_t = tl.load(stats + STAT_INV_SUM_T, mask=real, other=0.0)[:, None]
    max_x = tl.load(stats + STAT_MAX_X, mask=real, other=0.0)[:, None]
    inv_x = tl.load(stats + STAT_INV_SUM_X, mask=real, other=0.0)[:, None]
    shift = tl.load(stats + STAT_D, mask=real, other=0.0)[:, None]
    return tl.exp(x - max_x) * inv_x, tl.exp(t - max_t) * inv_t, _difference(x, t) - shift


@triton.jit
def divergence_backward_kernel(
    grad_ptr, x_ptr, t_ptr, mask_ptr, stats_ptr, dx_ptr, dt_ptr,
    rows, width, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    alpha, weight,
    KIND: tl.constexpr, WANT_X: tl.constexpr, WANT_T: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a scalar loss: ``dx``, ``dt`` (contiguous ``[rows, width]``), one program per tile, any order.

    ``grad`` is the upstream scalar, read on the device. Masked rows get zeros and are not read.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    row = (pid // blocks) * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    inside = real[:, None] & (col < width)[None, :]
    x = _load(x_ptr, row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2), col, inside)
    t = _load(t_ptr, row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2), col, inside)
    stats = stats_ptr + row * STATS
    p, q, r = _probabilities(x, t, stats, real)
    scale = as_fp32(weight) * tl.load(grad_ptr).to(tl.float32)
    if KIND == "js":
        scale = 0.5 * scale * as_fp32(alpha)

    out = (row * width)[:, None] + col[None, :]
    everywhere = valid[:, None] & (col < width)[None, :]
    diff = scale * _p_minus_q(p, q, r)
    if WANT_X:
        dx = diff
        if KIND == "sym_kl":
            dx = diff * as_fp32(alpha)
        if MASKED:
            dx = tl.where(real[:, None], dx, 0.0)
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=everywhere)
    if WANT_T:
        if KIND == "kl":
            kl = tl.load(stats + STAT_KL, mask=real, other=0.0)[:, None]
            dt = -scale * _times(q, r + kl)
        else:
            dt = -diff
        if MASKED:
            dt = tl.where(real[:, None], dt, 0.0)
        tl.store(dt_ptr + out, dt.to(dt_ptr.dtype.element_ty), mask=everywhere)


@triton.jit
def _load_grad(grad_ptr, base, stride, col, inside, first):
    """Upstream gradient of a tile relative to the row's first one: a constant row is then exactly zero."""
    grad = tl.load(grad_ptr + base[:, None] + (col * stride)[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, grad - first[:, None], 0.0)


@triton.jit
def divergence_backward_elementwise_kernel(
    grad_ptr, x_ptr, t_ptr, mask_ptr, stats_ptr, dx_ptr, dt_ptr,
    rows, width, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    grad_stride0, grad_stride1, grad_stride2, grad_stride_col,
    alpha,
    KIND: tl.constexpr, WANT_X: tl.constexpr, WANT_T: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gradients of ``reduction="none"`` under any upstream ``grad`` (any strides, stride 0 included).

    With g0 the first upstream value of the row, h = g - g0, and S_c = sum c h over the row:

        kl      dx = (p - q) (g0 + S_q) + q (S_q - h)        dt = q (h - S_q) - q (g r - sum q g r)
        sym_kl  dx = alpha (the kl dx)                       dt = q (S_p - h) - g (p - q)
        js      dx = alpha (p (S_m - h) + g (p - q) / 2)     dt = alpha (q (S_m - h) - g (p - q) / 2)

    written so that a constant g, the usual case, cancels exactly instead of to rounding.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    x_base = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    t_base = row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2)
    g_base = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    stats = stats_ptr + row * STATS
    alpha = as_fp32(alpha)
    first = tl.load(grad_ptr + g_base, mask=real, other=0.0).to(tl.float32)

    sum_p = tl.zeros([ROWS], tl.float32)
    sum_q = tl.zeros([ROWS], tl.float32)
    sum_qgr = tl.zeros([ROWS], tl.float32)
    for block in range(BLOCKS):
        col = block * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        x = _load(x_ptr, x_base, col, inside)
        t = _load(t_ptr, t_base, col, inside)
        h = _load_grad(grad_ptr, g_base, grad_stride_col, col, inside, first)
        p, q, r = _probabilities(x, t, stats, real)
        sum_p += tl.sum(tl.where(inside, p * h, 0.0), axis=1)
        sum_q += tl.sum(tl.where(inside, q * h, 0.0), axis=1)
        sum_qgr += tl.sum(tl.where(inside, _times(q, (h + first[:, None]) * r), 0.0), axis=1)

    for block in range(BLOCKS):
        col = block * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        everywhere = valid[:, None] & (col < width)[None, :]
        x = _load(x_ptr, x_base, col, inside)
        t = _load(t_ptr, t_base, col, inside)
        h = _load_grad(grad_ptr, g_base, grad_stride_col, col, inside, first)
        p, q, r = _probabilities(x, t, stats, real)
        g = h + first[:, None]
        diff = _p_minus_q(p, q, r)
        if KIND == "js":
            sum_m = 0.5 * (sum_p + sum_q)[:, None]
            dx = alpha * (p * (sum_m - h) + 0.5 * g * diff)
            dt = alpha * (q * (sum_m - h) - 0.5 * g * diff)
        else:
            dx = diff * (first + sum_q)[:, None] + q * (sum_q[:, None] - h)
            if KIND == "kl":
                dt = q * (h - sum_q[:, None]) - (_times(q, g * r) - q * sum_qgr[:, None])
            else:
                dx = alpha * dx
                dt = q * (sum_p[:, None] - h) - g * diff
        out = (row * width)[:, None] + col[None, :]
        if WANT_X:
            dx = tl.where(real[:, None], dx, 0.0)
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=everywhere)
        if WANT_T:
            dt = tl.where(real[:, None], dt, 0.0)
            tl.store(dt_ptr + out, dt.to(dt_ptr.dtype.element_ty), mask=everywhere)
