"""``python -m bench finetune``: make the runs that are missing, and show what there is.

Several processes may work on one file of results: start the command several times.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..commands import HERE, Call
from ..report import environment
from . import costs, data, materials, plan, report
from .results import Results
from .train import Run, perform

WAIT = 5.0  # seconds between looks at what other processes do
COMMITTED = HERE / "results" / "finetune.jsonl"


def main(call: Call) -> int:
    """``--json``: lines, added to; ``--cases``: only runs whose key, as JSON, contains it ("costs": none but
    step times and memory, which come last); ``--limit``: seconds after
    which no run starts."""
    options = call.options
    path: pathlib.Path = options.json or call.folder / ("finetune-quick.jsonl" if options.quick else "finetune.jsonl")
    results = Results(path)
    try:
        cache = data.CARRIED if data.CARRIED.is_dir() and not data.CACHE.is_dir() else data.CACHE
        loaded = materials.load(call.device, cache)
    except RuntimeError as error:
        call.console.print(f"[red]finetune:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    except ModuleNotFoundError as error:
        call.parser.exit(1, f"python -m bench finetune needs {error.name}: pip install -e '.[finetune]'\n")
    tuned = Results(COMMITTED) if options.quick else results
    about = {
        "environment": environment(call.device),
        "data": {each.requirement: each.sha256 for each in (data.MINILM, data.SENTENCES)},
        "weights": "rounded to float16" if cache == data.CARRIED else "as published",
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=call.console, transient=True) as progress:
        bar = progress.add_task("")

        def say(doing: str) -> None:
            progress.update(bar, description=doing.replace("[", r"\["))

        def planned() -> list[Run]:
            every = plan.quick(tuned) if options.quick else plan.full(results)
            found = [run for run in every if options.cases in json.dumps(run.key)]
            missing = [run for run in found if results.of(run) is None]
            progress.update(bar, total=len(found), completed=len(found) - len(missing))
            return missing

        while missing := planned():  # anew after each run: what tuning chose decides what is tested
            if options.limit and time.perf_counter() - call.start > options.limit:
                call.console.print("stopped at its limit: run it again to go on", highlight=False)
                break
            for run in missing:
                with results.claimed(run) as mine:
                    if mine and results.of(run) is None:
                        results.add(_performed(run, loaded, say) | about)
                        if not call.console.is_terminal:
                            line = _line(results.of(run) or {}, call.start)
                            call.console.print(line, highlight=False, markup=False, soft_wrap=True)
                        break
            else:  # other processes are at all of them
                time.sleep(WAIT)
                results.refresh()
        else:
            if results.costs is None and options.cases in ("", "costs"):
                results.add({"costs": costs.measure(results, loaded, say)} | about)
    report.show(results, call.console)
    call.wrote(path)
    return 0


def _performed(run: Run, loaded: Any, say: Any) -> dict[str, Any]:
    name = f"{run.stage} {run.method}, seed {run.seed}, {run.size} sentences"
    torch.manual_seed(run.seed)
    return perform(run, loaded, lambda doing: say(f"{name}: {doing}"))


def _line(line: dict[str, Any], start: float) -> str:
    run, scores = line["run"], line["scores"]
    clean = " ".join(f"{domain} {value:.3f}" for domain, value in scores["clean"].items())
    attacked = " ".join(f"{name} {scores[name]:.3f}" for name in scores if name.startswith("pgd"))
    about = f"{run['stage']} {run['method']} {run['settings']} seed {run['seed']} size {run['size']} {run['start']}"
    return f"{time.perf_counter() - start:6.0f} s  {about}: {clean} {attacked} took {line['seconds']}"
