"""The bench: its table of cases, its refusal to time wrong results, its files and its command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
for package in ("smart_pytorch", "rich"):
    pytest.importorskip(package, reason=f"the bench needs {package}")

from bench import accuracy, cases, divergences, measure, peers, readme, regularizer, report, training  # noqa: E402
from bench.run import Row, plain_error, run_case  # noqa: E402
from bench.task import Contestant  # noqa: E402
from smart_fast.backends import select  # noqa: E402

CPU = torch.device("cpu")
SMALL = cases.divergence("sym_kl", (8, 5), torch.float32, "cpu")


def eager_and(*others):
    """Contestants without torch.compile, which would cost these tests seconds."""

    def entrants(task, device, backends):
        yield Contestant(peers.EAGER, "rival", task.call(task.smart_pytorch()))
        for name, change in others:
            yield Contestant(name, "ours", change(task.call(task.ours("torch"))), backend="torch")

    return entrants


def run_small(*others, case=SMALL):
    rows = run_case(case, CPU, [], seconds=0.01, entrants=eager_and(*others))
    return {row.contestant: row for row in rows}


def test_table_is_well_formed():
    names = [(case.name, tuple(case.where)) for case in cases.TABLE]
    assert len(set(names)) == len(names)
    without_bytes = regularizer.Regularizer, training.TrainingStep, divergences.LinearDivergence
    for case in cases.TABLE:
        assert case.group in cases.GROUPS
        assert set(case.where) <= {"quick", "cpu", "cuda"}
        assert (case.bytes is None) == (case.build.func in without_bytes)
        assert (case.flops is None) == (case.build.func is not divergences.LinearDivergence)
    for device, quick in ((CPU, True), (CPU, False), (torch.device("cuda"), True), (torch.device("cuda"), False)):
        chosen = cases.select(device, quick=quick)
        assert {case.group for case in chosen} == set(cases.GROUPS)
        assert len({case.name for case in chosen}) == len(chosen)
    assert all(case.group == "ops" for case in cases.select(CPU, groups=["ops"]))
    assert [case.name for case in cases.select(CPU, containing="POOLED")] == ["pooled head 768 to 3, [32, 768]"]


def test_bytes_that_must_move():
    by_hand = {
        cases.perturb((4, 6), torch.float32, "cpu").bytes: 4 * 6 * 4 * 2,  # read embed, write perturbed
        cases.ascend((4, 6), torch.bfloat16, "cpu").bytes: 4 * 6 * 2 * 3,  # read embed and gradient, write perturbed
        # Forward reads two tensors of logits, backward reads them again and writes two gradients.
        cases.divergence("kl", (4, 6), torch.float32, "cpu").bytes: 4 * 6 * 4 * (2 + 2 + 2),
        cases.lm_divergence("kl", (4, 6), torch.bfloat16, "cpu", backward=False).bytes: 4 * 6 * 2 * 2,
    }
    assert all(counted == expected for counted, expected in by_hand.items())


def test_flops_that_must_be():
    """Two GEMMs for the logits; for each matrix of gradients to them one for hidden states and one for the weight."""
    gemm = 2 * 4 * 5 * 6
    counted = {kind: cases.lm_linear(kind, 4, 5, 6, torch.float32, "cpu").flops for kind in ("kl", "sym_kl", "js")}
    assert counted == {"kl": 6 * gemm, "sym_kl": 4 * gemm, "js": 4 * gemm}
    assert measure.gemm_rate(CPU, torch.float32) > 1e9


every_kind = pytest.mark.parametrize(
    "case",
    [
        cases.perturb((64, 33), torch.float32, "cpu", variant="masked"),
        cases.perturb((64, 33), torch.float32, "cpu", variant="relative"),
        cases.perturb((64, 33), torch.bfloat16, "cpu"),
        cases.ascend((16, 33), torch.float32, "cpu"),
        cases.ascend((16, 33), torch.bfloat16, "cpu"),
        cases.ascend((16, 33), torch.float32, "cpu", update="paper"),
        *(cases.divergence(kind, (8, 5), torch.float32, "cpu") for kind in ("kl", "sym_kl", "js")),
        cases.divergence("js", (8, 500), torch.bfloat16, "cpu"),
        cases.direction((8, 50), torch.float32, "cpu"),
        cases.direction((8, 500), torch.bfloat16, "cpu"),
        cases.lm_divergence("sym_kl", (8, 500), torch.bfloat16, "cpu", backward=False),
        *(cases.divergence(kind, (8, 500), torch.float32, "cpu", "near") for kind in ("kl", "sym_kl", "js")),
        cases.divergence("sym_kl", (8, 500), torch.bfloat16, "cpu", "near"),
        cases.lm_linear("sym_kl", 8, 6, 50, torch.float32, "cpu", "near"),
        *(cases.lm_linear(kind, 8, 6, 50, torch.float32, "cpu") for kind in ("kl", "sym_kl", "js")),
        cases.lm_linear("sym_kl", 8, 16, 50, torch.bfloat16, "cpu"),
        cases.regularizer("head", (4, 16), "cpu", lambda: torch.nn.Linear(16, 3), needs=None),
    ],
    ids=lambda case: case.name,
)


@pytest.mark.exhaustive
@every_kind
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_fused_backends_pass_the_checks(case, backend):
    if reason := peers.smart_fast.available_backends()[backend]:
        pytest.skip(reason)
    if select(backend, torch.zeros(1)).name == "torch":
        pytest.skip(f"{backend} does not serve CPU tensors here")
    task = case.build(CPU)
    findings = task.check(task.call(task.ours(backend)), task.inputs(0), backend)
    assert not [found for found in findings if found.wrong]


@pytest.mark.exhaustive
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
    report.Report(
        report.environment(CPU), 1e10, rows=[ours], gemm_rates={"float32": 1e12, "bfloat16": 2e12}
    ).compare_with_limits()
    if case.bytes is not None:
        assert ours.copy_share == pytest.approx(case.bytes / ours.timing.median / 1e10)
    if case.flops is not None:
        peak = 1e12 if case.dtype == torch.float32 else 2e12
        assert ours.gemm_share == pytest.approx(case.flops / ours.timing.median / peak)
        assert report.rate(ours).endswith("GFLOP/s")


def off_by_one_percent(run):
    def wrong(*inputs):
        loss, *grads = run(*inputs)
        return loss, 1.01 * grads[0], *grads[1:]

    return wrong


def not_a_number(run):
    return lambda *inputs: tuple(t * float("nan") for t in run(*inputs))


def test_wrong_gradient_to_the_weight_gets_no_time():
    def without_the_target(run):
        return lambda input, target, weight: run(input, target.detach(), weight)

    def half(run):
        def wrong(*inputs):
            *right, weight = run(*inputs)
            return *right, weight / 2

        return wrong

    case = cases.lm_linear("sym_kl", 8, 6, 50, torch.float32, "cpu")
    rows = run_small(("smart-fast half", half), ("smart-fast without", without_the_target), case=case)
    assert rows["smart-fast half"].wrong.startswith("gradient to the weight off by 0.5")
    assert rows["smart-fast without"].skipped.startswith("failed")
    assert rows["smart-fast half"].timing is rows["smart-fast without"].timing is None


def test_linear_cases_run_ours_in_both_ways(native):
    task = cases.lm_linear("js", 8, 6, 50, torch.float32, "cpu").build(CPU)
    field = [each.name for each in peers.contestants(task, CPU, ["torch", "native"], compiling=False)]
    ours = ["smart-fast torch", "smart-fast native", "smart-fast native, whole logits"]
    assert [name for name in field if name.startswith(peers.OURS)] == ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_rows_are_those_of_a_perturbed_pass(dtype):
    for case in (
        cases.divergence("kl", (64, 1000), dtype, "cpu", "near"),
        cases.lm_linear("kl", 64, 32, 1000, dtype, "cpu", "near"),
    ):
        assert " near " in case.name
        x, t, *weight = (each.detach().double() for each in case.build(CPU).inputs(0))
        difference = (x - t) @ weight[0].t() if weight else x - t
        assert 0.005 < difference.std() < 0.02
        assert difference.abs().max() <= 1


def test_formulas_are_held_to_what_they_allow_on_near_rows_and_ours_to_the_tolerance_of_all():
    """A formula that cancels is timed with the error that it has; what no rounding explains is wrong for everyone."""
    task = cases.divergence("kl", (64, 3), torch.float32, "cpu", "near").build(CPU)
    inputs = task.inputs(0)
    exact = task.call(lambda x, t: task.exact(x.double(), t.double()))

    def off_by(share):
        return lambda *sides: [each * (1 + share) if index == 0 else each for index, each in enumerate(exact(*sides))]

    def loss_is_wrong(share, backend):
        return task.check(off_by(share), inputs, backend)[0].wrong

    assert [loss_is_wrong(0.005, backend) for backend in (None, "torch", "triton", "native")] == [0, 0, 1, 1]
    assert all(loss_is_wrong(0.5, backend) for backend in (None, "torch", "triton", "native"))
    far = cases.divergence("kl", (64, 3), torch.float32, "cpu").build(CPU)
    assert far.rounding() is None
    linear = cases.lm_linear("sym_kl", 16, 8, 50, torch.float32, "cpu", "near").build(CPU)
    inputs = linear.inputs(0)
    theirs, ours = (
        [each.tolerance for each in linear.check(linear.call(linear.smart_pytorch()), inputs, backend)]
        for backend in (None, "native")
    )
    assert all(one > other for one, other in zip(theirs, ours, strict=True))


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
        return lambda embed, mask, unit: embed + 0.1

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


def test_json_of_other_versions(tmp_path):
    """Fields that an older version did not write have defaults; those that only a newer one knows are passed over."""
    written = report.Report(report.environment(CPU), 2.5e10, 0.5, [Row("case", "ops", "smart-fast torch", "ours")])
    path = tmp_path / "results.json"
    report.save_json(written, path)
    content = json.loads(path.read_text())
    del content["gemm_rates"], content["rows"][0]["note"], content["rows"][0]["flops"]
    content["rows"][0]["from_the_future"] = content["from_the_future"] = 1
    path.write_text(json.dumps(content))
    assert report.load_json(path) == written


@pytest.mark.parametrize(
    ("older", "name"),
    [
        ("js fwd+bwd [32, 3] fp32", "js fwd+bwd far [32, 3] fp32"),
        ("overhead, kl fwd+bwd [1, 4] fp32", "overhead, kl fwd+bwd far [1, 4] fp32"),
        ("lm-divergence sym_kl fwd [8, 5] bf16", "lm-divergence sym_kl fwd far [8, 5] bf16"),
        ("lm-linear kl [8, 6] x [6, 50] fp32", "lm-linear kl far [8, 6] x [6, 50] fp32"),
        ("js fwd+bwd near [32, 3] fp32", "js fwd+bwd near [32, 3] fp32"),
        ("perturb [32, 3] fp32", "perturb [32, 3] fp32"),
    ],
)
def test_older_results_did_not_name_their_regime(older, name, tmp_path):
    path = tmp_path / "results.json"
    rows = [Row(older, "ops", "smart-fast torch", "ours")]
    report.save_json(report.Report(report.environment(CPU), rows=rows, left_out=[older]), path)
    loaded = report.load_json(path)
    assert loaded.rows[0].case == loaded.left_out[0] == name


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.plots import save_plots

    rows = list(run_small(("smart-fast torch", lambda run: run)).values())
    summary = report.Report(report.environment(CPU), 1e10, rows=rows)
    summary.compare_with_limits()
    written = save_plots(summary, tmp_path / "speed.png")
    assert [path.name for path in written] == ["speed.png", "speed-limit.png"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_geometric_mean():
    rows = [Row(f"case {n}", "ops", "smart-fast torch", "ours", speed=speed) for n, speed in enumerate((0.5, 8.0))]
    assert report.geometric_means(rows) == {("ops", "smart-fast torch"): (pytest.approx(2.0), 2)}


def test_host_overheads():
    def row(contestant, median, case="overhead, head", group="overhead"):
        timing = measure.Timing(median, median, median, 1, 1)
        return Row(case, group, contestant, "ours", timing=timing)

    rows = [row(peers.EAGER, 10.0), row(peers.MODEL_ONLY, 4.0), row(peers.COMPILED, 9.0), row("smart-fast torch", 7.0)]
    rows += [row(peers.EAGER, 1.0, "overhead, kl"), row(peers.MODEL_ONLY, 1.0, "head", "regulariser")]
    assert report.host_overheads(rows) == {("overhead, head", "smart-fast torch"): pytest.approx(0.5)}


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


@pytest.mark.exhaustive
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
        (["training"], "invalid choice"),
        (["ops", "report"], "go with no other group"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_command_line_errors_are_clear(arguments, message, capsys):
    from bench.__main__ import main

    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.exhaustive
def test_command_line_takes_several_groups():
    done = cli("lm", "overhead", "--list", "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines() if re.match(r"\S+ .*\[", line)} == {"lm", "overhead"}


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
    """Every number in the tables of README and docs comes from bench/results."""
    copy_pages(tmp_path)
    for page, text in readme.write(tmp_path).items():
        assert text == (readme.ROOT / page).read_text(), page
    written = [marker for markers in readme.PAGES.values() for marker in markers]
    assert set(written) == set(readme.sections())


def test_figures_are_made_of_the_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import figures, headline, style
    from bench.finetune import figures as finetune_figures

    folder = readme.ROOT / "docs" / "images"
    finetuned = set(folder.glob("finetune-*.svg"))
    for path in finetuned:
        assert finetune_figures.digest(readme.RESULTS / "finetune.jsonl") in path.read_text(), path.name
    committed = sorted({*folder.glob("*.svg")} - finetuned)
    assert len(committed) == 8
    for path in committed:
        assert figures.digest(readme.RESULTS) in path.read_text(), f"{path.name} is older: python -m bench report"
    report_ = headline.report_of([report.load_json(path) for path in sorted(readme.RESULTS.glob("speed-*.json"))])
    assert len(headline.table(report_)) == 1 + len(headline.CASES) <= 9
    with style.styled(style.DARK):
        drawn = figures.memory(report_, style.DARK)
        style.save(drawn, tmp_path / "memory.svg", "made of it")
    assert "made of it" in (tmp_path / "memory.svg").read_text()


def copy_pages(root: Path) -> None:
    for page in readme.PAGES:
        (root / page).parent.mkdir(parents=True, exist_ok=True)
        (root / page).write_text((readme.ROOT / page).read_text())


def test_readme_takes_what_was_measured_last(tmp_path: Path) -> None:
    def save(date: str, **medians: float) -> None:
        rows = [
            Row(case, "ops", name, "rival", measure.Timing(median, median, median, 2, 1))
            for case, median in medians.items()
            for name in (peers.EAGER, "smart-fast torch")
        ]
        environment = {**report.environment(CPU), "device": "one", "date": date}
        report.save_json(report.Report(environment, 1e10, rows=rows), tmp_path / f"speed-{date[:10]}.json")

    save("2026-01-02T00:00:00+00:00", first=1.0, second=2.0)
    save("2026-01-01T00:00:00+00:00", first=3.0, third=4.0)
    (tmp_path / "accuracy.json").write_text((readme.RESULTS / "accuracy.json").read_text())
    table = readme.sections(tmp_path)["speed"]
    assert "| first | 1.00 s |" in table
    assert "| second | 2.00 s |" in table
    assert "| third | 4.00 s |" in table
    assert "3.00 s" not in table


def test_readme_table_of_language_models(tmp_path: Path) -> None:
    """Cases of the group lm get a table of their own, with memory; a peer that computes something else is marked."""
    assert readme.sections()["speed-lm"]
    fast, ours = measure.Timing(0.1, 0.1, 0.1, 2, 1), "smart-fast torch"
    rows = [
        Row("case", "lm", peers.EAGER, "rival", measure.Timing(0.2, 0.2, 0.2, 2, 1), peak=4 << 20, speed=1.0),
        Row("case", "lm", "Liger-Kernel X", "other", fast, peak=2 << 20, note="half of it"),
        Row("case", "lm", ours, "ours", fast, peak=1 << 20, speed=2.0, dtype="float32", flops=5 * 10**9),
    ]
    written = report.Report(report.environment(CPU), 1e10, rows=rows, gemm_rates={"float32": 1e11})
    written.compare_with_limits()
    report.save_json(written, tmp_path / "speed-x.json")
    accuracy.save([], report.environment(CPU), tmp_path / "accuracy.json")
    made = readme.sections(tmp_path)
    assert made["speed"] == ""
    assert "| case | smart-fast torch | 100 ms | 2.00 | 1 MiB | 25% | 50 GFLOP/s | 50% |" in made["speed-lm"]
    assert "| case | Liger-Kernel X (*) | 100 ms |  | 2 MiB | 50% |  |  |" in made["speed-lm"]
    assert "(*) Liger-Kernel X: half of it." in made["speed-lm"]
