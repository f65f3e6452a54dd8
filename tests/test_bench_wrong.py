"""A deliberately wrong kernel, in any stage of a fused backend, gets no speed: nowhere, and the bench fails."""

from __future__ import annotations

import functools
import json
import re
import signal
import time

import pytest
import torch
from torch import nn

for package in ("smart_pytorch", "rich", "matplotlib", "transformers"):
    pytest.importorskip(package, reason=f"the bench needs {package}")

import smart_fast  # noqa: E402
from bench import __main__ as command  # noqa: E402
from bench import accuracy, cases, measure, models, plots, readme, regularizer, report, training  # noqa: E402
from smart_fast import autograd  # noqa: E402

NATIVE = "smart-fast native"
F32 = torch.float32
HEAD = cases.regularizer("head 16 to 3", (4, 16), "quick cpu", lambda: nn.Linear(16, 3), needs=None)
KL, NOISE, STEP = (
    cases.divergence("kl", (1, 4), F32, "quick cpu"),
    cases.perturb((1, 8), F32, "quick cpu"),
    cases.ascend((1, 8), F32, "quick cpu"),
)
TABLE = {
    "perturb": cases.perturb((64, 128), F32, "quick cpu"),
    "ascend": cases.ascend((64, 128), F32, "quick cpu"),
    "divergence": cases.divergence("sym_kl", (8, 50), F32, "quick cpu"),
    "lm divergence": cases.lm_divergence("js", (8, 500), F32, "quick cpu"),
    "lm forward": cases.lm_divergence("js", (8, 500), F32, "quick cpu", backward=False),
    "linear": cases.lm_linear("sym_kl", 8, 6, 50, F32, "quick cpu"),
    "regularizer": HEAD,
    "step": cases.training("bert classifier 1x64", (2, 8), "quick cpu", functools.partial(models.bert, 1, 64)),
    "overhead perturb": cases.overhead(NOISE),
    "overhead ascend": cases.overhead(STEP),
    "overhead divergence": cases.overhead(KL),
    "overhead regularizer": cases.overhead(HEAD),
}


class Off(torch.autograd.Function):
    """A value and a gradient, each times its factor."""

    @staticmethod
    def forward(ctx, value, of_value, of_gradient):
        ctx.factor = of_gradient
        return value * of_value

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None, None


def off(function, of_value=3.0, of_gradient=1.0):
    """``function`` with a wrong value, or a right one with a wrong gradient; None stays None."""

    def wrong(*arguments, **options):
        value = function(*arguments, **options)
        return None if value is None else Off.apply(value, of_value, of_gradient)

    return wrong


def wrong_perturb(patch, native):
    right = native.perturb_fresh

    def perturb(embed, *arguments):
        perturbed, noise = right(embed, *arguments)
        return embed + 1.2 * (perturbed - embed), noise

    patch.setattr(native, "perturb_fresh", perturb)


def wrong_ascend(patch, native):
    right = native.ascend

    def ascend(embed, *arguments):
        perturbed, noise = right(embed, *arguments)
        return embed + 2.0 * (perturbed - embed), noise

    patch.setattr(native, "ascend", ascend)


def wrong_divergence(patch, native):
    right = native.divergence_forward

    def forward(*arguments):
        loss, stats = right(*arguments)
        return 3.0 * loss, stats

    patch.setattr(native, "divergence_forward", forward)  # what linear losses call
    for name in ("divergence", "plain_divergence"):
        patch.setattr(native, name, off(getattr(native, name)))


def wrong_gradient(patch, native):
    right = native.divergence_backward

    def backward(*arguments):
        return tuple(None if each is None else 1.5 * each for each in right(*arguments))

    patch.setattr(native, "divergence_backward", backward)
    for name in ("divergence", "plain_divergence"):
        patch.setattr(native, name, off(getattr(native, name), 1.0, 1.5))


def wrong_linear_loss(patch, native):
    patch.setattr(autograd, "linear_divergence", off(autograd.linear_divergence))


def wrong_regularizer(patch, native):
    patch.setattr(smart_fast.SMARTLoss, "forward", off(smart_fast.SMARTLoss.forward, 1.0, 1.5))


def wrong_step(patch, native):
    right = training.TrainingStep.ours
    patch.setattr(training.TrainingStep, "ours", lambda task, backend: off(right(task, backend), 1.0, 1.5))


DIVERGENCES = {"divergence", "lm divergence", "overhead divergence"}
MODELS = {"regularizer", "step", "overhead regularizer"}
INJECTED = {
    # The checks of whole calls take the noise that the backend itself draws as given: cases of perturb judge it.
    wrong_perturb: {"perturb", "overhead perturb"},
    wrong_ascend: {"ascend", "overhead ascend"} | MODELS,
    wrong_divergence: DIVERGENCES | MODELS | {"lm forward", "linear"},
    wrong_gradient: DIVERGENCES | MODELS | {"linear"},
    wrong_linear_loss: {"linear"},
    wrong_regularizer: MODELS,
    wrong_step: {"step"},
}


