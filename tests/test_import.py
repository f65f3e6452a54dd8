"""``import smart_fast`` works on a bare machine, and does nothing but import."""

import pytest

import smart_fast
from tests.helpers import ROOT, run_python

USE = """
import torch, torch.nn as nn
net = nn.Linear(5, 3)
embed = torch.randn(2, 5)
smart_fast.SMARTLoss(net, smart_fast.kl_loss, num_steps=2)(embed, net(embed)).backward()
assert net.weight.grad.isfinite().all()
"""


def passes(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_on_a_bare_machine(tmp_path):
    """No triton, no transformers, no smart-pytorch, no numpy, no compiler."""
    code = """
import sys
sys.modules |= dict.fromkeys(("triton", "transformers", "smart_pytorch", "numpy"))
import smart_fast
print(smart_fast.available_backends()["triton"])
"""
    said = passes(run_python(code + USE, cwd=tmp_path, env={"PATH": str(tmp_path), "CC": "", "CXX": ""}))
    assert "triton is not installed" in said


def test_triton_takes_no_numpy(tmp_path):
    """torch and triton install none; only Triton's interpreter needs it."""
    pytest.importorskip("triton")
    code = """
import sys
sys.modules["numpy"] = None
import smart_fast.backends.triton
assert "triton.runtime.interpreter" not in sys.modules
"""
    passes(run_python(code, cwd=tmp_path, env={"TRITON_INTERPRET": "0"}))


@pytest.mark.exhaustive
def test_a_broken_triton_is_a_reason_and_no_crash(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libcuda is not there')")
    code = "import smart_fast" + USE + "print(smart_fast.available_backends()['triton'])"
    assert "libcuda is not there" in passes(run_python(code, cwd=tmp_path, path=(tmp_path, ROOT)))


def test_nothing_is_imported_or_compiled(tmp_path):
    code = """
import os, subprocess, sys, torch
before, generator = set(sys.modules), torch.get_rng_state()
def refuse(*args, **kwargs):
    raise AssertionError(f"a process was started: {args}")
subprocess.Popen.__init__ = os.system = os.posix_spawn = os.fork = refuse
import smart_fast
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "transformers", "numpy", "setuptools", "kernels"}, new
assert not any(name.startswith("torch.utils.cpp_extension") for name in sys.modules)
assert not torch.cuda.is_initialized()
assert torch.equal(torch.get_rng_state(), generator)
"""
    passes(run_python(code, cwd=tmp_path, env={"PATH": str(tmp_path), "CC": "", "CXX": ""}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_kernels_are_found_and_the_name_stays_free(tmp_path):
    """The repository's kernels/ are smart_fast.kernels; ``import kernels`` is the package of Hugging Face."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'from Hugging Face'")
    code = """
import smart_fast, kernels
assert kernels.get_kernel == "from Hugging Face"
import importlib.util
spec = importlib.util.find_spec("smart_fast.kernels.philox")
assert spec is not None and spec.origin.endswith("philox.py")
"""
    passes(run_python(code, cwd=ROOT, path=(ROOT, tmp_path)))


def test_public_names():
    assert all(hasattr(smart_fast, name) for name in smart_fast.__all__)
    for name in ("SMARTLoss", "kl_loss", "sym_kl_loss", "js_loss", "inf_norm", "l2_norm", "l1_norm", "sentence_norm"):
        assert name in smart_fast.__all__
    for name in ("kl_loss", "sym_kl_loss", "js_loss"):
        assert getattr(smart_fast.loss, name) is getattr(smart_fast, name)
