"""``python -m bench doctor``: what it says of a machine as fast as the committed one, slower, and far slower."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("rich", reason="the bench extra")
pytest.importorskip("smart_pytorch")

from rich.console import Console

from bench import commands, doctor, peers, readme
from bench.measure import Timing
from bench.report import Report
from bench.run import Row

CASE = doctor.CASES[0]
ENVIRONMENT = {"device": "a CPU", "device_type": "cpu", "threads": 2, "versions": {"torch": "2.13.0"}}


def rows(case: str, theirs: float, ours: float) -> list[Row]:
    times = {peers.EAGER: theirs, doctor.OURS: ours}
    return [Row(case, "ops", name, "", timing=Timing(each, each, each, 9, 1)) for name, each in times.items()]


@pytest.mark.parametrize(
    ("here", "verdict"),
    [(12.0, doctor.CONFIRMED), (8.1, doctor.CONFIRMED), (7.9, doctor.LESS), (5.1, doctor.LESS), (4.9, doctor.REFUTED)],
)
def test_verdicts(here: float, verdict: str) -> None:
    assert doctor.Finding(CASE, here, 10.0).verdict == verdict


def test_ratios_are_smart_pytorchs_time_over_ours() -> None:
    assert doctor.ratio([*rows("another", 9.0, 1.0), *rows(CASE, 6.0, 2.0)], CASE) == pytest.approx(3.0)
    assert doctor.ratio(rows(CASE, 6.0, 2.0)[:1], CASE) is None


def test_cases_are_committed() -> None:
    known = [row for report in readme.reports() for row in report.rows]
    assert all(doctor.ratio(known, case) for case in doctor.CASES)


def committed(ratio: float) -> list[Report]:
    return [Report(dict(ENVIRONMENT), copy_rate=40e9, rows=rows(CASE, ratio, 1.0))]


@pytest.mark.parametrize(("measured", "status"), [(9.0, 0), (6.0, 0), (4.0, 1)])
def test_the_command_fails_where_a_ratio_is_below_half(
    measured: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Sequence[str]] = []

    def run(case: Any, device: Any, backends: Sequence[str], **_: Any) -> list[Row]:
        ran.append((case.name, *backends))
        return rows(case.name, measured, 1.0)

    monkeypatch.setattr(doctor, "run_case", run)
    monkeypatch.setattr(doctor, "copy_bandwidth", lambda device, size: 20e9)
    monkeypatch.setattr(doctor, "gemm_rate", lambda device, dtype: 100e9)
    monkeypatch.setattr(readme, "reports", lambda: committed(10.0))
    monkeypatch.setattr(commands, "build_native", lambda console: None)
    console = Console(file=io.StringIO(), width=120)
    options: Any = type("Options", (), {"seconds": None})
    call = commands.Call(options, options, options, [], [], console, 0.0)
    assert commands.doctor(call) == status
    assert ran == [(CASE, "native")]
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert doctor.Finding(CASE, measured, 10.0).verdict in printed
    assert "20" in printed
    assert "40" in printed


def test_nothing_to_compare_with_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_case", lambda *_, **__: [])
    assert list(doctor.examine(committed(10.0), seconds=0.1)) == []
