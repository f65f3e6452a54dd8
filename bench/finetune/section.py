"""The section of the docs that is made of committed results."""

from __future__ import annotations

import itertools
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from . import attacks, plan
from .methods import METHODS, NEFTUNE, PLAIN, RECOMMENDED, SHIPPED
from .report import RATED, Interval, Row, rows, sizes
from .results import Results
from .train import BATCH, EPOCHS, LENGTH, RATE, VALIDATED

NOTHING = "(No results are committed yet: `python -m bench finetune` makes them.)\n"
#: Columns of the docs' tables: what does not fit is in the file of results.
TABLES = {
    "Accuracy and calibration": ("in domain", "out of domain", "editorials and tweets", "calibration error"),
    "Attacks": ("PGD 0.1", "PGD 0.3", "lost to typos", "lost to lost words"),
}


def section(path: pathlib.Path) -> str:
    if not path.is_file():
        return NOTHING
    results = Results(path)
    parts = [_how(results), _lacking(results)]
    for size in sizes(results):
        found = rows(results, size)
        parts += [f"### {size} sentences\n", *(_table(title, found, names) for title, names in TABLES.items())]
    parts += [_goals(results), _tuning(results), _rated(results), _control(results), _cost(results)]
    return "\n".join(part for part in parts if part)


def _lacking(results: Results) -> str:
    """What of the plan is still to be run: tables of a part of it say so."""
    tested = {row.method: row.means["in domain"].number for row in rows(results, plan.SIZE)}
    lacking = [name for name in METHODS if tested.get(name, 0) < len(plan.SEEDS)]
    if not lacking:
        return ""
    return (
        f"**Not all of it has been run**: at {plan.SIZE} sentences fewer than {len(plan.SEEDS)} seeds, or none, of "
        f"{', '.join(lacking)}. What follows is what there is.\n"
    )


def _how(results: Results) -> str:
    line = next(results.runs(), None)
    if line is None:
        return NOTHING
    made = line["environment"]
    return (
        f"{EPOCHS} epochs of AdamW at {RATE:g}, batches of {BATCH}, at most {LENGTH} tokens ({made['device']}, torch "
        f"{made['versions']['torch']}, transformers {made['versions']['transformers']}). Each seed draws the sentences "
        f"that are trained on and {plan.TESTED} a domain to test on, the same for every method; texts are attacked in "
        f"half of these, embeddings in {plan.ATTACKED} of the domain that was trained in (sign steps, {attacks.STEPS} "
        "for each radius, in units of each token's root mean square). Lines but plain's are differences to plain in "
        "points, paired by seed, with 95 % t intervals.\n"
    )


def _table(title: str, found: Sequence[Row], names: Sequence[str], scale: float = 100, digits: int = 1) -> str:
    lines = [["method", "seeds", *names]]
    for row in found:
        shown = row.means if row.method == PLAIN else row.differences
        cells = [_cell(shown[name], row.method, scale, digits) if shown else "" for name in names]
        seeds = (row.means if row.method == PLAIN else row.differences or row.means)["in domain"].number
        lines.append([row.method, str(seeds), *cells])
    return f"{title}:\n\n{markdown(lines)}"


def _cell(found: Interval, method: str, scale: float, digits: int) -> str:
    return found.text("" if method == PLAIN else "+", scale, digits)


def _goals(results: Results) -> str:
    """What was hoped for at `plan.SIZE` sentences, and what came of it."""
    found = {row.method: row for row in rows(results, plan.SIZE)}
    ours, plain = found.get(RECOMMENDED, found.get(SHIPPED)), found.get(PLAIN)
    if ours is None or plain is None or not ours.differences:
        return ""
    out, inside = ours.differences["out of domain"], ours.differences["in domain"]
    attacked, base = (
        ours.means["PGD 0.1"].mean,
        ours.means["PGD 0.1"].mean - ours.differences["PGD 0.1"].mean,
    )  # of the same seeds
    typos = ours.differences["lost to typos"]
    enough = out.number >= len(plan.SEEDS)

    def yes(value: bool) -> str:
        return ("yes" if value else "no") if enough else "too few seeds"

    lines = [
        ["goal", "found", "reached"],
        ["out of domain at least 1.5 points above plain", out.text(), yes(out.mean >= 0.015 and out.above_zero)],
        ["in domain not worse than plain", inside.text(), yes(inside.mean >= 0)],
        ["5 times plain's accuracy under PGD 0.1", f"{attacked:.1%} to {base:.1%}", yes(attacked >= 5 * base)],
        ["less lost to typos than plain, interval below zero", typos.text(), yes(_below_zero(typos))],
    ]
    for rival in (NEFTUNE, "R3F"):
        if rival in found and found[rival].differences:
            there = found[rival].differences["out of domain"]
            lines.append(
                [f"out of domain above {rival}", f"{out.text()} to {there.text()}", yes(out.mean > there.mean)]
            )
    if ours.cost:
        lines.append(["at most 2.4 times plain's step time", f"{ours.cost['time']:.2f}", yes(ours.cost["time"] <= 2.4)])
    tuned = ", tuned" if ours.method == RECOMMENDED else ""
    return f"### What was hoped for\n\nOf {ours.method}{tuned}, at {plan.SIZE} sentences:\n\n{markdown(lines)}"


