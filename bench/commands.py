"""The groups of ``python -m bench`` that go with no other: each a function of the `Call`, returning the exit status."""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console

HERE = pathlib.Path(__file__).parent


@dataclass(frozen=True)
class Call:
    """What the command line asked for. ``start``: when, by `time.perf_counter`."""

    options: argparse.Namespace
    parser: argparse.ArgumentParser
    device: torch.device
    backends: list[str]
    files: list[pathlib.Path]
    console: Console
    start: float

    @property
    def folder(self) -> pathlib.Path:
        return folder(self.options, self.device)

    def wrote(self, *paths: pathlib.Path) -> None:
        for each in paths:
            self.console.print(f"wrote {os.path.relpath(each)}", highlight=False)
        self.console.print(f"took {time.perf_counter() - self.start:.0f} s", highlight=False)

    def runnable(self) -> list[str]:
        """Those of our backends that have kernels to run here; why the others do not is said."""
        from .peers import why_not

        reasons = {name: why_not(name, self.device) for name in self.backends if name != "torch"}
        for name, reason in reasons.items():
            if reason is not None:
                self.console.print(f"[yellow]not run:[/] {name}: {reason}", highlight=False, soft_wrap=True)
        return [name for name, reason in reasons.items() if reason is None]


def folder(options: argparse.Namespace, device: torch.device) -> pathlib.Path:
    from .report import device_name

    given: pathlib.Path | None = options.out
    return given or HERE / "out" / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def build_native(console: Console) -> None:
    """What a CPU has to show is compiled first; why it cannot be is said with the results."""
    from smart_fast.backends import build_native

    try:
        build_native()
    except (RuntimeError, ImportError) as error:
        console.print(f"[yellow]native:[/] {error}", highlight=False, soft_wrap=True)


def accuracy(call: Call) -> int:
    from smart_fast import available_backends

    from . import accuracy
    from .report import environment

    unavailable = available_backends()
    fused = [name for name in call.backends if name != "torch" and unavailable[name] is None]
    for name in call.backends:
        if unavailable[name] is not None:
            call.console.print(f"[yellow]not run:[/] {name}: {unavailable[name]}", highlight=False, soft_wrap=True)
    results = list(accuracy.measure(call.device, fused))
    path = call.options.json or call.folder / "accuracy.json"
    accuracy.save(results, environment(call.device), path)
    accuracy.show(results, call.console)
    call.wrote(path)
    return 0


def quality(call: Call) -> int:
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError:
        call.parser.exit(1, "python -m bench quality needs scikit-learn: pip install -e '.[bench]'\n")
    from . import figures, quality
    from .report import environment

    device = torch.device("cpu")
    build_native(call.console)
    with call.console.status("") as status:
        results = quality.measure(lambda doing: status.update(doing))
    where = folder(call.options, device)
    path, plot = call.options.json or where / "quality.json", call.options.plot or where / "quality.png"
    quality.save(results, environment(device), path)
    figures.save_robustness(results, plot)
    quality.show(results, call.console)
    call.wrote(path, plot)
    return 0


def kernels(call: Call) -> int:
    from . import kernels
    from .measure import copy_bandwidth
    from .report import environment

    device, options = call.device, call.options
    if device.type == "cpu" and "native" in call.backends:
        build_native(call.console)
    fused = call.runnable()
    if not fused:
        call.parser.error(f"--backends {' '.join(call.backends)}: none of them has kernels that run here")
    limit, copy = options.limit or float("inf"), copy_bandwidth(device, 1 << (30 if device.type == "cuda" else 28))
    path, found = options.json or call.folder / "kernels.json", []
    with call.console.status("") as status:
        for each in kernels.measure(
            device, fused, options.seconds or 0.5, small=options.quick and device.type == "cpu",
            say=lambda doing: status.update(doing.replace("[", r"\[")),
        ):  # fmt: skip
            found.append(each)
            kernels.save(kernels.compare_with_copy(found, copy), copy, environment(device), path)
            if time.perf_counter() - call.start > limit:
                call.console.print("[yellow]stopped at its limit: the kernels after this one were not run")
                break
    kernels.show(kernels.compare_with_copy(found, copy), copy, call.console)
    call.wrote(path)
    return 0


