"""Launch choices and row views: pure functions, tested without kernels."""

from __future__ import annotations

import pytest
import torch
from smart_fast.kernels import launch

from smart_fast.backends.base import as_rows

WIDTHS = [1, 2, 3, 4, 5, 31, 64, 100, 768, 1000, 1024, 4096, 8192, 8193, 30522, 128256, 262144]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("choose", [launch.row_tile, launch.flat_tile, launch.stream_tile])
def test_tiles_cover_rows(choose, width: int) -> None:
    tile = choose(width)
    assert tile.block * tile.blocks >= width
    assert tile.block * (tile.blocks - 1) < width
    for power in (tile.rows, tile.block, tile.warps):
        assert power == launch.next_power_of_two(power)
    assert 1 <= tile.warps <= 16
    # Larger register blocks spill; see the compiler tests.
    assert tile.rows * tile.block <= launch.MAX_BLOCK
    assert tile.rows == 1 or tile.blocks == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_stay_on_chip_where_they_can(width: int) -> None:
    assert (launch.row_tile(width).blocks == 1) == (width <= launch.MAX_BLOCK)


@pytest.mark.parametrize("processors", [1, 108, 132, 304])
@pytest.mark.parametrize("rows", [1, 2, 7, 131, 132, 8192])
def test_few_long_rows_are_shared(rows: int, processors: int) -> None:
    for width in WIDTHS:
        check_sharing(rows, width, processors)


def check_sharing(rows: int, width: int, processors: int) -> None:
    tile = launch.split_tile(rows, width, processors)
    splits = launch.splits(tile, width)
    whole = launch.row_tile(width)
    if width <= launch.MAX_BLOCK or rows >= processors:
        assert tile == whole
        assert splits == 1
        return
    # Every program has something to read; there are at most two a multiprocessor; with half the blocks each, more.
    assert tile._replace(blocks=whole.blocks) == whole
    assert tile.block * tile.blocks * (splits - 1) < width <= tile.block * tile.blocks * splits
    assert rows * splits <= 2 * processors
    finer = tile._replace(blocks=max(1, tile.blocks // 2))
    assert tile.blocks == 1 or -(-whole.blocks // finer.blocks) > 2 * processors // rows
    merge = launch.merge_tile(splits)
    assert merge.block >= splits
    assert merge.rows * merge.block == launch.MERGED


def test_shared_rows_take_few_binaries() -> None:
    found = {launch.split_tile(rows, 128256, 132).blocks for rows in range(1, 4096)}
    assert found == {1, 2, 4, 8, 16, 32, 63}


def test_grid() -> None:
    tile = launch.Tile(rows=4, block=8, blocks=3, warps=1)
    assert launch.grid(tile, 9, whole_rows=True) == 3
    assert launch.grid(tile, 9, whole_rows=False) == 9


BASE = torch.arange(2 * 3 * 4 * 5 * 6, dtype=torch.float32).view(2, 3, 4, 5, 6)
VIEWS = [
    BASE, BASE[0, 0, 0], BASE[0, 0], BASE[:, 1:], BASE.transpose(0, 1), BASE.permute(3, 1, 0, 2, 4), BASE[:, :, ::2],
    BASE[..., 1:4], BASE[:, :1].expand(2, 7, 4, 5, 6), BASE[:1, :, :1], BASE[..., ::2], BASE.transpose(0, 4),
]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS, ids=range(len(VIEWS)))
def test_rows_address_every_element(view: torch.Tensor) -> None:
    other = torch.empty(view.shape).transpose(0, -1).contiguous().transpose(0, -1) if view.dim() > 2 else view
    rows = as_rows(view, other)
    flat = torch.as_strided(rows.tensors[0], (BASE.numel(),), (1,), 0) if view._base is None else None
    storage = rows.tensors[0]
    for row, expected in enumerate(view.reshape(-1, view.shape[-1])):
        i2, rest = row % rows.size2, row // rows.size2
        s0, s1, s2 = rows.strides[0]
        offset = storage.storage_offset() + (rest // rows.size1) * s0 + (rest % rows.size1) * s1 + i2 * s2
        assert torch.equal(storage.as_strided((view.shape[-1],), (1,), offset), expected)
    assert flat is None or flat.numel() == BASE.numel()


def test_rows_copy_only_what_they_must() -> None:
    assert as_rows(BASE.transpose(0, 1)).tensors[0].data_ptr() == BASE.data_ptr()
    assert as_rows(BASE[..., ::2]).tensors[0].data_ptr() != BASE.data_ptr()
    merged = as_rows(BASE[:, 1:])
    assert (merged.size1, merged.size2) == (1, 2 * 4 * 5)
    assert as_rows(BASE[:, 1:], free=BASE[..., :1].expand_as(BASE)[:, 1:]).tensors[1].stride(-1) == 0


def test_too_many_rows() -> None:
    with pytest.raises(ValueError, match="rows"):
        as_rows(torch.empty(1, 1).expand(2**31, 1))


@pytest.mark.parametrize(("rows", "width"), [(1, 2), (8, 3), (64, 20), (64, 32), (512, 4), (2, 1024)])
def test_few_short_rows_are_one_program(rows: int, width: int) -> None:
    tile = launch.together(launch.row_tile(width), rows)
    assert launch.grid(tile, rows, whole_rows=True) == 1
    assert tile.rows == launch.next_power_of_two(tile.rows)
    assert tile.rows * tile.block <= max(launch.TOGETHER, launch.TILE)
    assert tile.rows * tile.block <= tile.warps * 32 * 4 or tile.rows == 1  # elements of a thread: no spills


@pytest.mark.parametrize(("rows", "width"), [(513, 4), (65, 32), (3, 1024), (2, 30522), (1, 8192)])
def test_other_rows_are_taken_as_ever(rows: int, width: int) -> None:
    assert launch.together(launch.row_tile(width), rows) == launch.row_tile(width)
