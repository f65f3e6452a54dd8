"""The table of stages, and the runner: each has a process group of its own and a time, and loses nothing when cut."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from . import lines

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = ROOT / "bench" / "out" / "gpu-cache"  # compiled kernels: a machine that is still warm finds them again
DEPS = ROOT / ".gpu_deps"  # packages carried beside the checkout
LIMIT, AFTER_LIMIT = 500, 300  # seconds of one call, and of one that repeats
SHORTEST = 3  # with less time left a stage is not started
DRY_AT_ONCE, DRY_PATIENCE = 2, 60  # stages of a rehearsal that run together, seconds that each gets besides
TAIL = 3000  # characters of the output that a failed or cut stage leaves in its line


class Stage(NamedTuple):
    """``seconds``: after which it is cut. ``command``: what follows the name of the interpreter."""

    name: str
    seconds: int
    command: tuple[str, ...]
    about: str


def _stage(name: str, seconds: int, about: str, module: str = "", *arguments: str) -> Stage:
    return Stage(name, seconds, ("-m", f"bench.gpu.{module or name}", *arguments), about)


#: In the order of what is worth most: what the time does not suffice for is the tail. Triton and native are apart
#: wherever one could take down the other. The native smoke test comes after the build, since nothing was linked before.
STAGES = (
    _stage("machine", 15, "versions, clocks, copy bandwidth, GEMM rate"),
    _stage("smoke-triton", 20, "each operator against float64", "smoke", "triton"),
    _stage("build", 60, "Triton compiled ahead by all cores, native objects linked beside it"),
    _stage("smoke-native", 10, "each operator against float64, bf16 [8192, 10000] last", "smoke", "native"),
    _stage("kernels-triton", 52, "bytes over time of each kernel, near and far", "kernels", "triton"),
    _stage("kernels-native", 48, "bytes over time of each kernel, near and far", "kernels", "native"),
    _stage("host", 45, "host time of SMARTLoss, CUDA graphs, no synchronization"),
    _stage("rivals", 85, "against torch.compile, forward and backward as a user writes it"),
    _stage("tests", 80, "the chosen GPU tests", "chosen_tests"),
    _stage("sanitize", 45, "compute-sanitizer on small native cases", "memcheck"),
    _stage("bert", 35, "a training step of BERT-base"),
)
#: Of the second call alone.
SWEEP = _stage("sweep", 100, "the three launch choices that matter")
#: Of a call of its own, by name: what it needs to be carried leaves no room for more (`bench.finetune.workers`).
FINETUNE = Stage("finetune", 480, ("-m", "bench.finetune.workers"), "real weights and text, as many runs as fit")


def chosen(names: Sequence[str]) -> list[Stage]:
    """Stages by name, or by what several names begin with ("kernels"), in the order of the table."""
    table = (*STAGES, SWEEP, FINETUNE)
    for name in names:
        if not any(_called(stage, name) for stage in table):
            raise ValueError(f"no stage {name!r}: choose from {', '.join(stage.name for stage in table)}")
    return [stage for stage in table if any(_called(stage, name) for name in names)]


def _called(stage: Stage, name: str) -> bool:
    return stage.name == name or stage.name.startswith(f"{name}-")


def to_repeat(previous: Sequence[lines.Line]) -> list[Stage]:
    """What did not end well, by the lines of an earlier run, between the build that a bare machine needs and the sweep.

    By the last line about each stage; one that has none was never reached.
    """
    status = {line["what"]: line["status"] for line in previous if line["kind"] == "stage"}
    again = [stage for stage in STAGES if status.get(stage.name) != "ok" or stage.name == "build"]
    return [*again, SWEEP]


def run(
    stages: Sequence[Stage], folder: pathlib.Path, *, limit: float, dry_run: bool = False, commit: str | None = None
) -> Iterator[lines.Line]:
    """Run ``stages`` one after another; after each, its line. Everything is in ``folder``: lines and output.

    A rehearsal runs two at a time, whose times mean nothing anyway.
    """
    runner = _Runner(folder, time.monotonic() + limit, dry_run, commit)
    if not dry_run:
        yield from map(runner, stages)
        return
    with ThreadPoolExecutor(DRY_AT_ONCE) as pool:
        try:
            yield from pool.map(runner, stages)
        finally:  # interrupted: what is running must end for the pool to end, what is not must not begin
            runner.end = 0.0
            for process in list(runner.running):
                _kill(process)


class _Runner:
    """Runs a stage within its time, keeps its output and writes the line about it."""

    def __init__(self, folder: pathlib.Path, end: float, dry_run: bool, commit: str | None) -> None:
        self.folder, self.end, self.dry_run, self.commit = folder, end, dry_run, commit
        self.path = folder / "gpu_check.jsonl"
        self.environment = _environment(self.path, dry_run, commit)
        self.running: set[subprocess.Popen[bytes]] = set()

    def __call__(self, stage: Stage) -> lines.Line:
        # A rehearsal may share its two cores with others: then only what hangs is cut.
        allowed = min(DRY_PATIENCE * self.dry_run + stage.seconds, self.end - time.monotonic())
        line: dict[str, Any] = {"stage": stage.name, "kind": "stage", "what": stage.name, "limit": round(allowed)}
        if allowed < SHORTEST:
            line |= {"status": "left out", "ok": False, "seconds": 0, "error": "no time was left"}
        else:
            line |= self._run(stage, allowed)
            written = [each for each in lines.read(self.path) if each.get("stage") == stage.name]
            line |= {"lines": len(written), "wrong": len(lines.failed(written))}
        line |= {"time": round(time.time(), 3), "dry_run": self.dry_run, "commit": self.commit}
        lines.write(line, self.path)
        return line

    def _run(self, stage: Stage, seconds: float) -> lines.Line:
        start, cached = time.monotonic(), _compiled(self.environment)
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, *stage.command], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                env=self.environment | {lines.STAGE: stage.name}, **_OWN_GROUP,
            )  # fmt: skip
            self.running.add(process)
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
                self.running.discard(process)
                output.seek(0)
                printed = output.read()
                with open(self.folder / "output.txt", "ab") as file:
                    file.write(f"\n== {stage.name}: {stage.about}\n".encode() + printed)
        status = "cut" if code is None else "ok" if code == 0 else "failed"
        line: dict[str, Any] = {"status": status, "ok": code == 0, "seconds": round(time.monotonic() - start, 1)}
        line |= {"exit": code, "compiled": _compiled(self.environment) - cached}
        if code != 0:
            line["tail"] = printed.decode(errors="replace")[-TAIL:]
        return line


#: A group of its own, so that nothing of a stage is left behind; no session, which would outlive the call.
_OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _compiled(environment: dict[str, str]) -> int:
    """How many kernels are in Triton's cache: what a stage adds was not compiled ahead."""
    return sum(1 for _ in pathlib.Path(environment["TRITON_CACHE_DIR"]).glob("*/*.cubin"))


def _environment(path: pathlib.Path, dry_run: bool, commit: str | None) -> dict[str, str]:
    found = dict(os.environ)
    search = [str(ROOT), *([str(DEPS)] if DEPS.is_dir() else []), *filter(None, [found.get("PYTHONPATH")])]
    found |= {
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONUNBUFFERED": "1",
        lines.FILE: str(path),
        lines.DRY_RUN: str(int(dry_run)),
        "TRITON_CACHE_DIR": str(CACHE / ("triton-dry-run" if dry_run else "triton")),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
    }
    if commit is not None:
        found[lines.COMMIT] = commit
    if dry_run:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    else:
        found.pop("TRITON_INTERPRET", None)
        found["TORCH_EXTENSIONS_DIR"] = str(CACHE / "extensions")
    return found