def host(call: Call) -> int:
    try:
        from . import driver_stub
    except ModuleNotFoundError as error:
        call.parser.exit(1, f"python -m bench host needs {error.name}, whose launches it measures\n")
    from smart_fast import available_backends

    from . import host
    from .report import environment

    build_native(call.console)
    if (reason := driver_stub.unavailable()) is not None:
        call.console.print(f"[yellow]not run:[/] triton: {reason}", highlight=False)
        return 1
    torch.set_num_threads(1)
    backends = tuple(name for name in host.OURS if name == "triton" or available_backends()[name] is None)
    with host.stubbed():
        costs = host.measure(host.contestants(backends), rounds=30 if call.options.quick else host.ROUNDS)
    host.show(costs, call.console)
    path = call.options.json or call.folder / "host.json"
    host.save(costs, environment(torch.device("cpu")), path)
    call.wrote(path)
    return 0


def instructions(call: Call) -> int:
    from . import instructions
    from .report import environment

    if os.environ.get("TRITON_INTERPRET") == "1":
        call.console.print("[yellow]not run:[/] TRITON_INTERPRET=1 compiles nothing", highlight=False)
        return 1
    table = instructions.rows(call.options.cases)
    instructions.show(table, call.console)
    path = call.options.json or call.folder / "instructions.json"
    instructions.write(path, environment(torch.device("cpu")), table)
    call.wrote(path)
    return int(any(row["instructions"] > row["limit"] or row["stack"] for row in table))


def report(call: Call) -> int:
    from . import readme

    call.wrote(*(readme.ROOT / page for page in readme.write()), *readme.draw())
    return 0


def compare(call: Call) -> int:
    from . import compare
    from .report import load_json

    reports = []
    for path in call.files:
        try:
            reports.append(load_json(path))
        except OSError as error:
            call.parser.error(f"{path}: {error.strerror}")
        except (ValueError, KeyError, TypeError) as error:
            call.parser.error(f"{path} holds no results of the bench: {error}")
    try:
        found = compare.compare(*reports)
    except ValueError as error:
        call.parser.error(str(error))
    compare.show(found, call.console)
    compare.warn_of_work(reports, call.console)
    return 1 if any(each.verdict == compare.DISAGREE for each in found) else 0


def doctor(call: Call) -> int:
    from . import doctor, headline, readme

    build_native(call.console)
    committed = readme.reports()
    began = doctor.Stolen()
    with call.console.status("") as status:
        findings = list(
            doctor.examine(
                committed,
                seconds=call.options.seconds or 4.0,
                say=lambda doing: status.update(doing.replace("[", r"\[")),
            )
        )
        found = doctor.traits(headline.report_of(committed), began)
    doctor.show(findings, found, call.console)
    return int(not findings or any(each.verdict == doctor.REFUTED for each in findings))


def tune(call: Call) -> int:
    device, options, console = call.device, call.options, call.console
    if device.type != "cuda":
        print("python -m bench tune measures launch choices on a GPU; none was found", file=sys.stderr)
        return 1
    from smart_fast.kernels import tuning

    from smart_fast.backends.triton_launch import device_name

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
    call.wrote(path)
    return 0 if table["entries"] else 1


def finetune(call: Call) -> int:
    from .finetune import command

    return command.main(call)


ALONE = {
    "accuracy": accuracy,
    "quality": quality,
    "finetune": finetune,
    "kernels": kernels,
    "tune": tune,
    "compare": compare,
    "doctor": doctor,
    "host": host,
    "instructions": instructions,
    "report": report,
}
