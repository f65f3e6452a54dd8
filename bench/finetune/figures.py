"""What differs from plain fine-tuning, with intervals, and what it costs: as figures for light and dark pages."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence

from matplotlib import pyplot
from matplotlib.figure import Figure

from ..style import THEMES, WIDTH, Theme, save, styled
from .methods import PLAIN
from .report import Row, rows
from .results import Results

#: Panel -> color of the theme; right is better but for what is lost.
PANELS = {"out of domain": 0, "in domain": 2, "PGD 0.1": 3, "lost to typos": 4}


def differences(found: Sequence[Row], theme: Theme) -> Figure:
    """Is it better than nothing? A panel a figure, a line a method, paired differences with their intervals."""
    shown = [row for row in found if row.method != PLAIN and row.differences]
    shown.sort(key=lambda row: row.differences["out of domain"].mean)
    figure, panels = pyplot.subplots(
        1, len(PANELS), figsize=(WIDTH, 1.4 + 0.3 * len(shown)), sharey=True, layout="constrained"
    )
    for (name, color), axes in zip(PANELS.items(), panels, strict=True):
        found_here = [row.differences[name] for row in shown]
        means, halves = [100 * each.mean for each in found_here], [100 * (each.half or 0.0) for each in found_here]
        axes.errorbar(means, range(len(shown)), xerr=halves, fmt="o", color=theme.colors[color], markersize=5)
        axes.axvline(0, color=theme.text, linewidth=1, linestyle="--", zorder=0)
        axes.set(title=name, xlabel="points")
    panels[0].set_yticks(range(len(shown)), [row.method for row in shown])
    return figure


def costs(found: Sequence[Row], theme: Theme) -> Figure:
    """What does a point cost? Out-of-domain difference to plain against the time of a step."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 4.0), layout="constrained")
    for row in found:
        if not row.cost:
            continue
        there = row.differences["out of domain"]
        point = row.cost["time"], 100 * there.mean
        if row.method == PLAIN:
            axes.plot(*point, "s", color=theme.text)
        else:
            axes.errorbar(*point, yerr=100 * (there.half or 0.0), fmt="o", color=theme.colors[0], elinewidth=1)
        axes.annotate(row.method, point, xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.axhline(0, color=theme.text, linewidth=1, linestyle="--", zorder=0)
    axes.set(xlabel="time of a step, in plain fine-tuning's", ylabel="out of domain, points above plain")
    return figure


def digest(path: pathlib.Path) -> str:
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def write(path: pathlib.Path, folder: pathlib.Path, size: int) -> list[pathlib.Path]:
    """As ``folder/finetune-NAME-THEME.svg``; those without anything to show are left out."""
    results, written = Results(path), []
    found = rows(results, size)
    draw: dict[str, Callable[[Sequence[Row], Theme], Figure]] = {}
    if any(row.method != PLAIN and row.differences for row in found):
        draw["differences"] = differences
        if results.costs is not None:
            draw["costs"] = costs
    for name, figure_of in draw.items():
        for theme in THEMES:
            with styled(theme):
                figure = figure_of(found, theme)
                written.append(folder / f"finetune-{name}-{theme.name}.svg")
                save(figure, written[-1], digest(path))
                pyplot.close(figure)
    return written
