"""``python -m bench tune``: time other launch choices than the defaults on a GPU, and write down those that win.

Every candidate must give the default's results without register spills, then is timed beside the default: CUDA graphs
of the launchers on inputs that have left the cache, in turn, so that no host time counts. `RULE` says what wins. What
wins must then do the same for the kernel's other variants (kinds, masks, units), which are not timed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from smart_fast.kernels import launch, tuning
from smart_fast.kernels.launch import Choice
from torch import Tensor

from smart_fast.backends import triton_launch as ops

from . import report
from .measure import Timing, copy_bandwidth, input_sets, interleaved
from .run import plain_error
from .tune_candidates import candidates, default_choice, flaw, refinements
from .tune_targets import Job, Target

MIN_GAIN = 0.03
RULE = (
    f"faster than the default by at least {MIN_GAIN:.0%}, with its upper quartile below the default's lower one, "
    "when the best of a sweep is timed once more beside the default alone"
)

Clock = Callable[[dict[str, Callable[..., Any]], Sequence[tuple[Any, ...]], torch.device, float], dict[str, Timing]]


def replayed(
    runs: dict[str, Callable[..., Any]], sets: Sequence[tuple[Any, ...]], device: torch.device, seconds: float
) -> dict[str, Timing]:
    """`measure.interleaved` of CUDA graphs, each a pass over all ``sets``: times of one call, without the host's."""
    graphs, pool = {}, torch.cuda.graph_pool_handle()  # results are thrown away: all graphs may use the same memory
    for name, run in runs.items():
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], pool=pool):
            for each in sets:
                run(*each)
    timings = interleaved({name: graph.replay for name, graph in graphs.items()}, [()], device, seconds)
    return {name: timing.shared_by(len(sets)) for name, timing in timings.items()}


def faster(found: Timing, default: Timing) -> bool:
    """`RULE`."""
    return found.median <= (1 - MIN_GAIN) * default.median and found.q3 < default.q1


