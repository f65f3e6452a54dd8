"""Launch choices from data: tables as launches read them, and the sweep that writes them, by a clock made up here."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
for package in ("smart_pytorch", "rich", "triton"):
    pytest.importorskip(package, reason=f"sweeps need {package}")

from smart_fast.kernels import launch, tuning  # noqa: E402
from smart_fast.kernels.launch import Choice, Tile  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from bench import tune, tune_candidates, tune_targets  # noqa: E402
from bench.measure import Timing  # noqa: E402
from smart_fast import kl_loss  # noqa: E402
from smart_fast.backends import triton_launch as ops  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAME = ops.device_name(DEVICE)
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch):
    """Whatever the package holds for this machine's GPU."""
    monkeypatch.setenv(tuning.VARIABLE, "off")
    ops._table.cache_clear()
    yield
    ops._table.cache_clear()


@pytest.fixture
def long_rows(monkeypatch):
    """Rows of more than 1024 are long, and a GPU has four multiprocessors: loops and shared rows at sizes that the
    interpreter can do."""
    monkeypatch.setattr(launch, "MAX_BLOCK", 1024)
    monkeypatch.setattr(launch, "LOOP_BLOCK", 512)
    monkeypatch.setattr(ops, "_processors", lambda device: 4)


def entry(kernel="ascend", choice=None, widths=(1, None), itemsize=4):
    choice = choice or Choice(16, 1, 2)
    return {"kernel": kernel, "itemsize": itemsize, "widths": list(widths), "choice": choice and choice._asdict()}


def content(*entries, **changes):
    return {"schema": 1, "device": NAME, "entries": list(entries)} | changes


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Launch by a table from now on: its content, or what stands in its file."""

    def use(table):
        path = tmp_path / "table.json"
        path.write_text(table if isinstance(table, str) else json.dumps(table))
        monkeypatch.setenv(tuning.VARIABLE, str(path))
        ops._table.cache_clear()

    return use


class Recorder:
    """A launchers' ``wrap``: keeps the tile of every launch, and launches if it is to."""

    def __init__(self, launches=True):
        self.tiles, self.launches = {}, launches

    def __call__(self, kernel):
        recorder = self

        class Launcher:
            def __getitem__(self, grid):
                def run(*args, **options):
                    tile = (options["ROWS"], options.get("BLOCK"), options.get("BLOCKS"), options["num_warps"])
                    recorder.tiles[kernel.fn.__name__] = (*tile, options.get("STAGES"))
                    if recorder.launches:
                        kernel[grid](*args, **options)

                return run

        return Launcher()


def tiles_of(kernel, shape, dtype=FP32):
    """The tiles by which the call that is timed would be launched."""
    recorder = Recorder(launches=False)
    x, other = torch.empty(2, *shape, dtype=dtype, device=DEVICE)
    mask, unit = torch.ones(shape[0], dtype=torch.bool, device=DEVICE), torch.ones(shape[0], 1, device=DEVICE)
    seed, stats = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.empty(shape[0], 8, device=DEVICE)
    tune_targets._CALLS[kernel][0](x, other, mask, unit, seed, stats, wrap=recorder)
    return recorder.tiles


KERNEL_OF = {
    "perturb": "perturb_kernel", "perturb_stream": "perturb_kernel", "ascend_norm": "norm_kernel",
    "ascend": "ascend_kernel", "divergence_forward": "divergence_forward_kernel",
    "divergence_split": "divergence_parts_kernel", "divergence_backward": "divergence_backward_kernel",
    "divergence_backward_elementwise": "divergence_backward_elementwise_kernel",
    "fisher_direction": "fisher_direction_kernel",
}  # fmt: skip
every_kernel = pytest.mark.parametrize("kernel", tuning.KERNELS)


def test_every_kernel_has_calls():
    assert (
        set(tuning.KERNELS)
        == set(launch.DEFAULTS)
        == set(KERNEL_OF)
        == set(tune_targets._CALLS)
        == set(tune_targets.FIRST)
    )


