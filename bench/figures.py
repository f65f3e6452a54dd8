"""The figures of README and docs, one for each question, light and dark, from committed results.

`python -m bench report` writes them. Each holds the digest of what it was made of, by which a test tells whether it is
up to date.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from . import accuracy, quality
from .headline import NATIVE
from .peers import COMPILED, EAGER
from .report import Report
from .run import Row
from .style import LIGHT, THEMES, WIDTH, Theme, mark, save, styled

GROUPS = {
    "ops": "one operation",
    "lm": "language models",
    "regulariser": "SMART on a model",
    "train": "a training step",
    "overhead": "tiny calls",
}


def speed(report: Report, theme: Theme) -> Figure:
    """How much faster than what I use? A panel a group, a line a case."""
    cases: dict[str, dict[str, dict[str, float]]] = {group: {} for group in GROUPS}
    for row in report.rows:
        ours = _median(report, row.case, NATIVE)
        if row.contestant in (EAGER, COMPILED) and row.timing is not None and ours is not None:
            cases[row.group].setdefault(row.case, {})[row.contestant] = row.timing.median / ours
    cases = {group: found for group, found in cases.items() if found}
    heights = [len(found) + 1 for found in cases.values()]
    figure, panels = pyplot.subplots(
        len(cases), 1, figsize=(WIDTH, 1.2 + 0.21 * sum(heights)), sharex=True, height_ratios=heights,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for (group, found), axes in zip(cases.items(), panels[:, 0], strict=True):
        order = sorted(found, key=lambda case: min(found[case].values()))
        for place, case in enumerate(order):
            axes.plot(list(found[case].values()), [place] * len(found[case]), color=theme.faint, linewidth=2, zorder=1)
        for rival in (EAGER, COMPILED):
            these = [(found[case][rival], place) for place, case in enumerate(order) if rival in found[case]]
            axes.plot(*zip(*these, strict=True), markersize=6, label=f"than {rival}", **mark(rival, theme))
        axes.axvline(1, color=theme.text, linewidth=1, linestyle="--", zorder=0)
        axes.set(xscale="log", ylim=(-0.7, len(order) - 0.3))
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.set_title(GROUPS[group], loc="left")
    last = panels[-1, 0]
    last.xaxis.set_major_formatter(lambda number, _: f"{number:g} x")
    last.set_xlabel("smart-fast native is so many times as fast")
    _legend(figure, last)
    return figure


def memory(report: Report, theme: Theme) -> Figure:
    """How much memory? Peak beside the inputs, of the cases of language models."""
    rows = [row for row in report.rows if row.group == "lm" and row.peak and row.timing is not None]
    names = [EAGER, COMPILED, NATIVE + ", whole logits", NATIVE]
    order = sorted({row.case for row in rows}, key=lambda case: _peak(rows, case, EAGER))
    figure, axes = pyplot.subplots(figsize=(WIDTH, 1.6 + 0.32 * len(order)), layout="constrained")
    for name in names:
        mine = [row for row in rows if row.contestant == name]
        points = [row.peak / 2**20 for row in mine if row.peak], [order.index(row.case) for row in mine]
        axes.plot(*points, markersize=8, label=name, **mark(name, theme))
    axes.set(xscale="log", xlabel="peak memory beside the inputs, MiB (left is less)", ylim=(-0.6, len(order) - 0.4))
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axes.set_yticks(range(len(order)), order, fontsize=8)
    _legend(figure, axes)
    return figure


def robustness(results: Sequence[quality.Quality], theme: Theme) -> Figure:
    """What does it do to robustness? A panel a task, a line a regularizer, best under the strong attack on top."""
    tasks = list(dict.fromkeys(each.task for each in results))
    means = {(task, row): quality.summary(results, task, row) for task in tasks for row in quality.ROWS}
    order = sorted(quality.ROWS, key=lambda row: sum(means[task, row]["pgd"][0] for task in tasks))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(WIDTH, 4.0), sharey=True, layout="constrained")
    for task, axes in zip(tasks, panels, strict=True):
        for name, color, marker in (("clean", 6, "o"), ("pgd_weak", 2, "s"), ("pgd", 0, "D")):
            found = [means[task, row][name] for row in order]
            values, spreads = ([100 * value for value in values] for values in zip(*found, strict=True))
            look: dict[str, Any] = {"color": theme.colors[color], "fmt": marker, "markersize": 5, "elinewidth": 1.5}
            if name == "clean":  # the weak attack's mark may lie within
                look |= {"markersize": 9, "markerfacecolor": "none"}
            axes.errorbar(values, range(len(order)), xerr=spreads, label=_attack(name), **look)
        axes.set(title=task, xlabel="accuracy, %", xlim=(-4, 104))
        axes.set_yticks(range(len(order)), order)
    _legend(figure, panels[0], columns=3)
    return figure


def _attack(name: str) -> str:
    return {"clean": "no attack", "pgd_weak": f"PGD {quality.WEAK}", "pgd": f"PGD {quality.STRONG}"}[name]


def error(results: Sequence[accuracy.Accuracy], theme: Theme) -> Figure:
    """How wrong is the usual formula where the two sides are close? Loss and gradient, worst of kl, sym_kl and js."""
    names = list(dict.fromkeys(each.contestant for each in results))
    differences = sorted({each.difference for each in results})
    figure, panels = pyplot.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True, layout="constrained")
    for value, axes in zip(("loss", "gradient"), panels, strict=True):
        for name in names:
            worst = [
                max(getattr(e, value) for e in results if (e.difference, e.contestant) == (difference, name))
                for difference in differences
            ]
            axes.plot(differences, worst, label=name, **{**mark(name, theme), "linestyle": "-", "alpha": 0.9})
        axes.axhline(1, color=theme.text, linewidth=1, linestyle="--", zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="size of the difference of the logits", title=value)
    panels[0].set_ylabel("largest relative error (1: no digit is right)")
    panels[0].invert_xaxis()
    panels[1].invert_xaxis()
    _legend(figure, panels[0], columns=3)
    return figure


def _median(report: Report, case: str, contestant: str) -> float | None:
    found = (row for row in report.rows if (row.case, row.contestant) == (case, contestant))
    return next((row.timing.median for row in found if row.timing is not None), None)


def _peak(rows: Sequence[Row], case: str, contestant: str) -> int:
    return next((row.peak for row in rows if (row.case, row.contestant) == (case, contestant) and row.peak), 0)


def _legend(figure: Figure, axes: Any, columns: int = 2) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9)


def save_robustness(results: Sequence[quality.Quality], path: pathlib.Path) -> None:
    with styled(LIGHT):
        figure = robustness(results, LIGHT)
        save(figure, path)
        pyplot.close(figure)


def digest(results: pathlib.Path) -> str:
    """Of all results that figures are made of."""
    found = hashlib.sha256()
    for path in (*sorted(results.glob("speed-*.json")), results / "quality.json", results / "accuracy.json"):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"bench/results {found.hexdigest()[:16]}"


def write(report: Report, results: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """All of them, as ``folder/NAME-THEME.svg``."""
    quality_results, errors = quality.load(results / "quality.json"), accuracy.load(results / "accuracy.json")
    draw: dict[str, Callable[[Theme], Figure]] = {
        "speed": lambda theme: speed(report, theme),
        "memory": lambda theme: memory(report, theme),
        "robustness": lambda theme: robustness(quality_results, theme),
        "error": lambda theme: error(errors, theme),
    }
    written = []
    for name, figure_of in draw.items():
        for theme in THEMES:
            with styled(theme):
                figure = figure_of(theme)
                written.append(folder / f"{name}-{theme.name}.svg")
                save(figure, written[-1], digest(results))
                pyplot.close(figure)
    return written
