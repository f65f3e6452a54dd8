"""Liger-Kernel's losses in the bench: wired to what they are documented to compute, never run without a GPU.

Stand-ins in plain PyTorch follow its documentation (0.8.5); where the package is installed, its kernels are run too.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

for package in ("smart_pytorch", "rich"):
    pytest.importorskip(package, reason=f"the bench needs {package}")

from bench import cases, liger  # noqa: E402
from bench.run import run_case  # noqa: E402
from bench.task import Contestant  # noqa: E402

CPU = torch.device("cpu")


class JSD(nn.Module):
    def __init__(self, beta):
        super().__init__()
        assert beta == 0.5

    def forward(self, log_q, log_p):
        log_m = ((log_q.exp() + log_p.exp()) / 2).log()
        halves = [nn.functional.kl_div(log_m, each, reduction="batchmean", log_target=True) for each in (log_q, log_p)]
        return sum(halves) / 2


class FusedLinearKLDiv(nn.KLDivLoss):
    def forward(self, states, weight, target):
        return super().forward((states @ weight.t()).log_softmax(-1), target)


class FusedLinearJSD(nn.Module):
    def __init__(self, jsd_beta):
        super().__init__()
        self.jsd = JSD(jsd_beta)

    def forward(self, student, student_weight, teacher, teacher_weight, labels):
        return self.jsd((student @ student_weight.t()).log_softmax(-1), (teacher @ teacher_weight.t()).log_softmax(-1))


STAND_INS = {
    "KLDiv": nn.KLDivLoss, "JSD": JSD, "FusedLinearKLDiv": FusedLinearKLDiv, "FusedLinearJSD": FusedLinearJSD,
}  # fmt: skip
NAMES = {
    ("kl", False): {"KLDiv": "other"},
    ("sym_kl", False): {"KLDiv twice": "rival"},
    ("js", False): {"KLDiv twice": "rival", "JSD": "other"},
    ("kl", True): {"FusedLinearKLDiv": "other"},
    ("sym_kl", True): {"FusedLinearKLDiv twice": "rival"},
    ("js", True): {"FusedLinearKLDiv twice": "rival", "FusedLinearJSD": "other"},
}
every_case = pytest.mark.parametrize(("kind", "linear"), NAMES)


def case_of(kind, linear):
    if linear:
        return cases.lm_linear(kind, 8, 6, 50, torch.float32, "cpu")
    return cases.lm_divergence(kind, (8, 50), torch.float32, "cpu")


def run_liger(kind, linear, change=lambda run: run):
    """Rows of Liger-Kernel's contestants beside smart-pytorch."""

    def entrants(task, device, backends):
        yield Contestant("smart-pytorch", "rival", task.call(task.smart_pytorch()))
        for each in liger.contestants(task, device):
            run = None if each.run is None else change(each.run)
            yield Contestant(each.name, each.role, run, skipped=each.skipped, check=each.check, note=each.note)

    rows = run_case(case_of(kind, linear), CPU, [], seconds=0.01, entrants=entrants)
    return {row.contestant.removeprefix(liger.LIGER): row for row in rows}


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(liger, "why_not", lambda device: None)
    monkeypatch.setattr(liger, "_kernel", lambda name: (STAND_INS[name], None))


@pytest.mark.exhaustive
@every_case
def test_named_but_not_run_without_a_gpu(kind, linear):
    rows = run_liger(kind, linear)
    assert {name: row.role for name, row in rows.items() if row.skipped} == NAMES[kind, linear]
    assert all("need a GPU" in row.skipped for row in rows.values() if row.skipped)


@pytest.mark.exhaustive
@every_case
def test_checked_against_what_they_compute(kind, linear, stand_ins):
    rows = run_liger(kind, linear)
    rival = rows.pop("smart-pytorch")
    assert rows.keys() == NAMES[kind, linear].keys()
    for name, row in rows.items():
        assert row.wrong is row.skipped is None, (name, row)
        assert row.note == liger.NOTES[name]
        assert row.timing.median > 0
        # What computes something else is compared with nobody, and its time is nobody's rival.
        assert (row.speed is None) == (row.role == "other") == (row.bandwidth is None and row.flops is None)
    if all(row.role == "other" for row in rows.values()):
        assert rival.speed == 1.0


@pytest.mark.exhaustive
@every_case
def test_wrong_results_get_no_time(kind, linear, stand_ins):
    def doubled(run):
        return lambda *inputs: tuple(2 * each for each in run(*inputs))

    for name, row in run_liger(kind, linear, doubled).items():
        assert name == "smart-pytorch" or (row.wrong and row.timing is None)


@every_case
def test_the_package_itself(kind, linear, monkeypatch):
    pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is optional")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter is not on, and there is no GPU")
    monkeypatch.setattr(liger, "why_not", lambda device: None)
    device = CPU if os.environ.get("TRITON_INTERPRET") == "1" else torch.device("cuda")
    task = case_of(kind, linear).build(device)
    inputs = task.inputs(0)
    for each in liger.contestants(task, device):
        try:
            found = each.check(each.run, inputs) if each.check else task.check(each.run, inputs, None)
        except Exception as error:
            if type(error).__name__ != "InterpreterError":  # released kernels need not run in the interpreter
                raise
            continue
        assert not [one for one in found if one.wrong], each.name
