"""What README.md and docs/ say of GPUs, made of committed lines (bench/results/gpu-*.jsonl), each with device,
floor and commit.

Without such a file it says that no GPU has run anything, in the README's second paragraph too. Links are README's.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

from .lines import Line, read
from .summary import kernel_column, kernel_lines, latest

NEVER = "**No GPU has run any of this yet**"
NO_GPU = (
    f"{NEVER}: the kernels are checked in Triton's interpreter and in a thread emulator of CUDA, and compiled for\n"
    "GPUs that are not there; every time here is a CPU's.\n"
)
NO_FIGURES = f"{NEVER}: there are no figures. `python bench/gpu_check.py` takes them where there is a GPU.\n"


def sections(results: pathlib.Path) -> dict[str, str]:
    """Marker -> Markdown: the second paragraph, and the section."""
    runs = [found for path in sorted(results.glob("gpu-*.jsonl")) if (found := _measured(read(path)))]
    if not runs:
        return {"gpu-status": NO_GPU, "gpu": NO_FIGURES}
    devices = " and ".join(dict.fromkeys(_device(lines) for lines in runs))
    status = (
        f"Run and measured on {devices}: see [On a GPU](docs/benchmarks.md#on-a-gpu). Every other time is a CPU's.\n"
    )
    return {"gpu-status": status, "gpu": "\n".join(map(_run, runs))}


def _measured(lines: Iterable[Line]) -> list[Line]:
    """Rehearsals on a CPU are no results."""
    return [line for line in lines if not line.get("dry_run")]


def _device(lines: Sequence[Line]) -> str:
    return next((str(line["device"]) for line in lines if line.get("device")), "a GPU that did not say its name")


def _run(lines: Sequence[Line]) -> str:
    commits = ", ".join(dict.fromkeys(str(line["commit"]) for line in lines if line.get("commit")))
    where = f"{_device(lines)}, commit {commits or 'unknown'}"
    parts = [_stages(lines, where), _kernels(lines, where), _calls(lines, where)]
    return "\n".join(part for part in parts if part)


def _stages(lines: Sequence[Line], where: str) -> str:
    last = {line["what"]: line for line in lines if line["kind"] == "stage"}
    well = [name for name, line in last.items() if line["status"] == "ok"]
    rest = [f"{name} ({line['status']})" for name, line in last.items() if line["status"] != "ok"]
    ended = f"Stages that ended well ({where}): {', '.join(well) or 'none'}."
    tests = latest((line for line in lines if line["kind"] == "test"), "what")
    passed = sum(line["ok"] is True for line in tests)
    counted = f" {passed} of {len(tests)} chosen tests passed." if tests else ""
    return f"{ended}{' Not: ' + ', '.join(rest) + '.' if rest else ''}{counted}\n"


def _kernels(lines: Sequence[Line], where: str) -> str:
    """Time, and in brackets bytes over time as a share of a copy's, which is the floor."""
    found = kernel_lines(lines)
    if not found:
        return ""
    columns = list(dict.fromkeys(kernel_column(line) for line in found))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in found:
        row = rows.setdefault((line["kernel"], str(line["shape"])), {})
        row[kernel_column(line)] = f"{_time(line['seconds'])} ({line['copy_share']:.0%})"
    copy = max(line["copy_rate"] for line in found) / 1e12
    title = f"Median time of each kernel, and its bytes over that as a share of a copy's {copy:.2f} TB/s ({where}):"
    table = [[*key, *(row.get(column, "") for column in columns)] for key, row in rows.items()]
    return f"{title}\n\n{_markdown([['kernel', 'shape', *columns], *table])}"


def _calls(lines: Sequence[Line], where: str) -> str:
    timed = (line for line in lines if line["kind"] in ("rival", "host", "step") and line.get("seconds") and line["ok"])
    found = latest(timed, "what", "contestant", "backend")
    if not found:
        return ""
    table = [["call", "who", "median", "host", "x the fastest formula", "floor", "off by"]]
    for line in found:
        who = line.get("contestant") or line["backend"]
        host, speed = line.get("host_seconds"), line.get("speed")
        cells = ["" if host is None else _time(host), "" if speed is None else f"{speed:.2f}"]
        table.append([line["what"], who, _time(line["seconds"]), *cells, _floor(line), _error(line)])
    title = f"Median time of a call, forward and backward as a user writes it ({where}):"
    return f"{title}\n\n{_markdown(table)}"


def _floor(line: Line) -> str:
    share, beside = line.get("share"), line.get("beside_model")
    if share is not None:
        return f"{share:.0%} of {'a GEMM' if 'flops' in line else 'a copy'}"
    return "" if beside is None else f"{1 - beside:.0%} is the model"


def _error(line: Line) -> str:
    """Of the loss: on near rows a formula may have no digit of it right."""
    errors = line.get("errors")
    return f"{errors['loss']:.0e}" if isinstance(errors, dict) and "loss" in errors else ""


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _markdown(lines: Sequence[Iterable[str]]) -> str:
    header, *rows = (list(line) for line in lines)
    table = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)
