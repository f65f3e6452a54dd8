"""The bench: its table of cases, its refusal to time wrong results, its files and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
for package in ("smart_pytorch", "rich"):
    pytest.importorskip(package, reason=f"the bench needs {package}")
if str(ROOT) not in sys.path:  # bench/ is not installed: it runs from the repository
    sys.path.insert(0, str(ROOT))

from bench import accuracy, cases, liger, measure, peers, readme, regularizer, report  # noqa: E402
from bench.language_model import LinearDivergence  # noqa: E402
from bench.run import Row, plain_error, run_case  # noqa: E402
from smart_fast.backends import select  # noqa: E402

CPU = torch.device("cpu")
SMALL = cases.divergence("sym_kl", (8, 5), torch.float32, "cpu")


def eager_and(*others):
    """Contestants without torch.compile, which would cost these tests seconds."""

    def entrants(task, device, backends):
        yield peers.Contestant(peers.EAGER, "rival", task.call(task.smart_pytorch()))
        for name, change in others:
            yield peers.Contestant(name, "ours", change(task.call(task.ours("torch"))), backend="torch")

    return entrants


def run_small(*others, case=SMALL):
    rows = run_case(case, CPU, [], seconds=0.01, entrants=eager_and(*others))
    return {row.contestant: row for row in rows}


def test_table_is_well_formed():
    names = [(case.name, tuple(case.where)) for case in cases.TABLE]
    assert len(set(names)) == len(names)
    for case in cases.TABLE:
        assert case.group in cases.GROUPS
        assert set(case.where) <= {"quick", "cpu", "cuda"}
        assert (case.bytes is None) == (case.build.func in (regularizer.Regularizer, LinearDivergence))
        assert (case.flops is None) == (case.build.func is not LinearDivergence)
    for device, quick in ((CPU, True), (CPU, False), (torch.device("cuda"), True), (torch.device("cuda"), False)):
        chosen = cases.select(device, quick=quick)
        assert {case.group for case in chosen} == set(cases.GROUPS)
        assert len({case.name for case in chosen}) == len(chosen)
    assert all(case.group == "ops" for case in cases.select(CPU, group="ops"))
    assert [case.name for case in cases.select(CPU, containing="POOLED")] == ["pooled head 768 to 3, [32, 768]"]


def test_bytes_that_must_move():
    by_hand = {
        cases.perturb((4, 6), torch.float32, "cpu").bytes: 4 * 6 * 4 * 2,  # read embed, write perturbed
        cases.ascend((4, 6), torch.bfloat16, "cpu").bytes: 4 * 6 * 2 * 3,  # read embed and gradient, write perturbed
        # Forward reads two tensors of logits, backward reads them again and writes two gradients.
        cases.divergence("kl", (4, 6), torch.float32, "cpu").bytes: 4 * 6 * 4 * (2 + 2 + 2),
    }
    assert all(counted == expected for counted, expected in by_hand.items())


every_kind = pytest.mark.parametrize(
    "case",
    [
        cases.perturb((64, 33), torch.float32, "cpu", masked=True),
        cases.perturb((64, 33), torch.bfloat16, "cpu"),
        cases.ascend((16, 33), torch.float32, "cpu"),
        cases.ascend((16, 33), torch.bfloat16, "cpu"),
        *(cases.divergence(kind, (8, 5), torch.float32, "cpu") for kind in ("kl", "sym_kl", "js")),
        cases.divergence("js", (8, 500), torch.bfloat16, "cpu"),
        cases.lm_linear("sym_kl", 8, 4, 50, torch.float32, "cpu"),
        cases.lm_linear("kl", 8, 4, 50, torch.bfloat16, "cpu"),
        cases.regularizer("head", (4, 16), "cpu", lambda: torch.nn.Linear(16, 3), needs=None),
    ],
    ids=lambda case: case.name,
)


@every_kind
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_fused_backends_pass_the_checks(case, backend):
    if reason := peers.smart_fast.available_backends()[backend]:
        pytest.skip(reason)
    if select(backend, torch.zeros(1)) is None:
        pytest.skip(f"{backend} does not serve CPU tensors here")
    task = case.build(CPU)
    findings = task.check(task.call(task.ours(backend)), task.inputs(0), backend)
    assert not [found for found in findings if found.wrong]


@every_kind
def test_right_results_are_timed(case):
    rows = run_small(("smart-fast torch", lambda run: run), case=case)
    for row in rows.values():
        assert row.wrong is None
        assert row.skipped is None
        assert row.timing.median > 0
        assert row.timing.q1 <= row.timing.median <= row.timing.q3
        assert row.peak > 0
    ours, rival = rows["smart-fast torch"], rows[peers.EAGER]
    assert ours.speed == pytest.approx(rival.timing.median / ours.timing.median)
    if case.bytes is not None:
        summary = report.Report(report.environment(CPU), rows=[ours])
        summary.compare_with_copies([1e9, 1e10])
        assert summary.copy_rate == 1e10
        assert ours.copy_share == pytest.approx(case.bytes / ours.timing.median / 1e10)


def test_floors_of_gemms():
    """Two GEMMs of logits and, for gradients, two (kl: four) more; related to a GEMM of the same run."""
    case = cases.lm_linear("sym_kl", 8, 4, 50, torch.float32, "cpu")
    assert case.flops == 4 * 2 * 8 * 4 * 50
    assert cases.lm_linear("kl", 8, 4, 50, torch.float32, "cpu").flops == 6 * 2 * 8 * 4 * 50
    summary = report.Report(
        report.environment(CPU), rows=list(run_small(("smart-fast torch", lambda run: run), case=case).values())
    )
    summary.compare_with_gemms(case, lambda dtype: 1e12)
    assert summary.gemm_rates == {"float32": 1e12}
    for row in summary.rows:
        assert row.gemm_share == pytest.approx(case.flops / row.timing.median / 1e12)
    assert measure.gemm_rate(CPU, torch.float32) > 1e9


def test_other_work_is_checked_by_itself_and_nobodys_rival():
    task = SMALL.build(CPU)
    double = liger._check(lambda x, t: ((x + t).sum().detach(), torch.ones_like(x), torch.ones_like(t)))

    def entrants(task, device, backends):
        yield peers.Contestant(peers.EAGER, "rival", task.call(task.smart_pytorch()))
        run = task.call(lambda x, t: (x + t).sum())
        yield peers.Contestant("other", "other", run, check=double)
        yield peers.Contestant("wrong", "other", off_by_one_percent(run), check=double)

    rows = {row.contestant: row for row in run_case(SMALL, CPU, [], seconds=0.01, entrants=entrants)}
    assert rows["other"].timing.median > 0
    assert rows["other"].speed is None
    assert rows["wrong"].timing is None
    assert rows["wrong"].wrong
    assert rows[peers.EAGER].speed == 1
    names = [
        name for name, _, _ in liger.contestants(cases.divergence("kl", (8, 5), torch.float32, "cpu").build(CPU), CPU)
    ]
    assert names == ["Liger-Kernel KLDiv (gradient to input only)"]
    assert not list(liger.contestants(task, CPU))
    assert liger.why_not(CPU)


@pytest.mark.parametrize("exact", [liger._exact_kl, liger._exact_jsd])
def test_what_others_compute(exact):
    """Non-negative, zero for equal logits, and differentiable in the input alone."""
    x, t = (torch.randn(4, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, gradient = exact(x, t)
    assert loss > 0
    assert gradient.shape == x.shape
    assert exact(x, x.detach())[0].abs() < 1e-12


def off_by_one_percent(run):
    def wrong(*inputs):
        loss, *grads = run(*inputs)
        return loss, 1.01 * grads[0], *grads[1:]

    return wrong


def not_a_number(run):
    return lambda *inputs: tuple(t * float("nan") for t in run(*inputs))


@pytest.mark.parametrize("change", [off_by_one_percent, not_a_number])
def test_wrong_result_gets_no_time(change, capsys):
    rows = run_small(("smart-fast wrong", change))
    wrong = rows["smart-fast wrong"]
    assert "gradient to the input" in wrong.wrong
    assert wrong.timing is None
    assert wrong.speed is None
    assert wrong.bandwidth is None
    assert wrong.peak is None
    assert rows[peers.EAGER].timing is not None

    shown = report.Report(report.environment(CPU), rows=[wrong])
    report.show(shown, report.Console(width=120))
    line = next(line for line in capsys.readouterr().out.splitlines() if "smart-fast wrong" in line)
    assert "WRONG" in line
    assert not any(unit in line for unit in (" us", " ms", " s "))


def test_wrong_noise_gets_no_time():
    def constant(run):
        return lambda embed, mask: embed + 0.1

    rows = run_small(("smart-fast wrong", constant), case=cases.perturb((64, 33), torch.float32, "cpu"))
    assert "mean of the noise" in rows["smart-fast wrong"].wrong
    assert rows["smart-fast wrong"].timing is None


def test_a_contestant_that_raises_is_named_not_timed():
    def failing(run):
        def raises(*inputs):
            raise RuntimeError("no compiler at /usr/some/where\nsecond line")

        return raises

    row = run_small(("smart-fast failing", failing))["smart-fast failing"]
    assert row.skipped == "failed: RuntimeError: no compiler at (path)"
    assert row.timing is None
    assert plain_error(ValueError()) == "ValueError: "


def test_interpreted_kernels_are_never_timed(monkeypatch):
    monkeypatch.setattr(peers.smart_fast, "available_backends", lambda: {"torch": None, "triton": None})
    assert "TRITON_INTERPRET" in peers.why_not("triton", CPU)
    assert peers.why_not("torch", CPU) is None


def test_json_round_trip(tmp_path):
    rows = list(run_small(("smart-fast torch", lambda run: run)).values())
    rows.append(Row("another", "ops", "smart-fast triton", "ours", skipped="no GPU"))
    written = report.Report(report.environment(CPU), 2.5e10, 0.5, rows, ["left out"])
    path = tmp_path / "folder" / "results.json"
    report.save_json(written, path)
    assert report.load_json(path) == written
    content = json.loads(path.read_text())
    assert {"python", "torch", "triton", "smart_fast"} <= set(content["environment"]["versions"])
    assert str(ROOT) not in path.read_text()
    assert [mean["contestant"] for mean in content["geometric_means"]] == [peers.EAGER, "smart-fast torch"]


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.plots import save_plots

    rows = list(run_small(("smart-fast torch", lambda run: run)).values())
    summary = report.Report(report.environment(CPU), rows=rows)
    summary.compare_with_copies([1e10])
    written = save_plots(summary, tmp_path / "speed.png")
    assert [path.name for path in written] == ["speed.png", "speed-bandwidth.png"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_geometric_mean():
    rows = [Row(f"case {n}", "ops", "smart-fast torch", "ours", speed=speed) for n, speed in enumerate((0.5, 8.0))]
    assert report.geometric_means(rows) == {("ops", "smart-fast torch"): (pytest.approx(2.0), 2)}


def test_peak_memory_counts_what_is_alive_at_once():
    def two_at_a_time(x):
        first = x + 1
        second = first + 1
        del first
        return second + 1

    x = torch.zeros(1 << 18)
    peak = measure.peak_memory(two_at_a_time, (x,), CPU)
    assert 2 * x.nbytes <= peak < 2 * x.nbytes + 4096


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234567, "1.23 s"), (0.01234, "12.3 ms"), (12.3e-6, "12.3 us"), (0.5, "500 ms")]
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


def cli(*arguments):
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_command_line_lists_the_cases():
    done = cli("--list", "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for case in cases.select(CPU, quick=True):
        assert case.name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "no such case"], "no such case"),
        (["--backends", "cudnn"], "choose from torch, triton, native"),
        (["--seconds", "0"], "must be positive"),
        (["lm"], "invalid choice"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_command_line_errors_are_clear(arguments, message, capsys):
    from bench.__main__ import main

    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_accuracy_table() -> None:
    results = [accuracy.Accuracy("kl", 1e-2, name, loss, 0, 1e-6) for name, loss in (("theirs", 1e-3), ("ours", 1e-7))]
    header, row = accuracy.table(results)
    assert header[2:5] == ["theirs: loss", "theirs: rows < 0", "theirs: gradient"]
    assert row == ["1e-02", "kl", "1e-03", "0 of 8", "1e-06", "1e-07", "0 of 8", "1e-06"]


def test_accuracy_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "DIFFERENCES", (1e-2,))
    monkeypatch.setattr(accuracy, "VOCABULARY", 500)
    found = {each.contestant: each for each in accuracy.measure(CPU, ["triton"]) if each.kind == "sym_kl"}
    assert found[peers.EAGER].loss > 1e-5 > found[peers.OURS + "triton"].loss
    assert found[peers.EAGER].gradient > 1e-6 > found[peers.OURS + "triton"].gradient


def test_readme_holds_the_committed_results(tmp_path: Path) -> None:
    """Every number in the README's tables comes from bench/results."""
    copy = tmp_path / "README.md"
    copy.write_text(readme.README.read_text())
    assert readme.write(copy) == readme.README.read_text()
