"""The examples run as a user would run them, and say what they promise."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from smart_fast.backends import select
from tests.helpers import ROOT, exhaustively, run_python


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_causal_lm(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if backend == "auto" and select("auto", torch.ones(2, 2)).name == "torch":
        pytest.skip("no fused backend here has the kernels of the linear losses")
    small = ["--batch", "2", "--length", "32", "--steps", "1", "--device", "cpu", "--backend", backend]
    done = run_python([str(ROOT / "examples" / "causal_lm.py"), *small], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "tiny, 2 x 32 tokens, vocabulary 8000, float32 on cpu"
    assert [line.split()[0] for line in lines[1:]] == ["linear", "fused", "plain"]
    found = [re.search(r"loss (\S+), regularizer (\S+)$", line) for line in lines[1:]]
    values = torch.tensor([[float(number) for number in each.groups()] for each in found if each])
    assert values.shape == (3, 2)
    assert (values > 0).all()
    # The noise of the backends differs; the regularizer is of one size, the loss of the task the same.
    torch.testing.assert_close(values[:, 0], values[:1, 0].expand(3), rtol=0.05, atol=0)
    torch.testing.assert_close(values[:, 1], values[:1, 1].expand(3), rtol=0.5, atol=0)


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without torch.distributed or gloo"
)
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_several_processes(name: str, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_python(
        [*torchrun, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    if name == "fsdp2":
        here, whole = re.fullmatch(r"(\d+) of (\d+) parameters here", lines.pop(0)).groups()
        assert int(here) < 0.6 * int(whole)
    losses = [re.fullmatch(r"step \d+: loss (\S+), regularizer (\S+)", line).groups() for line in lines[:-1]]
    assert float(losses[-1][0]) < 0.6 * float(losses[0][0])
    assert all(0 < float(smoothness) < 1 for _, smoothness in losses)
    assert float(re.fullmatch(r"accuracy (\S+) on 2 x cpu", lines[-1])[1]) > 0.8


# Least accuracy or explained variance; by chance it is 0.33 or 0.
METRICS = {
    "pytorch_loop": 0.9,
    "accelerate_loop": 0.8,
    "lightning_callback": 0.8,
    "sequence_classification": 0.85,
    "token_classification": 0.95,
    "regression": 0.8,
    "sft": 0.8,
}


@pytest.mark.parametrize("name", ["pytorch_loop", *exhaustively(*(each for each in METRICS if each != "pytorch_loop"))])
def test_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, since importing transformers takes longer than they do."""
    if name != "pytorch_loop":
        pytest.importorskip("transformers")
        pytest.importorskip({"lightning_callback": "lightning", "sft": "trl"}.get(name, "accelerate"))
    if name == "accelerate_loop":
        from accelerate.state import AcceleratorState

        monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # of other tests
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    *lines, last = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"step \d+: loss (\S+), regularizer (\S+)", line) for line in lines]
    if any(found):
        values = [(float(each[1]), float(each[2])) for each in found if each]
    else:  # what Trainer prints
        logs = [ast.literal_eval(line) for line in lines]
        values = [(float(each["loss"]), float(each["smart_loss"])) for each in logs if "smart_loss" in each]
    assert len(values) >= 4
    assert values[-1][0] < 0.7 * values[0][0]
    assert all(0 < smoothness < 1 for _, smoothness in values)
    assert float(re.fullmatch(r"(?:accuracy|explained variance) (\S+)", last)[1]) > METRICS[name]


@pytest.mark.exhaustive
def test_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "distillation.py"), run_name="__main__")
    *lines, last = capsys.readouterr().out.splitlines()
    found = [float(re.fullmatch(r"step \d+: divergence (\S+)", line)[1]) for line in lines]
    assert len(found) == 6
    assert 0 < found[-1] < 0.3 * found[0]
    assert float(re.fullmatch(r"agreement with the teacher (\S+)", last)[1]) > 0.9


def numbers_of(name: str, pattern: str, tmp_path: Path) -> list[tuple[float, ...]]:
    """The numbers in each line that an example prints."""
    done = run_python([str(ROOT / "examples" / f"{name}.py")], cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = [re.fullmatch(pattern, line) for line in done.stdout.splitlines()]
    return [tuple(float(each) for each in line.groups()) for line in found if line]


@pytest.mark.exhaustive
def test_latent_adversarial_training(tmp_path: Path) -> None:
    """Attacks on the layer succeed before and fail after; clean answers stay right."""
    before, after = numbers_of(
        "latent_adversarial_training", r"step \d+: accuracy (\S+), attacks succeed (\S+)", tmp_path
    )
    assert before[1] > 0.5
    assert after[1] < 0.1
    assert after[0] > before[0] - 0.01


@pytest.mark.exhaustive
def test_trades(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    plain, robust = numbers_of("trades", r"\w+: accuracy (\S+), under attack (\S+)", tmp_path)
    assert robust[1] > plain[1] + 0.15
    assert robust[0] > plain[0] - 0.01


@pytest.mark.exhaustive
def test_r_drop(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    plain, dropped = numbers_of("r_drop", r"[\w -]+: accuracy (\S+), dropout moves the output by (\S+)", tmp_path)
    assert dropped[1] < 0.8 * plain[1]
    assert dropped[0] > plain[0] - 0.01
