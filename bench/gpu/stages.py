"""The table of stages, and the runner: each has a process group of its own and a time, and loses nothing when cut."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from . import lines

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = ROOT / "bench" / "out" / "gpu-cache"  # compiled kernels: a machine that is still warm finds them again
DEPS = ROOT / ".gpu_deps"  # packages carried beside the checkout
LIMIT, AFTER_LIMIT = 500, 300  # seconds of one call, and of one that repeats
SHORTEST = 3  # with less time left a stage is not started
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


def chosen(names: Sequence[str]) -> list[Stage]:
    """Stages by name, or by what several names begin with ("kernels"), in the order of the table."""
    table = (*STAGES, SWEEP)
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
    """Run ``stages`` one after another; after each, its line. Everything is in ``folder``: lines and output."""
    end = time.monotonic() + limit
    path = folder / "gpu_check.jsonl"
    environment = _environment(path, dry_run, commit)
    with open(folder / "output.txt", "a+b") as output:
        for stage in stages:
            left = end - time.monotonic()
            # A rehearsal may share its two cores: then only what hangs is cut.
            allowed = min(60 + stage.seconds if dry_run else stage.seconds, left)
            line: dict[str, Any] = {"stage": stage.name, "kind": "stage", "what": stage.name, "limit": round(allowed)}
            if allowed < SHORTEST:
                line |= {"status": "left out", "ok": False, "seconds": 0, "error": "no time was left"}
            else:
                output.write(f"\n== {stage.name}: {stage.about}\n".encode())
                line |= _run_one(stage, environment | {lines.STAGE: stage.name}, output, allowed)
                written = [each for each in lines.read(path) if each.get("stage") == stage.name]
                line |= {"lines": len(written), "wrong": len(lines.failed(written))}
            line |= {"time": round(time.time(), 3), "dry_run": dry_run, "commit": commit}
            lines.write(line, path)
            yield line


def _run_one(stage: Stage, environment: dict[str, str], output: IO[bytes], seconds: float) -> lines.Line:
    output.flush()
    before, start = output.seek(0, os.SEEK_END), time.monotonic()
    cached = _compiled(environment)
    process = subprocess.Popen(
        [sys.executable, *stage.command], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
        preexec_fn=os.setpgrp,  # one group, so that nothing of it is left behind; no session: that would outlive us
    )  # fmt: skip
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    status = "cut" if code is None else "ok" if code == 0 else "failed"
    line: dict[str, Any] = {"status": status, "ok": code == 0, "seconds": round(time.monotonic() - start, 1)}
    line |= {"exit": code, "compiled": _compiled(environment) - cached}
    if code != 0:
        output.seek(before)
        line["tail"] = output.read().decode(errors="replace")[-TAIL:]
        output.seek(0, os.SEEK_END)
    return line


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