# ---- what launches read --------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("width", [1, 3, 768, 8193, 30522])
def test_defaults_without_a_table(kernel, width):
    rows = 2 if kernel == "divergence_split" else 600  # more than one program takes together
    name = KERNEL_OF[kernel]
    expected = launch.DEFAULTS[kernel](rows * width if kernel == "perturb_stream" else width)
    if kernel == "divergence_split":
        expected = launch.split_tile(rows, width, ops._processors(DEVICE))
        name = name if launch.splits(expected, width) > 1 else KERNEL_OF["divergence_forward"]
    if name == "divergence_forward_kernel":
        expected = launch.together(expected, rows)
    rows, block, blocks, warps, stages = tiles_of(kernel, (rows, width))[name]
    assert (rows, block, warps) == (expected.rows, expected.block, expected.warps)
    assert (blocks, stages) == ((None, None) if kernel in tune_candidates.FLAT else (expected.blocks, 1))


def test_defaults_are_what_they_were():
    """Written out: choices that are measured may change, these have been compiled and tested everywhere."""
    assert launch.row_tile(3) == Tile(64, 4, 1, 2)
    assert launch.row_tile(768) == Tile(1, 1024, 1, 4)
    assert launch.row_tile(8192) == Tile(1, 8192, 1, 16)
    assert launch.row_tile(30522) == Tile(1, 2048, 15, 8)
    assert launch.ascend_tile(20) == launch.row_tile(20)
    assert launch.ascend_tile(768) == Tile(1, 256, 3, 1)
    assert launch.ascend_tile(4096) == Tile(1, 1024, 4, 4)
    assert launch.ascend_tile(30522) == launch.row_tile(30522)
    assert launch.flat_tile(768) == Tile(1, 1024, 1, 4)
    assert launch.stream_tile(10**6) == Tile(1, 2048, 489, 4)
    assert launch.split_tile(16, 151936, 132) == Tile(1, 2048, 8, 8)
    assert ops._resources(launch.row_tile(30522), ops._plain)["num_warps"] == 8


@every_kernel
def test_a_table_changes_the_launch(kernel, use, long_rows):
    rows = 1 if kernel == "perturb_stream" else 2
    chosen = Choice(256, 2, rows, 1 if kernel in tune_candidates.FLAT else 3, programs=4)
    shape = (2 if kernel == "divergence_split" else 9, 1300)
    default = tiles_of(kernel, shape, BF16)
    use(content(entry(kernel, chosen)))
    found = tiles_of(kernel, shape)[KERNEL_OF[kernel]]
    blocks = None if kernel in tune_candidates.FLAT else 1 if kernel == "divergence_split" else 6
    assert found == (rows, 256, blocks, 2, None if kernel in tune_candidates.FLAT else 3)
    assert default[KERNEL_OF[kernel]] != found
    assert tiles_of(kernel, shape, BF16) == default  # entries speak of one size of elements


@pytest.mark.exhaustive
@every_kernel
@pytest.mark.parametrize(("width", "dtype"), [(1, FP32), (3, BF16), (1100, FP32), (1100, BF16)])
def test_results_are_right_whatever_the_choice(kernel, width, dtype, long_rows):
    """All variants of a kernel's calls, against the default's results, which the kernels' own tests hold to float64."""
    rows = 3
    if kernel == "divergence_split" and width <= launch.MAX_BLOCK:
        pytest.skip("short rows are not shared")
    job = tune_targets.Job(tune_targets.Target(kernel, (rows, width), dtype), DEVICE)
    inputs = job.inputs(0)
    several = 1 if kernel == "perturb_stream" else 2
    for choice in (Choice(256, 1, several, 2, programs=8), Choice(2048, 2, 1, 3, programs=1)):
        for call in (job.call, *job.variants):
            assert tune_candidates.flaw(kernel, choice, call, inputs) is None


def test_rows_shared_above_the_number_of_processors(use, long_rows):
    wide = (6, 1300)
    assert "divergence_forward_kernel" in tiles_of("divergence_split", wide)
    use(content(entry("divergence_split", Choice(256, 1, threshold=2, programs=3))))
    assert tiles_of("divergence_split", wide)["divergence_parts_kernel"] == (1, 256, 4, 1, 1)
    assert "divergence_forward_kernel" in tiles_of("divergence_split", (8, 1300))


def test_widths():
    table = tuning.parse(
        content(
            entry(choice=Choice(8, 1), widths=(5, 8)), entry(choice=Choice(16, 1), widths=(9, 16)),
            entry(choice=Choice(32, 1), widths=(17, None), itemsize=2), entry("perturb", Choice(64, 1), (1, 4)),
        ),
        NAME,
    )  # fmt: skip
    found = [table.find("ascend", width, 4) for width in (4, 5, 8, 9, 16, 17)]
    assert [each and each.block for each in found] == [None, 8, 8, 16, 16, None]
    assert table.find("ascend", 10**12, 2) == Choice(32, 1)
    assert table.find("ascend_norm", 5, 4) is None


