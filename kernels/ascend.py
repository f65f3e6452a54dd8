"""ascend: noise, gradient step, norm, projection and add, from the gradient to the next perturbed embedding.

With g the gradient of the ascent loss with respect to the noise (0 for rows where it is not finite), and u the unit of
a row (1 if there are none):

    smart-pytorch  m = noise + step_size * u * g            noise <- m / (norm(m) + epsilon * u)
    sift           m = g                                    noise <- noise + step_size * u * m / (norm(m) + epsilon * u)
    paper          m = noise / u + step_size * g / norm(g)  noise <- u * (the point nearest to m with norm <= epsilon)
    sign           m = noise + step_size * u * sign(g)      noise <- m clipped to +-epsilon * u

Token norms need one kernel. A norm over more than a row needs `norm_kernel` first, which leaves either one partial
norm per row or, for a norm that only Python can compute, m itself; for l2 and paper twice, of g and of m. Floor: read
embed, read g, write the result; the initial noise is regenerated from its seed.

Passes over a row are loops over its blocks. Where there is one, the compiler finds that all passes load and compute the
same, and does it once: the row stays in registers. With STAGES above one, blocks are loaded ahead of their turn.
"""

import triton
import triton.language as tl

from .indexing import as_fp32, load_unit, row_offset, rows_there
from .philox import noise_tile

#: What the functions on UPDATE and NORM know. Any other name does not compile.
UPDATES = ("smart-pytorch", "sift", "paper", "sign")
NORMS = ("inf", "l2", "l1")


