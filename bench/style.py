"""How plots look: colors and markers by contestant, on light pages and on dark ones.

The colors are Okabe and Ito's, which color-blind readers tell apart; markers differ as well.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from .chunked import CHUNKED
from .liger import LIGER
from .mtdnn import MTDNN
from .peers import COMPILED, EAGER

#: Many contestants, of which at most one runs in a case: one mark for all of them.
FAMILIES = LIGER.strip(), MTDNN.strip()
WIDTH = 8.0  # inches: 800 pixels at 100 dots an inch


@dataclass(frozen=True)
class Theme:
    name: str
    text: str
    faint: str
    #: Blue, green, orange, vermilion, purple, sky, grey: in this theme.
    colors: tuple[str, ...]


LIGHT = Theme(
    "light", "#1f2933", "#cbd2d9", ("#0072b2", "#009e73", "#c98500", "#d55e00", "#b0508a", "#56b4e9", "#6b7683")
)
DARK = Theme(
    "dark", "#e4e7eb", "#4b5563", ("#56b4e9", "#2ec99b", "#f0b429", "#ff8a4c", "#e39ac7", "#a5d8ff", "#9aa5b1")
)
THEMES = LIGHT, DARK

_MARKS = {
    EAGER: (6, "o"),
    COMPILED: (2, "s"),
    FAMILIES[0]: (3, "P"),
    FAMILIES[1]: (4, "X"),
    CHUNKED: (4, "v"),
    "smart-fast native": (0, "D"),
    "smart-fast triton": (1, "^"),
    "smart-fast torch": (5, "p"),
}


def family(contestant: str) -> str:
    return next((each for each in FAMILIES if contestant.startswith(each)), contestant)


def mark(contestant: str, theme: Theme) -> dict[str, Any]:
    """Color and marker. Variants (", compiled", " max-autotune...") have their parent's color, and are hollow."""
    parent = max((each for each in _MARKS if contestant.startswith(each)), key=len, default=EAGER)
    color, marker = _MARKS[parent]
    hollow = contestant not in (parent, *FAMILIES) and parent not in FAMILIES
    face = "none" if hollow else theme.colors[color]
    return {"marker": marker, "color": theme.colors[color], "markerfacecolor": face, "linestyle": "none"}


@contextlib.contextmanager
def styled(theme: Theme) -> Iterator[None]:
    grey = dict.fromkeys(("axes.edgecolor", "grid.color"), theme.faint)
    names = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    text = dict.fromkeys(names, theme.text)
    settings = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.grid": True,
        "axes.grid.axis": "x",
        "axes.axisbelow": True,
        "grid.alpha": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.hashsalt": "smart-fast",
        "svg.fonttype": "path",
    }
    with matplotlib.rc_context({**settings, **grey, **text}):
        yield


def save(figure: Figure, path: pathlib.Path, source: str = "") -> None:
    """Without a background where it is an SVG, for pages of any color. ``source`` says what it was made of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    svg = path.suffix == ".svg"
    about = {"metadata": {"Date": None, "Description": source}, "transparent": True} if svg else {"dpi": 150}
    figure.savefig(path, **about)  # type: ignore[arg-type]
