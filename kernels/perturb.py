"""perturb: embed + noise_var * unit * noise(seed), the noise never in memory. Floor: read embed, write the result."""

import triton
import triton.language as tl

from .indexing import as_fp32, load_unit, row_offset
from .philox import noise_tile


@triton.jit
def perturb_kernel(
    embed_ptr,
    seed_ptr,
    mask_ptr,
    unit_ptr,
    out_ptr,
    rows,
    width,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    noise_var,
    MASKED: tl.constexpr,
    IN_UNITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Writes ``out`` (``[rows, width]``, contiguous) from ``embed`` (rows at ``row_offset``, dense last dimension).

    One program per ``[ROWS, BLOCK]`` tile; rows whose ``mask`` byte is zero are copied unchanged.
    """
    pid = tl.program_id(0)
    if rows == 1:
        block = pid.to(tl.int64)
        row = tl.arange(0, ROWS).to(tl.int64)
    else:
        blocks = tl.cdiv(width, BLOCK)
        block = (pid % blocks).to(tl.int64)
        row = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = block * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]

    base = row_offset(row, size1, size2, stride0, stride1, stride2)
    embed = tl.load(embed_ptr + base[:, None] + col[None, :], mask=inside).to(tl.float32)
    bits: tl.constexpr = embed_ptr.dtype.element_ty.primitive_bitwidth
    noise = noise_tile(tl.load(seed_ptr), (row * width)[:, None], block, ROWS, BLOCK, ALIGNED, bits, NOISE)
    noise = noise * (as_fp32(noise_var) * load_unit(unit_ptr, row, rows, IN_UNITS, ROWS))[:, None]
    if MASKED:
        real = tl.load(mask_ptr + row, mask=row < rows, other=0) != 0
        noise = tl.where(real[:, None], noise, 0.0)
    out = (embed + noise).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * width)[:, None] + col[None, :], out, mask=inside)