@pytest.fixture
def run_bench(native, monkeypatch, tmp_path, capsys):
    """``python -m bench`` on some of the table, without torch.compile: exit status, what it prints, its JSON file."""
    monkeypatch.setattr(command, "START", time.perf_counter())
    monkeypatch.setattr(command, "GRACE", 600.0)  # a busy machine leaves no case out
    monkeypatch.setenv("COLUMNS", "200")
    for task in (training.TrainingStep, regularizer.Regularizer):
        monkeypatch.delattr(task, "variants")  # they compile whole steps
    monkeypatch.setattr(report, "copy_bandwidth", lambda device, size: 1e10)
    monkeypatch.setattr(report, "gemm_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(measure, "busy_share", lambda: None)
    monkeypatch.setattr(plots, "save_plots", lambda report, path: [])
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    path = tmp_path / "speed-wrong.json"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small work does not wait for a second processor

    def run(keys, *arguments):
        monkeypatch.setattr(cases, "TABLE", tuple(case for key, case in TABLE.items() if key in keys))
        options = ["--device", "cpu", "--backends", "native", "--seconds", "0.01", "--limit", "0.001"]
        status = command.main([*arguments, *options, "--json", str(path)])
        return status, capsys.readouterr().out, path

    yield run
    torch.set_num_threads(threads)


def printed(text):
    """``case -> the line of the native backend`` in the table on the terminal."""
    lines, case = {}, None
    for line in text.splitlines():
        case = next((each.name for each in TABLE.values() if line.strip() == each.name), case)
        if re.match(rf" +{NATIVE} ", line):
            lines[case] = line
    return lines


@pytest.mark.exhaustive
@pytest.mark.parametrize("inject", INJECTED, ids=lambda inject: inject.__name__)
def test_a_wrong_kernel_gets_no_speed(inject, run_bench, native, monkeypatch):
    inject(monkeypatch, native)
    wrong = INJECTED[inject]
    used = wrong | {"perturb" if "divergence" in wrong else "divergence"}  # one that is right
    status, text, path = run_bench(used, "ops", "lm", "regulariser", "train", "overhead")
    assert status == 1
    shown = printed(text)
    results = json.loads(path.read_text())
    rows = {row["case"]: row for row in results["rows"] if row["contestant"] == NATIVE}
    assert set(rows) == {TABLE[key].name for key in used}
    for key in used:
        case = TABLE[key]
        row, line = rows[case.name], shown[case.name]
        figures = [row[name] for name in ("timing", "speed", "speed_low", "bandwidth", "peak", "host", "energy")]
        if key in wrong:
            assert row["wrong"] is not None, (key, row["checked"])
            assert "off by" in row["wrong"], key
            assert figures == [None] * len(figures), key
            assert "WRONG" in line, key
            assert not re.search(r"\d (us|ms|s) |%|B/s|FLOP/s", line), line
        else:
            assert row["wrong"] is None, key
            assert row["timing"]["median"] > 0, key
            assert "WRONG" not in line, key
    means = {mean["group"]: mean["cases"] for mean in results["geometric_means"] if mean["contestant"] == NATIVE}
    assert means == {"ops": 1}

    accuracy.save([], report.environment(torch.device("cpu")), path.parent / "accuracy.json")
    made = readme.sections(path.parent)
    table = made["speed"] + made["speed-lm"]
    for case in (TABLE[key] for key in wrong):
        in_readme = [line for line in table.splitlines() if line.startswith(f"| {case.name} |")]
        assert in_readme, case.name  # smart-pytorch's time is there
        assert not any(f"| {NATIVE} |" in line for line in in_readme), case.name
        if case.group != "lm":
            header = next(line.split(" | ") for line in table.splitlines() if NATIVE in line)
            (cells,) = (line.split(" | ") for line in in_readme)
            assert cells[header.index(NATIVE)] == cells[header.index("x smart-pytorch")] == ""


@pytest.mark.exhaustive
def test_right_kernels_get_a_speed(run_bench):
    """The other side of the tests above: nothing is wrong with the small table itself."""
    status, text, path = run_bench(TABLE, "all")
    assert status == 0
    assert "WRONG" not in text
    rows = [row for row in json.loads(path.read_text())["rows"] if row["contestant"] == NATIVE]
    assert len(rows) == len(TABLE)
    assert all(row["speed_low"] <= row["speed"] <= row["speed_high"] for row in rows)
    assert all(row["checked"].startswith("against the case's float64 reference: ") for row in rows)
