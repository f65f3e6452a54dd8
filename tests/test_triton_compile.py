"""The kernels' specializations compile for GPUs that are not here, and keep to registers: no stack, so no spills.

The compiler and the interpreter cannot share a process, so each target compiles in its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import exhaustively

SCRIPT = Path(__file__).with_name("compile_kernels.py")
#: Quarters that differ for the GPUs that launch choices are made for, an eighth for the others; the sweep has the rest.
SHARES = [("sm_90", "0/4"), ("sm_100", "1/4"), ("sm_80", "2/8"), ("gfx942", "3/8")]
SWEEP = [("sm_90", f"{part}/4") for part in (1, 2, 3)] + [("sm_100", f"{part}/4") for part in (0, 2, 3)]
KERNELS = {
    "perturb_kernel", "norm_kernel", "ascend_kernel", "fisher_direction_kernel", "divergence_forward_kernel",
    "divergence_backward_kernel", "divergence_backward_elementwise_kernel", "divergence_parts_kernel",
    "divergence_finish_kernel", "divergence_merge_kernel", "divergence_collect_kernel",
}  # fmt: skip


def compiled(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("target", ["sm_90", *exhaustively("gfx942")])  # one of each maker
def test_every_kernel_compiles(target: str, tmp_path: Path) -> None:
    found = compiled(tmp_path, target, "--brief")
    assert {each["kernel"] for each in found} == KERNELS
    assert not [each for each in found if each["stack"]]


@pytest.mark.exhaustive
@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("target", "part"), [*SHARES, *(pytest.param(*each, marks=pytest.mark.sweep) for each in SWEEP)]
)
def test_specializations_compile_without_spills(target: str, part: str, tmp_path: Path) -> None:
    found = compiled(tmp_path, target, "--part", part)
    assert len(found) > 40
    few = {"divergence_merge_kernel", "divergence_collect_kernel", "fisher_direction_kernel"}  # not in every part
    assert {each["kernel"] for each in found} | few == KERNELS
    assert not [each for each in found if each["stack"]]
