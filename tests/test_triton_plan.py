"""Launch plans launch what the launchers would: the checks of plan_checks.py, on a stub of the CUDA driver."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import once, run_python

SCRIPT = Path(__file__).with_name("plan_checks.py")
LAUNCHERS = (
    "perturb", "ascend_norm", "ascend", "divergence_forward", "divergence_backward", "divergence_parts",
    "divergence_finish", "fisher_direction",
)  # fmt: skip
CHECKS = (
    *(f"launches of {name}" for name in LAUNCHERS), "numbers are passed on",
    "numbers are not computed with", "one tensor twice", "streams",
    "hooks see every launch", "few are kept and threads share them", "copies are not planned",
)  # fmt: skip


def checked(directory: Path) -> Any:
    done = run_python([str(SCRIPT)], cwd=directory, env={"TRITON_CACHE_DIR": str(directory / "cache")})
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["check"]: line["wrong"] for line in lines}


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("triton")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc on PATH")
    return once(tmp_path_factory, "plan_checks", checked)


def test_every_check_is_named(found: Any) -> None:
    assert list(found) == list(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_plans(found: Any, check: str) -> None:
    assert found[check] is None, found[check]
