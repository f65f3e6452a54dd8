"""PNG plots of a report: speed against the fastest rival, and the share of the measured copy bandwidth or GEMM rate."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable

from .liger import LIGER
from .mtdnn import MTDNN
from .peers import COMPILED, EAGER, MODES
from .report import Report
from .run import Row

FAMILIES = LIGER.strip(), MTDNN.strip()  # many contestants, of which at the most one is a rival in a case
THEIRS = (EAGER, COMPILED, *(f"{COMPILED} {mode}" for mode in MODES), *FAMILIES)
COLORS = dict(zip(THEIRS, ("#9aa5b1", "#52606d", "#323f4b", "#7b8794", "#b08968", "#c9ada7"), strict=True))
OURS = ("#1f77b4", "#2a9d55", "#d97706", "#8b5cf6")


def save_plots(report: Report, path: pathlib.Path) -> list[pathlib.Path]:
    """Write ``path`` (speed) and, where bytes or FLOPs were counted, ``path`` with "-limit" before its suffix."""
    written = []
    limit = path.with_name(f"{path.stem}-limit{path.suffix}")
    for target, value, label, line in (
        (path, lambda row: row.speed, "speed relative to the fastest rival (higher is better)", "fastest rival"),
        (limit, _limit_share, "bytes or FLOPs that must be / time, relative to a plain copy or GEMM", "copy or GEMM"),
    ):
        rows = [row for row in report.rows if row.role != "part" and value(row) is not None]
        if rows:
            _bars(report, rows, value, label, line, target)
            written.append(target)
    return written


def _limit_share(row: Row) -> float | None:
    return row.copy_share if row.gemm_share is None else row.gemm_share


def _bars(
    report: Report, rows: list[Row], value: Callable[[Row], float], label: str, line: str, path: pathlib.Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(map(_name, rows)))
    ours = itertools.cycle(OURS)
    colors = {name: COLORS.get(name) or next(ours) for name in names}
    thick = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + (0.22 * len(names) + 0.25) * len(cases)), layout="constrained")
    for place, name in enumerate(names):
        mine = [row for row in rows if _name(row) == name]
        heights = [cases.index(row.case) + (place - (len(names) - 1) / 2) * thick for row in mine]
        values = [value(row) for row in mine]
        bars = axes.barh(heights, values, thick * 0.92, color=colors[name], label=name)
        texts = axes.bar_label(bars, [_label(v) for v in values], padding=3, fontsize=8, color="#3e4c59")
        for text in texts:
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.axvline(1, color="#cf1124", linewidth=1, linestyle="--", zorder=0, label=line)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    env = report.environment
    threads = f", {env['threads']} threads" if env["device_type"] == "cpu" else ""
    figure.suptitle(f"{env['device']}{threads}, torch {env['versions']['torch']}", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    by_name = dict(zip(labels, handles, strict=True))
    entries = (*names, line)
    columns = min(3, len(entries))
    figure.legend([by_name[e] for e in entries], entries, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _name(row: Row) -> str:
    return next((family for family in FAMILIES if row.contestant.startswith(family)), row.contestant)


def _label(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"