def test_blocks_are_cut_down_to_the_row():
    assert launch.chosen_tile(Choice(1024, 4), 100) == Tile(1, 128, 1, 4)
    assert launch.chosen_tile(Choice(1024, 4), 1) == Tile(1, 4, 1, 4)  # one class is a case of its own at block 4
    assert launch.chosen_tile(Choice(64, 4, 2, 3), 100) == Tile(2, 64, 2, 4, 3)


def test_a_symbolic_size_is_looked_up_by_guards(use):
    """As torch.compile(dynamic=True) traces: the number of elements stays symbolic."""
    use(content(entry("perturb_stream", Choice(64, 1), (1, 500)), entry("perturb_stream", Choice(128, 1), (501, None))))
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    recorder = Recorder(launches=False)
    traced = make_fx(lambda x: ops.perturb(x, seed, 0.1, None, None, wrap=recorder), tracing_mode="symbolic")
    for count, block in ((40, 64), (400, 128)):
        graph = traced(torch.empty(count, 5, device=DEVICE))
        (x,) = (node for node in graph.graph.nodes if node.op == "placeholder")
        assert not isinstance(x.meta["val"].shape[0], int)
        assert recorder.tiles["perturb_kernel"][1] == block


@pytest.mark.exhaustive
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_a_table(use, dynamic):
    use(content(entry("divergence_forward", Choice(4, 1, 2)), entry("divergence_backward", Choice(8, 1))))
    torch.compiler.reset()
    compiled = torch.compile(kl_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        x, t = torch.randn(2, rows, 21, device=DEVICE, requires_grad=True)
        grads = [
            torch.autograd.grad(loss(x, t, backend="triton"), x)[0] for loss in (kl_loss, compiled)
        ]  # fmt: skip
        torch.testing.assert_close(*grads)
        x64, t64 = x.detach().double().requires_grad_(), t.detach().double()
        (exact,) = torch.autograd.grad(kl_loss(x64, t64), x64)
        torch.testing.assert_close(grads[0].double(), exact, rtol=1e-5, atol=1e-7)


def test_a_width_is_looked_for_once(use, monkeypatch):
    searched = []
    search = tuning.Table._search
    monkeypatch.setattr(tuning.Table, "_search", lambda self, *key: searched.append(key) or search(self, *key))
    use(content(entry()))
    for _ in range(3):
        tiles_of("ascend", (4, 20))
        tiles_of("ascend_norm", (4, 20))
    assert searched == [("ascend", 20, 4), ("ascend_norm", 20, 4)]


BROKEN = {
    "not JSON": ("{", "Expecting"),
    "not a table": ("[1]", "schema 1"),
    "another schema": (content(schema=2), "schema 1"),
    "another GPU's": (content(device="NVIDIA Abacus"), "NVIDIA Abacus"),
    "unknown kernel": (content(entry("descend")), "descend"),
    "unknown field": (content(entry() | {"color": 3}), "color"),
    "unknown choice": (content(entry() | {"choice": {"block": 4, "warps": 1, "lanes": 2}}), "lanes"),
    "missing choice": (content(entry() | {"choice": {"block": 4}}), "warps"),
    "entry of no fields": (content(3), "entry"),
    "size of elements": (content(entry(itemsize=8)), "itemsize"),
    "upside down": (content(entry(widths=(9, 8))), "widths"),
    "one width": (content(entry(widths=(9,))), "widths"),
    "no power of two": (content(entry(choice=Choice(48, 1))), "powers of two"),
    "too small a block": (content(entry(choice=Choice(2, 1))), "tile"),
    "too large a tile": (content(entry(choice=Choice(1 << 15, 32, 2))), "tile"),
    "too many warps": (content(entry(choice=Choice(64, 64))), "warps"),
    "half a warp": (content(entry(choice=Choice(64, 0.5))), "integer"),
    "no stage": (content(entry(choice=Choice(64, 1, 1, 0))), "integer"),
    "rows of contiguous memory": (content(entry("perturb_stream")), "one row"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_serve_is_reported_once(case, use):
    table, message = BROKEN[case]
    use(table)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        found = tiles_of("ascend", (4, 20))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles_of("ascend", (4, 20)) == found == {"ascend_kernel": (*launch.row_tile(20)[:4], 1)}


def test_a_file_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "none.json"))
    with pytest.warns(RuntimeWarning, match="No such file"):
        assert tuning.load(NAME) is None


def test_the_package_s_own_tables(monkeypatch, tmp_path):
    monkeypatch.delenv(tuning.VARIABLE)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    assert tuning.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert tuning.load("NVIDIA H200") is None
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(content(entry(), device="NVIDIA H200")))
    assert tuning.load("NVIDIA H200").find("ascend", 5, 4) == Choice(16, 1, 2)
    monkeypatch.setenv(tuning.VARIABLE, "off")
    assert tuning.load("NVIDIA H200") is None