class Sweep:
    """The search for one target's choice. ``seconds`` for each of its three to five rounds."""

    def __init__(self, target: Target, device: torch.device, seconds: float, clock: Clock) -> None:
        self.job, self.target, self.device = Job(target, device), target, device
        self.seconds, self.clock = seconds, clock
        self.sets = input_sets(self.job.inputs, device)
        self.dropped: collections.Counter[str] = collections.Counter()
        self.tried = 0

    def entry(self) -> dict[str, Any]:
        """The target's entry of a table, all but its widths."""
        kernel, (_, width) = self.target.kernel, self.target.shape
        self._run(None, *self.sets[0])  # compiled before anything is captured; if the default fails, nothing is swept
        ratios = self._timed(self._sound(candidates(kernel, width)))
        best = min(ratios, key=ratios.__getitem__, default=default_choice(kernel, width))
        ratios |= self._timed(self._sound(refinements(kernel, width, best)))
        tried = next((each for each in sorted(ratios, key=ratios.__getitem__) if self._sound_throughout(each)), None)
        default, found = self._compare(tried)
        choice = tried if found is not None and faster(found, default) else None
        measured: dict[str, Any] = {
            "shape": list(self.target.shape),
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "bytes": self.job.bytes,
            "default_seconds": default.median,
            "default_spread": default.spread,
            "best": None if tried is None else tried._asdict(),
            "seconds": None if found is None else found.median,
            "spread": None if found is None else found.spread,
            "faster": choice is not None,
        }
        if kernel == "divergence_split":
            choice, measured["more_rows"] = self._share_more(choice)
        measured |= {"tried": self.tried, "dropped": dict(self.dropped)}
        fields = None if choice is None else choice._asdict()
        return {"kernel": kernel, "itemsize": self.target.dtype.itemsize, "choice": fields, "measured": measured}

    def _run(self, choice: Choice | None, *inputs: Tensor) -> Any:
        with tuning.override(self.target.kernel, choice):
            return self.job.call(*inputs)

    def _sound(self, choices: Sequence[Choice]) -> list[Choice]:
        """Those of ``choices`` that give the default's result, by the call that is timed; the others are counted."""
        sound = []
        for each in choices:
            self.tried += 1
            if (reason := flaw(self.target.kernel, each, self.job.call, self.sets[0])) is None:
                sound.append(each)
            else:
                self.dropped[reason] += 1
        return sound

    def _sound_throughout(self, choice: Choice) -> bool:
        for variant in self.job.variants:
            if reason := flaw(self.target.kernel, choice, variant, self.sets[0]):
                self.dropped[f"{reason} in a variant"] += 1
                return False
        return True

    def _timed(self, choices: Sequence[Choice]) -> dict[Choice, float]:
        """The time of each choice over that of the default beside it."""
        if not choices:
            return {}
        names = {str(each): each for each in choices}
        runs = {name: functools.partial(self._run, each) for name, each in names.items()}
        runs["default"] = functools.partial(self._run, None)
        timings = self.clock(runs, self.sets, self.device, self.seconds)
        return {each: timings[name].median / timings["default"].median for name, each in names.items()}

    def _compare(self, choice: Choice | None) -> tuple[Timing, Timing | None]:
        """The default, and beside it ``choice`` alone."""
        runs = {"default": functools.partial(self._run, None)}
        if choice is not None:
            runs[str(choice)] = functools.partial(self._run, choice)
        timings = self.clock(runs, self.sets, self.device, self.seconds)
        return timings["default"], timings.get(str(choice))

    def _share_more(self, choice: Choice | None) -> tuple[Choice | None, dict[str, Any] | None]:
        """As many rows as multiprocessors, which the default no longer shares: the choice that does, if that is faster,
        else ``choice``; and what was measured."""
        shape = (ops._processors(self.device), self.target.shape[1])
        shared = (choice or default_choice(self.target.kernel, shape[1]))._replace(threshold=2)
        other = Sweep(dataclasses.replace(self.target, shape=shape), self.device, self.seconds, self.clock)
        sound = other._sound([shared]) and other._sound_throughout(shared)
        self.tried += other.tried
        self.dropped += other.dropped
        if not sound:
            return choice, None
        default, found = other._compare(shared)
        assert found is not None
        measured = {"shape": list(shape), "default_seconds": default.median, "seconds": found.median}
        return (shared if faster(found, default) else choice), measured


