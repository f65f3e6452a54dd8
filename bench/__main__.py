"""``python -m bench``: measure SMART on this machine's device, beside smart-pytorch and torch.compile."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import signal
import sys
import time
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch and rich are imported once the arguments are known to be right
    import torch
    from rich.console import Console

    from .cases import Case

START = time.perf_counter()
QUICK_LIMIT = 65.0  # seconds: a slow or busy machine still ends within two minutes
GROUPS = ("all", "ops", "lm", "regulariser", "train", "overhead")
ALONE = (
    "accuracy",
    "quality",
    "finetune",
    "kernels",
    "tune",
    "compare",
    "doctor",
    "host",
    "instructions",
    "report",
)  # what goes with no other group (commands.py)
GRACE = 20.0  # seconds past the limit in which cases still start, without torch.compile


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure SMART regularization and its fused operations: every available backend of smart-fast "
        "against smart-pytorch, eager and under torch.compile. Results are checked before anything is timed.",
    )
    made.add_argument(
        "groups",
        nargs="*",
        type=_group,
        metavar="GROUP",
        help=f"what to measure, among {', '.join(GROUPS)} (default all; lm: divergences at the size of a language "
        "model; train: whole training steps); or accuracy: how exact the divergences of nearly equal logits are; or "
        "quality: what the regularizers do to accuracy, clean and attacked; or finetune: the same on a "
        "pretrained encoder and real text from the package index; or kernels: bytes over time of each fused "
        "kernel; or tune: sweep launch choices of the Triton kernels on a GPU, and write the table they are launched "
        "by; or compare A.json B.json: whether two runs agree on every speed; or doctor: "
        "whether this machine confirms the ratios of the committed results, and how it differs from theirs; or host: "
        "what small calls cost the host, "
        "Triton's kernels launched into a stub of the CUDA driver; or instructions: how many the hot loops of the "
        "Triton kernels take, compiled for an H100; or report: measure nothing, write the "
        "tables and figures of README.md and docs/ from bench/results",
    )
    made.add_argument(
        "--quick", action="store_true", help="few, small cases: under two minutes on two cores without a GPU"
    )
    made.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    made.add_argument("--backends", nargs="+", metavar="NAME", help="only these backends of smart-fast")
    made.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    made.add_argument("--seconds", type=_positive, metavar="S", help="time to spend on timing a case (default 2)")
    made.add_argument(
        "--limit",
        type=_positive,
        metavar="S",
        help="after S seconds compile nothing more, and soon after start no other case",
    )
    made.add_argument("--out", type=pathlib.Path, metavar="DIR", help="folder of results (default: bench/out/DEVICE)")
    made.add_argument("--json", type=pathlib.Path, metavar="PATH", help="JSON file (default: results.json in --out)")
    made.add_argument("--plot", type=pathlib.Path, metavar="PATH", help="PNG file (default: speed.png in --out)")
    made.add_argument("--energy", action="store_true", help="also measure joules a call, where the device counts them")
    made.add_argument("--list", action="store_true", help="list the cases and contestants, and measure nothing")
    return made


def _group(text: str) -> str:
    if text not in (*GROUPS, *ALONE) and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join((*GROUPS, *ALONE))})")
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    groups: list[str] = options.groups or ["all"]
    files = [pathlib.Path(each) for each in groups if each.endswith(".json")]
    groups = [each for each in groups if not each.endswith(".json")]
    if len(groups) > 1 and set(groups) & set(ALONE):
        parse.error(f"{', '.join(ALONE)} go with no other group, got {' '.join(groups)}")
    if len(files) != 2 * (groups == ["compare"]):
        parse.error(f"compare takes two JSON files, nothing else takes any: got {len(files)} with {' '.join(groups)}")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    try:
        import torch
        from rich.console import Console

        from . import cases, commands, peers
    except ModuleNotFoundError as error:
        parse.exit(1, f"python -m bench needs {error.name}: pip install -e '.[bench]'\n")

    usable = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if options.device not in (None, *usable):
        parse.error(f"--device {options.device}: choose from {', '.join(usable)}")
    device = torch.device(options.device or usable[-1])
    backends = options.backends or peers.default_backends()
    for name in set(backends) - set(peers.default_backends()):
        parse.error(f"--backends {name}: choose from {', '.join(peers.default_backends())}")
    console = Console()
    if groups[0] in ALONE:
        call = commands.Call(options, parse, device, backends, files, console, START)
        return commands.ALONE[groups[0]](call)
    chosen = cases.select(device, quick=options.quick, groups=groups, containing=options.cases)
    if not chosen:
        parse.error(f"--cases {options.cases!r}: no such case among those that --list prints")
    if options.list:
        return _list(chosen, backends, device)
    if device.type == "cpu" and "native" in backends:
        commands.build_native(console)
    return _measure(chosen, backends, device, options, console)


def _list(chosen: list[Case], backends: list[str], device: torch.device) -> int:
    from . import peers

    for case in chosen:
        print(f"{case.group:<12} {case.name}")
    print("contestants, each in the cases that it has to do with:")
    for name, note, reason in peers.roster(device, backends):
        print(f"  {name}: {note}" + ("" if reason is None else f" (not run: {reason})"))
    print("Results are checked before anything is timed: against the case's float64 reference, or where a contestant")
    print('computes something else against that in float64 ("checked" in the JSON file). A wrong one gets no time.')
    return 0


def _measure(
    chosen: list[Case], backends: list[str], device: torch.device, options: argparse.Namespace, console: Console
) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import commands, energy
    from .measure import busy_share
    from .peers import contestants
    from .plots import save_plots
    from .report import Report, environment, save_json, show
    from .run import run_case

    folder = commands.folder(options, device)
    json_path, plot_path = options.json or folder / "results.json", options.plot or folder / "speed.png"
    limit = options.limit or (QUICK_LIMIT if options.quick else float("inf"))
    seconds = options.seconds or (0.6 if options.quick else 2.0)

    count = energy.counter(device) if options.energy else None
    if options.energy and count is None:
        fix = " (pip install nvidia-ml-py)" if device.type == "cuda" else ""
        console.print(f"[yellow]--energy:[/] nothing here counts joules that this user may read{fix}", highlight=False)
    report = Report(environment(device), busy=busy_share())
    report.measure_limits(device, chosen)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    waiting = list(chosen)
    # `timeout` ends a run as Ctrl-C does: with the table of what was done.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Progress(*columns, console=console, transient=True) as progress, contextlib.suppress(KeyboardInterrupt):
        interrupted = True
        bar = progress.add_task("", total=len(chosen))
        while waiting and (elapsed := time.perf_counter() - START) < limit + GRACE:
            name = waiting[0].name
            if not console.is_terminal:
                console.print(f"{elapsed:6.1f} s  {name}", highlight=False, markup=False)

            def say(doing: str, name: str = name) -> None:
                progress.update(bar, description=f"{name}: {doing}".replace("[", r"\["))

            entrants = functools.partial(contestants, compiling=elapsed < limit, time_left=limit - elapsed)
            report.rows += run_case(
                waiting[0], device, backends, seconds=seconds, say=say, entrants=entrants, count=count
            )
            waiting.pop(0)
            report.compare_with_limits()
            save_json(report, json_path)  # after every case: a run that is killed keeps what it measured
            progress.advance(bar)
        interrupted = False
    report.measure_limits(device, chosen)
    report.compare_with_limits()
    report.left_out = [case.name for case in waiting]
    if report.busy is not None:
        report.busy = max(report.busy, busy_share() or 0.0)
    save_json(report, json_path)
    show(report, console)
    for path in (json_path, *save_plots(report, plot_path)):
        console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    console.print(f"took {time.perf_counter() - START:.0f} s", highlight=False)
    if interrupted:
        return 130
    return 1 if any(row.wrong and row.role == "ours" for row in report.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
