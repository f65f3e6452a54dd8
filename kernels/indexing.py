"""Arguments of kernels: rows of a dense last dimension, numbers of rows, host numbers."""

import triton
import triton.language as tl


@triton.jit
def row_offset(row, size1, size2, stride0, stride1, stride2):
    """Offset, in elements (int64), of logical ``row`` of a tensor with up to three leading dimensions.

    ``row = (i0 * size1 + i1) * size2 + i2``. Sizes of one, the contiguous case, are specialized by Triton's launcher
    and the divisions vanish. Those are 32 bits wide (launchers check the number of rows): 64-bit division is a call.
    """
    row = row.to(tl.int32)
    i2 = row % size2
    rest = row // size2
    i0 = (rest // size1).to(tl.int64)
    i1 = (rest % size1).to(tl.int64)
    return i0 * stride0 + i1 * stride1 + i2.to(tl.int64) * stride2


@triton.jit
def rows_there(row, rows, ROWS: tl.constexpr):
    """Which rows of a tile there are: of a single one the compiler is told, and drops what asks."""
    if ROWS == 1:
        return tl.full([ROWS], True, tl.int1)
    else:
        return row < rows


@triton.jit
def load_unit(unit_ptr, row, rows, IN_UNITS: tl.constexpr, ROWS: tl.constexpr):
    """The fp32 unit of each row; one where there are none, which multiplies nothing once compiled."""
    if IN_UNITS:
        return tl.load(unit_ptr + row, mask=row < rows, other=0.0)
    else:
        return tl.full([ROWS], 1.0, tl.float32)


@triton.jit
def as_fp32(number):
    """A host float as fp32: Inductor passes fp64, the interpreter a Python float."""
    return tl.full((), number, tl.float32)
