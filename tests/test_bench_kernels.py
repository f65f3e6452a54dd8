"""`python -m bench kernels` (bytes over time) and `python -m bench.sanitize` (every kernel at odd shapes)."""

from __future__ import annotations

import json

import pytest
import torch

for package in ("smart_pytorch", "rich"):
    pytest.importorskip(package, reason=f"the bench needs {package}")

from rich.console import Console  # noqa: E402

from bench import __main__ as command  # noqa: E402
from bench import kernels, sanitize  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(native):
    return list(kernels.measure(CPU, ["native"], 0.01, small=True))


def test_every_operator_has_a_line(measured):
    lines = {(each.kernel, each.dtype, each.regime) for each in measured}
    assert len(lines) == len(measured) == 2 * (8 + 2 * 6)  # those of two logits on near and on far rows
    assert {each.kernel for each in measured} >= {"perturb", "ascend l1 paper", "js backward", "fisher direction"}
    assert all(each.timing.median > 0 for each in measured)


def test_bytes_are_those_of_arguments_and_results(measured):
    """The native backend keeps its noise in fp32 on a CPU; statistics are eight numbers a row."""
    found = {(each.kernel, each.dtype): each.bytes for each in measured}
    embed, rows, logits = 16 * 33, 4, 4 * 130
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert found["perturb", dtype] == 2 * size * embed + 8
        assert found["ascend inf", dtype] == (3 * size + 4) * embed
        assert found["ascend inf, noise kept", dtype] == (3 * size + 8) * embed
        assert found["kl forward", dtype] == 2 * size * logits + 4 + rows * 32
        assert found["sym_kl backward", dtype] == 4 * size * logits + rows * 32 + 4
        assert found["fisher direction", dtype] == 2 * size * logits


def test_near_and_far_rows(native):
    """Of either regime by what is given to the kernels: near rows are those of a perturbed pass of SMART."""
    for regime, apart in (("near", 0.01), ("far", 1.0)):
        x, t, _, _ = kernels._logits(native, (8, 1000), torch.float32, regime, CPU)(0)
        assert (x - t).std() == pytest.approx(apart, rel=0.05)
        assert ((x - t).abs().max() <= 1) == (regime == "near")


def test_a_kernel_that_raises_leaves_the_others_measured(native, monkeypatch):
    def raises(*args):
        raise RuntimeError("invalid argument")

    monkeypatch.setattr(native, "divergence_backward", raises)
    found = list(kernels.measure_shapes(CPU, "native", torch.float32, [], [(4, 130)], 0.01))
    failed = [each for each in found if isinstance(each, kernels.Failed)]
    assert len(found) == 1 + 2 * 6
    assert {each.kernel for each in failed} == {"kl backward", "sym_kl backward", "js backward"}
    assert {each.regime for each in failed} == {"near", "far"}
    with pytest.raises(RuntimeError, match="invalid argument"):
        list(kernels.measure(CPU, ["native"], 0.01, small=True))


def test_shares_files_and_table(measured, tmp_path, capsys):
    compared = kernels.compare_with_copy(measured, 1e9)
    assert compared[0].copy_share == pytest.approx(measured[0].bytes / measured[0].timing.median / 1e9)
    kernels.save(compared, 1e9, {"device": "here"}, tmp_path / "kernels.json")
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content["copy_rate"] == 1e9
    assert len(content["kernels"]) == len(measured)
    kernels.show(compared, 1e9, Console(width=140))
    shown = capsys.readouterr().out
    assert "fisher direction" in shown
    assert "GB/s" in shown


def test_command_line(tmp_path, capsys, native):
    path = tmp_path / "kernels.json"
    options = ["--device", "cpu", "--backends", "native", "--quick", "--seconds", "0.01", "--json", str(path)]
    assert command.main(["kernels", *options]) == 0
    assert "ascend inf" in capsys.readouterr().out
    assert json.loads(path.read_text())["environment"]["device_type"] == "cpu"


def test_no_backend_with_kernels_is_an_error(capsys):
    with pytest.raises(SystemExit):
        command.main(["kernels", "--device", "cpu", "--backends", "torch"])
    assert "--backends torch: none of them has kernels" in capsys.readouterr().err


def test_sanitized_shapes_pass(native, capsys):
    assert sanitize.main(["--device", "cpu", "--backends", "native"]) == 0
    assert "checks passed" in capsys.readouterr().out


def test_sanitized_shapes_catch_a_wrong_kernel(native, monkeypatch):
    right = native.fisher_direction
    monkeypatch.setattr(native, "fisher_direction", lambda logits, wide: right(logits, wide) * 1.001)
    with pytest.raises(AssertionError, match="off by"):
        sanitize.main(["--device", "cpu", "--backends", "native"])


def test_sanitizing_what_does_not_run_here(native):
    with pytest.raises(RuntimeError, match="does not serve meta"):
        list(sanitize.checks("native", torch.device("meta")))
