"""What a run leaves: a table on the terminal, results as JSON, plots as PNG. Only measured numbers get in."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import smart_fast

from .cases import Case, named
from .chunked import CHUNKED
from .liger import LIGER
from .measure import Timing, copy_bandwidth, gemm_rate, within
from .peers import COMPILED, EAGER, MODEL_ONLY, NOT_EAGER, OURS
from .run import Row

SCHEMA = 1  # fields are only ever added: older files lack some, and readers pass over those they do not know
COLUMNS = ("median", "spread", "x rival", "rate", "of limit", "peak MiB", "not model", "error")
BUSY = 0.1  # others' share of the processors above which the table says that the machine was busy


@dataclass
class Report:
    """``environment``: versions, device, threads, commit, date. ``copy_rate`` in bytes per second, ``gemm_rates`` in
    FLOPs per second by dtype. ``busy``: the share of the processors that other programs took just before or just after
    the run, whichever is larger."""

    environment: dict[str, Any]
    copy_rate: float | None = None
    busy: float | None = None
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    gemm_rates: dict[str, float] = field(default_factory=dict)

    def measure_limits(self, device: torch.device, cases: Iterable[Case]) -> None:
        """What ``device`` can do: a copy, and GEMMs in the dtypes of those of ``cases`` that multiply. The fastest of
        all calls counts, before and after a run, since other work may slow one down."""
        size = 1 << 30 if device.type == "cuda" else 1 << 28
        self.copy_rate = max(self.copy_rate or 0.0, copy_bandwidth(device, size))
        for dtype in dict.fromkeys(case.dtype for case in cases if case.flops is not None):
            name = str(dtype).removeprefix("torch.")
            self.gemm_rates[name] = max(self.gemm_rates.get(name, 0.0), gemm_rate(device, dtype))

    def compare_with_limits(self) -> None:
        """Relate every rate to what was measured of the device."""
        for row in self.rows:
            if row.bandwidth is not None and self.copy_rate is not None:
                row.copy_share = row.bandwidth / self.copy_rate
            if row.flops is not None and row.timing is not None and row.dtype in self.gemm_rates:
                row.gemm_share = row.flops / row.timing.median / self.gemm_rates[row.dtype]


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat the run; nothing that names the machine or its user."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": {
            "python": platform.python_version(),
            "smart_fast": smart_fast.__version__,
            **{name: _version(name) for name in ("torch", "triton", "transformers", "smart-pytorch", "liger-kernel")},
        },
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that ran, with "-dirty" when the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def geometric_means(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[float, int]]:
    """``(group, contestant) -> (geometric mean of the speed against the fastest rival, number of cases)``."""
    speeds: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.speed is not None:
            speeds.setdefault((row.group, row.contestant), []).append(row.speed)
    return {key: (statistics.geometric_mean(values), len(values)) for key, values in speeds.items()}


def host_overheads(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """``(case, contestant) -> time beside the model's own passes, as a share of that of smart-pytorch eager``, for the
    cases of the group overhead that hold a model."""
    medians: dict[str, dict[str, float]] = {}
    for row in rows:
        eager = not row.contestant.endswith(NOT_EAGER)  # the model's passes were timed eagerly
        if row.group == "overhead" and row.timing is not None and row.role != "other" and eager:
            medians.setdefault(row.case, {})[row.contestant] = row.timing.median
    return {
        (case, name): (median - times[MODEL_ONLY]) / (times[EAGER] - times[MODEL_ONLY])
        for case, times in medians.items()
        if MODEL_ONLY in times and EAGER in times
        for name, median in times.items()
        if name not in (MODEL_ONLY, EAGER)
    }


def save_json(report: Report, path: pathlib.Path) -> None:
    """Written whole or not at all: a run that is cut short leaves its last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, **dataclasses.asdict(report)}
    content["geometric_means"] = [
        {"group": group, "contestant": contestant, "speed": speed, "cases": cases}
        for (group, contestant), (speed, cases) in geometric_means(report.rows).items()
    ]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def load_json(path: pathlib.Path) -> Report:
    """The inverse of `save_json`; cases of older files have the names of today."""
    content = json.loads(path.read_text())
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path.name} has schema {schema}, this version reads {SCHEMA}")
    rows = []
    for fields in content["rows"]:
        row = _known(Row, fields)
        row.timing = None if row.timing is None else _known(Timing, fields["timing"])
        row.case = named(row.case)
        rows.append(row)
    report: Report = _known(Report, content)
    report.rows, report.left_out = rows, [named(case) for case in report.left_out]
    return report


def _known(kind: Any, fields: dict[str, Any]) -> Any:
    """A dataclass made of those of ``fields`` that it has."""
    names = {each.name for each in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in fields.items() if name in names})


def show(report: Report, console: Console) -> None:
    """The table, then the geometric means and the cases that were not run."""
    if not console.is_terminal:
        console.width = max(console.width, 150)  # a log file has no edge to wrap at
    console.print(_heading(report), highlight=False, soft_wrap=True)
    console.print(_table(report.rows))
    for (group, contestant), (speed, cases) in geometric_means(report.rows).items():
        if contestant.startswith("smart-fast"):
            what = f"{contestant}, {group}: {speed:.2f} x the fastest rival"
            console.print(f"{what} (geometric mean of {cases} case{'s' if cases > 1 else ''})", highlight=False)
    for (case, name), part in host_overheads(report.rows).items():
        console.print(f"{name}, {case}: {part:.0%} of smart-pytorch's time beside the model", highlight=False)
    if report.busy is not None and report.busy > BUSY:
        console.print(
            f"[yellow]this machine was busy with other work ({report.busy:.0%} of its processors before or after the "
            "run): times, spreads and ratios suffer",
            highlight=False,
            soft_wrap=True,
        )
    for name, note in explained(report.rows).items():
        console.print(f"[dim]{_escape(name)}: {_escape(note)}[/]", highlight=False, soft_wrap=True)
    for note in _absent(report.rows):
        console.print(f"[yellow]not run:[/] {_escape(note)}", highlight=False, soft_wrap=True)
    for name in report.left_out:
        console.print(f"[yellow]not run, out of time or interrupted:[/] {_escape(name)}", highlight=False)