def test_committed_tables_are_valid():
    for path in tuning.FOLDER.glob("*.json"):
        table = json.loads(path.read_text())
        assert path.name == tuning.file_name(table["device"]) != "cpu.json"
        tuning.parse(table, table["device"])


def test_override_ends():
    with tuning.override("ascend", Choice(4, 1)):
        with tuning.override("ascend", None):
            assert tiles_of("ascend", (4, 20))["ascend_kernel"][1] == 32
        assert tiles_of("ascend", (4, 20))["ascend_kernel"][1] == 4
    assert not tuning.overriding
    with pytest.raises(tuning.TableError, match="powers of two"), tuning.override("ascend", Choice(5, 1)):
        pass


# ---- the sweep -----------------------------------------------------------------------------------------------------


class Clock:
    """Times that are told: ``times(choice)`` seconds for a choice, one for the default."""

    def __init__(self, times, spread=0.01):
        self.times, self.spread, self.seen = times, spread, []

    def __call__(self, runs, sets, device, seconds):
        self.seen += runs
        named = {name: 1.0 if name == "default" else self.times(eval(name, {"Choice": Choice})) for name in runs}
        return {n: Timing(t, t * (1 - self.spread), t * (1 + self.spread), 9, 1) for n, t in named.items()}


@pytest.fixture
def few(monkeypatch):
    """Two candidates of each kind: the interpreter takes its time."""
    candidates, refinements = tune_candidates.candidates, tune_candidates.refinements
    monkeypatch.setattr(tune, "candidates", lambda kernel, width: candidates(kernel, width)[:2])
    monkeypatch.setattr(tune, "refinements", lambda kernel, width, best: refinements(kernel, width, best)[:2])


def always(seconds):
    return lambda choice: seconds


def swept(kernel, clock, shape=(5, 33), dtype=FP32):
    return tune.Sweep(tune_targets.Target(kernel, shape, dtype), DEVICE, 0.01, clock).entry()


@pytest.mark.exhaustive
@every_kernel
def test_the_fastest_is_chosen_and_launches(kernel, use, tmp_path, long_rows, few):
    rows = 1 if kernel == "perturb_stream" else 2 if kernel == "divergence_split" else 4
    shape = (rows, 4096 if kernel == "perturb_stream" else 1300)
    best = tune_candidates.candidates(kernel, shape[1])[0]
    clock = Clock(lambda choice: 0.5 if choice[:3] == best[:3] else 0.9)
    path = tmp_path / "found.json"
    table = tune.sweep([tune_targets.Target(kernel, shape, FP32)], DEVICE, path, clock=clock)
    (found,) = table["entries"]
    assert not table["failed"]
    assert Choice(**found["choice"])[:3] == best[:3]
    assert found["measured"]["default_seconds"] == 1.0
    assert found["measured"]["seconds"] == 0.5
    assert not found["measured"]["dropped"]
    use(path.read_text())
    rows, block, _, warps, _ = tiles_of(kernel, shape)[KERNEL_OF[kernel]]
    assert (block, warps, rows) == best[:3]
    assert [line[0] for line in tune.rows(table)] == ["kernel", kernel]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("clock", "wins"),
    [
        (Clock(always(0.96), 0.01), True),
        (Clock(always(0.98), 0.001), False),  # less than the least gain
        (Clock(always(0.9), 0.06), False),  # within the spread
        (Clock(always(1.1)), False),
    ],
)
def test_noise_is_no_gain(clock, wins):
    found = swept("perturb", clock)
    assert (found["choice"] is not None) == found["measured"]["faster"] == wins


