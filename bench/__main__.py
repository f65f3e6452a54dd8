"""``python -m bench``: measure SMART on this machine's device, beside smart-pytorch and torch.compile."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import re
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
HERE = pathlib.Path(__file__).parent
QUICK_LIMIT = 65.0  # seconds: a slow or busy machine still ends within two minutes
GROUPS = ("all", "ops", "lm", "regulariser", "train", "overhead")
ALONE = ("accuracy", "quality", "report", "tune", "compare")  # what goes with no other group
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
        "quality: what the regularizers do to accuracy, clean and attacked; or report: measure nothing, write "
        "README.md's tables from bench/results; or tune: sweep launch choices of the Triton kernels on a GPU, and "
        "write the table they are launched by; or compare A.json B.json: whether two runs agree on every speed",
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

        from . import cases, peers
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
    if groups == ["compare"]:
        return _compare(files, parse, console)
    if groups == ["report"]:
        from . import readme

        readme.write()
        return 0
    if groups == ["accuracy"]:
        return _accuracy(backends, device, options, console)
    if groups == ["quality"]:
        return _quality(options, parse, console)
    if groups == ["tune"]:
        return _tune(device, options, console)
    chosen = cases.select(device, quick=options.quick, groups=groups, containing=options.cases)
    if not chosen:
        parse.error(f"--cases {options.cases!r}: no such case among those that --list prints")
    if options.list:
        return _list(chosen, backends, device)
    if device.type == "cpu" and "native" in backends:
        _build_native(console)
    return _measure(chosen, backends, device, options, console)


def _build_native(console: Console) -> None:
    """What a CPU has to show is compiled first; why it cannot be is said with the results."""
    from smart_fast.backends import build_native

    try:
        build_native()
    except (RuntimeError, ImportError) as error:
        console.print(f"[yellow]native:[/] {error}", highlight=False, soft_wrap=True)


def _folder(options: argparse.Namespace, device: torch.device) -> pathlib.Path:
    from .report import device_name

    folder: pathlib.Path | None = options.out
    return folder or HERE / "out" / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _accuracy(backends: list[str], device: torch.device, options: argparse.Namespace, console: Console) -> int:
    from smart_fast import available_backends

    from . import accuracy
    from .report import environment

    unavailable = available_backends()
    fused = [name for name in backends if name != "torch" and unavailable[name] is None]
    for name in backends:
        if unavailable[name] is not None:
            console.print(f"[yellow]not run:[/] {name}: {unavailable[name]}", highlight=False, soft_wrap=True)
    results = list(accuracy.measure(device, fused))
    path = options.json or _folder(options, device) / "accuracy.json"
    accuracy.save(results, environment(device), path)
    accuracy.show(results, console)
    console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    return 0


def _quality(options: argparse.Namespace, parse: argparse.ArgumentParser, console: Console) -> int:
    import torch

    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError:
        parse.exit(1, "python -m bench quality needs scikit-learn: pip install -e '.[bench]'\n")
    from . import quality
    from .report import environment

    device = torch.device("cpu")
    _build_native(console)
    with console.status("") as status:
        results = quality.measure(lambda doing: status.update(doing))
    folder = _folder(options, device)
    path, plot = options.json or folder / "quality.json", options.plot or folder / "quality.png"
    quality.save(results, environment(device), path)
    quality.save_plot(results, plot)
    quality.show(results, console)
    for each in (path, plot):
        console.print(f"wrote {os.path.relpath(each)}", highlight=False)
    console.print(f"took {time.perf_counter() - START:.0f} s", highlight=False)
    return 0


def _compare(files: list[pathlib.Path], parse: argparse.ArgumentParser, console: Console) -> int:
    from . import compare
    from .report import load_json

    reports = []
    for path in files:
        try:
            reports.append(load_json(path))
        except OSError as error:
            parse.error(f"{path}: {error.strerror}")
        except (ValueError, KeyError, TypeError) as error:
            parse.error(f"{path} holds no results of the bench: {error}")
    try:
        found = compare.compare(*reports)
    except ValueError as error:
        parse.error(str(error))
    compare.show(found, console)
    compare.warn_of_work(reports, console)
    return 1 if any(each.verdict == compare.DISAGREE for each in found) else 0


def _tune(device: torch.device, options: argparse.Namespace, console: Console) -> int:
    if device.type != "cuda":
        print("python -m bench tune measures launch choices on a GPU; none was found", file=sys.stderr)
        return 1
    from smart_fast.kernels import tuning

    from smart_fast.backends.triton_ops import device_name

    from . import tune, tune_targets

    path = options.json or tuning.FOLDER / tuning.file_name(device_name(device))
    with console.status("") as status:
        table = tune.sweep(
            tune_targets.targets(options.cases),
            device,
            path,
            seconds=options.seconds or 0.3,
            limit=options.limit or float("inf"),
            say=lambda doing: status.update(doing.replace("[", r"\[")),
        )
    tune.show(table, console)
    console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    console.print(f"took {time.perf_counter() - START:.0f} s", highlight=False)
    return 0 if table["entries"] else 1


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

    from . import energy
    from .measure import busy_share
    from .peers import contestants
    from .plots import save_plots
    from .report import Report, environment, save_json, show
    from .run import run_case

    folder = _folder(options, device)
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
