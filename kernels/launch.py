"""Launch choices: pure functions of shapes, without triton, so that they can be tested anywhere.

Sizes are powers of two. Rows up to `MAX_BLOCK` stay on chip and are read once; longer ones are walked in blocks of
`LOOP_BLOCK`, since larger register blocks spill. The number of blocks is a compile-time constant (one binary per
vocabulary, not per batch; a power of two where programs share a row, so that batches give few). These are the defaults:
what was measured to be faster on a GPU takes their place (tuning.py).
"""

from collections.abc import Callable
from typing import NamedTuple

MAX_BLOCK = 8192
LOOP_BLOCK = 2048
TILE = 256  # elements a program handles when rows are short
TOGETHER = 2048  # elements of all rows together that one program takes, where it then adds their losses as well
MERGED = 2048  # numbers one program merges: of every row, where rows are few enough to be shared


class Tile(NamedTuple):
    """A program's share: ``rows`` rows of ``block`` columns, ``blocks`` times over a row, on ``warps`` warps. Loops
    over blocks hold ``stages`` of them at a time: with two or more, loads run ahead."""

    rows: int
    block: int
    blocks: int
    warps: int
    stages: int = 1


class Choice(NamedTuple):
    """What takes the place of a default: `Tile`'s fields, of which ``block`` is cut down to the row, and for rows that
    are shared (`split_tile`) how many ``programs`` a multiprocessor gets, and below how many rows a multiprocessor
    (``threshold``) they are shared at all."""

    block: int
    warps: int
    rows: int = 1
    stages: int = 1
    programs: int = 2
    threshold: int = 1


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _warps(elements: int) -> int:
    # 4 elements a thread where a tile holds several rows and their statistics, 8 where it holds one (16 in the widest):
    # more, and ptxas spills.
    return 2 if elements <= TILE else min(16, elements // 256)


def _looped(width: int) -> Tile:
    return Tile(1, LOOP_BLOCK, -(-width // LOOP_BLOCK), 8)


def row_tile(width: int) -> Tile:
    """For kernels that need whole rows: `ascend`, `divergence` forward of many rows."""
    if width > MAX_BLOCK:
        return _looped(width)
    block = max(4, next_power_of_two(width))
    rows = max(1, TILE // block)
    return Tile(rows, block, 1, _warps(rows * block))


def elementwise_tile(width: int) -> Tile:
    """For gradients of elementwise terms, which hold more of a row than others do."""
    return _looped(width) if width > MAX_BLOCK // 2 else row_tile(width)


def ascend_tile(width: int) -> Tile:
    """For `ascend` and the norms it takes: rows in up to four blocks of 256 columns a warp, unrolled, which stay in
    registers; widths that no power of two is near (768, 1536) leave few lanes idle."""
    if not TILE < width <= MAX_BLOCK:
        return row_tile(width)
    warps = next_power_of_two(-(-width // 1024))
    return Tile(1, 256 * warps, -(-width // (256 * warps)), warps)


def chosen_tile(choice: Choice, width: int) -> Tile:
    """The tile of a choice for rows of ``width``. A block wider than the row's power of two would only idle."""
    block = choice.block if width >= choice.block else min(choice.block, max(4, next_power_of_two(width)))
    return Tile(choice.rows, block, -(-width // block), choice.warps, choice.stages)


def split_tile(rows: int, width: int, processors: int, choice: Choice | None = None) -> Tile:
    """For divergences: where there are fewer long rows than multiprocessors, ``blocks`` covers a part of a row only,
    so that about two programs a multiprocessor share the work. Otherwise `row_tile`."""
    whole = row_tile(width)
    programs, threshold = (2, 1) if choice is None else (choice.programs, choice.threshold)
    if whole.blocks == 1 or rows >= threshold * processors:
        return whole
    tile = whole if choice is None else chosen_tile(choice, width)
    sharing = max(1, programs * processors // int(rows))
    blocks = next_power_of_two(-(-tile.blocks // sharing))
    return tile._replace(blocks=blocks) if blocks < tile.blocks else whole


def span(width: int, skew: int) -> int:
    """Columns that rows of ``width`` may reach over where they begin up to ``skew`` - 1 elements late."""
    return width + skew - 1 if skew else width


def covering(tile: Tile, width: int, skew: int) -> Tile:
    """``tile``, with as many blocks as `span` asks for."""
    return tile._replace(blocks=-(-span(width, skew) // tile.block))


def together(tile: Tile, rows: int) -> Tile:
    """For sums of losses: every row in one program where rows are few and short, so that no second launch adds them."""
    elements = next_power_of_two(rows) * tile.block
    if tile.blocks > 1 or elements > TOGETHER or tile.rows >= rows:
        return tile
    return tile._replace(rows=next_power_of_two(rows), warps=max(tile.warps, elements // 128))


def splits(tile: Tile, width: int) -> int:
    """Number of programs that share a row."""
    return -(-width // (tile.block * tile.blocks))


def merge_tile(count: int) -> Tile:
    """For kernels that merge what the ``count`` programs of a row found."""
    block = next_power_of_two(count)
    return Tile(max(1, MERGED // block), block, 1, 16)


def flat_tile(width: int) -> Tile:
    """For kernels whose tiles do not depend on one another: `perturb` on rows, `divergence` backward."""
    block = min(max(4, next_power_of_two(width)), 1024)
    rows = max(1, TILE // block)
    return Tile(rows, block, -(-width // block), _warps(rows * block))


def stream_tile(count: int) -> Tile:
    """For `perturb` on contiguous memory, seen as one row of ``count`` elements."""
    return Tile(1, 2048, -(-count // 2048), 4)


#: Of each kernel of tuning.py, at a width (of perturb_stream: a number of elements), where none was measured.
DEFAULTS: dict[str, Callable[[int], Tile]] = {
    "perturb": flat_tile,
    "perturb_stream": stream_tile,
    "ascend_norm": ascend_tile,
    "ascend": ascend_tile,
    "divergence_forward": row_tile,
    "divergence_split": row_tile,
    "divergence_backward": flat_tile,
    "divergence_backward_elementwise": elementwise_tile,
    "fisher_direction": row_tile,
}


def grid(tile: Tile, rows: int, *, whole_rows: bool) -> int:
    """Number of programs for ``rows`` rows."""
    return -(-rows // tile.rows) * (1 if whole_rows else tile.blocks)
