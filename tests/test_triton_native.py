"""Triton by way of the native extension: the checks of plan_native_checks.py, on a stub of the CUDA driver, and when
that is the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, checks_found, run_python

SCRIPT = Path(__file__).with_name("plan_native_checks.py")
CHECKS = (
    "launches of perturb", "launches of ascend", "launches of divergence forward", "launches of divergence backward",
    "launches of a step", "numbers are passed on", "one tensor twice", "streams", "hooks see every launch",
    "choices under test are launched", "few are kept and threads share them", "another launcher is called whole",
    "graphs", "without graphs", "the short way takes what was planned", "errors keep their type",
    "copies are not planned", "tensors without memory are not planned",
)  # fmt: skip

JOINED = """
from smart_fast.backends import registry
from smart_fast.backends.triton import TRITON

registry.state.native_sought = True  # nothing was built
registry.available_backends()
print(registry.state.found["triton"] is TRITON, TRITON.nodes)
registry.build_native()
registry.available_backends()
print(registry.state.found["triton"].nodes, registry.plain_divergence("triton") is not None)
"""


@pytest.fixture(scope="session")
def found(native: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return checks_found(tmp_path_factory, SCRIPT)


def test_every_check_is_named(found: Any) -> None:
    assert list(found) == list(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_native_plans(found: Any, check: str) -> None:
    assert found[check] is None, found[check]


@pytest.mark.parametrize("interpreted", [False, True])
def test_triton_goes_through_an_extension_once_there_is_one(native: Any, interpreted: bool) -> None:
    """But for the interpreter, which launches nothing."""
    pytest.importorskip("triton")
    done = run_python(["-c", JOINED], cwd=ROOT, env={"TRITON_INTERPRET": "1"} if interpreted else None)
    assert done.returncode == 0, done.stderr[-4000:]
    after = "never False" if interpreted else "eager True"
    assert done.stdout.split("\n")[:2] == ["True never", after]