def _below_zero(found: Interval) -> bool:
    return found.half is not None and found.mean + found.half < 0


def _tuning(results: Results) -> str:
    """Every candidate that was tried on validation parts, the one that was taken in bold."""
    lines = [["method", "candidates"]]
    for method, rate in itertools.product(METHODS, sorted({RATE, *plan.RATES}, key=lambda rate: rate != RATE)):
        if method == PLAIN and rate != RATE:
            continue  # that is said below
        wanted = {"stage": "tune", "method": method, "rate": rate}
        tried = [line for seed in plan.TUNING_SEEDS for line in results.runs(seed=seed, **wanted)]
        taken = plan.chosen(method, results) if rate == RATE else None
        cells = [f"**{text}**" if taken and settings == taken else text for settings, text in _by_settings(tried)]
        if cells:
            lines.append([method if rate == RATE else f"{method} at {rate:g}", "; ".join(cells)])
    if len(lines) == 1:
        return ""
    found_of = {rate: [results.of(run) for run in plan.rates() if run.rate == rate] for rate in plan.RATES}
    rates = (
        f"{rate:g}: {', '.join(f'{100 * plan.validated(line):.1f}' for line in found if line)}"
        for rate, found in found_of.items()
        if any(found)
    )
    return (
        f"### What was tuned\n\nMean accuracy in % on the validation parts of {' and '.join(VALIDATED)}, {plan.SIZE} "
        f"sentences, seed {', '.join(map(str, plan.TUNING_SEEDS))}, which no test uses; what was taken is bold:\n\n"
        f"{markdown(lines)}\nAll methods train at {RATE:g}, chosen for plain fine-tuning in the same way. Its accuracy "
        f"by rate, for seeds {' and '.join(map(str, plan.RATE_SEEDS))} as far as they were run: {'; '.join(rates)}.\n"
    )


def _by_settings(lines: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Settings, and their mean over the seeds as text."""
    found: list[tuple[dict[str, Any], list[float]]] = []
    for line in lines:
        settings = line["run"]["settings"]
        values = next((values for known, values in found if known == settings), None)
        if values is None:
            found.append((settings, values := []))
        values.append(plan.validated(line))
    shown = []
    for settings, values in found:
        about = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        shown.append((settings, f"{about}{': ' if about else ''}{100 * statistics.mean(values):.1f}"))
    return shown


def _rated(results: Results) -> str:
    found = rows(results, plan.SIZE, task="rating")
    if not found:
        return ""
    return (
        f"### As regression\n\n{plan.SIZE} sentences with their ratings, neutral ones too, squared errors in the task "
        "and in the regularizer, settings as chosen for classes; root mean square errors, of ratings from −4 to 4, "
        f"less is better. {_table('Error', found, RATED, 1, 3)}"
    )


def _control(results: Results) -> str:
    found = rows(results, plan.SIZE, start="random")
    if not found:
        return ""
    return (
        "### From random weights\n\nThe same model without its pretraining, which shows what of the above the "
        f"checkpoint has learned from its own data:\n\n{_table('Accuracy', found, ('in domain', 'out of domain'))}"
    )


def _cost(results: Results) -> str:
    costs: dict[str, Any] = (results.costs or {"costs": {}})["costs"]
    lines = [["method", "x step time", "x peak memory"]]
    lines += [[name, f"{each['time']:.2f}", f"{each['memory']:.2f}"] for name, each in costs.items()]
    if not costs:
        return ""
    return (
        "### What it costs\n\nMedian of ratios to plain's step, in turns in one process; memory beside weights, "
        f"optimizer and gradients that were there before the step:\n\n{markdown(lines)}"
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *others = lines
    table = [header, ["---", *["---:"] * (len(header) - 1)], *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)
