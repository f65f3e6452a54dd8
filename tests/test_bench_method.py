"""How the bench measures: intervals of medians and of speeds, when it stops, host time, energy, two runs compared."""

from __future__ import annotations

import functools
import itertools
import json
import random
import statistics
import sys
import time
import types
from pathlib import Path

import pytest
import torch

for package in ("smart_pytorch", "rich"):
    pytest.importorskip(package, reason=f"the bench needs {package}")

from bench import accuracy, cases, compare, energy, measure, peers, readme, report  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.measure import Samples, Timing, interval, speed_interval  # noqa: E402
from bench.run import Row, run_case  # noqa: E402
from bench.task import Contestant  # noqa: E402

CPU = torch.device("cpu")
SMALL = cases.divergence("sym_kl", (8, 5), torch.float32, "cpu")


@pytest.mark.parametrize("count", [6, 7, 10, 25, 60, 200])
def test_interval_is_the_binomial_one(count):
    """Both ends are as far inside as they may be for 95 %."""
    binom = pytest.importorskip("scipy.stats").binom
    low, high = interval(random.Random(0).sample(range(count), count))
    assert low + high == count - 1  # the same number left out at either end
    assert binom.cdf(low, count, 0.5) <= 0.025 < binom.cdf(low + 1, count, 0.5)


def test_interval_of_few_values_is_their_range():
    assert interval([3.0]) == (3.0, 3.0)
    assert interval([5.0, 1.0, 2.0, 3.0, 4.0]) == (1.0, 5.0)


def test_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(1)
    intervals = [interval([draw.lognormvariate(0, 1) for _ in range(25)]) for _ in range(2000)]
    assert sum(low <= 1.0 <= high for low, high in intervals) >= 0.94 * 2000


def test_speed_interval_is_free_of_what_slows_both():
    draw = random.Random(2)
    slow = [1 + draw.random() for _ in range(40)]  # other work, round by round
    rival, mine = Samples([2 * each for each in slow], 1), Samples(slow, 1)
    assert speed_interval([rival], mine) == (2.0, 2.0)
    assert interval(rival.seconds)[1] / interval(mine.seconds)[0] > 2.1


def test_speed_interval_knows_that_another_rival_may_be_the_fastest():
    draw = random.Random(3)
    first, second = (Samples([1 + draw.random() for _ in range(20)], 1) for _ in range(2))
    fastest = min(first, second, key=lambda each: statistics.median(each.seconds))
    low, high = speed_interval([first, second], fastest)
    assert low < 1.0 == high


def test_speed_interval_holds_the_ratio_of_the_medians():
    rival, mine = Samples([1.0, 2.0, 9.0], 1), Samples([3.0, 1.0, 3.0], 1)
    low, high = speed_interval([rival], mine)
    assert low <= 2.0 / 3.0 <= high


def fake_samples(monkeypatch, draw):
    """Samples that take no time; how many rounds two runs get."""
    monkeypatch.setattr(measure, "_sample", lambda run, turn, calls, device: draw())
    found = measure.interleaved_samples({"a": None, "b": None}, [()], CPU, seconds=60.0)
    return [len(each.seconds) for each in found.values()]


def test_steady_runs_end_early(monkeypatch):
    assert fake_samples(monkeypatch, lambda: 1.0) == [measure.TIGHT_SAMPLES] * 2


def test_unsteady_runs_go_on(monkeypatch):
    assert (
        fake_samples(monkeypatch, functools.partial(random.Random(4).lognormvariate, 0, 1)) == [measure.MAX_SAMPLES] * 2
    )


def test_host_time_is_of_the_call_alone():
    done = measure.host_time(lambda seconds: time.sleep(seconds), [(0.002,), (0.003,)], CPU)
    assert 0.002 <= done < 0.1


def contestants(task, device, backends):
    run = task.call(task.smart_pytorch())
    yield Contestant(peers.EAGER, "rival", run, note="theirs")
    yield Contestant("smart-fast torch", "ours", task.call(task.ours("torch")), backend="torch")
    yield Contestant("part", "part", run)


def test_rows_hold_intervals_and_what_was_checked():
    rows = {row.contestant: row for row in run_case(SMALL, CPU, [], seconds=0.05, entrants=contestants)}
    ours, theirs = rows["smart-fast torch"], rows[peers.EAGER]
    assert ours.speed_low <= ours.speed <= ours.speed_high
    assert theirs.speed_low == theirs.speed == theirs.speed_high == 1.0
    assert rows["part"].speed_low is None
    assert all(row.timing.low <= row.timing.median <= row.timing.high for row in rows.values())
    assert theirs.note == "theirs"
    assert ours.checked.startswith("against the case's float64 reference: loss off by ")
    assert "gradient to the target off by" in ours.checked
    assert rows["part"].checked is None
    assert ours.host is ours.energy is None


