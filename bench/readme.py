"""``python -m bench report``: write the tables and figures of README.md and docs/ from the committed results.

No number is typed by hand.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

from . import accuracy, compare, headline, quality
from .finetune import section as finetune_section
from .gpu import section as gpu_section
from .peers import COMPILED, EAGER, MODEL_ONLY, OURS
from .report import (
    Report,
    duration,
    explained,
    flop_rate,
    geometric_means,
    host_overheads,
    load_json,
    rate,
    share,
    speed_text,
)
from .run import Row

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = pathlib.Path(__file__).parent / "results"
README = ROOT / "README.md"
#: Which sections stand between markers of their name in which page. Paths are those from the root.
PAGES = {
    "README.md": ("gpu-status", "headline"),
    "docs/index.md": ("gpu-status",),
    "docs/benchmarks.md": (
        "gpu",
        "quality",
        "accuracy",
        "speed",
        "speed-lm",
        "agreement",
        "instructions",
    ),
    "docs/real-text.md": ("finetune",),
}
NOT_MEASURED = "(No results are committed yet: `python -m bench lm` measures them.)\n"


def write(root: pathlib.Path = ROOT, results: pathlib.Path = RESULTS) -> dict[str, str]:
    """Replace what stands between the markers of each of `PAGES`; return the new texts by page."""
    made, texts = sections(results), {}
    for page, markers in PAGES.items():
        text = (root / page).read_text()
        for marker in markers:
            section = made[marker]
            if page.startswith("docs/"):
                section = section.replace("](docs/", "](")  # links are written as README sees them
            pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
            text, found = re.subn(pattern, lambda m, s=section: m[1] + s + m[2], text, flags=re.DOTALL)
            if found != 1:
                raise ValueError(f"{page} must hold the marker {marker!r} once, found {found}")
        texts[page] = text
    for page, text in texts.items():
        (root / page).write_text(text)
    return texts


def draw(folder: pathlib.Path = ROOT / "docs" / "images", results: pathlib.Path = RESULTS) -> list[pathlib.Path]:
    """The figures of README and docs."""
    from . import figures
    from .finetune import figures as finetune_figures
    from .finetune.plan import SIZE

    written = figures.write(headline.report_of(reports(results)), results, folder)
    finetuned = results / "finetune.jsonl"
    return written + (finetune_figures.write(finetuned, folder, SIZE) if finetuned.is_file() else [])


def reports(results: pathlib.Path = RESULTS) -> list[Report]:
    return _newest([load_json(path) for path in sorted(results.glob("speed-*.json"))])


def sections(results: pathlib.Path = RESULTS) -> dict[str, str]:
    """Marker -> Markdown."""
    found = reports(results)
    language = [_part(report, lambda row: row.group == "lm") for report in found]
    others = [_part(report, lambda row: row.group != "lm") for report in found]
    return {
        **gpu_section.sections(results),
        "headline": _headline(found),
        "accuracy": _accuracy(results / "accuracy.json"),
        "quality": _quality(results / "quality.json"),
        "agreement": _agreement(results / "agreement-1.json", results / "agreement-2.json"),
        "instructions": _instructions(results / "instructions.json"),
        "finetune": finetune_section.section(results / "finetune.jsonl"),
        "speed": "\n".join(_speed(report) for report in others if report.rows),
        "speed-lm": "\n".join(_language(report) for report in language if report.rows) or NOT_MEASURED,
    }


def _headline(reports: Sequence[Report]) -> str:
    if not reports:
        return "(No results are committed yet: `python -m bench` measures them.)\n"
    report = headline.report_of(reports)
    where = _where(report.environment)
    title = f"Median time of a call, forward and backward, and peak memory as a share of smart-pytorch's ({where}):"
    return f"{title}\n\n{_markdown(headline.table(report))}"


def _instructions(path: pathlib.Path) -> str:
    if not path.exists():
        return "(No counts are committed yet: `python -m bench instructions` makes them.)\n"
    content = json.loads(path.read_text())
    versions = content["environment"]["versions"]
    lines = [
        f"Predicted, not measured: counted in {content['target']} code that Triton {versions['triton']} makes.\n",
        "| hot loop of | dtype | instructions an element | at copy speed | registers | blocks a multiprocessor |",
        "|---|---|---|---|---|---|",
    ]
    columns = ("case", "dtype", "instructions", "budget", "registers", "blocks")
    lines += ["| " + " | ".join(str(row[each]) for each in columns) + " |" for row in content["rows"]]
    return "\n".join(lines) + "\n"


def _newest(reports: Sequence[Report]) -> list[Report]:
    """Each case of a device as it was measured last."""
    last: dict[tuple[str, str], str] = {}
    for report in reports:
        for row in report.rows:
            key = report.environment["device"], row.case
            last[key] = max(last.get(key, ""), report.environment["date"])
    return [
        _part(each, lambda row, env=each.environment: last[env["device"], row.case] == env["date"])  # type: ignore[misc]
        for each in reports
    ]


def _part(report: Report, keep: Callable[[Row], bool]) -> Report:
    return dataclasses.replace(report, rows=[row for row in report.rows if keep(row)])


def _accuracy(path: pathlib.Path) -> str:
    found, environment = accuracy.load(path), json.loads(path.read_text())["environment"]
    names = list(dict.fromkeys(each.contestant for each in found))
    header = ["logits differ by"]
    header += [f"{name}: {what}" for name in names for what in ("loss", "gradient")] + ["rows of theirs below zero"]
    lines = [header]
    for difference in dict.fromkeys(each.difference for each in found):
        cells = [f"{difference:.0e}"]
        for name in names:
            these = [each for each in found if (each.difference, each.contestant) == (difference, name)]
            cells += [f"{max(e.loss for e in these):.0e}", f"{max(e.gradient for e in these):.0e}"]
        theirs = [each for each in found if (each.difference, each.contestant) == (difference, EAGER)]
        lines.append([*cells, f"{sum(e.negative for e in theirs)} of {sum(e.rows for e in theirs)}"])
    shape = f"{accuracy.ROWS} rows, V = {accuracy.VOCABULARY}"
    title = f"Largest relative error in fp32 over kl, sym_kl and js, {shape} ({_where(environment)}):"
    return f"{title}\n\n{_markdown(lines)}"


def _agreement(first: pathlib.Path, second: pathlib.Path) -> str:
    """How many speeds of two runs agree, and those that are further apart."""
    if not (first.is_file() and second.is_file()):
        return "(No two runs are committed yet.)\n"
    reports = load_json(first), load_json(second)
    found = compare.compare(*reports)
    lines = [["case", "contestant", "first run", "second run", "verdict"]]
    for each in found:
        if each.verdict != compare.WITHIN:
            row = each.first
            lines.append([row.case, row.contestant, speed_text(row), speed_text(each.second), each.verdict])
    table = [_markdown(lines)] if len(lines) > 1 else []
    return "\n".join([f"{compare.summary(found)} ({_where(reports[1].environment)}).", "", *table])


def _quality(path: pathlib.Path) -> str:
    if not path.is_file():
        return "(No results are committed yet: `python -m bench quality` measures them.)\n"
    lines, content = quality.table(quality.load(path)), json.loads(path.read_text())
    seeds = len({each["seed"] for each in content["quality"]})
    weak, strong = content["attacks"]["radii"]
    inputs, tokens = ([each["name"] for each in content["tasks"] if each["relative"] == of] for of in (False, True))
    title = f"Accuracy in %, mean ± standard deviation of {seeds} seeds ({_where(content['environment'])}):"
    note = (
        f"Attacks move every entry of the embedding by at most {weak:g} or {strong:g} standard deviations of the "
        f"feature ({', '.join(inputs)}) or root mean squares of the token ({', '.join(tokens)}); PGD takes "
        f"{content['attacks']['pgd_steps']} steps."
    )
    return f"{title}\n\n{_markdown(lines)}\n{note}\n"


def _speed(report: Report) -> str:
    """Times, what the best of ours is worth against either rival, and how near it is to what cannot be less.

    Where intervals were measured, what it is worth against the fastest rival of all as well.
    """
    ours = [name for name in dict.fromkeys(row.contestant for row in report.rows if row.timing) if OURS in name]
    fastest = ["x the fastest rival"] if any(row.speed_low is not None for row in report.rows) else []
    header = [
        "case",
        "smart-pytorch",
        "its torch.compile",
        *ours,
        "x smart-pytorch",
        "x torch.compile",
        *fastest,
        "floor",
    ]
    lines = [header]
    for case in dict.fromkeys(row.case for row in report.rows):
        rows = {row.contestant: row for row in report.rows if row.case == case and row.timing is not None}
        best = min((rows[name] for name in ours if name in rows), key=_median, default=None)
        ratios = [_ratio(rows.get(name), best) for name in (EAGER, COMPILED)]
        times = (_time(rows.get(name)) for name in (EAGER, COMPILED, *ours))
        speed = [speed_text(best) if best else ""] if fastest else []
        lines.append([case, *times, *ratios, *speed, _floor(best, rows.get(MODEL_ONLY))])
    title = f"Median time of a call, forward and backward ({_where(report.environment)}{_limits(report)}):"
    overheads = [
        f"`{name}`, {case}: {part:.0%} of smart-pytorch's time beside the model."
        for (case, name), part in host_overheads(report.rows).items()
    ]
    return "\n".join([title, "", _markdown(lines), *_means(report), *overheads, ""])


def _median(row: Row) -> float:
    assert row.timing is not None
    return row.timing.median


def _ratio(rival: Row | None, best: Row | None) -> str:
    return "" if rival is None or best is None else f"{_median(rival) / _median(best):.2f}"


def _floor(best: Row | None, model: Row | None) -> str:
    """The model's own passes, or the share of a plain copy's rate; nothing where only the host works."""
    if model is not None:
        return f"model alone {_time(model)}"
    return (
        "" if best is None or best.copy_share is None or best.copy_share < 0.01 else f"{best.copy_share:.0%} of a copy"
    )


def _language(report: Report) -> str:
    """One line a contestant: memory and rates matter here as much as time."""
    lines = [
        ["case", "contestant", "median", "x the fastest rival", "peak extra memory", "of eager's", "rate", "of limit"]
    ]
    notes = explained(report.rows)
    for case in dict.fromkeys(row.case for row in report.rows):
        rows = [row for row in report.rows if row.case == case and row.timing is not None]
        eager = next((row.peak for row in rows if row.contestant == EAGER), None)
        for row in rows:
            peak = "" if row.peak is None else f"{row.peak / 2**20:.0f} MiB"
            part = f"{row.peak / eager:.0%}" if row.peak and eager else ""
            name = row.contestant + (" (*)" if row.contestant in notes else "")
            lines.append([case, name, _time(row), speed_text(row), peak, part, rate(row), share(row)])
    footnotes = [f"(*) {name}: {note}." for name, note in notes.items()]
    title = f"Median time and peak memory of a call ({_where(report.environment)}{_limits(report)}):"
    return "\n".join([title, "", _markdown(lines), *footnotes, *_means(report), ""])


def _limits(report: Report) -> str:
    copy = "" if report.copy_rate is None else f"; a large copy moves {report.copy_rate / 1e9:.0f} GB/s"
    gemms = (f", a large {name} GEMM runs at {flop_rate(value)}" for name, value in report.gemm_rates.items())
    return copy + ("".join(gemms) if any(row.flops for row in report.rows) else "")


def _means(report: Report) -> list[str]:
    return [
        f"`{contestant}`, {group}: {speed:.2f} x the fastest rival "
        f"(geometric mean of {cases} case{'s' if cases > 1 else ''})."
        for (group, contestant), (speed, cases) in geometric_means(report.rows).items()
        if OURS in contestant
    ]


def _time(row: Row | None) -> str:
    return "" if row is None or row.timing is None else duration(row.timing.median)


def _where(environment: dict[str, object]) -> str:
    versions = environment["versions"]
    assert isinstance(versions, dict)
    count = environment["threads"]
    threads = f", {count} thread{'' if count == 1 else 's'}" if environment["device_type"] == "cpu" else ""
    tools = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton"))
    return f"{environment['device']}{threads}, {tools}, {str(environment['date'])[:10]}"


def _markdown(lines: Sequence[Iterable[str]]) -> str:
    header, *rows = (list(line) for line in lines)
    table = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)
