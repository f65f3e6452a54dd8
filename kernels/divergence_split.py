"""The divergence of rows that several programs share, in three steps: parts, finish, collect.

Where rows are few and wide, and where each device holds a slice of the vocabulary. Every program measures its own
columns; partial statistics merge as log-sum-exps do; with the merged ones every program finishes its columns; the
parts of a row's loss are added last, in a fixed order. Formulas: divergence_formulas.py.
"""

import triton
import triton.language as tl

from .divergence_formulas import exp, f_near, finite_max, loss_of_sums
from .divergence_rows import (
    PART_EXPM1_SUM,
    PART_MAX_D,
    PART_MAX_T,
    PART_MAX_X,
    PART_SHIFT,
    PART_SUM_T,
    PART_SUM_X,
    PARTS,
    finish_blocks,
    finite_or_zero,
    load_statistics,
    log_ratio_of,
    parts_of_blocks,
    skewed,
    store_statistics,
    store_sums,
)
from .indexing import as_fp32, row_offset, rows_there


@triton.jit
def _store_partials(partials, valid, max_x, sum_x, max_t, sum_t, widest, shift, sum_u):
    tl.store(partials + PART_MAX_X, max_x, mask=valid)
    tl.store(partials + PART_SUM_X, sum_x, mask=valid)
    tl.store(partials + PART_MAX_T, max_t, mask=valid)
    tl.store(partials + PART_SUM_T, sum_t, mask=valid)
    tl.store(partials + PART_MAX_D, widest, mask=valid)
    tl.store(partials + PART_SHIFT, shift, mask=valid)
    tl.store(partials + PART_EXPM1_SUM, sum_u, mask=valid)


@triton.jit
def _merge_partials(partials_ptr, row, real, splits, scale, SPLITS: tl.constexpr):
    """The partial statistics of whole rows from those of their ``splits`` <= SPLITS slices.

    Slices have shifts of their own. By s more than that of the heaviest slice (scaled), expm1(delta + s) =
    exp(s) expm1(delta) + expm1(s).
    """
    split = tl.arange(0, SPLITS)
    there = real[:, None] & (split < splits)[None, :]
    at = partials_ptr + ((row * splits)[:, None] + split[None, :]) * PARTS
    maxima_x = tl.load(at + PART_MAX_X, mask=there, other=float("-inf"))
    maxima_t = tl.load(at + PART_MAX_T, mask=there, other=float("-inf"))
    max_x = tl.max(maxima_x, axis=1)
    max_t = tl.max(maxima_t, axis=1)
    share_x = exp(maxima_x - finite_max(max_x)[:, None])
    share_t = exp(maxima_t - finite_max(max_t)[:, None])
    sum_x = tl.sum(share_x * tl.load(at + PART_SUM_X, mask=there, other=0.0), axis=1)
    sums_t = share_t * tl.load(at + PART_SUM_T, mask=there, other=0.0)
    sum_t = tl.sum(sums_t, axis=1)

    shifts = tl.load(at + PART_SHIFT, mask=there, other=0.0)
    filled = there & (sums_t > 0.0)
    heaviest = filled & (sums_t == tl.max(sums_t, axis=1)[:, None])
    shift = tl.max(tl.where(heaviest, shifts, float("-inf")), axis=1)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    more = tl.where(filled, (shifts - shift[:, None]) * scale, 0.0)
    widest = tl.max(tl.load(at + PART_MAX_D, mask=there, other=0.0) + tl.abs(more), axis=1)
    near = widest <= 1.0
    more = tl.where(near[:, None], more, 0.0)
    u = more + f_near(more)
    sums_u = share_t * tl.load(at + PART_EXPM1_SUM, mask=there, other=0.0)
    sum_u = tl.sum(tl.where(filled, sums_u + u * (sums_u + sums_t), 0.0), axis=1)
    gap = finite_or_zero(finite_max(max_x) - finite_max(max_t)) / scale
    return max_x, sum_x, max_t, sum_t, widest, tl.where(near, shift, gap), sum_u


@triton.jit
def divergence_parts_kernel(
    x_ptr, t_ptr, mask_ptr, partials_ptr,
    rows, width, splits, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    scale,
    MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, SKEW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes the partial statistics, fp32 ``[rows, splits, PARTS]``. Masked rows: those of one class, not read."""
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = pid % splits
    valid = rows_there(row, rows, ROWS)
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    x_base = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    t_base = row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2)
    x_base, skew = skewed(x_base, SKEW)
    t_base, _ = skewed(t_base, SKEW)
    first = split * (BLOCK * BLOCKS)
    max_x, sum_x, max_t, sum_t, widest, shift, sum_u, _, _, _, _ = parts_of_blocks(
        x_ptr, t_ptr, x_base, t_base, skew, real, first, width, as_fp32(scale), MASKED, FROM_DIFFERENCE, SCALED, SKEW,
        0, ROWS, BLOCK, BLOCKS, STAGES,
    )  # fmt: skip
    # Without a finite logit there is nothing that sums could be relative to.
    max_x = tl.where(sum_x == 0.0, float("-inf"), max_x)
    max_t = tl.where(sum_t == 0.0, float("-inf"), max_t)
    if MASKED:
        max_x = tl.where(real, max_x, 0.0)
        sum_x = tl.where(real, sum_x, 1.0)
        max_t = tl.where(real, max_t, 0.0)
        sum_t = tl.where(real, sum_t, 1.0)
    partials = partials_ptr + (row * splits + split) * PARTS
    _store_partials(partials, valid, max_x, sum_x, max_t, sum_t, widest, shift, sum_u)


@triton.jit
def divergence_merge_kernel(partials_ptr, merged_ptr, rows, splits, scale, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """``[rows, splits, PARTS]`` to ``[rows, PARTS]``, for those who merge further."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    max_x, sum_x, max_t, sum_t, widest, shift, sum_u = _merge_partials(
        partials_ptr, row, valid, splits, as_fp32(scale), SPLITS
    )
    _store_partials(merged_ptr + row * PARTS, valid, max_x, sum_x, max_t, sum_t, widest, shift, sum_u)


