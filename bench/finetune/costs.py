"""What a training step of each method costs, as shares of plain fine-tuning's: all in turns, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..measure import peak_memory, synchronize
from . import plan
from .methods import METHODS, OBJECTIVES, PLAIN
from .results import Results
from .train import BATCH, RATE, Materials, Run, batch_of, sample, targets_of

ROUNDS = 6


def measure(
    results: Results, materials: Materials, say: Callable[[str], None], rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Method -> its median share of the time of plain's step in the same round, and its share of the peak memory.

    One batch of real sentences of middling lengths; the rates are such that no weights move far.
    """
    run = Run("cost", PLAIN, {}, 0, 8 * BATCH, 0, 0)
    chosen = sample(run, materials)
    ids = sorted(materials.encode([each.text for each in chosen]), key=len)[4 * BATCH : 5 * BATCH]
    batch = batch_of(ids, targets_of(chosen[:BATCH], run.task), materials.device, True)
    model = materials.model("pretrained", OBJECTIVES[run.task].outputs).to(materials.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE / 1000, fused=True)
    steps = {}
    for name, method in METHODS.items():
        settings = plan.chosen(name, results) or method.candidates[0]
        if method.made_of and not settings:
            settings = {key: value for each in method.made_of for key, value in METHODS[each].candidates[0].items()}
        training = method.make(model, OBJECTIVES[run.task], **settings)

        def step(training: Any = training) -> None:
            optimizer.zero_grad()
            training.loss(batch).backward()
            optimizer.step()
            training.after_step()

        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    for name, step in steps.items():
        say(f"memory of {name}")
        step()  # the state of the optimizer, a teacher
        peaks[name] = peak_memory(step, (), materials.device)
    for number in range(rounds):
        say(f"step times, round {number + 1} of {rounds}")
        for name, step in steps.items():
            synchronize(materials.device)
            start = time.perf_counter()
            step()
            synchronize(materials.device)
            times[name].append(time.perf_counter() - start)
    plain = times[PLAIN]
    return {
        name: {
            "time": statistics.median(mine / base for mine, base in zip(each, plain, strict=True)),
            "memory": peaks[name] / peaks[PLAIN],
        }
        for name, each in times.items()
    }