@triton.jit
def _noise_tile(
    noise_ptr, seed, noise_var, unit, row, real, block, width, NOISE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The current noise of a tile: the one that NOISE names, regenerated before the first step; later on "kept", read
    back. Zero where masked."""
    first = (row * width)[:, None]
    if NOISE != "kept":
        noise = noise_tile(seed, first, block, ROWS, BLOCK, ALIGNED, BITS, NOISE)
        noise = noise * (as_fp32(noise_var) * unit)[:, None]
    else:
        col = block * BLOCK + tl.arange(0, BLOCK)
        noise = tl.load(noise_ptr + first + col[None, :], mask=real[:, None] & (col < width)[None, :], other=0.0)
    return tl.where(real[:, None], noise, 0.0)


@triton.jit
def _raw_grad_tile(grad_ptr, base, real, block, width, BLOCK: tl.constexpr):
    col = block * BLOCK + tl.arange(0, BLOCK)
    inside = real[:, None] & (col < width)[None, :]
    return tl.load(grad_ptr + base[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _finite_rows(
    grad_ptr, base, real, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr
):
    """1 for each row in which every gradient is finite, else 0."""
    nothing = tl.zeros([ROWS], tl.float32)
    for block in tl.range(BLOCKS, num_stages=STAGES, loop_unroll_factor=BLOCKS if BLOCKS <= 4 else 1):
        nothing += tl.sum(_raw_grad_tile(grad_ptr, base, real, block, width, BLOCK) * 0.0, axis=1)
    return (nothing == 0.0).to(tl.int32)


@triton.jit
def _grad_tile(grad_ptr, base, real, finite, block, width, BLOCK: tl.constexpr):
    """The gradient, zero where masked or outside, and in rows that are not finite."""
    return tl.where(finite[:, None] > 0, _raw_grad_tile(grad_ptr, base, real, block, width, BLOCK), 0.0)


@triton.jit
def _accumulate(norm, measured, NORM: tl.constexpr):
    """Fold a tile into running row norms (l2: the sum of squares)."""
    if NORM == "inf":
        return tl.maximum(norm, tl.max(tl.abs(measured), axis=1))
    elif NORM == "l2":
        return norm + tl.sum(measured * measured, axis=1)
    elif NORM == "l1":
        return norm + tl.sum(tl.abs(measured), axis=1)
    else:
        tl.static_assert(False, "unknown norm")


@triton.jit
def _grad_norm(
    grad_ptr, base, real, finite, width, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The norm of the gradient of each row, whatever its magnitude: l2 squares what the largest entry has divided."""
    norm = tl.zeros([ROWS], tl.float32)
    if NORM != "l2":
        for block in tl.range(BLOCKS, num_stages=STAGES, loop_unroll_factor=BLOCKS if BLOCKS <= 4 else 1):
            norm = _accumulate(norm, _grad_tile(grad_ptr, base, real, finite, block, width, BLOCK), NORM)
        return norm
    else:
        peak = tl.zeros([ROWS], tl.float32)
        for block in tl.range(BLOCKS, num_stages=STAGES, loop_unroll_factor=BLOCKS if BLOCKS <= 4 else 1):
            peak = _accumulate(peak, _grad_tile(grad_ptr, base, real, finite, block, width, BLOCK), "inf")
        peak = tl.minimum(tl.maximum(peak, 1e-37), 1e37)  # its reciprocal is a normal number
        for block in tl.range(BLOCKS, num_stages=STAGES, loop_unroll_factor=BLOCKS if BLOCKS <= 4 else 1):
            grad = _grad_tile(grad_ptr, base, real, finite, block, width, BLOCK)
            norm = _accumulate(norm, grad * (1.0 / peak)[:, None], NORM)
        return peak * tl.sqrt(norm)


@triton.jit
def _group_norm(
    norm_ptr, row, valid, group, UPDATE: tl.constexpr, NORM: tl.constexpr, GROUP_BLOCK: tl.constexpr
):  # fmt: skip
    """The norm of the group of each row, from what `norm_kernel` has left of its ``group`` rows."""
    member = tl.arange(0, GROUP_BLOCK)[None, :]
    start = (row // group) * group
    partial = tl.load(norm_ptr + start[:, None] + member, mask=valid[:, None] & (member < group), other=0.0)
    if NORM == "inf":
        return tl.max(partial, axis=1)
    elif NORM == "l1":
        return tl.sum(partial, axis=1)
    elif NORM == "l2" and UPDATE == "paper":  # of norms: squares of what the largest of them has divided
        peak = tl.minimum(tl.maximum(tl.max(partial, axis=1), 1e-37), 1e37)
        share = partial * (1.0 / peak)[:, None]
        return peak * tl.sqrt(tl.sum(share * share, axis=1))
    elif NORM == "l2":
        return tl.sqrt(tl.sum(partial, axis=1))
    else:
        tl.static_assert(False, "unknown norm")


@triton.jit
def _tile(
    grad_ptr, base, noise_ptr, seed, noise_var, step_size, unit, norm, finite, row, real, block, width,
    UPDATE: tl.constexpr, NOISE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``(noise, m)`` of a tile, m zero where masked or outside. ``norm``: of the gradient, read by paper only."""
    grad = _grad_tile(grad_ptr, base, real, finite, block, width, BLOCK)
    bits: tl.constexpr = grad_ptr.dtype.element_ty.primitive_bitwidth
    noise = _noise_tile(noise_ptr, seed, noise_var, unit, row, real, block, width, NOISE, ALIGNED, ROWS, BLOCK, bits)
    if UPDATE == "sift":
        measured = grad
    elif UPDATE == "paper":
        moving, known = norm > 0.0, unit > 0.0
        direction = tl.where(moving[:, None], grad / tl.where(moving, norm, 1.0)[:, None], 0.0)
        measured = noise / tl.where(known, unit, 1.0)[:, None] + as_fp32(step_size) * direction
        measured = tl.where(known[:, None], measured, 0.0)  # an embedding of zeros has no noise
    elif UPDATE == "smart-pytorch":
        measured = noise + (as_fp32(step_size) * unit)[:, None] * grad
    elif UPDATE == "sign":
        step = (as_fp32(step_size) * unit)[:, None]
        measured = noise + tl.where(grad > 0.0, step, tl.where(grad < 0.0, -step, 0.0))
    else:
        tl.static_assert(False, "unknown update")
    inside = real[:, None] & (block * BLOCK + tl.arange(0, BLOCK) < width)[None, :]
    return noise, tl.where(inside, measured, 0.0)


@triton.jit
def _divided(noise, measured, norm, step_size, epsilon, unit, UPDATE: tl.constexpr):
    """The new noise of smart-pytorch or sift. A zero denominator leaves the noise where it is."""
    denominator = norm + as_fp32(epsilon) * unit
    dead = denominator == 0.0
    scale = 1.0 / tl.where(dead, 1.0, denominator)
    if UPDATE == "sift":
        moved = noise + (as_fp32(step_size) * unit)[:, None] * measured * scale[:, None]
    elif UPDATE == "smart-pytorch":
        moved = measured * scale[:, None]
    else:
        tl.static_assert(False, "unknown update")
    return tl.where(dead[:, None], noise, moved)


@triton.jit
def _projected(measured, shrink, epsilon, NORM: tl.constexpr):
    """The point of the ball that is nearest to m, where `_shrink` or `_factor` is known."""
    if NORM == "inf":
        radius = as_fp32(epsilon)
        return tl.minimum(tl.maximum(measured, -radius), radius)
    elif NORM == "l2":
        return measured * shrink[:, None]
    elif NORM == "l1":
        left = tl.maximum(tl.abs(measured) - shrink[:, None], 0.0)
        return tl.where(measured < 0.0, -left, left)
    else:
        tl.static_assert(False, "unknown norm")


@triton.jit
def _clipped(measured, epsilon, unit):
    """The new noise of sign."""
    radius = (as_fp32(epsilon) * unit)[:, None]
    return tl.minimum(tl.maximum(measured, -radius), radius)


@triton.jit
def _factor(size, epsilon):
    """What brings m, whose l2 norm is ``size``, into the ball."""
    radius = as_fp32(epsilon)
    return tl.where(size > radius, radius / tl.where(size > radius, size, 1.0), 1.0)


@triton.jit
def _above(measured, threshold):
    """Number and sum of the absolute values above a threshold, of each row."""
    size = tl.abs(measured)
    above = size > threshold[:, None]
    return tl.sum(above.to(tl.float32), axis=1), tl.sum(tl.where(above, size, 0.0), axis=1)


@triton.jit
def _shrink(
    grad_ptr, base, noise_ptr, seed, noise_var, step_size, epsilon, unit, norm, finite, row, real, width,
    NORM: tl.constexpr, NOISE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the projection of each row takes: a factor (l2), or the threshold that all absolute values lose (l1).

    Michelot, A finite algorithm for finding the projection of a point onto the canonical simplex, 1986: the threshold
    is the average excess of what is above the last one, until nothing more falls below. It only grows.
    """
    if NORM == "l2":
        size = tl.zeros([ROWS], tl.float32)
        for block in tl.range(BLOCKS, num_stages=STAGES, loop_unroll_factor=BLOCKS if BLOCKS <= 4 else 1):
            _, measured = _tile(
                grad_ptr, base, noise_ptr, seed, noise_var, step_size, unit, norm, finite, row, real, block, width,
                "paper", NOISE, ALIGNED, ROWS, BLOCK,
            )  # fmt: skip
            size = _accumulate(size, measured, NORM)
        return _factor(tl.sqrt(size), epsilon)
    elif NORM == "l1":
        _, first = _tile(
            grad_ptr, base, noise_ptr, seed, noise_var, step_size, unit, norm, finite, row, real, 0, width,
            "paper", NOISE, ALIGNED, ROWS, BLOCK,
        )  # fmt: skip
        threshold = tl.zeros([ROWS], tl.float32)
        count = tl.full([ROWS], -1.0, tl.float32)  # 0 once it stays: in the loop's own state, as Triton 3.7 needs it
        while tl.max((count != 0.0).to(tl.int32), axis=0) > 0:
            above, total = _above(first, threshold)
            for block in range(1, BLOCKS):
                _, measured = _tile(
                    grad_ptr, base, noise_ptr, seed, noise_var, step_size, unit, norm, finite, row, real, block, width,
                    "paper", NOISE, ALIGNED, ROWS, BLOCK,
                )  # fmt: skip
                more, sizes = _above(measured, threshold)
                above, total = above + more, total + sizes
            threshold = tl.maximum(threshold, (total - as_fp32(epsilon)) / tl.maximum(above, 1.0))
            count = tl.where((above == count) | (count == 0.0), 0.0, above)
        return threshold
    else:
        tl.static_assert(False, "unknown norm")


@triton.jit
def norm_kernel(
    grad_ptr, noise_ptr, seed_ptr, norm_ptr, mask_ptr, unit_ptr, out_ptr,
    rows, width, size1, size2, grad_stride0, grad_stride1, grad_stride2, group, noise_var, step_size,
    UPDATE: tl.constexpr, NORM: tl.constexpr, GIVEN: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    NOISE: tl.constexpr, MASKED: tl.constexpr, IN_UNITS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes one partial norm of m per row (``out``: fp32 ``[rows]``), or m itself (fp32 ``[rows, width]``).

    NORM is "inf", "l2", "l1", or "opaque", which asks for m. The partial norm of l2 is the sum of squares; for paper it
    is the norm. For paper m is g, unless GIVEN: ``norm`` holds those of g, of ``group`` consecutive rows each.
    """
    OF: tl.constexpr = "sift" if UPDATE == "paper" and not GIVEN else UPDATE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    if MASKED:
        real = tl.load(mask_ptr + row, mask=real, other=0) != 0
    unit = load_unit(unit_ptr, row, rows, IN_UNITS, ROWS)
    base = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    seed = tl.load(seed_ptr)
    finite = _finite_rows(grad_ptr, base, real, width, ROWS, BLOCK, BLOCKS, STAGES)
    given = tl.zeros([ROWS], tl.float32)
    if GIVEN:
        given = _group_norm(norm_ptr, row, row < rows, group, UPDATE, NORM, GROUP_BLOCK)

    if UPDATE == "paper" and not GIVEN and NORM != "opaque":
        norm = _grad_norm(grad_ptr, base, real, finite, width, NORM, ROWS, BLOCK, BLOCKS, STAGES)
    else:
        norm = tl.zeros([ROWS], tl.float32)
        for block in tl.range(BLOCKS, num_stages=STAGES, loop_unroll_factor=BLOCKS if BLOCKS <= 4 else 1):
            _, measured = _tile(
                grad_ptr, base, noise_ptr, seed, noise_var, step_size, unit, given, finite, row, real, block, width,
                OF, NOISE, ALIGNED, ROWS, BLOCK,
            )  # fmt: skip
            if NORM == "opaque":
                col = block * BLOCK + tl.arange(0, BLOCK)
                everywhere = (row < rows)[:, None] & (col < width)[None, :]
                tl.store(out_ptr + (row * width)[:, None] + col[None, :], measured, mask=everywhere)
            else:
                norm = _accumulate(norm, measured, NORM)
        if UPDATE == "paper" and NORM == "l2":
            norm = tl.sqrt(norm)
    if NORM != "opaque":
        tl.store(out_ptr + row, norm, mask=row < rows)


@triton.jit
def ascend_kernel(
    embed_ptr, grad_ptr, noise_ptr, seed_ptr, norm_ptr, moved_norm_ptr, mask_ptr, unit_ptr, out_ptr, noise_out_ptr,
    rows, width: tl.constexpr, size1, size2,
    embed_stride0, embed_stride1, embed_stride2, grad_stride0, grad_stride1, grad_stride2,
    group, noise_var, step_size, epsilon,
    UPDATE: tl.constexpr, NORM: tl.constexpr, SCOPE: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    NOISE: tl.constexpr, KEEP_NOISE: tl.constexpr, MASKED: tl.constexpr, IN_UNITS: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` = embed + the updated noise, and that noise itself (fp32) when KEEP_NOISE.

    SCOPE says where norms come from: "row", computed here; "group", the partial norms of ``group`` consecutive rows (at
    most GROUP_BLOCK of them), left by `norm_kernel`, and for paper and l2 those of what it projects in ``moved_norm``;
    "given", one value per row in ``norm``. paper knows no l1 of groups. Rows whose mask byte is zero get no noise.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows_there(row, rows, ROWS)
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    unit = load_unit(unit_ptr, row, rows, IN_UNITS, ROWS)
    embed_base = row_offset(row, size1, size2, embed_stride0, embed_stride1, embed_stride2)
    grad_base = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    seed = tl.load(seed_ptr)
    if BLOCKS == 1:  # asked for before the reductions wait for the gradient
        col = tl.arange(0, BLOCK)
        everywhere = valid[:, None] & (col < width)[None, :]
        embed = tl.load(embed_ptr + embed_base[:, None] + col[None, :], mask=everywhere).to(tl.float32)

    finite = _finite_rows(grad_ptr, grad_base, real, width, ROWS, BLOCK, BLOCKS, STAGES)
    norm = tl.zeros([ROWS], tl.float32)
    if UPDATE == "sign":  # asks for none
        pass
    elif SCOPE == "given":
        norm = tl.load(norm_ptr + row, mask=valid, other=0.0)
    elif SCOPE == "group":
        norm = _group_norm(norm_ptr, row, valid, group, UPDATE, NORM, GROUP_BLOCK)
    elif UPDATE == "paper":
        norm = _grad_norm(grad_ptr, grad_base, real, finite, width, NORM, ROWS, BLOCK, BLOCKS, STAGES)
    else:
        for block in tl.range(BLOCKS, num_stages=STAGES, loop_unroll_factor=BLOCKS if BLOCKS <= 4 else 1):
            if UPDATE == "sift":  # the noise can wait
                measured = _grad_tile(grad_ptr, grad_base, real, finite, block, width, BLOCK)
            else:
                _, measured = _tile(
                    grad_ptr, grad_base, noise_ptr, seed, noise_var, step_size, unit, norm, finite, row, real, block,
                    width, UPDATE, NOISE, ALIGNED, ROWS, BLOCK,
                )  # fmt: skip
            norm = _accumulate(norm, measured, NORM)
        if NORM == "l2":
            norm = tl.sqrt(norm)

    shrink = tl.zeros([ROWS], tl.float32)
    if UPDATE == "paper" and NORM != "inf":
        if SCOPE == "group":
            tl.static_assert(NORM == "l2", "unknown norm")
            moved_norm = _group_norm(moved_norm_ptr, row, valid, group, UPDATE, NORM, GROUP_BLOCK)
            shrink = _factor(moved_norm, epsilon)
        else:
            shrink = _shrink(
                grad_ptr, grad_base, noise_ptr, seed, noise_var, step_size, epsilon, unit, norm, finite, row, real,
                width, NORM, NOISE, ALIGNED, ROWS, BLOCK, BLOCKS, STAGES,
            )  # fmt: skip

    for block in tl.range(BLOCKS, num_stages=STAGES, loop_unroll_factor=BLOCKS if BLOCKS <= 4 else 1):
        col = block * BLOCK + tl.arange(0, BLOCK)
        everywhere = valid[:, None] & (col < width)[None, :]
        if BLOCKS > 1:
            embed = tl.load(embed_ptr + embed_base[:, None] + col[None, :], mask=everywhere).to(tl.float32)
        noise, measured = _tile(
            grad_ptr, grad_base, noise_ptr, seed, noise_var, step_size, unit, norm, finite, row, real, block, width,
            UPDATE, NOISE, ALIGNED, ROWS, BLOCK,
        )  # fmt: skip
        if UPDATE == "paper":
            moved = _projected(measured, shrink, epsilon, NORM) * unit[:, None]
        elif UPDATE == "sign":
            moved = _clipped(measured, epsilon, unit)
        else:
            moved = _divided(noise, measured, norm, step_size, epsilon, unit, UPDATE)
        moved = tl.where(real[:, None], moved, 0.0)
        out_offset = (row * width)[:, None] + col[None, :]
        tl.store(out_ptr + out_offset, (embed + moved).to(out_ptr.dtype.element_ty), mask=everywhere)
        if KEEP_NOISE:
            tl.store(noise_out_ptr + out_offset, moved, mask=everywhere)