def _heading(report: Report) -> str:
    env = report.environment
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in env["versions"].items())
    copy = "not measured" if report.copy_rate is None else f"{report.copy_rate / 1e9:.1f} GB/s read + written"
    gemms = "".join(f"; {name} GEMM {flop_rate(rate)}" for name, rate in report.gemm_rates.items())
    threads = f", {env['threads']} threads" if env["device_type"] == "cpu" else ""
    return f"[bold]{env['device']}[/]{threads}; copy bandwidth {copy}{gemms}; commit {env['commit']}\n{versions}"


def explained(rows: Iterable[Row]) -> dict[str, str]:
    """``contestant -> what it computes``, of the outside ones that were timed, smart-pytorch's own functions aside."""
    return {
        row.contestant: row.note
        for row in rows
        if row.note
        and row.timing
        and row.role in ("rival", "other")
        and not row.contestant.startswith((EAGER, COMPILED))
    }


def _absent(rows: Sequence[Row]) -> list[str]:
    """Our backends and the outside kernels that did not run, each once, with what they have in common: the reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if _is_absent(row):
            reasons.setdefault(row.skipped or "", {})[row.contestant] = None
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _is_absent(row: Row) -> bool:
    skipped = row.skipped is not None and not row.skipped.startswith("failed")
    return skipped and row.contestant.startswith((OURS, LIGER, CHUNKED, f"{COMPILED} "))


def _table(rows: Sequence[Row]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case / contestant", overflow="fold", min_width=30)
    more = {title: text for title, text in MORE.items() if any(text(row) for row in rows)}
    for column in (*COLUMNS, *more):
        table.add_column(column, justify="right", no_wrap=True)
    case = None
    for row in rows:
        if row.case != case:
            if case is not None:
                table.add_section()
            case = row.case
            table.add_row(f"[bold]{_escape(case)}[/]")
        if _is_absent(row):
            continue
        cells = *_cells(row), *(text(row) for text in more.values())
        table.add_row(*cells, style="dim" if row.role in ("part", "other") else None)
        if row.wrong:
            table.add_row(f"    [red]{_escape(row.wrong)}[/]")
        if row.skipped:
            table.add_row(f"    [dim]{_escape(row.skipped)}[/]")
    return table


def _cells(row: Row) -> list[str]:
    name, timing = f"  {_escape(row.contestant)}", row.timing
    error = "" if row.error is None else f"{row.error:.1g}"
    if row.wrong:
        return [name, "[bold red]WRONG[/]", *[""] * (len(COLUMNS) - 2), error]
    if timing is None:
        return [name, "not run", *[""] * (len(COLUMNS) - 2), error]
    speed = speed_text(row)
    return [
        name,
        duration(timing.median),
        f"{timing.spread:.0%}",
        f"[bold green]{speed}[/]" if row.role == "ours" and row.speed and row.speed > 1 else speed,
        rate(row),
        share(row),
        "" if row.peak is None else f"{row.peak / 2**20:.2f}" if row.peak < 2**27 else f"{row.peak / 2**20:.0f}",
        "" if row.beside_model is None else f"{row.beside_model:.0%}",
        error,
    ]


#: Columns that only some runs have: until a call on a GPU returns, joules.
MORE: dict[str, Callable[[Row], str]] = {
    "host": lambda row: "" if row.host is None else duration(row.host),
    "energy": lambda row: "" if row.energy is None else f"{row.energy * 1e3:.3g} mJ",
}


def speed_text(row: Row) -> str:
    """The speed, with its interval where that is wide: ``1.95 (1.80-2.10)``."""
    if row.speed is None:
        return ""
    if row.speed_low is None or row.speed_high is None or within(row.speed, row.speed_low, row.speed_high):
        return f"{row.speed:.2f}"
    return f"{row.speed:.2f} ({row.speed_low:.2f}-{row.speed_high:.2f})"


def rate(row: Row) -> str:
    """Achieved rate of the case's floor, in the unit that fits."""
    if row.flops is not None and row.timing is not None:
        return flop_rate(row.flops / row.timing.median)
    return "" if row.bandwidth is None else f"{row.bandwidth / 1e9:.2f} GB/s"


def share(row: Row) -> str:
    """`rate` as a share of the copy or the GEMM measured in the same run."""
    value = row.copy_share if row.gemm_share is None else row.gemm_share
    return "" if value is None else f"{value:.0%}"


def flop_rate(value: float) -> str:
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e13 else f"{value / 1e9:.0f} GFLOP/s"


def duration(seconds: float) -> str:
    """Three significant digits in the unit that fits."""
    unit, factor = next((u for u in (("s", 1.0), ("ms", 1e3)) if seconds * u[1] >= 1), ("us", 1e6))
    value = seconds * factor
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f} {unit}"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
