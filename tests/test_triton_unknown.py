"""Names that a Triton kernel does not know are errors: of the launchers, of interpreted kernels, of the compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smart_fast.backends import base
from tests.helpers import run_python

ops = pytest.importorskip("smart_fast.backends.triton_launch")

#: A call of a launcher with one unknown name each, in Python: x is the tensor, seed the noise, s statistics.
CALLS = {
    "divergence, forward of a row": "ops.divergence_forward(x, x, None, 'other', 'rows', 1.0, 1.0, 1.0, False, True)",
    "divergence, forward of terms": "ops.divergence_forward(x, x, None, 'other', 'terms', 1.0, 1.0, 1.0, False, True)",
    "divergence, backward of a row": "ops.divergence_backward(g, x, x, s, None, 'other', 'sum', *rest, True, True)",
    "divergence, backward of terms": "ops.divergence_backward(x, x, x, s, None, 'other', 'terms', *rest, True, True)",
    "divergence, finish": "ops.divergence_finish(x, x, s, None, 'other', 'rows', 1.0, 1.0, 1.0, False)",
    "norm, measure": "ops.ascend_norm(x, seed, None, None, None, 'other', 1.0, 1.0, 'sift')",
    "norm, ascend": "ops.ascend(x, x, seed, None, None, None, None, 'other', 'row', *step, 'sift', 1.0, True)",
    "norm, projection": "ops.ascend(x, x, seed, x, x, None, None, 'other', 'given', *step, 'paper', 1.0, True)",
    "update, measure": "ops.ascend_norm(x, seed, None, None, None, 'l2', 1.0, 1.0, 'other')",
    "noise, perturb": "ops.perturb(x, seed, 1.0, None, None, 'other')",
    "noise, measure": "ops.ascend_norm(x, seed, None, None, None, 'l2', 1.0, 1.0, 'smart-pytorch', 'other')",
    "noise, ascend": "ops.ascend(x, x, seed, x, None, None, None, 'l2', 'given', *step, 'sift', 1.0, True, 'other')",
    "update, ascend": "ops.ascend(x, x, seed, x, None, None, None, 'l2', 'given', *step, 'other', 1.0, True)",
}
NAMES = {
    "x": torch.ones(2, 5), "g": torch.ones(()), "seed": torch.ones(1, dtype=torch.int64), "step": (1.0, 1.0),
    "s": torch.ones(2, base.STATISTICS), "rest": (1.0, 1.0, 1.0, False), "ops": ops,
}  # fmt: skip


def test_kernels_know_what_the_contract_names() -> None:
    assert set(ops.KINDS) == set(base.DIVERGENCES)
    assert set(ops.UPDATES) == set(base.UPDATES)


@pytest.mark.parametrize("call", CALLS)
def test_launchers_say_what_they_know(call: str) -> None:
    what = call.split(",")[0]
    known = {"divergence": "jsd", "norm": "l1", "update": "sift", "noise": "uniform"}[what]
    with pytest.raises(ValueError, match=f"the Triton kernels know no {what} 'other', only .*{known}"):
        eval(CALLS[call], NAMES)
    registered = CALLS[call].replace("ops.", "torch.ops.smart_fast.")
    with pytest.raises(ValueError, match=f"the Triton kernels know no {what} 'other'"):
        eval(registered, NAMES | {"torch": torch})


@pytest.mark.skipif(not ops.INTERPRETED, reason="kernels are compiled here")
@pytest.mark.parametrize("call", CALLS)
def test_interpreted_kernels_stop(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_known", lambda *_: None)
    with pytest.raises(Exception, match=f"unknown {call.split(',')[0]}"):
        eval(CALLS[call], NAMES)


COMPILE = f"""
import torch
from tests import compile_kernels
from smart_fast.backends import triton_launch as ops

ops._known = lambda *_: None
x, g, s = torch.empty(2, 5, device="meta"), torch.empty((), device="meta"), torch.empty(2, 7, device="meta")
seed = torch.empty(1, dtype=torch.int64, device="meta")
step, rest = (1.0, 1.0), (1.0, 1.0, 1.0, False)
for name, call in {CALLS!r}.items():
    launches = []
    eval(call[:-1] + ", wrap=lambda kernel: compile_kernels.sass.Recorder(kernel, launches))")
    kernel, arguments = launches[-1]
    found = "compiled"
    try:
        compile_kernels.compile_for("sm_90", kernel, arguments)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        found = f"{{type(error).__name__}}: {{error}}".splitlines()
        found = found[0][:9] + found[-1]
    print(name, found, sep=" | ")
"""


def test_nothing_unknown_compiles(tmp_path: Path) -> None:
    done = run_python(COMPILE, cwd=tmp_path, env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert list(found) == list(CALLS)
    for name, what in found.items():
        assert what.endswith(f"unknown {name.split(',')[0]}"), (name, what)