def row(case="case", contestant="smart-fast torch", speed=None, low=None, high=None, role="ours", median=0.1, **more):
    timing = Timing(median, median, median, 9, 1, median, median)
    return Row(case, "ops", contestant, role, timing, speed=speed, speed_low=low, speed_high=high, **more)


@pytest.mark.parametrize(
    ("speed", "low", "high", "text"),
    [
        (1.95, 1.8, 2.1, "1.95 (1.80-2.10)"),
        (1.95, 1.94, 1.97, "1.95"),
        (1.95, 1.94, 2.0, "1.95 (1.94-2.00)"),
        (1.95, None, None, "1.95"),
        (None, None, None, ""),
    ],
)
def test_wide_intervals_are_printed(speed, low, high, text):
    assert report.speed_text(row(speed=speed, low=low, high=high)) == text


def test_table_with_host_time_and_energy(capsys):
    rows = [row(speed=1.5, low=1.2, high=1.9, host=12e-6, energy=2.5e-3), row("other", speed=1.0)]
    report.show(report.Report(report.environment(CPU), rows=rows), report.Console(width=160))
    shown = capsys.readouterr().out
    assert "1.50 (1.20-1.90)" in shown
    assert "12.0 us" in shown
    assert "2.5 mJ" in shown
    report.show(report.Report(report.environment(CPU), rows=rows[1:]), report.Console(width=160))
    assert not {"host", "energy"} & set(capsys.readouterr().out.split())


def test_notes_stand_once_below_the_table(capsys):
    rows = [row(case, "mt-dnn X", role="other", note="half of it") for case in ("one", "two")]
    rows += [row("one", peers.EAGER, role="rival", note="theirs"), row("one", note="ours")]
    absent = [Row("one", "ops", f"Liger-Kernel {name}", "rival", skipped="no GPU") for name in "AB"]
    report.show(report.Report(report.environment(CPU), rows=rows + absent), report.Console(width=160))
    shown = capsys.readouterr().out
    assert shown.count("mt-dnn X: half of it") == 1
    assert "theirs" not in shown
    assert "ours" not in shown
    assert shown.count("not run: Liger-Kernel A, Liger-Kernel B: no GPU") == 1


def save(path, *rows, device="one", busy=None):
    environment = {**report.environment(CPU), "device": device}
    report.save_json(report.Report(environment, 1e10, busy, list(rows)), path)
    return str(path)


def test_readme_prints_wide_intervals(tmp_path):
    rival = row(contestant=peers.EAGER, role="rival", speed=1.0, low=1.0, high=1.0, median=0.2)
    save(tmp_path / "speed-x.json", rival, row(speed=2.0, low=1.5, high=2.25))
    accuracy.save([], report.environment(CPU), tmp_path / "accuracy.json")
    made = readme.sections(tmp_path)["speed"]
    assert "| x smart-pytorch | x torch.compile | x the fastest rival | floor |" in made
    assert "| case | 200 ms |  | 100 ms | 2.00 |  | 2.00 (1.50-2.25) |  |" in made
    save(tmp_path / "speed-x.json", row(contestant=peers.EAGER, role="rival", speed=1.0), row(speed=2.0))
    assert "the fastest rival |" not in readme.sections(tmp_path)["speed"]  # as older results are rendered


def verdicts(first, second):
    env = report.environment(CPU)
    found = compare.compare(report.Report(env, rows=first), report.Report(env, rows=second))
    return [(round(each.difference, 3), each.verdict) for each in found]


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ((2.0, 1.99, 2.01), (2.19, 2.18, 2.2), compare.WITHIN),
        ((2.19, 2.18, 2.2), (2.0, 1.99, 2.01), compare.WITHIN),
        ((2.0, 1.8, 2.5), (3.0, 2.4, 3.1), compare.SPREAD),
        ((3.0, 2.4, 3.1), (2.0, 1.8, 2.5), compare.SPREAD),
        ((2.0, 1.8, 2.3), (3.0, 2.4, 3.1), compare.SPREAD),  # 4 % apart
        ((2.0, 1.8, 2.1), (3.0, 2.4, 3.1), compare.DISAGREE),
        ((3.0, 2.4, 3.1), (2.0, 1.8, 2.1), compare.DISAGREE),
        ((2.0, None, None), (3.0, 2.4, 3.1), compare.DISAGREE),
        ((2.0, None, None), (3.0, 1.9, 3.1), compare.SPREAD),
    ],
)
def test_verdicts(first, second, verdict):
    difference = round(second[0] / first[0] - 1, 3)
    assert verdicts([row("a", "x", *first)], [row("a", "x", *second)]) == [(difference, verdict)]


def test_only_what_both_runs_have_is_compared():
    first = [row("a", speed=1.0), row("b", speed=1.0), row("c"), row("d", "else", 1.0)]
    second = [row("d", speed=1.0), row("c", speed=1.0), row("a", speed=1.05)]
    assert verdicts(first, second) == [(0.05, compare.WITHIN)]
    with pytest.raises(ValueError, match="no case in common"):
        verdicts(first[1:2], second)