@pytest.mark.exhaustive
def test_the_winner_of_a_sweep_must_win_again():
    times = itertools.chain(
        itertools.repeat(0.1, len(tune_candidates.candidates("perturb", 33))), itertools.repeat(1.0)
    )
    found = swept("perturb", Clock(lambda choice: next(times)))
    assert found["measured"]["seconds"] == 1.0
    assert found["choice"] is None


def spoiled(monkeypatch, name, when, result):
    """Launchers that go wrong where ``when`` says so."""
    plain = getattr(ops, name)

    def launcher(*args, wrap=ops._plain, **options):
        out = plain(*args, wrap=wrap, **options)
        return result(out, wrap) if when(args) else out

    monkeypatch.setattr(ops, name, launcher)


def fails(out, wrap):
    raise RuntimeError("out of resource")


def spills(out, wrap):
    class Spilling:
        def __getitem__(self, grid):
            return lambda: types.SimpleNamespace(n_spills=8)

    wrap(Spilling())[(1,)]()
    return out


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("reason", "result"),
    [
        ("wrong", lambda out, wrap: out * 1.001),
        ("wrong", lambda out, wrap: out.log()),
        ("fails", fails),
        ("spills", spills),
    ],
)
def test_a_flawed_candidate_is_never_chosen(reason, result, monkeypatch):
    bad, good = tune_candidates.candidates("perturb", 33)[:2]
    spoiled(monkeypatch, "perturb", lambda args: tuning.overriding.get("perturb") == bad, result)
    clock = Clock(lambda choice: {bad: 0.1, good: 0.5}.get(choice, 0.9))
    found = swept("perturb", clock)
    assert Choice(**found["choice"]) == good
    assert found["measured"]["dropped"] == {reason: 1}
    assert str(bad) not in clock.seen


@pytest.mark.exhaustive
def test_flawed_in_a_variant(monkeypatch):
    bad, good = tune_candidates.candidates("perturb", 33)[:2]
    flawed = lambda args: tuning.overriding.get("perturb") == bad and args[-1] is not None  # noqa: E731
    spoiled(monkeypatch, "perturb", flawed, lambda out, wrap: out * 1.001)
    found = swept("perturb", Clock(lambda choice: {bad: 0.1, good: 0.5}.get(choice, 0.9)))
    assert Choice(**found["choice"]) == good
    assert found["measured"]["dropped"] == {"wrong in a variant": 1}


@pytest.mark.exhaustive
def test_a_default_that_fails_is_reported(monkeypatch, tmp_path):
    spoiled(monkeypatch, "perturb", lambda args: True, fails)
    todo = [tune_targets.Target("perturb", (5, 33), FP32), tune_targets.Target("ascend_norm", (5, 33), FP32)]
    table = tune.sweep(todo, DEVICE, tmp_path / "found.json", clock=Clock(always(1)))
    assert table["failed"] == {todo[0].name: "RuntimeError: out of resource"}
    assert [each["kernel"] for each in table["entries"]] == ["ascend_norm"]


@pytest.mark.exhaustive
def test_loads_ahead_and_programs_are_tried(long_rows, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda kernel, width: [])
    clock = Clock(lambda choice: 0.9 - 0.1 * choice.stages - 0.01 * choice.programs)
    assert swept("ascend_norm", clock, (4, 1300))["choice"]["stages"] == 4
    clock = Clock(lambda choice: 0.5 if choice.programs == 8 else 1.0 if choice.threshold == 2 else 0.9)
    assert swept("divergence_split", clock, (2, 1300))["choice"]["programs"] == 8
    found = swept("divergence_split", Clock(lambda choice: 0.5 if choice.threshold == 2 else 1.0), (2, 1300))
    assert found["choice"] == tune_candidates.default_choice("divergence_split", 1300)._replace(threshold=2)._asdict()
    assert found["measured"]["more_rows"] == {"shape": [4, 1300], "default_seconds": 1.0, "seconds": 0.5}


@pytest.mark.exhaustive
def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda kernel, width: [Choice(32, 1)])
    path, todo = tmp_path / "found.json", [tune_targets.Target("perturb", (5, 33), d) for d in (FP32, BF16)]
    sweep = lambda clock, **options: tune.sweep(todo, DEVICE, path, clock=clock, **options)  # noqa: E731
    assert sweep(Clock(always(0.5)), limit=1e-9)["left_out"] == [each.name for each in todo]
    first = tune.sweep(todo[:1], DEVICE, path, clock=Clock(always(0.5)))
    both = sweep(Clock(always(0.5)))
    assert both["entries"][0] == first["entries"][0]
    assert [each["itemsize"] for each in both["entries"]] == [4, 2]
    again = Clock(always(0.5))
    assert sweep(again)["entries"] == both["entries"]
    assert not again.seen
    monkeypatch.setattr(tune, "_digest", lambda: "other kernels")
    assert sweep(again)["entries"] == both["entries"]
    assert again.seen
    path.write_text("{")
    assert len(sweep(Clock(always(0.5)))["entries"]) == 2


