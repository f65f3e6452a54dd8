"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import torch

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
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)
