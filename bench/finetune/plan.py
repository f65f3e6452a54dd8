"""Which runs there are, in the order of what they are worth: a run that is cut short has the most important ones."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from .methods import BREGMAN, METHODS, NEFTUNE, PLAIN, RECOMMENDED, SHIPPED, SMART_PYTORCH
from .results import Results
from .train import VALIDATED, Run

SIZE, OTHER_SIZES = 400, (200, 1600)
TUNING_SEEDS, SEEDS = (1000,), (0, 1, 2, 3, 4)
#: Of which `train.RATE` was chosen, for plain fine-tuning.
RATE_SEEDS, RATES = (1000, 1001), (5e-5, 1e-4, 2e-4, 4e-4)
TESTED, ATTACKED, TUNED_ON, ATTACKED_IN_TUNING = 300, 80, 300, 40
#: In the order of what decides: a wave is tuned, then tested.
WAVES = (
    (PLAIN, SHIPPED),
    (RECOMMENDED, NEFTUNE, "R3F"),
    ("fisher", SMART_PYTORCH),
    ("R-Drop", BREGMAN, f"{RECOMMENDED} + {BREGMAN}", "SiFT", "FreeLB"),
)
RATED = (PLAIN, RECOMMENDED, NEFTUNE, "R3F")  # as regression on the rating, with what was chosen for classes
QUICK = (PLAIN, SMART_PYTORCH, RECOMMENDED, NEFTUNE)
QUICK_SEEDS, QUICK_SIZE = (0, 1), 200


def tuning(method: str) -> list[Run]:
    """A method with one setting to choose from needs none; plain is run to compare with."""
    candidates = METHODS[method].candidates
    if len(candidates) == 1 and method != PLAIN:
        return []
    return [
        Run("tune", method, each, seed, SIZE, TUNED_ON, ATTACKED_IN_TUNING)
        for seed in TUNING_SEEDS
        for each in candidates
    ]


def rates() -> list[Run]:
    """All methods train at the rate that suits plain fine-tuning: no advantage of theirs."""
    return [
        Run("tune", PLAIN, {}, seed, SIZE, TUNED_ON, ATTACKED_IN_TUNING, rate=rate)
        for rate in RATES
        for seed in RATE_SEEDS
    ]


def validated(line: dict[str, Any]) -> float:
    """What settings are chosen by: mean accuracy on the validation parts of two domains, one that was trained in."""
    return statistics.mean(line["scores"]["clean"][domain] for domain in VALIDATED)


def chosen(method: str, results: Results) -> dict[str, Any] | None:
    """The settings of ``method`` that validation data speak for; None while they are not known."""
    made_of = METHODS[method].made_of
    if made_of:
        parts = [chosen(each, results) for each in made_of]
        return None if None in parts else {name: value for part in parts if part for name, value in part.items()}
    candidates = METHODS[method].candidates
    if len(candidates) == 1:
        return candidates[0]
    found = [[results.of(run) for run in tuning(method) if run.settings == each] for each in candidates]
    means = [statistics.mean(validated(line) for line in lines if line) for lines in found if all(lines)]
    return candidates[means.index(max(means))] if len(means) == len(candidates) else None


def trials(method: str, settings: dict[str, Any], size: int = SIZE, seeds: Sequence[int] = SEEDS) -> list[Run]:
    return [Run("test", method, settings, seed, size, TESTED, ATTACKED) for seed in seeds]


def full(results: Results) -> Iterator[Run]:
    """Every run; settings are looked up when a test is due, so that tuning before it counts."""
    for wave in WAVES:
        for method in wave:
            yield from tuning(method)
        for seed in SEEDS:
            yield from _tested(wave, results, SIZE, (seed,))
    yield from rates()  # the choice was made before all else, of most of these
    for seed in SEEDS:
        for run in _tested((PLAIN, RECOMMENDED), results, SIZE, (seed,)):
            yield dataclasses.replace(run, start="random")
    for seed in SEEDS:
        for run in _tested(RATED, results, SIZE, (seed,)):
            yield dataclasses.replace(run, task="rating")
    everything = [method for wave in WAVES for method in wave]
    for size in OTHER_SIZES:
        for seed in SEEDS:
            yield from _tested(everything, results, size, (seed,))


def quick(results: Results) -> Iterator[Run]:
    """Few methods, sentences and seeds; as they were tuned, or with the first of their candidates."""
    for seed in QUICK_SEEDS:
        for method in QUICK:
            settings = chosen(method, results) or METHODS[method].candidates[0]
            yield Run("test", method, settings, seed, QUICK_SIZE, TESTED // 2, ATTACKED // 2)


def _tested(methods: Sequence[str], results: Results, size: int, seeds: Sequence[int]) -> Iterator[Run]:
    for method in methods:
        settings = chosen(method, results)
        if settings is not None:
            yield from trials(method, settings, size, seeds)
