"""The divergence of rows that one program reads, and its gradients. Formulas: divergence_formulas.py.

OUTPUT is "terms" (elementwise ``[rows, width]``, not weighted), "rows" (fp32 ``[rows]``) or "sum" (fp32 scalar, where
one program holds every row). Logits are ``[rows, width]`` with up to three leading strides.
"""

import triton
import triton.language as tl

from .divergence_formulas import (
    any_of,
    elementwise_gradients,
    expm1_sum,
    finish_blocks,
    finite_max,
    load_pair,
    load_statistics,
    load_sums,
    log_ratio_shift,
    loss_of_sums,
    parts_of_blocks,
    row_gradients,
    store_statistics,
    store_sums,
    store_terms,
    upstream_terms,
)
from .indexing import as_fp32, row_offset


@triton.jit
def divergence_forward_kernel(
    x_ptr, t_ptr, mask_ptr, out_ptr, stats_ptr,
    rows, width, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    alpha, weight, scale,
    KIND: tl.constexpr, OUTPUT: tl.constexpr, MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
    KEEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` as OUTPUT says; KEEP also writes the row statistics, fp32 ``[rows, STATS]``.

    Masked rows are not read; their loss is zero.
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
    scale = as_fp32(scale)

    if BLOCKS == 1:
        col = tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        x, t, d = load_pair(x_ptr, t_ptr, x_base, t_base, col, inside, scale, FROM_DIFFERENCE, SCALED)
        max_d = tl.max(tl.abs(d), axis=1)
        max_x = finite_max(tl.max(x, axis=1))
        max_t = finite_max(tl.max(t, axis=1))
        p = tl.exp(x - max_x[:, None])
        q = tl.exp(t - max_t[:, None])
        sum_x = tl.sum(p, axis=1)
        sum_t = tl.sum(q, axis=1)
        shift = log_ratio_shift(max_x, sum_x, max_t, sum_t, expm1_sum(q, d), max_d)
        if BLOCK == 4:  # one class: p = q = 1, and r must be zero to the last bit
            shift = tl.where(width == 1, tl.sum(tl.where(inside, d, 0.0), axis=1), shift)
        inv_x = 1.0 / sum_x
        inv_t = 1.0 / sum_t
        p = p * inv_x[:, None]
        q = q * inv_t[:, None]
        r = d - shift[:, None]
        first, second = store_terms(out_ptr, p, q, r, alpha, row, col, valid, real, width, KIND, OUTPUT, MASKED)
    else:
        max_x, sum_x, max_t, sum_t, max_d, expm1 = parts_of_blocks(
            x_ptr,
            t_ptr,
            x_base,
            t_base,
            real,
            0,
            width,
            scale,
            MASKED,
            FROM_DIFFERENCE,
            SCALED,
            ROWS,
            BLOCK,
            BLOCKS,
            STAGES,
        )
        max_x = finite_max(max_x)
        max_t = finite_max(max_t)
        shift = log_ratio_shift(max_x, sum_x, max_t, sum_t, expm1, max_d)
        inv_x = 1.0 / sum_x
        inv_t = 1.0 / sum_t
        first, second = finish_blocks(
            x_ptr, t_ptr, out_ptr, x_base, t_base, row, valid, real, 0, width, scale, alpha,
            max_x, inv_x, max_t, inv_t, shift, KIND, OUTPUT, MASKED, FROM_DIFFERENCE, SCALED, ROWS, BLOCK, BLOCKS,
            STAGES,
        )  # fmt: skip

    loss = loss_of_sums(first, second, alpha, KIND)
    if OUTPUT == "sum":
        tl.store(out_ptr, weight * tl.sum(tl.where(valid, loss, 0.0), axis=0))
    elif OUTPUT == "rows":
        tl.store(out_ptr + row, weight * loss, mask=valid)
    if KEEP:
        store_statistics(stats_ptr, row, valid, real, max_x, inv_x, max_t, inv_t, shift, MASKED)
        store_sums(stats_ptr, row, valid, first, second)


@triton.jit
def _probabilities(x, t, d, stats_ptr, row, real):
    """p, q and r of a tile from the saved statistics of its rows."""
    max_x, inv_x, max_t, inv_t, shift = load_statistics(stats_ptr, row, real)
    p = tl.exp(x - max_x[:, None]) * inv_x[:, None]
    q = tl.exp(t - max_t[:, None]) * inv_t[:, None]
    return p, q, d - shift[:, None]


@triton.jit
def divergence_backward_kernel(
    grad_ptr, x_ptr, t_ptr, mask_ptr, stats_ptr, dx_ptr, dt_ptr,
    rows, width, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    grad_stride0, grad_stride1, grad_stride2,
    alpha, factor, scale,
    KIND: tl.constexpr, WANT_X: tl.constexpr, WANT_T: tl.constexpr, MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr,
    SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one loss a row: ``dx``, ``dt`` (contiguous ``[rows, width]``), one program per tile, any order.

    ``grad`` is the upstream gradient of each row, by strides (zeros: a scalar), read on the device; ``factor`` is
    weight * scale. Masked rows get zeros and are not read.
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
    x_base = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    t_base = row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2)
    g_base = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    x, t, d = load_pair(x_ptr, t_ptr, x_base, t_base, col, inside, as_fp32(scale), FROM_DIFFERENCE, SCALED)
    p, q, r = _probabilities(x, t, d, stats_ptr, row, real)
    g = as_fp32(factor) * tl.load(grad_ptr + g_base, mask=real, other=0.0).to(tl.float32)
    first, second = load_sums(stats_ptr, row, real)
    dx, dt = row_gradients(g, p, q, r, first, second, as_fp32(alpha), KIND)

    out = (row * width)[:, None] + col[None, :]
    everywhere = valid[:, None] & (col < width)[None, :]
    if WANT_X:
        if MASKED:
            dx = tl.where(real[:, None], dx, 0.0)
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=everywhere)
    if WANT_T:
        if MASKED:
            dt = tl.where(real[:, None], dt, 0.0)
        tl.store(dt_ptr + out, dt.to(dt_ptr.dtype.element_ty), mask=everywhere)


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
    valid = row < rows
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    x_base = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    t_base = row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2)
    g_base = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    alpha = as_fp32(alpha)
    scale = as_fp32(scale)
    first = tl.load(grad_ptr + g_base, mask=real, other=0.0).to(tl.float32) * scale

    one = tl.zeros([ROWS], tl.float32)
    two = tl.zeros([ROWS], tl.float32)
    if any_of(real, MASKED and BLOCKS > 1):  # a branch where both readings are one costs registers
        for block in tl.range(BLOCKS, num_stages=STAGES):
            col = block * BLOCK + tl.arange(0, BLOCK)
            inside = real[:, None] & (col < width)[None, :]
            x, t, d = load_pair(x_ptr, t_ptr, x_base, t_base, col, inside, scale, FROM_DIFFERENCE, SCALED)
            h = _load_grad(grad_ptr, g_base, grad_stride_col, col, inside, first, scale)
            p, q, r = _probabilities(x, t, d, stats_ptr, row, real)
            more_one, more_two = upstream_terms(p, q, r, h, first, alpha, KIND)
            one += tl.sum(tl.where(inside, more_one, 0.0), axis=1)
            two += tl.sum(tl.where(inside, more_two, 0.0), axis=1)

    for block in tl.range(BLOCKS, num_stages=STAGES):
        col = block * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        everywhere = valid[:, None] & (col < width)[None, :]
        x, t, d = load_pair(x_ptr, t_ptr, x_base, t_base, col, inside, scale, FROM_DIFFERENCE, SCALED)
        h = _load_grad(grad_ptr, g_base, grad_stride_col, col, inside, first, scale)
        p, q, r = _probabilities(x, t, d, stats_ptr, row, real)
        dx, dt = elementwise_gradients(p, q, r, h, first, one, two, alpha, KIND)
        out = (row * width)[:, None] + col[None, :]
        if WANT_X:
            dx = tl.where(real[:, None], dx, 0.0)
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=everywhere)
        if WANT_T:
            dt = tl.where(real[:, None], dt, 0.0)
            tl.store(dt_ptr + out, dt.to(dt_ptr.dtype.element_ty), mask=everywhere)
