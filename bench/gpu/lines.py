"""One JSON line a result, written and flushed the moment it exists: what is killed later has lost nothing.

The runner (stages.py) tells a stage through the environment where its lines go. By hand, without it, they are printed.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import time
from collections.abc import Iterable
from typing import Any

FILE, STAGE, DRY_RUN, COMMIT = "GPU_CHECK_LINES", "GPU_CHECK_STAGE", "GPU_CHECK_DRY_RUN", "GPU_CHECK_COMMIT"

Line = dict[str, Any]


def dry_run() -> bool:
    """Whether this is the rehearsal on a CPU: tiny shapes, interpreted kernels, times that mean nothing."""
    return os.environ.get(DRY_RUN) == "1"


def emit(kind: str, what: str, **fields: Any) -> None:
    """Write a result. ``kind`` says which fields to expect; ``ok=False`` is what makes a stage fail."""
    line = {"stage": os.environ.get(STAGE), "kind": kind, "what": what, **fields, **about()}
    line |= {"time": round(time.time(), 3), "dry_run": dry_run()}
    write(line, os.environ.get(FILE))


def write(line: Line, path: str | os.PathLike[str] | None) -> None:
    text = json.dumps(line)
    if path is None:
        print(text, flush=True)
        return
    with open(path, "a") as file:  # one write of one line: appended whole, whoever else is writing
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> list[Line]:
    """The lines of a file; one that was cut in the middle is passed over. No file: no lines."""
    if not pathlib.Path(path).is_file():
        return []
    return [line for line in map(parse, pathlib.Path(path).read_text().splitlines()) if line is not None]


def parse(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "kind" in line else None


@functools.cache
def about() -> Line:
    """What every figure is worth nothing without: the device it was taken on, and the commit."""
    import torch

    from bench.report import device_name

    return {"device": device_name(device()), "commit": os.environ.get(COMMIT), "torch": torch.__version__}


@functools.cache
def device() -> Any:
    """Where the stages compute: the GPU, or in the dry run the CPU."""
    import torch

    if dry_run():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is visible to torch: --dry-run rehearses on a CPU")
    return torch.device("cuda")


def failed(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line.get("ok") is False]


def why(error: BaseException) -> str:
    """Type and first line of an error, without the machine's paths."""
    first = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"(/[\w.+-]+){2,}", "(path)", f"{type(error).__name__}: {first}")[:400]


def not_sound(backend: str) -> str | None:
    """Why a backend is left out of stages that share a process: its own smoke test went wrong in this run. A kernel
    that faults takes down whatever shares its process."""
    path = os.environ.get(FILE)
    for line in reversed(read(path) if path else []):
        if line["kind"] == "stage" and line["what"] == f"smoke-{backend}":
            return None if line["status"] == "ok" else f"its smoke test was {line['status']}"
    return None
