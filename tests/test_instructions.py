"""The Triton kernels keep to their instruction budgets, and those that are committed are theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, exhaustively, once, run_python

pytest.importorskip("triton")
COMMITTED = ROOT / "bench" / "results" / "instructions.json"


@pytest.fixture(scope="session", params=["sym_kl forward, near rows of 32000", *exhaustively("")])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The rows of the cases whose names contain a text, from a process whose kernels are compiled, not interpreted."""

    def counted(directory: Path) -> Any:
        path = directory / "instructions.json"
        command = ["-m", "bench", "instructions", "--cases", request.param, "--json", str(path)]
        done = run_python(command, cwd=ROOT, env={"TRITON_CACHE_DIR": str(directory / "cache")})
        assert path.exists(), done.stderr[-4000:]
        return json.loads(path.read_text())["rows"]

    return once(tmp_path_factory, f"instructions-{bool(request.param)}", counted)


def test_no_case_is_over_its_limit(table: Any) -> None:
    assert table
    assert not [row for row in table if row["instructions"] > row["limit"] or row["stack"]]


def test_loops_exchange_nothing_between_threads(table: Any) -> None:
    assert not [row for row in table if "forward" in row["case"] and row["exchanges"]]


def test_the_committed_table_is_that_of_these_kernels(table: Any) -> None:
    """Other versions of Triton compile a little differently: within a tenth."""
    committed = {(row["case"], row["dtype"]): row["instructions"] for row in json.loads(COMMITTED.read_text())["rows"]}
    for row in table:
        assert row["instructions"] == pytest.approx(committed[row["case"], row["dtype"]], rel=0.1), row["case"]
