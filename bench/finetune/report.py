"""Tables of the results: means over seeds, and differences to plain fine-tuning, paired by seed, with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .methods import METHODS, PLAIN
from .results import Results
from .train import RATE


class Interval(NamedTuple):
    """Mean and half the width of its 95 % t interval (None of one value)."""

    mean: float
    half: float | None
    number: int

    @property
    def above_zero(self) -> bool:
        return self.half is not None and self.mean - self.half > 0

    def text(self, sign: str = "+", scale: float = 100, digits: int = 1) -> str:
        """In points, or another ``scale``."""
        half = "" if self.half is None else f" ± {scale * self.half:.{digits}f}"
        return f"{scale * self.mean:{sign}.{digits}f}{half}"


def interval(values: Sequence[float]) -> Interval:
    if len(values) < 2:
        return Interval(values[0], None, 1)
    from scipy import stats  # slow to import

    quantile = stats.t.ppf(0.975, len(values) - 1)
    return Interval(statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5, len(values))


def _in(line: dict[str, Any], name: str) -> float:
    value: float = line["scores"][name][line["run"]["domain"]]
    return value


def _out(line: dict[str, Any], name: str) -> float:
    found = line["scores"][name]
    return statistics.mean(value for domain, value in found.items() if domain != line["run"]["domain"])


def _lost(line: dict[str, Any], name: str) -> float:
    """What an attack on texts costs, over all domains."""
    scores = line["scores"]
    return statistics.mean(scores["half"].values()) - statistics.mean(scores[name].values())


#: Column -> its figure of a line.
FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "in domain": lambda line: _in(line, "clean"),
    "out of domain": lambda line: _out(line, "clean"),
    "editorials and tweets": lambda line: statistics.mean(
        line["scores"]["clean"][domain] for domain in ("editorial", "tweet")
    ),
    "calibration error": lambda line: _in(line, "ece"),
    "calibration error, out": lambda line: _out(line, "ece"),
    "PGD 0.1": lambda line: line["scores"]["pgd_0.1"],
    "PGD 0.3": lambda line: line["scores"]["pgd_0.3"],
    "lost to typos": lambda line: _lost(line, "typos"),
    "lost to lost words": lambda line: _lost(line, "lost_words"),
}


#: Those that mean something of ratings: there they are errors.
RATED = "in domain", "out of domain", "PGD 0.1", "PGD 0.3"


class Row(NamedTuple):
    method: str
    settings: dict[str, Any]
    means: dict[str, Interval]
    differences: dict[str, Interval]  # to plain, of the seeds that both have
    cost: dict[str, float]


def rows(results: Results, size: int, **wanted: Any) -> list[Row]:
    """A row a method that was tested with ``size`` sentences, in the order of the table of methods."""
    wanted = {"start": "pretrained", "task": "classes", "rate": RATE, **wanted}
    lines = list(results.runs(stage="test", size=size, **wanted))
    costs = (results.costs or {"costs": {}})["costs"]
    figures = {name: of for name, of in FIGURES.items() if wanted["task"] == "classes" or name in RATED}
    found = []
    plain = {line["run"]["seed"]: line for line in lines if line["run"]["method"] == PLAIN}
    for method in METHODS:
        mine = {line["run"]["seed"]: line for line in lines if line["run"]["method"] == method}
        if not mine:
            continue
        both = sorted(mine.keys() & plain.keys())
        found.append(
            Row(
                method,
                next(iter(mine.values()))["run"]["settings"],
                {name: interval([of(each) for each in mine.values()]) for name, of in figures.items()},
                {name: interval([of(mine[i]) - of(plain[i]) for i in both]) for name, of in figures.items() if both},
                costs.get(method, {}),
            )
        )
    return found


def table(found: Sequence[Row]) -> list[list[str]]:
    """Header and rows: plain's own figures in %, then differences to them in points."""
    lines = [["method", "settings", "seeds", *FIGURES, "x step time", "x peak memory"]]
    for row in found:
        shown = row.means if row.method == PLAIN else row.differences
        cells = [shown[name].text("" if row.method == PLAIN else "+") if shown else "" for name in FIGURES]
        settings = ", ".join(f"{name} {value:g}" for name, value in row.settings.items())
        cost = [f"{row.cost[name]:.2f}" if row.cost else "" for name in ("time", "memory")]
        lines.append([row.method, settings, str(row.means["in domain"].number), *cells, *cost])
    return lines


def sizes(results: Results) -> list[int]:
    found = results.runs(stage="test", start="pretrained", task="classes", rate=RATE)
    return sorted({line["run"]["size"] for line in found})


def show(results: Results, console: Any) -> None:
    from rich import box
    from rich.table import Table

    if not console.is_terminal:
        console.width = max(console.width, 220)  # a log file has no edge to wrap at
    for size in sizes(results):
        shown = Table(title=f"{size} sentences: plain in %, others as paired differences, 95 %", box=box.SIMPLE_HEAD)
        header, *lines = table(rows(results, size))
        for name in header:
            shown.add_column(name)
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
