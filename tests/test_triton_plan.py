"""Launch plans launch what the launchers would: the checks of plan_checks.py, on a stub of the CUDA driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import checks_found

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


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return checks_found(tmp_path_factory, SCRIPT)


def test_every_check_is_named(found: Any) -> None:
    assert list(found) == list(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_plans(found: Any, check: str) -> None:
    assert found[check] is None, found[check]
