"""``python -m bench compare A.json B.json``: do two runs agree on what everyone is worth?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .report import BUSY, Report, speed_text
from .run import Row

AGREEMENT = 0.10  # how far apart two speeds may be without an explanation
WITHIN, SPREAD, DISAGREE = f"within {AGREEMENT:.0%}".replace("%", " %"), "explained by the spread", "DISAGREE"
STYLES = {SPREAD: "yellow", DISAGREE: "bold red"}


class Comparison(NamedTuple):
    """One contestant in one case: its rows in both runs, the second speed over the first minus one, the verdict."""

    first: Row
    second: Row
    difference: float
    verdict: str


def compare(first: Report, second: Report) -> list[Comparison]:
    """Every contestant that has a speed in both reports, in the order of the first.

    Raises:
        ValueError: the reports are of different devices, or have no speed in common.
    """
    devices = [report.environment["device"] for report in (first, second)]
    if devices[0] != devices[1]:
        raise ValueError(f"the results are of two devices, {devices[0]!r} and {devices[1]!r}: they cannot be compared")
    found = list(_pairs(first, second))
    if not found:
        raise ValueError("the results have no case in common in which a contestant has a speed")
    return found


def _pairs(first: Report, second: Report) -> Iterator[Comparison]:
    others = {(row.case, row.contestant): row for row in second.rows}
    for row in first.rows:
        other = others.get((row.case, row.contestant))
        if row.speed is not None and other is not None and other.speed is not None:
            yield Comparison(row, other, other.speed / row.speed - 1, _verdict(row, other))


def _verdict(first: Row, second: Row) -> str:
    assert first.speed is not None
    assert second.speed is not None
    if max(first.speed, second.speed) <= (1 + AGREEMENT) * min(first.speed, second.speed):
        return WITHIN
    low, high = _interval(first)
    other_low, other_high = _interval(second)
    # What the intervals leave to be explained may be as large as what needs no explanation.
    return SPREAD if max(low, other_low) <= (1 + AGREEMENT) * min(high, other_high) else DISAGREE


def _interval(row: Row) -> tuple[float, float]:
    """Of the speed; results of older versions have none, and nothing explains their differences."""
    assert row.speed is not None
    if row.speed_low is None or row.speed_high is None:
        return row.speed, row.speed
    return row.speed_low, row.speed_high


def summary(found: list[Comparison]) -> str:
    counts = Counter(each.verdict for each in found)
    parts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (WITHIN, SPREAD, DISAGREE))
    return f"{len(found)} ratios in both runs: {parts}"


def show(found: list[Comparison], console: Console) -> None:
    """The table of all comparisons, then how many there are of each verdict."""
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a log file has no edge to wrap at
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case / contestant", overflow="fold", min_width=34)
    for column in ("first", "second", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    case = None
    for each in found:
        if each.first.case != case:
            if case is not None:
                table.add_section()
            case = each.first.case
            table.add_row(f"[bold]{escape(case)}[/]")
        speeds = (speed_text(row) for row in (each.first, each.second))
        name = f"  {escape(each.first.contestant)}"
        table.add_row(name, *speeds, f"{each.difference:+.1%}", each.verdict, style=STYLES.get(each.verdict))
    console.print(table)
    console.print(summary(found), highlight=False)


def warn_of_work(reports: Iterable[Report], console: Console) -> None:
    """Say which runs shared the machine: other work that comes and goes is in no interval."""
    for which, report in zip(("first", "second"), reports, strict=True):
        if report.busy is not None and report.busy > BUSY:
            console.print(f"[yellow]the machine was busy with other work in the {which} run ({report.busy:.0%})")
