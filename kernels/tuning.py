"""Measured launch choices: one table a GPU, ``tuned/<device>.json``, written by ``python -m bench tune``.

    {"schema": 1, "device": "NVIDIA H200", "environment": {versions, commit, date, ...}, "rule": "...", "entries": [
      {"kernel": "ascend", "itemsize": 2, "widths": [513, 768], "choice": {"block": 1024, "warps": 8, ...},
       "measured": {"shape": [65536, 768], "seconds": 1.1e-4, "default_seconds": 1.2e-4, ...}}]}

``widths`` holds both ends (null: no upper one), ``itemsize`` the bytes of an element of the first tensor. A choice that
is null, or absent, means the default, as does everything that no entry speaks of. ``measured`` is for readers.
Without torch and triton, as launch.py.
"""

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .launch import Choice

FOLDER = Path(__file__).parent / "tuned"
VARIABLE = "SMART_FAST_TUNED"
SCHEMA = 1
#: What an entry speaks of. perturb_stream is `perturb` on contiguous memory, whose width is the number of elements;
#: divergence_split stands for the kernels that share rows, parts and finish, which must agree on a tile.
KERNELS = (
    "perturb", "perturb_stream", "ascend_norm", "ascend", "divergence_forward", "divergence_split",
    "divergence_backward", "divergence_backward_elementwise", "fisher_direction",
)  # fmt: skip
MIN_BLOCK = 4  # a counter of the noise makes four numbers
MAX_TILE = 1 << 15  # elements
MAX_WARPS = 32
MAX_STAGES = 8

#: Choices that stand in for every table, by kernel, while there are any (`override`).
overriding: dict[str, Choice | None] = {}


class TableError(ValueError):
    """A file is no table of launch choices, or another device's."""


class Entry(NamedTuple):
    kernel: str
    itemsize: int
    low: int
    high: float
    choice: Choice


class Table:
    """The choices of one device. `find` is cached: a launch pays for a look into a dictionary."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries
        self._cached = functools.lru_cache(maxsize=1024)(self._search)

    def find(self, kernel: str, width: int, itemsize: int) -> Choice | None:
        """The choice for a kernel at a width (int, or torch's SymInt), or None for the default."""
        # A symbolic width is compared, which torch.compile guards on, but cannot be hashed.
        return (self._cached if type(width) is int else self._search)(kernel, width, itemsize)

    def _search(self, kernel: str, width: int, itemsize: int) -> Choice | None:
        for entry in self.entries:
            if entry.kernel == kernel and entry.itemsize == itemsize and entry.low <= width and width <= entry.high:
                return entry.choice
        return None


def file_name(device: str) -> str:
    """The name of a device's file: its own in lower case, with dashes."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def parse(content: Any, device: str) -> Table:
    """The table in decoded JSON.

    Raises:
        TableError: it is none, or not that of ``device``; the message says what is wrong.
    """
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("entries"), list):
        raise TableError(f"no table of schema {SCHEMA}")
    if content.get("device") != device:
        raise TableError(f"measured on {content.get('device')!r}, not on {device!r}")
    try:
        entries = [_entry(**{k: v for k, v in each.items() if k != "measured"}) for each in content["entries"]]
    except (TypeError, AttributeError) as error:
        raise TableError(f"an entry lacks a field or has another: {error}") from error
    return Table(tuple(each for each in entries if each is not None))


def _entry(kernel: str, itemsize: int, widths: list[int | None], choice: dict[str, int] | None = None) -> Entry | None:
    if kernel not in KERNELS:
        raise TableError(f"no kernel is called {kernel!r}")
    if itemsize not in (2, 4):
        raise TableError(f"{kernel}: itemsize {itemsize!r}, not 2 or 4")
    low, high = widths if isinstance(widths, list) and len(widths) == 2 else (0, 0)
    high = float("inf") if high is None else high
    if not (isinstance(low, int) and isinstance(high, (int, float)) and 1 <= low <= high):
        raise TableError(f"{kernel}: widths {widths!r} are no range")
    return None if choice is None else Entry(kernel, itemsize, low, high, checked(kernel, Choice(**choice)))


def checked(kernel: str, choice: Choice) -> Choice:
    """``choice``, if ``kernel`` can be launched by it at all.

    Raises:
        TableError: it cannot; the message says why.
    """
    if not all(type(each) is int and each >= 1 for each in choice):
        raise TableError(f"{kernel}: {choice} holds what is no positive integer")
    if any(each & (each - 1) for each in (choice.block, choice.warps, choice.rows)):
        raise TableError(f"{kernel}: block, warps and rows are powers of two, got {choice}")
    if choice.block < MIN_BLOCK or choice.rows * choice.block > MAX_TILE:
        raise TableError(f"{kernel}: a tile has {MIN_BLOCK} to {MAX_TILE} elements, got {choice}")
    if choice.warps > MAX_WARPS or choice.stages > MAX_STAGES:
        raise TableError(f"{kernel}: at most {MAX_WARPS} warps and {MAX_STAGES} stages, got {choice}")
    if kernel == "perturb_stream" and choice.rows > 1:
        raise TableError(f"{kernel}: contiguous memory is one row, got {choice}")
    return choice


def load(device: str) -> Table | None:
    """The table of a device: that of the package, or what the environment variable SMART_FAST_TUNED names (a path, or
    "off" for none). None: there is none. A file that cannot serve is reported in a warning, and is none."""
    named = os.environ.get(VARIABLE, "").strip()
    if named == "off":
        return None
    path = Path(named) if named else FOLDER / file_name(device)
    if not named and not path.is_file():
        return None
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), device)
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: {error}; kernels are launched by the defaults", RuntimeWarning, stacklevel=2)
        return None


@contextlib.contextmanager
def override(kernel: str, choice: Choice | None) -> Iterator[None]:
    """Within, ``kernel`` is launched by ``choice``, all others by their defaults (so is ``kernel``, for None). Of the
    whole process: for measuring.

    Raises:
        TableError: the kernel cannot be launched by this choice.
    """
    before = dict(overriding)
    overriding[kernel] = choice if choice is None else checked(kernel, choice)
    try:
        yield
    finally:
        overriding.clear()
        overriding.update(before)
