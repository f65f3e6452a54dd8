"""The Fisher direction softmax(x) - onehot(argmax x) of logits x. Floor: read the logits, write the direction.

The entry of the largest is the sum of the others with the sign changed, so that nothing cancels where it is near one.
The first of equal ones is the largest. Rows with NaN or infinity, or of minus infinity throughout, become NaN.
"""

import triton
import triton.language as tl

from .divergence_formulas import finite_max
from .indexing import row_offset


@triton.jit
def _load(logits_ptr, base, col, inside):
    return tl.load(logits_ptr + base[:, None] + col[None, :], mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _others(x, col, inside, largest, base, width):
    """The column of the largest, by equality (``width`` where there is none, as of NaN), and exp(x - base) of all the
    others."""
    first = tl.min(tl.where(inside & (x == largest[:, None]), col[None, :], width), axis=1)
    e = tl.exp(x - finite_max(base)[:, None])
    return first, tl.where(inside & (col[None, :] != first[:, None]), e, 0.0)


@triton.jit
def fisher_direction_kernel(
    logits_ptr, out_ptr,
    rows, width, size1, size2, stride0, stride1, stride2,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` (``[rows, width]``, contiguous). Rows in one block are read once, longer ones twice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    base = row_offset(row, size1, size2, stride0, stride1, stride2)
    out = out_ptr + (row * width)[:, None]
    if BLOCKS == 1:
        col = tl.arange(0, BLOCK)
        inside = valid[:, None] & (col < width)[None, :]
        x = _load(logits_ptr, base, col, inside)
        largest = tl.max(x, axis=1)
        first, e = _others(x, col, inside, largest, largest, width)
        others = tl.sum(e, axis=1)
        inverse = 1.0 / (others + tl.exp(largest - finite_max(largest)))
        value = tl.where(col[None, :] == first[:, None], -others[:, None], e) * inverse[:, None]
        tl.store(out + col[None, :], value.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        others = tl.zeros([ROWS], tl.float32)
        first = tl.zeros([ROWS], tl.int32)
        for block in tl.range(BLOCKS, num_stages=STAGES):
            col = block * BLOCK + tl.arange(0, BLOCK)
            inside = valid[:, None] & (col < width)[None, :]
            x = _load(logits_ptr, base, col, inside)
            top = tl.max(x, axis=1)
            new = tl.maximum(largest, top)
            top_first, e = _others(x, col, inside, top, new, width)
            before = tl.exp(largest - finite_max(new))
            # Of the largest so far and this block's, the smaller joins the others.
            smaller = tl.where(top > largest, before, tl.exp(top - finite_max(new)))
            others = others * before + tl.sum(e, axis=1) + smaller
            first = tl.where(top > largest, top_first, first)
            largest = new
        inverse = 1.0 / (others + tl.exp(largest - finite_max(largest)))
        for block in tl.range(BLOCKS, num_stages=STAGES):
            col = block * BLOCK + tl.arange(0, BLOCK)
            inside = valid[:, None] & (col < width)[None, :]
            x = _load(logits_ptr, base, col, inside)
            e = tl.exp(x - finite_max(largest)[:, None])
            value = tl.where(col[None, :] == first[:, None], -others[:, None], e) * inverse[:, None]
            tl.store(out + col[None, :], value.to(out_ptr.dtype.element_ty), mask=inside)