@triton.jit
def divergence_finish_kernel(
    x_ptr, t_ptr, mask_ptr, partials_ptr, stats_ptr, out_ptr, sums_ptr,
    rows, width, splits, size1, size2, x_stride0, x_stride1, x_stride2, t_stride0, t_stride1, t_stride2,
    alpha, scale,
    KIND: tl.constexpr, OUTPUT: tl.constexpr, MASKED: tl.constexpr, FROM_DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
    SKEW: tl.constexpr, MERGE: tl.constexpr, KEEP: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes each program's part of the two row sums, fp32 ``[rows, splits, 2]``, and with OUTPUT "terms" the terms.

    MERGE: row statistics come from ``partials`` (``[rows, splits, PARTS]``), and KEEP writes them, all but the
    two sums. Else they are read from ``stats``. Masked rows are not read; their sums are zero.
    """
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = pid % splits
    valid = rows_there(row, rows, ROWS)
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    if MERGE:
        max_x, sum_x, max_t, sum_t, widest, shift, sum_u = _merge_partials(
            partials_ptr, row, real, splits, as_fp32(scale), SPLITS
        )
        max_x = finite_max(max_x)
        max_t = finite_max(max_t)
        log_ratio = log_ratio_of(max_x, sum_x, max_t, sum_t, widest, shift * as_fp32(scale), sum_u)
        inv_x = 1.0 / sum_x
        inv_t = 1.0 / sum_t
        if KEEP:
            # Triton 3.9's interpreter makes integers of a scalar comparison that is broadcast to a mask, hence [None].
            writer = valid & (split[None] == 0)
            store_statistics(stats_ptr, row, writer, real, max_x, inv_x, max_t, inv_t, shift, log_ratio, MASKED)
    else:
        max_x, inv_x, max_t, inv_t, shift, log_ratio = load_statistics(stats_ptr, row, real)
    x_base = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    t_base = row_offset(row, size1, size2, t_stride0, t_stride1, t_stride2)
    x_base, skew = skewed(x_base, SKEW)
    t_base, _ = skewed(t_base, SKEW)
    first = split * (BLOCK * BLOCKS)
    one, two = finish_blocks(
        x_ptr, t_ptr, out_ptr, x_base, t_base, skew, row, valid, real, first, width, as_fp32(scale), as_fp32(alpha),
        max_x, inv_x, max_t, inv_t, shift, log_ratio, KIND, OUTPUT, MASKED, FROM_DIFFERENCE, SCALED, SKEW, ROWS, BLOCK,
        BLOCKS, STAGES,
    )  # fmt: skip
    sums = sums_ptr + (row * splits + split) * 2
    tl.store(sums, one, mask=valid)
    tl.store(sums + 1, two, mask=valid)


@triton.jit
def divergence_collect_kernel(
    sums_ptr, out_ptr, stats_ptr, rows, splits, alpha, weight,
    KIND: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the parts ``[rows, splits, 2]`` of the row sums: ``out`` as OUTPUT says ("sums": the two themselves, fp32
    ``[rows, 2]``), and the statistics' last two columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    valid = row < rows
    there = valid[:, None] & (split < splits)[None, :]
    sums = sums_ptr + ((row * splits)[:, None] + split[None, :]) * 2
    first = tl.sum(tl.load(sums, mask=there, other=0.0), axis=1)
    second = tl.sum(tl.load(sums + 1, mask=there, other=0.0), axis=1)
    if OUTPUT == "sums":
        tl.store(out_ptr + row * 2, first, mask=valid)
        tl.store(out_ptr + row * 2 + 1, second, mask=valid)
    elif OUTPUT == "sum":
        loss = loss_of_sums(first, second, as_fp32(alpha), KIND)
        tl.store(out_ptr, as_fp32(weight) * tl.sum(loss, axis=0))
    elif OUTPUT == "rows":
        tl.store(out_ptr + row, as_fp32(weight) * loss_of_sums(first, second, as_fp32(alpha), KIND), mask=valid)
    if KEEP:
        store_sums(stats_ptr, row, valid, first, second)