def sweep(
    todo: Sequence[Target],
    device: torch.device,
    path: pathlib.Path,
    *,
    seconds: float = 0.3,
    limit: float = float("inf"),
    clock: Clock | None = None,
    say: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    """Sweep ``todo`` until ``limit`` seconds have passed; the table, which is saved to ``path`` after every target.

    What ``path`` holds already of the same kernels, device and versions is kept and not swept again. Without a GPU a
    ``clock`` must be given: the time that the interpreter takes says nothing.

    Raises:
        ValueError: there is no GPU and no clock, or times that no GPU took would be written into the package.
    """
    if device.type != "cuda":
        if clock is None:
            raise ValueError("launch choices are measured on a GPU; there is none")
        if path.resolve().parent == tuning.FOLDER.resolve():
            raise ValueError("a table of the package holds times of a GPU only")
    start = time.perf_counter()
    table = _resumed(path, device)
    done = {(e["kernel"], *e["measured"]["shape"], e["measured"]["dtype"]) for e in table["entries"]}
    size = 1 << 30 if device.type == "cuda" else 1 << 20
    table["copy_rate"] = max(table["copy_rate"], copy_bandwidth(device, size))
    for target in todo:
        if time.perf_counter() - start >= limit:
            table["left_out"] = [each.name for each in todo[todo.index(target) :]]
            break
        if (target.kernel, *target.shape, str(target.dtype).removeprefix("torch.")) in done:
            continue
        say(target.name)
        try:
            table["entries"].append(Sweep(target, device, seconds, clock or replayed).entry())
        except Exception as error:  # the default itself failed, or memory ran out: said, and the others go on
            table["failed"][target.name] = plain_error(error)
        save(table, path)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    save(table, path)
    return table


def _resumed(path: pathlib.Path, device: torch.device) -> dict[str, Any]:
    """The table that ``path`` holds, if what is swept now would have come out the same, else a new one."""
    fresh = {
        "schema": tuning.SCHEMA,
        "device": ops.device_name(device),
        "environment": report.environment(device),
        "kernels": _digest(),
        "rule": RULE,
        "copy_rate": 0.0,
        "entries": [],
        "failed": {},
        "left_out": [],
    }
    if not path.is_file():
        return fresh
    try:
        found = json.loads(path.read_text())
        tuning.parse(found, fresh["device"])
        same = all(found[key] == fresh[key] for key in ("kernels", "rule"))
        same = same and found["environment"]["versions"] == fresh["environment"]["versions"]
    except (ValueError, KeyError, TypeError):
        return fresh
    return fresh | {key: found[key] for key in ("entries", "copy_rate")} if same else fresh


def _digest() -> str:
    """Of the kernels' sources: other kernels, other times."""
    sources = sorted(tuning.FOLDER.parent.glob("*.py"))
    return hashlib.sha256(b"".join(each.read_bytes() for each in sources)).hexdigest()[:16]


def ranges(kernel: str, widths: Sequence[int]) -> dict[int, list[int | None]]:
    """Which widths each measured one speaks for: from the last power of two, or the measured width below it, to
    itself, the largest of them up to its next power of two. Contiguous elements: up to the next measured count."""
    found: dict[int, list[int | None]] = {}
    below = 0
    for width, above in itertools.zip_longest(sorted(widths), sorted(widths)[1:]):
        bucket = launch.next_power_of_two(width)
        low = max(bucket // 2 if bucket > tuning.MIN_BLOCK else 0, below) + 1
        if kernel == "perturb_stream":
            below = None if above is None else launch.next_power_of_two(above) // 2
        else:
            below = bucket if above is None or above > bucket else width
        found[width] = [low, below]
    return found


def save(table: dict[str, Any], path: pathlib.Path) -> None:
    """Write a table, its ranges of widths brought up to date. What `tuning.parse` does not take is not written."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = collections.defaultdict(list)
    for entry in table["entries"]:
        groups[entry["kernel"], entry["itemsize"]].append(entry)
    for (kernel, _), entries in groups.items():
        spans = ranges(kernel, [entry["measured"]["shape"][1] for entry in entries])
        for entry in entries:
            entry["widths"] = spans[entry["measured"]["shape"][1]]
    tuning.parse(table, table["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")


def rows(table: dict[str, Any]) -> Iterator[list[str]]:
    """Header and lines of the printed table."""
    yield ["kernel", "shape", "dtype", "default", "best", "gain", "of a copy", "choice", "dropped"]
    for entry in table["entries"]:
        measured, choice = entry["measured"], entry["choice"]
        default, best = measured["default_seconds"], measured["seconds"]
        kept = best if measured["faster"] else default
        share = measured["bytes"] / kept / table["copy_rate"]
        yield [
            entry["kernel"],
            str(measured["shape"]),
            measured["dtype"],
            report.duration(default),
            "" if best is None else report.duration(best),
            "" if best is None else f"{1 - best / default:+.1%}",
            f"{share:.0%}",
            "default" if choice is None else _short(choice),
            ", ".join(f"{count} {reason}" for reason, count in measured["dropped"].items()),
        ]


def _short(choice: dict[str, int]) -> str:
    """Fields that are not those of every choice."""
    usual = Choice(0, 0)._asdict()
    return ", ".join(f"{name} {value}" for name, value in choice.items() if value != usual[name])


def show(table: dict[str, Any], console: Console) -> None:
    shown = Table(title=f"launch choices, {table['device']}", caption=table["rule"], box=box.SIMPLE_HEAD)
    header, *lines = rows(table)
    for name in header:
        shown.add_column(name, justify="left" if name in ("kernel", "choice") else "right")
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    for name, reason in table["failed"].items():
        console.print(f"[yellow]not swept:[/] {name}: {reason}", highlight=False, soft_wrap=True)
    if table["left_out"]:
        left = table["left_out"]
        console.print(f"left out by the limit: {len(left)}, next {left[0]}; run again to go on", highlight=False)