def test_times_of_the_interpreter_are_refused(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="on a GPU"):
        tune.sweep([], cpu, tmp_path / "found.json")
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="of a GPU only"):
        tune.sweep([], cpu, tmp_path / "found.json", clock=Clock(always(1)))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_the_command_needs_a_gpu(capsys):
    from bench.__main__ import main

    assert main(["tune"]) == 1
    assert "on a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command(tmp_path, capsys):
    from bench.__main__ import main

    path = tmp_path / "found.json"
    arguments = ["tune", "--cases", "fisher_direction [22369621, 3] bf16", "--seconds", "0.05", "--json", str(path)]
    assert main(arguments) == 0
    (found,) = json.loads(path.read_text())["entries"]
    assert found["measured"]["default_seconds"] > 0
    assert "launch choices" in capsys.readouterr().out


def test_ranges():
    assert tune.ranges("ascend", [768, 3, 1024, 128, 30522]) == {
        3: [1, 4], 128: [65, 128], 768: [513, 768], 1024: [769, 1024], 30522: [16385, 32768],
    }  # fmt: skip
    assert tune.ranges("perturb_stream", [1 << 26, 1 << 22]) == {
        1 << 22: [(1 << 21) + 1, 1 << 25], 1 << 26: [(1 << 25) + 1, None],
    }  # fmt: skip


def test_targets_and_their_candidates():
    todo = tune_targets.targets()
    assert {each.kernel for each in todo} == set(tuning.KERNELS)
    assert todo[0].name == "divergence_backward [523, 128256] bf16"
    assert tune_targets.targets("FISHER") == [each for each in todo if each.kernel == "fisher_direction"]
    for each in todo:
        width = each.shape[1]
        default = tune_candidates.default_choice(each.kernel, width)
        found = tune_candidates.candidates(each.kernel, width)
        assert found
        assert default not in found
        assert len(set(found)) == len(found) <= 40
        for choice in (default, *found, *tune_candidates.refinements(each.kernel, width, found[0])):
            assert tuning.checked(each.kernel, choice) == choice
            assert launch.chosen_tile(choice, width).block == choice.block
        assert launch.chosen_tile(default, width) == launch.DEFAULTS[each.kernel](width)


COMPILE = """
import json, torch, compile_kernels as ck
from smart_fast.kernels import tuning
from smart_fast.kernels.launch import Choice
x = torch.empty(4096, 30522, dtype=torch.bfloat16, device="meta")
stats, seed = torch.empty(4096, 8, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
spec = ("sym_kl", "sum", 1.0, 1.0, 1.0, False)
for kernel, choice, call in (
    ("divergence_forward", Choice(2048, 8, 1, 3), lambda w: ck.ops.divergence_forward(x, x, None, *spec, True, wrap=w)),
    ("divergence_backward", Choice(2048, 8), lambda w: ck.ops.divergence_backward(
        torch.empty((), device="meta"), x, x, stats, None, *spec, True, True, wrap=w)),
    ("ascend_norm", Choice(4096, 32, 1, 2), lambda w: ck.ops.ascend_norm(
        x, seed, None, None, None, "inf", 1e-5, 1e-3, "smart-pytorch", wrap=w)),
):
    recorded = []
    with tuning.override(kernel, choice):
        call(lambda k: ck.sass.Recorder(k, recorded))
    print(json.dumps(ck.compile_for("sm_90", *recorded[0])))
"""


@pytest.mark.exhaustive
@pytest.mark.compile_only
def test_other_choices_compile_without_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    forward, backward, measure = map(json.loads, done.stdout.splitlines())
    assert (forward["options"]["BLOCK"], forward["options"]["STAGES"], forward["options"]["num_warps"]) == (2048, 3, 8)
    assert (measure["options"]["num_warps"], measure["options"]["maxnreg"]) == (32, 64)
    assert [each["stack"] for each in (forward, backward, measure)] == [0, 0, 0]
