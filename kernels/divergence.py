"""The divergence of rows that one program reads, and its gradients. Formulas: divergence_formulas.py.

OUTPUT is "terms" (elementwise ``[rows, width]``, not weighted), "rows" (fp32 ``[rows]``) or "sum" (fp32 scalar, where
one program holds every row). Logits are ``[rows, width]`` with up to three leading strides.
"""

import triton
import triton.language as tl

from .divergence_formulas import (
    elementwise_gradients,
    exp,
    loss_of_moments,
    loss_of_sums,
    row_gradients,
    upstream_terms,
)
from .divergence_rows import (
    any_of,
    finish_blocks,
    lane_sum,
    load_pair,
    load_statistics,
    load_sums,
    log_ratio_of,
    parts_of_blocks,
    skewed,
    store_statistics,
    store_sums,
)
from .indexing import as_fp32, row_offset, rows_there


@triton.jit
def divergence_forward_kernel(
    x_ptr, t_ptr, mask_ptr, out_ptr, stats_ptr,
    rows, width, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    alpha, weight, scale,
    KIND: tl.constexpr, OUTPUT: tl.constexpr, MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
    SKEW: tl.constexpr, MOMENTS: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` as OUTPUT says; KEEP also writes the row statistics, fp32 ``[rows, STATS]``.

    Masked rows are not read; their loss is zero.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows_there(row, rows, ROWS)
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    x_base = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    t_base = row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2)
    x_base, skew = skewed(x_base, SKEW)
    t_base, _ = skewed(t_base, SKEW)
    alpha = as_fp32(alpha)
    weight = as_fp32(weight)
    scale = as_fp32(scale)

    max_x, sum_x, max_t, sum_t, widest, shift, sum_u, sum_delta, sum_f, sum_product, sum_fourth = parts_of_blocks(
        x_ptr, t_ptr, x_base, t_base, skew, real, 0, width, scale, MASKED, FROM_DIFFERENCE, SCALED, SKEW, MOMENTS, ROWS,
        BLOCK, BLOCKS, STAGES,
    )  # fmt: skip
    log_ratio = log_ratio_of(max_x, sum_x, max_t, sum_t, widest, shift * scale, sum_u)
    if BLOCK == 4:  # one class: p = q = 1, and r must be zero to the last bit
        log_ratio = tl.where(width == 1, sum_delta, log_ratio)
    inv_x = 1.0 / sum_x
    inv_t = 1.0 / sum_t
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    settled = first != first
    if MOMENTS > 0:
        first, settled = loss_of_moments(
            sum_t, sum_delta, sum_f, sum_product, sum_fourth, log_ratio, widest, alpha, KIND
        )
        settled = settled & (widest <= 1.0)
        if BLOCK == 4:
            first = tl.where(width == 1, 0.0, first)
        if MASKED:
            first = tl.where(real, first, 0.0)
    if any_of(real & (settled == 0), MOMENTS > 0):
        walked, second = finish_blocks(
            x_ptr, t_ptr, out_ptr, x_base, t_base, skew, row, valid, real, 0, width, scale, alpha,
            max_x, inv_x, max_t, inv_t, shift, log_ratio, KIND, OUTPUT, MASKED, FROM_DIFFERENCE, SCALED, SKEW, ROWS,
            BLOCK, BLOCKS, STAGES,
        )  # fmt: skip
        first = tl.where(settled, first, walked)

    loss = loss_of_sums(first, second, alpha, KIND)
    if OUTPUT == "sum":
        tl.store(out_ptr, weight * tl.sum(tl.where(valid, loss, 0.0), axis=0))
    elif OUTPUT == "rows":
        tl.store(out_ptr + row, weight * loss, mask=valid)
    if KEEP:
        store_statistics(stats_ptr, row, valid, real, max_x, inv_x, max_t, inv_t, shift, log_ratio, MASKED)
        store_sums(stats_ptr, row, valid, first, second)


@triton.jit
def _probabilities(
    x_ptr, t_ptr, x_base, t_base, skew, col, stats_ptr, row, real, width, scale,
    FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, SKEW: tl.constexpr,
):  # fmt: skip
    """p, q and r of a tile from the saved statistics of its rows; with SKEW, anything outside the row."""
    max_x, inv_x, max_t, inv_t, shift, log_ratio = load_statistics(stats_ptr, row, real)
    x, t, delta = load_pair(
        x_ptr, t_ptr, x_base, t_base, skew, col, real, width, shift, scale, FROM_DIFFERENCE, SCALED, SKEW, False
    )
    p = exp(x - max_x[:, None]) * inv_x[:, None]
    q = exp(t - max_t[:, None]) * inv_t[:, None]
    return p, q, delta - log_ratio[:, None]


@triton.jit
def divergence_backward_kernel(
    grad_ptr, x_ptr, t_ptr, mask_ptr, stats_ptr, dx_ptr, dt_ptr,
    rows, width, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    grad_stride0, grad_stride1, grad_stride2,
    alpha, factor, scale,
    KIND: tl.constexpr, WANT_X: tl.constexpr, WANT_T: tl.constexpr, MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr,
    SCALED: tl.constexpr, SKEW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one loss a row: ``dx``, ``dt`` (contiguous ``[rows, width]``), one program per tile, any order.

    ``grad`` is the upstream gradient of each row, by strides (zeros: a scalar), read on the device; ``factor`` is
    weight * scale. Masked rows get zeros and are not read.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(width + SKEW, BLOCK)
    block = pid % blocks
    row = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = block * BLOCK + tl.arange(0, BLOCK)
    valid = rows_there(row, rows, ROWS)
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    x_base, skew = skewed(row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2), SKEW)
    t_base, _ = skewed(row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2), SKEW)
    g_base = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    p, q, r = _probabilities(
        x_ptr, t_ptr, x_base, t_base, skew, col, stats_ptr, row, real, width, as_fp32(scale), FROM_DIFFERENCE, SCALED,
        SKEW,
    )  # fmt: skip
    g = as_fp32(factor) * tl.load(grad_ptr + g_base, mask=real, other=0.0).to(tl.float32)
    first, second = load_sums(stats_ptr, row, real)
    dx, dt = row_gradients(g, p, q, r, first, second, as_fp32(alpha), KIND)
    ends = (block == 0) | ((block + 1) * BLOCK > width)  # where a row ends depends on its skew
    if WANT_X:
        _store_gradient(dx_ptr, dx, row, col, skew, valid, real, width, ends, MASKED, SKEW)
    if WANT_T:
        _store_gradient(dt_ptr, dt, row, col, skew, valid, real, width, ends, MASKED, SKEW)


@triton.jit
def _store_gradient(
    out_ptr, gradient, row, col, skew, valid, real, width, ends, MASKED: tl.constexpr, SKEW: tl.constexpr
):
    """Writes a tile; with SKEW, 16 bytes at a time, but for those at the ``ends`` of a row that two rows share."""
    if MASKED:
        gradient = tl.where(real[:, None], gradient, 0.0)
    gradient = gradient.to(out_ptr.dtype.element_ty)
    if SKEW == 0:
        out = out_ptr + (row * width)[:, None] + col[None, :]
        tl.store(out, gradient, mask=valid[:, None] & (col < width)[None, :])
    else:
        base, _ = skewed(row * width, SKEW)
        out = out_ptr + base[:, None] + col[None, :]
        load = (col // SKEW * SKEW)[None, :] - skew[:, None]
        whole = valid[:, None] & (load >= 0) & (load + SKEW <= width)
        tl.store(out, gradient, mask=whole)
        if ends:
            at = col[None, :] - skew[:, None]
            inside = valid[:, None] & (at >= 0) & (at < width)
            tl.store(out, gradient, mask=inside & (whole == 0))


@triton.jit
def _load_grad(grad_ptr, base, stride, col, inside, first, factor):
    """Upstream gradient of a tile relative to the row's first one: a constant row is then exactly zero."""
    grad = tl.load(grad_ptr + base[:, None] + (col * stride)[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, grad * factor - first[:, None], 0.0)


@triton.jit
def divergence_backward_elementwise_kernel(
    grad_ptr, x_ptr, t_ptr, mask_ptr, stats_ptr, dx_ptr, dt_ptr,
    rows, width, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    grad_stride0, grad_stride1, grad_stride2, grad_stride_col,
    alpha, scale,
    KIND: tl.constexpr, WANT_X: tl.constexpr, WANT_T: tl.constexpr, MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr,
    SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the terms under any upstream ``grad`` (any strides, stride 0 included). Read twice: for the sums of
    `upstream_terms`, then for `elementwise_gradients`. The upstream gradient is multiplied by ``scale``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows_there(row, rows, ROWS)
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    x_base = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    t_base = row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2)
    g_base = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    alpha = as_fp32(alpha)
    scale = as_fp32(scale)
    first = tl.load(grad_ptr + g_base, mask=real, other=0.0).to(tl.float32) * scale

    one = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    two = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    if any_of(real, MASKED and BLOCKS > 1):  # a branch where both readings are one costs registers
        for block in tl.range(BLOCKS, num_stages=STAGES):
            col = block * BLOCK + tl.arange(0, BLOCK)
            inside = real[:, None] & (col < width)[None, :]
            h = _load_grad(grad_ptr, g_base, grad_stride_col, col, inside, first, scale)
            p, q, r = _probabilities(
                x_ptr, t_ptr, x_base, t_base, 0, col, stats_ptr, row, real, width, scale, FROM_DIFFERENCE, SCALED, 0
            )
            more_one, more_two = upstream_terms(p, q, r, h, first, alpha, KIND)
            one += lane_sum(tl.where(inside, more_one, 0.0), ROWS, BLOCK)
            two += lane_sum(tl.where(inside, more_two, 0.0), ROWS, BLOCK)
    one, two = tl.sum(one, axis=1), tl.sum(two, axis=1)

    for block in tl.range(BLOCKS, num_stages=STAGES):
        col = block * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        everywhere = valid[:, None] & (col < width)[None, :]
        h = _load_grad(grad_ptr, g_base, grad_stride_col, col, inside, first, scale)
        p, q, r = _probabilities(
            x_ptr, t_ptr, x_base, t_base, 0, col, stats_ptr, row, real, width, scale, FROM_DIFFERENCE, SCALED, 0
        )
        dx, dt = elementwise_gradients(p, q, r, h, first, one, two, alpha, KIND)
        out = (row * width)[:, None] + col[None, :]
        if WANT_X:
            dx = tl.where(real[:, None], dx, 0.0)
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=everywhere)
        if WANT_T:
            dt = tl.where(real[:, None], dt, 0.0)
            tl.store(dt_ptr + out, dt.to(dt_ptr.dtype.element_ty), mask=everywhere)
