"""The outside contestants of the bench: mt-dnn's formulas, more modes of torch.compile, torch's own chunked loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

for package in ("smart_pytorch", "rich"):
    pytest.importorskip(package, reason=f"the bench needs {package}")

import smart_fast  # noqa: E402
from bench import cases, chunked, liger, mtdnn, peers  # noqa: E402
from bench.run import run_case  # noqa: E402
from bench.task import Contestant  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda")
F32, BF16 = torch.float32, torch.bfloat16


def head(dtype):
    def build():
        return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))

    return cases.regularizer("head", (4, 16), "cpu", build, dtype=dtype, needs=None)


HEAD = head(F32)
EXPECTED = [
    (cases.perturb((64, 128), F32, "cpu"), {"generate_noise": "rival"}),
    (cases.perturb((64, 128), BF16, "cpu"), {"generate_noise": "rival"}),
    (cases.perturb((64, 128), F32, "cpu", variant="masked"), {}),
    (cases.ascend((16, 33), F32, "cpu"), {"SmartPerturbation step": "rival"}),
    (cases.ascend((16, 33), BF16, "cpu"), {"SmartPerturbation step": "rival"}),
    (cases.ascend((16, 33), F32, "cpu", update="paper"), {}),
    (cases.divergence("kl", (8, 5), F32, "cpu"), {"KlCriterion": "rival", "stable_kl": "other"}),
    (cases.divergence("kl", (8, 50), BF16, "cpu"), {"KlCriterion": "rival", "stable_kl": "other"}),
    (cases.divergence("sym_kl", (8, 5), F32, "cpu"), {"SymKlCriterion": "rival", "NsSymKlCriterion": "other"}),
    (cases.divergence("js", (8, 5), F32, "cpu"), {"JSCriterion": "rival"}),
    (
        cases.lm_divergence("sym_kl", (8, 50), BF16, "cpu", backward=False),
        {"SymKlCriterion": "rival", "NsSymKlCriterion": "other"},
    ),
    (cases.lm_linear("kl", 8, 6, 50, F32, "cpu"), {}),
    (HEAD, {"SmartPerturbation": "other"}),
    (head(BF16), {"SmartPerturbation": "other"}),
]
every_case = pytest.mark.parametrize(("case", "names"), EXPECTED, ids=lambda value: getattr(value, "name", ""))


def rows_of(case, module, change=lambda run: run):
    """Rows of the contestants of ``module`` beside smart-pytorch."""

    def entrants(task, device, backends):
        yield Contestant(peers.EAGER, "rival", task.call(task.smart_pytorch()))
        for each in module.contestants(task):
            run = None if each.run is None else change(each.run)
            yield Contestant(each.name, each.role, run, skipped=each.skipped, check=each.check, note=each.note)

    rows = {row.contestant: row for row in run_case(case, CPU, [], seconds=0.01, entrants=entrants)}
    del rows[peers.EAGER]
    return rows


@pytest.mark.exhaustive
@every_case
def test_mtdnn_is_checked_and_timed(case, names):
    rows = rows_of(case, mtdnn)
    assert {name: row.role for name, row in rows.items()} == {mtdnn.MTDNN + n: role for n, role in names.items()}
    for name, row in rows.items():
        assert row.wrong is row.skipped is None, row
        assert row.note == mtdnn.NOTES[name.removeprefix(mtdnn.MTDNN)]
        assert row.timing.median > 0
        assert (row.speed is None) == (row.role == "other")
        assert ("what it computes" in row.checked) == (row.role == "other")


@pytest.mark.exhaustive
@every_case
def test_wrong_results_of_mtdnn_get_no_time(case, names):
    def doubled(run):
        def wrong(*inputs):
            results = run(*inputs)
            return tuple(2 * each for each in results) if isinstance(results, tuple) else 2 * results

        return wrong

    rows = rows_of(case, mtdnn, doubled)
    assert len(rows) == len(names)
    assert all(row.wrong and row.timing is None for row in rows.values())


def test_mtdnn_stable_divergences():
    """Against smart-fast's own version of the symmetric one, and their float64 form."""
    x, t = torch.randn(2, 6, 9).unbind()
    both = (mtdnn._stable_kl(x, t) + mtdnn._stable_kl(t, x)) / 6
    torch.testing.assert_close(both, smart_fast.stable_sym_kl_loss(x, t))
    torch.testing.assert_close(mtdnn.stable_kl64(x.double(), t.double()), mtdnn._stable_kl(x, t).double())


