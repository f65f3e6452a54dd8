"""The examples run as a user would run them, and say what they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from smart_fast.backends import select
from tests.helpers import ROOT, run_python


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_causal_lm(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if backend == "auto" and not hasattr(select("auto", torch.ones(2, 2)), "divergence_measure"):
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
