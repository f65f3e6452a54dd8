"""ascend: noise, gradient step, norm, projection and add, from the gradient to the next perturbed embedding.

With g the gradient of the ascent loss with respect to the noise (0 for rows where it is not finite):

    smart-pytorch   m = noise + step_size * g    noise <- m / (norm(m) + epsilon)
    sift            m = g                        noise <- noise + step_size * m / (norm(m) + epsilon)

Token norms need one kernel. A norm over more than a row needs `measure_kernel` first, which leaves either one partial
norm per row or, for a norm that only Python can compute, m itself. Floor: read embed, read g, write the
result; the initial noise is regenerated from its seed.
"""

import triton
import triton.language as tl

from .indexing import as_fp32, row_offset
from .philox import normal_tile


@triton.jit
def _noise_tile(
    noise_ptr, seed, noise_var, row, real, block, width, FROM_SEED: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The current noise of a tile: regenerated before the first step, read back afterwards. Zero where masked."""
    first = (row * width)[:, None]
    if FROM_SEED:
        noise = normal_tile(seed, first, block, ROWS, BLOCK, ALIGNED) * as_fp32(noise_var)
    else:
        col = block * BLOCK + tl.arange(0, BLOCK)
        noise = tl.load(noise_ptr + first + col[None, :], mask=real[:, None] & (col < width)[None, :], other=0.0)
    return tl.where(real[:, None], noise, 0.0)


@triton.jit
def _grad_tile(grad_ptr, base, real, block, width, BLOCK: tl.constexpr):
    col = block * BLOCK + tl.arange(0, BLOCK)
    inside = real[:, None] & (col < width)[None, :]
    return tl.load(grad_ptr + base[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _finite(grad):
    """1 for each row of the tile in which every gradient is finite, else 0."""
    return tl.min((tl.abs(grad) < float("inf")).to(tl.int32), axis=1)


@triton.jit
def _measured(noise, grad, finite, step_size, inside, UPDATE: tl.constexpr):
    grad = tl.where(finite[:, None] > 0, grad, 0.0)
    if UPDATE == "sift":
        measured = grad
    else:
        measured = noise + as_fp32(step_size) * grad
    return tl.where(inside, measured, 0.0)


@triton.jit
def _accumulate(norm, measured, NORM: tl.constexpr):
    """Fold a tile into running row norms (l2: the sum of squares)."""
    if NORM == "inf":
        return tl.maximum(norm, tl.max(tl.abs(measured), axis=1))
    elif NORM == "l2":
        return norm + tl.sum(measured * measured, axis=1)
    else:
        return norm + tl.sum(tl.abs(measured), axis=1)


@triton.jit
def _project(noise, measured, norm, step_size, epsilon, UPDATE: tl.constexpr):
    """The update rule. A zero denominator leaves the noise where it is."""
    denominator = norm + as_fp32(epsilon)
    dead = denominator == 0.0
    scale = 1.0 / tl.where(dead, 1.0, denominator)
    if UPDATE == "sift":
        moved = noise + as_fp32(step_size) * measured * scale[:, None]
    else:
        moved = measured * scale[:, None]
    return tl.where(dead[:, None], noise, moved)


@triton.jit
def measure_kernel(
    grad_ptr, noise_ptr, seed_ptr, mask_ptr, out_ptr,
    rows, width, size1, size2, grad_stride0, grad_stride1, grad_stride2, noise_var, step_size,
    UPDATE: tl.constexpr, NORM: tl.constexpr, FROM_SEED: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Writes one partial norm per row (``out``: fp32 ``[rows]``), or ``measured`` (fp32 ``[rows, width]``).

    NORM is "inf", "l2" (writes the sum of squares), "l1", or "opaque", which asks for ``measured``.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    if MASKED:
        real = tl.load(mask_ptr + row, mask=real, other=0) != 0
    base = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    seed = tl.load(seed_ptr)

    finite = tl.full([ROWS], 1, tl.int32)
    if BLOCKS > 1:
        for block in range(BLOCKS):
            finite = tl.minimum(finite, _finite(_grad_tile(grad_ptr, base, real, block, width, BLOCK)))
    norm = tl.zeros([ROWS], tl.float32)
    for block in range(BLOCKS):
        col = block * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        grad = _grad_tile(grad_ptr, base, real, block, width, BLOCK)
        if BLOCKS == 1:
            finite = _finite(grad)
        noise = _noise_tile(noise_ptr, seed, noise_var, row, real, block, width, FROM_SEED, ALIGNED, ROWS, BLOCK)
        measured = _measured(noise, grad, finite, step_size, inside, UPDATE)
        if NORM == "opaque":
            everywhere = (row < rows)[:, None] & (col < width)[None, :]
            tl.store(out_ptr + (row * width)[:, None] + col[None, :], measured, mask=everywhere)
        else:
            norm = _accumulate(norm, measured, NORM)
    if NORM != "opaque":
        tl.store(out_ptr + row, norm, mask=row < rows)


@triton.jit
def ascend_kernel(
    embed_ptr, grad_ptr, noise_ptr, seed_ptr, mask_ptr, norm_ptr, out_ptr, noise_out_ptr,
    rows, width, size1, size2,
    embed_stride0, embed_stride1, embed_stride2, grad_stride0, grad_stride1, grad_stride2,
    group, noise_var, step_size, epsilon,
    UPDATE: tl.constexpr, NORM: tl.constexpr, SCOPE: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    FROM_SEED: tl.constexpr, KEEP_NOISE: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` = embed + the updated noise, and that noise itself (fp32) when KEEP_NOISE.

    SCOPE says where the norm comes from: "row", computed here; "group", the partial norms of ``group`` consecutive
    rows (at most GROUP_BLOCK of them), left by `measure_kernel`; "given", one value per row in ``norm``.
    Rows whose mask byte is zero get no noise.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    real = valid
    if MASKED:
        real = tl.load(mask_ptr + row, mask=valid, other=0) != 0
    embed_base = row_offset(row, size1, size2, embed_stride0, embed_stride1, embed_stride2)
    grad_base = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    seed = tl.load(seed_ptr)

    norm = tl.zeros([ROWS], tl.float32)
    if SCOPE == "given":
        norm = tl.load(norm_ptr + row, mask=valid, other=0.0)
    elif SCOPE == "group":
        member = tl.arange(0, GROUP_BLOCK)[None, :]
        start = (row // group) * group
        partial = tl.load(norm_ptr + start[:, None] + member, mask=valid[:, None] & (member < group), other=0.0)
        if NORM == "inf":
            norm = tl.max(partial, axis=1)
        else:
            norm = tl.sum(partial, axis=1)

    finite = tl.full([ROWS], 1, tl.int32)
    if BLOCKS > 1:
        for block in range(BLOCKS):
            finite = tl.minimum(finite, _finite(_grad_tile(grad_ptr, grad_base, real, block, width, BLOCK)))
        if SCOPE == "row":
            for block in range(BLOCKS):
                inside = real[:, None] & (block * BLOCK + tl.arange(0, BLOCK) < width)[None, :]
                grad = _grad_tile(grad_ptr, grad_base, real, block, width, BLOCK)
                noise = _noise_tile(
                    noise_ptr, seed, noise_var, row, real, block, width, FROM_SEED, ALIGNED, ROWS, BLOCK
                )
                norm = _accumulate(norm, _measured(noise, grad, finite, step_size, inside, UPDATE), NORM)
            if NORM == "l2":
                norm = tl.sqrt(norm)
    if SCOPE == "group" and NORM == "l2":
        norm = tl.sqrt(norm)

    for block in range(BLOCKS):
        col = block * BLOCK + tl.arange(0, BLOCK)
        everywhere = valid[:, None] & (col < width)[None, :]
        inside = real[:, None] & (col < width)[None, :]
        grad = _grad_tile(grad_ptr, grad_base, real, block, width, BLOCK)
        embed = tl.load(embed_ptr + embed_base[:, None] + col[None, :], mask=everywhere).to(tl.float32)
        if BLOCKS == 1:
            finite = _finite(grad)
        noise = _noise_tile(noise_ptr, seed, noise_var, row, real, block, width, FROM_SEED, ALIGNED, ROWS, BLOCK)
        measured = _measured(noise, grad, finite, step_size, inside, UPDATE)
        if BLOCKS == 1 and SCOPE == "row":
            norm = _accumulate(norm, measured, NORM)
            if NORM == "l2":
                norm = tl.sqrt(norm)
        moved = _project(noise, measured, norm, step_size, epsilon, UPDATE)
        moved = tl.where(real[:, None], moved, 0.0)
        out_offset = (row * width)[:, None] + col[None, :]
        tl.store(out_ptr + out_offset, (embed + moved).to(out_ptr.dtype.element_ty), mask=everywhere)
        if KEEP_NOISE:
            tl.store(noise_out_ptr + out_offset, moved, mask=everywhere)
