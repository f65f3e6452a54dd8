"""``python -m bench doctor``: is this machine like the one of the committed results, and does it confirm their ratios?

Times mean nothing on another machine; ratios to smart-pytorch of the same run should hold. A few cases are run again,
native beside eager, and each ratio is set beside the committed one.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import cases, peers
from .measure import busy_share, copy_bandwidth, gemm_rate
from .report import Report, device_name
from .run import Row, run_case
from .task import Contestant, Task

OURS = peers.OURS + "native"
CASES = (
    "perturb [4096, 768] fp32",
    "ascend inf [4096, 768] fp32",
    "sym_kl fwd+bwd far [1024, 30522] fp32",
    "sym_kl fwd+bwd far [4096, 2] fp32",
    "pooled head 768 to 3, [32, 768]",
)
CLOSE = 0.8  # of the committed ratio: what other machines and other work take
FLOOR = 0.5  # below, what is committed does not hold here
CONFIRMED, LESS, REFUTED = "confirmed", "less", "NOT CONFIRMED"
STYLES = {CONFIRMED: "green", LESS: "yellow", REFUTED: "bold red"}


@dataclass(frozen=True)
class Finding:
    """How often smart-pytorch's time holds ours, here and in the committed run."""

    case: str
    here: float
    committed: float

    @property
    def verdict(self) -> str:
        share = self.here / self.committed
        return CONFIRMED if share >= CLOSE else LESS if share >= FLOOR else REFUTED


@dataclass(frozen=True)
class Trait:
    """Something of the machine, here and in the committed run (None: not known)."""

    name: str
    here: str | None
    committed: str | None


def ratio(rows: Iterable[Row], case: str) -> float | None:
    """The time of smart-pytorch over ours; None where either was not timed."""
    times = {row.contestant: row.timing.median for row in rows if row.case == case and row.timing is not None}
    return times[peers.EAGER] / times[OURS] if {peers.EAGER, OURS} <= set(times) else None


def examine(
    committed: Sequence[Report], *, seconds: float, say: Callable[[str], None] = lambda doing: None
) -> Iterator[Finding]:
    """Every case of `CASES` that is committed with a ratio, ``seconds`` of timing each."""
    device = torch.device("cpu")
    known = [row for report in committed for row in report.rows]
    for case in cases.select(device, quick=False, groups=["all"], containing=""):
        before = ratio(known, case.name) if case.name in CASES else None
        if before is None:
            continue
        say(case.name)
        here = ratio(run_case(case, device, ["native"], seconds=seconds, entrants=_two), case.name)
        if here is not None:
            yield Finding(case.name, here, before)


def _two(task: Task, device: torch.device, backends: Sequence[str]) -> Iterator[Contestant]:
    wanted = {peers.EAGER, OURS}
    return (each for each in peers.contestants(task, device, backends, compiling=False) if each.name in wanted)


class Stolen:
    """The share of the processors' time that a hypervisor has given to others since this was made."""

    def __init__(self) -> None:
        self.start, self.before = time.perf_counter(), _steal()

    def share(self) -> float | None:
        now = _steal()
        if self.before is None or now is None:
            return None
        return (now - self.before) / (time.perf_counter() - self.start) / (os.cpu_count() or 1)


def traits(committed: Report, began: Stolen) -> list[Trait]:
    """What times depend on: bandwidth, arithmetic, threads, and what others took of the processors since ``began``."""
    device = torch.device("cpu")
    versions = committed.environment["versions"]
    gemm = committed.gemm_rates.get("float32")
    busy = busy_share()
    return [
        Trait("device", device_name(device), committed.environment["device"]),
        Trait("threads", str(torch.get_num_threads()), str(committed.environment["threads"])),
        Trait("torch", torch.__version__, versions["torch"]),
        Trait("copy, GB/s", _giga(copy_bandwidth(device, 1 << 28)), _giga(committed.copy_rate)),
        Trait("GEMM fp32, GFLOP/s", _giga(gemm_rate(device, torch.float32)), _giga(gemm)),
        Trait("other programs", _percent(busy), _percent(committed.busy)),
        Trait("stolen by other machines", _percent(began.share()), None),
    ]


def _steal() -> float | None:
    """Seconds stolen from all processors since boot; None where the system does not count them, or without psutil."""
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    found: float | None = getattr(psutil.cpu_times(), "steal", None)
    return found


def _giga(value: float | None) -> str | None:
    return None if value is None else f"{value / 1e9:.0f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def show(findings: Sequence[Finding], found: Sequence[Trait], console: Console) -> None:
    machine = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("this machine", "here", "committed run"):
        machine.add_column(column, justify="left" if column == "this machine" else "right")
    for trait in found:
        machine.add_row(*(escape(each or "not known") for each in dataclasses.astuple(trait)))
    console.print(machine)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("smart-pytorch's time over native's", "here", "committed", "verdict"):
        table.add_column(column, justify="left" if column.startswith(("smart", "verdict")) else "right")
    for each in findings:
        style = STYLES[each.verdict]
        table.add_row(escape(each.case), f"{each.here:.1f}", f"{each.committed:.1f}", f"[{style}]{each.verdict}[/]")
    console.print(table)
    console.print(
        f"confirmed: at least {CLOSE:.0%} of the committed ratio; below {FLOOR:.0%} it is not", highlight=False
    )
