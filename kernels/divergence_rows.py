"""The walks over rows of logits that the divergence kernels are made of: what is known of a row, then its terms.

Threads add up what they hold of a row and exchange sums once, behind the loop. Exponentials are relative to the largest
logits of the first block: where a later one goes too far beyond, which is rare, the row is walked over again. Formulas:
divergence_formulas.py.
"""

import triton
import triton.language as tl

from .divergence_formulas import NEG_INF, elementwise_terms, exp, f_near, finite_max, log1p, row_terms

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

#: What a maximum may be short of the true one: sums of exponentials stay far from overflow.
REACH = tl.constexpr(60.0)


@triton.jit
def skewed(base, SKEW: tl.constexpr):
    """``(base, skew)``: the offset of a row, rounded down to a multiple of SKEW elements (16 bytes), and by how much.

    Columns then count from there, so that loads of 16 bytes are aligned whatever the width. SKEW 0: as it was.
    """
    if SKEW == 0:
        return base, tl.zeros_like(base).to(tl.int32)
    else:
        skew = base % SKEW
        return tl.multiple_of(base - skew, SKEW), skew.to(tl.int32)


@triton.jit
def _left_out(x, t, d):
    """What rounding took from d = x - t (Knuth's two-difference); NaN where d is not finite."""
    back = d - x
    return (x - (d - back)) - (t + back)


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def load_pair(
    x_ptr, t_ptr, x_base, t_base, skew, col, real, width, shift, scale,
    FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, SKEW: tl.constexpr, DROP: tl.constexpr = True,
):  # fmt: skip
    """``(x, t, delta)`` of a tile: delta = (x - t) - shift, with what rounding takes from x - t put back.
    Outside, and where both are minus infinity: minus infinity, and delta zero.

    FROM_DIFFERENCE: ``x_ptr`` holds x - t, and t alone tells which classes there are. Scaled last: differences keep
    their precision. SKEW: bases and columns are those of `skewed`; loads' parts of other rows are left if not DROP.
    """
    if SKEW == 0:
        loaded = real[:, None] & (col < width)[None, :]
    else:  # of each 16 bytes all or nothing
        loaded = real[:, None] & ((col // SKEW * SKEW)[None, :] < (width + skew)[:, None])
    x = tl.load(x_ptr + x_base[:, None] + col[None, :], mask=loaded, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + t_base[:, None] + col[None, :], mask=loaded, other=float("-inf")).to(tl.float32)
    if SKEW > 0 and DROP:
        inside = (col[None, :] - skew[:, None]).to(tl.uint32) < width.to(tl.uint32)
        x = tl.where(inside, x, NEG_INF)
        t = tl.where(inside, t, NEG_INF)
    if FROM_DIFFERENCE:
        out = t == NEG_INF  # whatever x holds there
        delta = tl.where(out, 0.0, x - shift[:, None])
        x = tl.where(out, NEG_INF, t + x)
    else:
        d = x - t
        delta = d - shift[:, None]
        delta = tl.where(tl.abs(delta) < float("inf"), delta + _left_out(x, t, d), delta)
        delta = tl.where((x == NEG_INF) & (t == NEG_INF), 0.0, delta)
    if SCALED:
        x = x * scale
        t = t * scale
        delta = delta * scale
    return x, t, delta


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
    """A tile's share of the two sums over each row, `lane_sum`s. OUTPUT "terms" writes the terms instead, zeros in
    masked rows: their gradients need no sum that could be had here, and it is zero."""
    if OUTPUT == "terms":
        inside = real[:, None] & (col < width)[None, :]
        terms = tl.where(inside, elementwise_terms(p, q, r, alpha, KIND), 0.0)
        if MASKED:
            everywhere = valid[:, None] & (col < width)[None, :]
        else:
            everywhere = inside
        tl.store(out_ptr + (row * width)[:, None] + col[None, :], terms.to(out_ptr.dtype.element_ty), mask=everywhere)
        one = tl.zeros([ROWS, BLOCK // 4], tl.float32)
        two = one
    else:
        first, second = row_terms(p, q, r, alpha, KIND)  # zero beyond the row, where p and q are
        one = lane_sum(tl.where(real[:, None], first, 0.0), ROWS, BLOCK)
        two = lane_sum(tl.where(real[:, None], second, 0.0), ROWS, BLOCK)
    return one, two


@triton.jit
def _four_sums(a, b, c, d):
    """The sums over the columns of four tiles, by one exchange between threads."""
    rows: tl.constexpr = a.shape[0]
    pairs = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (3, 2, 0, 1))
    sums = tl.reshape(tl.sum(tl.reshape(pairs, [4 * rows, a.shape[1]]), axis=1), [2, 2, rows])
    left, right = tl.split(tl.permute(sums, (2, 1, 0)))
    a, b = tl.split(left)
    c, d = tl.split(right)
    return a, b, c, d


@triton.jit
def _two_maxima(a, b):
    return tl.split(tl.max(tl.join(a, b), axis=1))


@triton.jit
def first_look(
    x_ptr, t_ptr, x_base, t_base, skew, real, first, width, scale,
    FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, SKEW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``(max_x, max_t, shift)`` of the first block of a row: references for the sums over all of it.

    The shift (unscaled) is the mean of x - t under the softmax of t, near that of the row where the block is like it.
    """
    col = first + tl.arange(0, BLOCK)
    zero = tl.zeros([ROWS], tl.float32)
    x, t, d = load_pair(x_ptr, t_ptr, x_base, t_base, skew, col, real, width, zero, scale, FROM_DIFFERENCE, False, SKEW)
    max_x, max_t = _two_maxima(x, t)
    max_t = finite_max(max_t)
    e = exp((t - max_t[:, None]) * scale)
    sum_t, sum_d = tl.sum(e, axis=1), tl.sum(e * d, axis=1)
    shift = finite_or_zero(sum_d / sum_t)
    if SCALED:
        max_x = max_x * scale
        max_t = max_t * scale
    return finite_max(max_x), max_t, shift


@triton.jit
def _near_sums(
    x_ptr, t_ptr, x_base, t_base, skew, real, first, width, shift, scale, base,
    FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, SKEW: tl.constexpr, MOMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With e = exp(t - base), u = expm1(delta) and f = u - delta: the sums of e, e delta, e f, e u delta (zero but for
    MOMENTS 2 and 4) and e u delta^3 (zero but for 4), and the largest |delta| and t."""
    sum_e = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    sum_delta = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    sum_f = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    sum_product = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    sum_fourth = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    widest = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    top = tl.full([ROWS, BLOCK // 4], float("-inf"), tl.float32)
    for block in tl.range(BLOCKS, num_stages=STAGES):
        col = first + block * BLOCK + tl.arange(0, BLOCK)
        _, t, delta = load_pair(
            x_ptr, t_ptr, x_base, t_base, skew, col, real, width, shift, scale, FROM_DIFFERENCE, SCALED, SKEW
        )
        e = exp(t - base[:, None])
        f = f_near(delta)
        weighted = e * delta
        sum_e += lane_sum(e, ROWS, BLOCK)
        sum_delta += lane_sum(weighted, ROWS, BLOCK)
        sum_f += lane_sum(e * f, ROWS, BLOCK)
        if MOMENTS >= 2:
            product = weighted * (delta + f)
            sum_product += lane_sum(product, ROWS, BLOCK)
            if MOMENTS >= 4:
                sum_fourth += lane_sum(product * (delta * delta), ROWS, BLOCK)
        widest = tl.maximum(widest, _lane_max(tl.abs(delta), ROWS, BLOCK))
        top = tl.maximum(top, _lane_max(t, ROWS, BLOCK))
    sum_e, sum_delta, sum_f, sum_product = _four_sums(sum_e, sum_delta, sum_f, sum_product)
    if MOMENTS >= 4:
        fourth = tl.sum(sum_fourth, axis=1)
    else:
        fourth = tl.zeros([ROWS], tl.float32)
    widest, top = _two_maxima(widest, top)
    return sum_e, sum_delta, sum_f, sum_product, fourth, widest, top


@triton.jit
def _far_sums(
    x_ptr, t_ptr, x_base, t_base, skew, real, first, width, scale, base_x, base_t,
    FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, SKEW: tl.constexpr,
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
        x, t, _ = load_pair(
            x_ptr, t_ptr, x_base, t_base, skew, col, real, width, zero, scale, FROM_DIFFERENCE, SCALED, SKEW
        )
        sum_x += lane_sum(exp(x - base_x[:, None]), ROWS, BLOCK)
        sum_t += lane_sum(exp(t - base_t[:, None]), ROWS, BLOCK)
        top_x = tl.maximum(top_x, _lane_max(x, ROWS, BLOCK))
        top_t = tl.maximum(top_t, _lane_max(t, ROWS, BLOCK))
    sum_x, sum_t = tl.sum(sum_x, axis=1), tl.sum(sum_t, axis=1)
    top_x, top_t = _two_maxima(top_x, top_t)
    return sum_x, sum_t, top_x, top_t


@triton.jit
def _any_row(flags):
    return tl.max(flags.to(tl.int32), axis=0) != 0


@triton.jit
def _astray(base, top):
    """Whether exponentials relative to ``base`` come near overflow, where the largest exponent is ``top``, or vanish,
    for which a first block of minus infinities is the only reason."""
    beyond = finite_max(top) - base
    return (beyond > REACH) | (beyond < 0.0)


@triton.jit
def parts_of_blocks(
    x_ptr, t_ptr, x_base, t_base, skew, real, first, width, scale,
    MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, SKEW: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What is known of BLOCKS blocks of columns from ``first`` on: ``(base_x, sum_x, base_t, sum_t, widest, shift,
    sum_u, sum_delta, sum_f, sum_product, sum_fourth)``.

    The sums of exponentials are relative to the bases, which are within REACH of the maxima. ``widest`` is the largest
    |delta|, delta = x - t - shift (scaled). While it is at most one, ``sum_u`` is the sum of e expm1(delta), with
    e = exp(t - base_t), and the last four are those of `_near_sums`: of e delta, e f(delta) and, by MOMENTS, of
    e expm1(delta) delta and e expm1(delta) delta^3.
    Otherwise the shift given is the difference of the maxima: log-ratios of classes that count on both sides are not
    far from that.
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
    sum_fourth = tl.zeros([ROWS], tl.float32)
    if any_of(real, MASKED):
        base_x, base_t, shift = first_look(
            x_ptr, t_ptr, x_base, t_base, skew, real, first, width, scale, FROM_DIFFERENCE, SCALED, SKEW, ROWS, BLOCK
        )
        # More than one try where a later block shows that the first one was no guide to the largest logit.
        tries: tl.constexpr = 1 if BLOCKS == 1 else 2
        attempt = 0
        while attempt < tries:
            sum_t, sum_delta, sum_f, sum_product, sum_fourth, widest, top = _near_sums(
                x_ptr, t_ptr, x_base, t_base, skew, real, first, width, shift, scale, base_t, FROM_DIFFERENCE, SCALED,
                SKEW, MOMENTS, ROWS, BLOCK, BLOCKS, STAGES,
            )  # fmt: skip
            astray = _astray(base_t, top)
            base_t = tl.where(astray, finite_max(top), base_t)
            attempt = tl.where(_any_row(astray & (widest <= 1.0)), attempt + 1, tries)
        # exp(x) = exp(t + shift) (1 + expm1(delta))
        scaled = shift
        if SCALED:
            scaled = shift * scale
        near_x = base_t + scaled
        sum_x = (sum_t + (sum_delta + sum_f)) * (1.0 + _left_out(base_t, -scaled, near_x))
        far = widest > 1.0
        if _any_row(far):
            attempt = 0
            while attempt < tries:
                far_x, far_t, top_x, top_t = _far_sums(
                    x_ptr, t_ptr, x_base, t_base, skew, real, first, width, scale, base_x, base_t, FROM_DIFFERENCE,
                    SCALED, SKEW, ROWS, BLOCK, BLOCKS, STAGES,
                )  # fmt: skip
                astray = far & (_astray(base_x, top_x) | _astray(base_t, top_t))
                base_x = tl.where(astray, finite_max(top_x), base_x)
                base_t = tl.where(astray, finite_max(top_t), base_t)
                attempt = tl.where(_any_row(astray), attempt + 1, tries)
                sum_x = tl.where(far, far_x, sum_x)
                sum_t = tl.where(far, far_t, sum_t)
            gap = finite_or_zero(base_x - base_t)
            if SCALED:
                gap = gap / scale
            shift = tl.where(far, gap, shift)
        base_x = tl.where(far, base_x, near_x)
    return base_x, sum_x, base_t, sum_t, widest, shift, sum_delta + sum_f, sum_delta, sum_f, sum_product, sum_fourth


@triton.jit
def log_ratio_of(base_x, sum_x, base_t, sum_t, widest, shift, sum_u):
    """log sum exp(x) - log sum exp(t) - shift (scaled), from the expression that keeps its precision."""
    gap = base_x - base_t
    far = ((gap - shift) + _left_out(base_x, base_t, gap)) + tl.log(sum_x / sum_t)
    return tl.where(widest <= 1.0, log1p(sum_u / sum_t), far)


@triton.jit
def finish_blocks(
    x_ptr, t_ptr, out_ptr, x_base, t_base, skew, row, valid, real, first, width, scale, alpha,
    max_x, inv_x, max_t, inv_t, shift, log_ratio,
    KIND: tl.constexpr, OUTPUT: tl.constexpr, MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
    SKEW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The two row sums over BLOCKS blocks of columns from ``first`` on, from the row's statistics. With OUTPUT "terms"
    the terms are written, and the sums are zero."""
    one = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    two = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    if any_of(real, MASKED and OUTPUT != "terms"):
        for block in tl.range(BLOCKS, num_stages=STAGES):
            col = first + block * BLOCK + tl.arange(0, BLOCK)
            x, t, delta = load_pair(
                x_ptr, t_ptr, x_base, t_base, skew, col, real, width, shift, scale, FROM_DIFFERENCE, SCALED, SKEW
            )
            p = exp(x - max_x[:, None]) * inv_x[:, None]
            q = exp(t - max_t[:, None]) * inv_t[:, None]
            r = delta - log_ratio[:, None]
            more, more_two = store_terms(
                out_ptr, p, q, r, alpha, row, col, valid, real, width, KIND, OUTPUT, MASKED, ROWS, BLOCK
            )
            one += more
            two += more_two
    return tl.sum(one, axis=1), tl.sum(two, axis=1)


@triton.jit
def store_statistics(stats_ptr, row, valid, real, max_x, inv_x, max_t, inv_t, shift, log_ratio, MASKED: tl.constexpr):
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