def test_compare_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    rival = row(contestant=peers.EAGER, role="rival", speed=1.0)
    one = save(tmp_path / "one.json", rival, row(speed=2.0, low=1.9, high=2.5))
    spread = save(tmp_path / "spread.json", rival, row(speed=3.0, low=2.4, high=3.1), busy=0.5)
    apart = save(tmp_path / "apart.json", rival, row(speed=3.0, low=2.9, high=3.1))
    assert main(["compare", one, spread]) == 0
    shown = capsys.readouterr().out
    assert "2 ratios in both runs: 1 within 10 %, 1 explained by the spread, 0 DISAGREE" in shown
    assert "2.00 (1.90-2.50)   3.00 (2.40-3.10)       +50.0%   explained by the spread" in shown
    assert "busy with other work in the second run (50%)" in shown
    assert main(["compare", one, apart]) == 1
    assert "1 DISAGREE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "takes two JSON files"),
        (["compare", "one.json"], "takes two JSON files"),
        (["ops", "one.json"], "takes two JSON files"),
        (["compare", "ops", "one.json", "two.json"], "go with no other group"),
        (["compare", "one.json", "missing.json"], "missing.json: No such file"),
        (["compare", "one.json", "broken.json"], "holds no results of the bench"),
        (["compare", "one.json", "foreign.json"], "holds no results of the bench"),
        (["compare", "one.json", "list.json"], "holds no results of the bench"),
        (["compare", "one.json", "gpu.json"], "two devices, 'one' and 'another'"),
        (["compare", "one.json", "empty.json"], "no case in common"),
    ],
)
def test_compare_errors_are_clear(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("one.json"), row(speed=1.0))
    save(Path("gpu.json"), row(speed=1.0), device="another")
    save(Path("empty.json"))
    Path("broken.json").write_text("{")
    Path("foreign.json").write_text(json.dumps({"schema": 7}))
    Path("list.json").write_text("[]")
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_joules_of_a_loop_that_is_long_enough():
    calls = []
    found = energy.joules_per_call(calls.append, [(1,), (2,)], CPU, lambda: 0.5 * len(calls), seconds=0.01)
    assert len(calls) == 0.3 / 0.01
    assert found == pytest.approx(0.5)
    assert calls[:3] == [1, 2, 1]


def rapl(folder, name, joules, full):
    package = folder / name
    package.mkdir(exist_ok=True)
    (package / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")
    (package / "max_energy_range_uj").write_text(f"{full * 1e6:.0f}\n")


def test_energy_of_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.counter(CPU) is None
    rapl(tmp_path, "intel-rapl:0", 90, 100)
    rapl(tmp_path, "intel-rapl:0:0", 7, 100)  # a part of the first
    rapl(tmp_path, "intel-rapl:1", 5, 100)
    count = energy.counter(CPU)
    before = count()
    rapl(tmp_path, "intel-rapl:0", 20, 100)  # it has started over
    rapl(tmp_path, "intel-rapl:0:0", 99, 100)
    rapl(tmp_path, "intel-rapl:1", 6, 100)
    assert count() - before == pytest.approx(31, abs=1e-4)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert energy.counter(CPU) is None


def test_energy_of_a_gpu(monkeypatch):
    """NVML's counter of the device that torch means, in millijoules; none without NVML."""
    known = {"GPU-abc": 12345}
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name if name in known else 1 / 0,
        nvmlDeviceGetTotalEnergyConsumption=known.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="abc"))
    assert energy.counter(device)() == pytest.approx(12.345)
    known.clear()
    assert energy.counter(device) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.counter(device) is None


def test_energy_gets_into_the_rows(monkeypatch):
    monkeypatch.setattr(energy, "MIN_SECONDS", 0.01)
    ticks = itertools.count()
    rows = run_case(SMALL, CPU, [], seconds=0.01, entrants=contestants, count=lambda: float(next(ticks)))
    assert all(0 < each.energy <= 1 for each in rows)


@pytest.mark.exhaustive
def test_energy_option(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(energy, "MIN_SECONDS", 0.01)
    monkeypatch.setattr(cases, "TABLE", (SMALL,))
    monkeypatch.setattr(peers, "contestants", lambda task, device, backends, **options: contestants(task, device, []))
    monkeypatch.setattr(report, "copy_bandwidth", lambda device, size: 1e10)
    options = ["--device", "cpu", "--backends", "torch", "--seconds", "0.01", "--energy"]
    options += ["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]
    for counter, said in ((lambda device: time.perf_counter, "mJ"), (lambda device: None, "nothing here counts")):
        monkeypatch.setattr(energy, "counter", counter)
        monkeypatch.setattr("bench.__main__.START", time.perf_counter())
        monkeypatch.setattr("signal.signal", lambda *handler: None)
        assert main(["ops", *options]) == 0
        assert said in capsys.readouterr().out
