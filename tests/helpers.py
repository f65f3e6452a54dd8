"""What several test files share."""

import ast
import fcntl
import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from smart_fast.losses.divergences import NAMES as DIVERGENCES

# The tensors of the tests are small: threads would only wait for each other.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


def same_bits(a, b):
    """Equality that tells NaN from numbers and float32 from float64, for tensors or None."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and _equal_numbers(a, b)


def _equal_numbers(a, b):
    return torch.equal(torch.where(a.isnan(), 0, a), torch.where(b.isnan(), 0, b))


def exhaustively(*values):
    """Parameters for exhaustive runs alone: ``@pytest.mark.parametrize("width", [3, *exhaustively(1, 1000)])``."""
    return [
        pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.exhaustive) for each in values
    ]


#: Where the divergence is not what is tested: one with a sum over the row, one with two.
FEW_KINDS = ["sym_kl", "jsd", *exhaustively(*(each for each in DIVERGENCES if each not in ("sym_kl", "jsd")))]


class Counting:
    """A callable that counts its calls and keeps what it was given last."""

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.seen = []

    def __call__(self, *args, **kwargs):
        self.calls += 1
        self.seen.append(tuple(arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args))
        return self.function(*args, **kwargs)


def run_python(code, *, cwd, path=(ROOT,), env=None):
    """Run ``code`` in a fresh interpreter outside the repository; returns the finished process."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("SMART_FAST", "TRITON"))}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, path))
    variables.update(env or {})
    command = [sys.executable, "-c", code] if not isinstance(code, list) else [sys.executable, *code]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def checks_of(worker):
    """Names of the functions of the script ``worker`` that are decorated with ``check``."""
    functions = [node for node in ast.parse(worker.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [each.name for each in functions if any(getattr(d, "id", "") == "check" for d in each.decorator_list)]


def once(tmp_path_factory, name, make):
    """What ``make(directory)`` gives, in JSON's types: called once, whichever of pytest's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = directory / "made.json"
        if not file.is_file():
            work = directory / "work"
            work.mkdir()
            file.write_text(json.dumps(make(work)))
        return json.loads(file.read_text())


def run_workers(worker, world, directory, checks=()):
    """Run the checks of ``worker`` (these alone, if any are named) in ``world`` processes; for each process a dict of
    tracebacks (empty: passed)."""
    done = run_python([str(worker), str(world), str(directory), *checks], cwd=ROOT)
    files = [directory / f"{rank}.json" for rank in range(world)]
    nothing = dict.fromkeys(checks_of(worker), f"left no results\n{done.stdout}{done.stderr}")
    return [json.loads(file.read_text()) if file.is_file() else nothing for file in files]


def report_checks(checks):
    """What the script of `checks_found` does: calls each of ``checks`` and prints a line for it."""
    for name, check in checks.items():
        wrong = None
        try:
            check()
        except BaseException:
            wrong = traceback.format_exc()
        print(json.dumps({"check": name, "wrong": wrong}), flush=True)


def checks_found(tmp_path_factory, script):
    """For each check of a script on the stub of the CUDA driver a traceback, or None if it passed."""
    pytest.importorskip("triton")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc on PATH")

    def checked(directory):
        done = run_python([str(script)], cwd=directory, env={"TRITON_CACHE_DIR": str(directory / "cache")})
        assert done.returncode == 0, done.stderr[-4000:]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return {line["check"]: line["wrong"] for line in lines}

    return once(tmp_path_factory, script.stem, checked)
