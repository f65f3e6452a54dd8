"""Plots of a report: speed against the fastest rival, and the share of the measured copy bandwidth or GEMM rate."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from .report import Report
from .run import Row


def save_plots(report: Report, path: pathlib.Path) -> list[pathlib.Path]:
    """Write ``path`` (speed) and, where bytes or FLOPs were counted, ``path`` with "-limit" before its suffix."""
    written = []
    limit = path.with_name(f"{path.stem}-limit{path.suffix}")
    for target, value, label, line in (
        (path, lambda row: row.speed, "speed relative to the fastest rival (right is faster)", "fastest rival"),
        (limit, _limit_share, "bytes or FLOPs that must be / time, relative to a plain copy or GEMM", "copy or GEMM"),
    ):
        rows = [row for row in report.rows if row.role != "part" and value(row) is not None]
        if rows:
            _dots(report, rows, value, label, line, target)
            written.append(target)
    return written


def _limit_share(row: Row) -> float | None:
    return row.copy_share if row.gemm_share is None else row.gemm_share


def _dots(
    report: Report, rows: list[Row], value: Callable[[Row], float], label: str, line: str, path: pathlib.Path
) -> None:
    """A line a case, best on top, and a mark a contestant, on a log axis."""
    from matplotlib import pyplot

    from . import style

    ours = {row.case: max(value(each) for each in rows if each.case == row.case) for row in rows}
    cases = sorted(ours, key=lambda case: ours[case])
    with style.styled(style.LIGHT):
        figure, axes = pyplot.subplots(figsize=(style.WIDTH, 1.8 + 0.24 * len(cases)), layout="constrained")
        for name in dict.fromkeys(style.family(row.contestant) for row in rows):
            mine = [row for row in rows if style.family(row.contestant) == name]
            points = [value(row) for row in mine], [cases.index(row.case) for row in mine]
            axes.plot(*points, markersize=6, label=name, **style.mark(name, style.LIGHT))
        axes.axvline(1, color=style.LIGHT.text, linewidth=1, linestyle="--", zorder=0, label=line)
        axes.set(xscale="log", xlabel=label, ylim=(-0.7, len(cases) - 0.3))
        axes.set_yticks(range(len(cases)), cases, fontsize=8)
        axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
        env = report.environment
        threads = f", {env['threads']} threads" if env["device_type"] == "cpu" else ""
        figure.suptitle(f"{env['device']}{threads}, torch {env['versions']['torch']}", fontsize=10)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
        style.save(figure, path)
        pyplot.close(figure)