def test_mtdnn_gives_up_gradients_that_are_not_finite():
    noise = torch.zeros(2, 3)
    with pytest.raises(FloatingPointError, match="not finite"):
        mtdnn._moved(noise, noise / 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", ["kl", "sym_kl", "js"])
def test_torch_chunked_loss(kind, dtype):
    case = cases.lm_linear(kind, 16, 8, 50, dtype, "cpu")
    (row,) = rows_of(case, chunked).values()
    assert row.role == "other"
    assert row.note == chunked.NOTE
    if chunked.why_not():
        assert "has no chunked" in row.skipped
        return
    assert row.wrong is row.skipped is row.speed is None, row
    assert row.timing.median > 0
    (row,) = rows_of(case, chunked, lambda run: lambda *inputs: tuple(2 * each for each in run(*inputs))).values()
    assert row.wrong
    assert row.timing is None


def test_torch_chunked_loss_takes_blocks_of_rows_in_order(monkeypatch):
    """The check of a case too large for one block of float64 logits."""
    if reason := chunked.why_not():
        pytest.skip(reason)
    monkeypatch.setattr("bench.divergences.REFERENCE_ELEMENTS", 150)
    (row,) = rows_of(cases.lm_linear("kl", 16, 8, 50, F32, "cpu"), chunked).values()
    assert row.wrong is None


def test_torch_without_a_chunked_loss_is_named(monkeypatch):
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    (row,) = rows_of(cases.lm_linear("kl", 8, 6, 50, F32, "cpu"), chunked).values()
    assert row.skipped == f"torch {torch.__version__} has no chunked linear_cross_entropy"
    assert not rows_of(EXPECTED[0][0], chunked)


def field(case, monkeypatch, device=CPU, **options):
    """The contestants of ``case``, nothing compiled."""
    monkeypatch.setattr(peers, "compiled", lambda task, mode=None: lambda *inputs: mode)
    task = case.build(CPU)
    monkeypatch.setattr(liger, "contestants", lambda task, device: ())
    return {each.name: each for each in peers.contestants(task, device, ["torch"], **options)}


AUTOTUNE, GRAPHS = (f"{peers.COMPILED} {mode}" for mode in peers.MODES)


def test_more_modes_of_compile_are_for_gpus(monkeypatch):
    found = field(EXPECTED[6][0], monkeypatch)
    assert found[peers.COMPILED].run
    assert {found[name].skipped for name in (AUTOTUNE, GRAPHS)} == {"a mode for GPUs"}
    found = field(EXPECTED[6][0], monkeypatch, GPU)
    assert [found[name].run() for name in (peers.COMPILED, AUTOTUNE, GRAPHS)] == [None, *peers.MODES]
    assert all(found[name].role == "rival" for name in (AUTOTUNE, GRAPHS))


@pytest.mark.parametrize(
    ("case", "left", "skipped"),
    [
        (EXPECTED[6][0], 1e3, set()),
        (EXPECTED[6][0], 20.0, {AUTOTUNE, GRAPHS}),
        (HEAD, 1e3, set()),
        (HEAD, 100.0, {AUTOTUNE}),  # it would tune every GEMM of a model
    ],
)
def test_modes_take_time_to_compile(case, left, skipped, monkeypatch):
    found = field(case, monkeypatch, GPU, time_left=left)
    assert {name for name in (AUTOTUNE, GRAPHS) if found[name].skipped == peers.NO_TIME} == skipped
    assert found[peers.COMPILED].run
    found = field(case, monkeypatch, GPU, compiling=False)
    assert {found[name].skipped for name in (peers.COMPILED, AUTOTUNE, GRAPHS)} == {peers.NO_TIME}


def test_reduce_overhead_starts_a_step_at_every_call(monkeypatch):
    """Results live in the memory of CUDA graphs: the next call says that nobody reads them any more."""
    steps = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append("step"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: steps.append(options["mode"]) or function)
    task = EXPECTED[6][0].build(CPU)
    call = peers.compiled(task, "reduce-overhead")
    assert not [found for found in task.check(call, task.inputs(0), None) if found.wrong]
    assert steps == ["reduce-overhead", "step"]
    steps.clear()
    peers.compiled(task)(*task.inputs(0))
    assert steps == [None]


def test_memory_of_graphs_is_not_measured_by_the_call():
    def entrants(task, device, backends):
        yield Contestant(GRAPHS, "rival", task.call(task.smart_pytorch()))

    (row,) = run_case(EXPECTED[6][0], CPU, [], seconds=0.01, entrants=entrants)
    assert row.timing.median > 0
    assert row.peak is None


def test_everyone_says_what_they_compute(monkeypatch):
    roster = {peer.name: peer for peer in peers.roster(CPU, peers.default_backends())}
    assert all(peer.note for peer in roster.values())
    for case, _ in EXPECTED:
        for name, each in field(case, monkeypatch).items():
            assert each.note, name
            known = roster.get(name.partition(",")[0])  # ours may run in several ways
            assert each.note.startswith(known.note) if known else each.role == "part", name
    assert set(mtdnn.OTHERS) <= set(mtdnn.NOTES)


def test_the_list_names_everyone(capsys):
    from bench.__main__ import main

    assert main(["ops", "--quick", "--list", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for name, note, reason in peers.roster(CPU, peers.default_backends()):
        assert f"  {name}: {note}" + (f" (not run: {reason})" if reason else "") in shown
