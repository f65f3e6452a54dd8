"""The table at the end of a run, from its lines; the last of them about a thing is what counts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

from .lines import Line

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows
SHOWN_FAILURES = 12


def tables(lines: Sequence[Line]) -> list[Table]:
    return [each for each in (_figures(lines), _kernels(lines), _failures(lines), _stages(lines)) if each[2]]


def _stages(lines: Sequence[Line]) -> Table:
    last = {line["what"]: line for line in lines if line["kind"] == "stage"}
    rows = [
        [name, line["status"], f"{line['seconds']:g} of {line['limit']:g} s", *_counts(line), _short(line.get("error"))]
        for name, line in last.items()
    ]
    return "stages", ["stage", "status", "time", "lines", "wrong", "compiled late", ""], rows


def _counts(line: Line) -> list[str]:
    late = line.get("compiled") if line["what"] != "build" else None
    return [str(line.get(name, "")) for name in ("lines", "wrong")] + [str(late or "")]


def latest(lines: Iterable[Line], *names: str) -> list[Line]:
    """Of lines that are about the same thing, by the values of ``names``, the last."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        found[tuple(str(line.get(name)) for name in names)] = line
    return list(found.values())


def kernel_lines(lines: Iterable[Line]) -> list[Line]:
    names = "backend", "kernel", "shape", "dtype", "regime"
    return latest((line for line in lines if line["kind"] == "kernel" and line["ok"]), *names)


def _kernels(lines: Sequence[Line]) -> Table:
    """Shares of a copy: a row for a kernel and a shape, a column for a backend, a dtype and a regime."""
    found = kernel_lines(lines)
    columns = list(dict.fromkeys(kernel_column(line) for line in found))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in found:
        row = rows.setdefault((line["kernel"], "x".join(map(str, line["shape"]))), {})
        row[kernel_column(line)] = f"{line['copy_share']:.0%}"
    table = [[*key, *(row.get(column, "") for column in columns)] for key, row in sorted(rows.items())]
    return "kernels: share of a copy", ["kernel", "shape", *columns], table


def kernel_column(line: Line) -> str:
    dtype = {"bfloat16": "bf16", "float32": "fp32"}.get(line["dtype"], line["dtype"])
    return " ".join(filter(None, (line["backend"], dtype, line["regime"])))


def _figures(lines: Sequence[Line]) -> Table:
    timed = (line for line in lines if line["kind"] in ("rival", "host", "step"))
    rows = []
    for line in latest(timed, "what", "contestant", "backend"):
        who = line.get("contestant") or line.get("backend") or ""
        host = line.get("host_seconds")
        cells = [_time(line.get("seconds")), "" if host is None else f"host {_time(host)}"]
        share = "" if line.get("share") is None else f"{line['share']:.0%} of limit"
        speed = "" if line.get("speed") is None else f"{line['speed']:.2f} x"
        rows.append([line["what"], who, *cells, speed, share, "" if line["ok"] else "WRONG"])
    return "calls", ["case", "who", "median", "host", "speed", "floor", ""], rows


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} ms"


def _failures(lines: Sequence[Line]) -> Table:
    wrong = [line for line in lines if line.get("ok") is False and line["kind"] != "stage"]
    rows = [[str(line["stage"]), line["what"], _short(line.get("error"))] for line in wrong[:SHOWN_FAILURES]]
    if len(wrong) > SHOWN_FAILURES:
        rows.append(["", f"and {len(wrong) - SHOWN_FAILURES} more", ""])
    return "wrong", ["stage", "what", "error"], rows


def _short(error: Any) -> str:
    text = "" if error is None else f"{error:.2g}" if isinstance(error, float) else str(error)
    return text.strip().splitlines()[-1][:90] if text.strip() else ""


def show(lines: Sequence[Line]) -> None:
    for table in tables(lines):
        if importlib.util.find_spec("rich"):
            _rich(*table)
        else:
            print(plain(*table))


def _rich(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 150  # a log file has no edge to wrap at
    made = RichTable(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in header:
        made.add_column(name)
    for row in rows:
        made.add_row(*map(Text, row))
    console.print(made)


def plain(title: str, header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join([title, *(line.rstrip() for line in text), ""])
