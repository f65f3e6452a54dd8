"""Backends by name: which exist, what "auto" means, and fallbacks that say so once."""

import math
import threading
import types
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import smart_fast
from smart_fast import BackendFallbackWarning, SMARTLoss, available_backends, kl_loss, set_default_backend
from smart_fast.__main__ import main
from smart_fast.backends import backend_of_caller, calling, default_backend
from smart_fast.backends.pytorch import PYTORCH
from tests.helpers import run_python

PAIR = (torch.randn(3, 5), torch.randn(3, 5))


@pytest.fixture(autouse=True)
def _auto_afterwards():
    before = default_backend()
    yield
    set_default_backend(before)


@pytest.fixture
def no_native(monkeypatch):
    """As on a machine without a compiler."""
    monkeypatch.setitem(smart_fast.backends.registry.state.found, "native", "it cannot be built: no C++ compiler")


def test_available_backends_says_why_not():
    found = available_backends()
    assert list(found) == ["torch", "triton", "native"]
    assert found["torch"] is None
    assert all(reason is None or (isinstance(reason, str) and len(reason) > 20) for reason in found.values())


def test_a_backend_that_does_not_exist():
    unavailable = [reason for reason in available_backends().values() if reason]
    for call in (
        lambda: kl_loss(*PAIR, backend="jax"),
        lambda: SMARTLoss(nn.Linear(5, 5), kl_loss, backend="jax"),
        lambda: set_default_backend("jax"),
    ):
        with pytest.raises(ValueError, match="'jax' does not exist") as error:
            call()
        assert all(part in str(error.value) for part in ("'auto'", "'torch' (available)", *unavailable))
    with pytest.raises(TypeError, match="name"):
        set_default_backend(None)
    assert default_backend() == "auto"


def fallbacks(call, action="always"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        call()
    return [str(each.message) for each in caught if each.category is BackendFallbackWarning]


def test_a_fallback_says_so_once_per_reason(no_native):
    smart, embed = SMARTLoss(nn.Linear(5, 5), kl_loss, backend="native"), torch.randn(3, 5)

    def calls():
        for _ in range(3):
            smart(embed, PAIR[0])
            kl_loss(*PAIR, backend="native")

    (said,) = fallbacks(calls)
    assert "'native' falls back to PyTorch" in said


def test_a_fallback_can_be_an_error(no_native):
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendFallbackWarning)
        for _ in range(2):
            with pytest.raises(BackendFallbackWarning, match="native"):
                kl_loss(*PAIR, backend="native")


def test_a_fallback_gives_what_pytorch_gives(no_native):
    with pytest.warns(BackendFallbackWarning):
        found = kl_loss(*PAIR, backend="native")
    assert torch.equal(found, kl_loss(*PAIR, backend="torch"))


@pytest.mark.skipif(available_backends()["triton"] is None, reason="the Triton backend serves tensors here")
def test_triton_on_cpu_tensors_says_what_would_help():
    (said,) = fallbacks(lambda: kl_loss(*PAIR, backend="triton"))
    assert "triton" in said
    assert "TRITON_INTERPRET=1" in said or "install" in said


@pytest.mark.parametrize("backend", ["triton", "native", "auto"])
def test_float64_is_silent(backend):
    def calls():
        kl_loss(PAIR[0].double(), PAIR[1].double(), backend=backend)
        net = nn.Linear(5, 3).double()
        SMARTLoss(net, kl_loss, backend=backend)(PAIR[0].double(), net(PAIR[0].double()))

    assert fallbacks(calls) == []


def test_auto_is_silent():
    assert fallbacks(lambda: SMARTLoss(nn.Linear(5, 5), kl_loss)(*PAIR)) == []


def test_set_default_backend_changes_what_auto_means(no_native):
    set_default_backend("native")
    assert len(fallbacks(lambda: kl_loss(*PAIR))) == 1
    assert len(fallbacks(lambda: SMARTLoss(nn.Linear(5, 5), lambda p, s: p.sum())(*PAIR))) == 1
    assert fallbacks(lambda: kl_loss(*PAIR, backend="torch")) == []
    set_default_backend("auto")
    assert fallbacks(lambda: kl_loss(*PAIR)) == []


def test_the_calling_backend_belongs_to_its_thread():
    seen = {}

    def look(name):
        seen[name] = backend_of_caller()

    with calling("native"):
        other = threading.Thread(target=look, args=("other",))
        other.start()
        other.join()
        look("same")
    look("after")
    assert seen == {"other": "auto", "same": "native", "after": "auto"}


@pytest.mark.filterwarnings("ignore::smart_fast.BackendFallbackWarning")
def test_the_calling_backend_is_restored_after_an_error():
    def fail(p, s):
        raise KeyError("from the loss")

    with pytest.raises(KeyError):
        SMARTLoss(nn.Linear(5, 5), fail, backend="native", num_steps=0)(*PAIR)
    assert backend_of_caller() == "auto"


ENVIRONMENT = """
import torch, warnings, smart_fast
warnings.simplefilter("error", smart_fast.BackendFallbackWarning)
pair = torch.randn(2, 3), torch.randn(2, 3)
try:
    smart_fast.kl_loss(*pair)
except Exception as error:
    print(type(error).__name__, error)
smart_fast.set_default_backend("torch")
print("loss", smart_fast.kl_loss(*pair).item())
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("value", "says"),
    [("native", "BackendFallbackWarning"), ("jax", "ValueError environment variable SMART_FAST_BACKEND"), ("", "loss")],
)
def test_the_environment_variable(tmp_path, value, says):
    done = run_python(
        ENVIRONMENT,
        cwd=tmp_path,
        env={"SMART_FAST_BACKEND": value, "CXX": "no-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(says)
    assert "loss" in done.stdout.splitlines()[-1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["here", "with a mistake in the environment"])
def test_the_report(how, tmp_path, capsys):
    if how == "here":
        assert main() == 0
        report = capsys.readouterr().out
        assert "auto means auto" in report
    else:
        done = run_python(["-m", "smart_fast"], cwd=tmp_path, env={"SMART_FAST_BACKEND": "jax"})
        assert done.returncode == 0, done.stderr
        report = done.stdout
        assert "SMART_FAST_BACKEND: 'jax' does not exist" in report
    for part in (f"smart-fast {smart_fast.__version__}", torch.__version__, "cpu:", "torch    available", "native"):
        assert part in report


def advice(monkeypatch, capsys, **environment):
    """The last line of the report."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert main() == 0
    return capsys.readouterr().out.splitlines()[-1].strip()


def test_the_report_ends_with_advice(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("smart_fast.__main__.shutil.which", lambda name: None)  # no nvidia-smi
    cpu = "tensors on the CPU get backend"
    unbuilt = {"torch": None, "triton": "no GPU is visible", "native": "not built yet"}
    monkeypatch.setattr("smart_fast.__main__.available_backends", lambda: unbuilt)
    monkeypatch.setattr("smart_fast.__main__.select", lambda *_: PYTORCH)
    monkeypatch.setattr("smart_fast.build.missing", lambda: None)
    assert "python -m smart_fast build" in advice(monkeypatch, capsys)
    monkeypatch.setattr("smart_fast.build.missing", lambda: "ninja is not on PATH (fix: pip install ninja)")
    assert "pip install ninja setuptools && python -m smart_fast build" in advice(monkeypatch, capsys)
    monkeypatch.setattr("smart_fast.build.missing", lambda: "no C++ compiler (fix: apt install g++)")
    assert "no C++ compiler" in advice(monkeypatch, capsys)
    monkeypatch.setattr("smart_fast.__main__.select", lambda *_: types.SimpleNamespace(name="triton"))
    assert "nothing to do" in advice(monkeypatch, capsys)
    monkeypatch.setattr("smart_fast.build.missing", lambda: None)
    assert "launches the Triton kernels from C++" in advice(monkeypatch, capsys)
    monkeypatch.setattr("smart_fast.__main__.select", lambda *_: PYTORCH)
    monkeypatch.setattr("smart_fast.__main__.default_backend", lambda: "torch")
    assert "unset SMART_FAST_BACKEND" in advice(monkeypatch, capsys)
    monkeypatch.setattr("smart_fast.__main__.select", lambda *_: types.SimpleNamespace(name="native"))
    assert main() == 0
    *_, says, last = capsys.readouterr().out.splitlines()
    assert cpu in says
    assert says.endswith("native")
    assert "nothing to do" in last


# ---- what "auto" means -----------------------------------------------------------------------------------------------


def test_auto_takes_the_first_rule_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from smart_fast.backends import auto

    small = auto.Rule("native", "small or unaligned", fewer_than=100, unaligned=True)
    large = auto.Rule("triton", "the rest")
    monkeypatch.setitem(auto.RULES, "cpu", (small, large))
    assert auto.candidates(torch.zeros(3, 4)) == ["native", "triton"]
    assert auto.candidates(torch.zeros(30, 4)) == ["triton"]
    assert auto.candidates(torch.zeros(30, 5)) == ["native", "triton"]  # rows of 20 bytes
    assert auto.candidates(torch.zeros(121)[1:].view(30, 4)) == ["native", "triton"]
    assert auto.candidates(torch.zeros(30, 4, device="meta")) == []


def test_auto_serves_by_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from smart_fast import backends
    from smart_fast.backends import auto

    monkeypatch.setattr(backends.registry.state, "default", "auto")
    x = torch.zeros(3, 4)
    monkeypatch.setitem(auto.RULES, "cpu", (auto.Rule("triton", "interpreted here"),))
    assert backends.select("auto", x).name == "triton"
    monkeypatch.setitem(auto.RULES, "cpu", ())
    assert backends.select("auto", x).name == "torch"


@pytest.mark.parametrize(
    ("shape", "shift", "eager"),
    [
        ((8, 2), 0, ["native", "triton"]),  # a classifier's head
        ((64, 128, 768), 0, ["triton"]),
        ((64, 128, 768), 1, ["native", "triton"]),  # memory that begins between two vectors
        ((512, 30522), 0, ["native", "triton"]),  # so do rows of BERT's vocabulary
        ((512, 32000), 0, ["triton"]),
    ],
)
def test_auto_on_a_gpu_goes_by_shapes(shape: tuple[int, ...], shift: int, eager: list[str]) -> None:
    from smart_fast.backends import auto

    tensor = torch.empty(math.prod(shape) + shift, dtype=torch.bfloat16)[shift:].view(shape)
    assert auto.candidates(tensor, "cuda") == eager
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        assert auto.candidates(tensor, "cuda") == ["triton"]


def test_the_short_way_keeps_to_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from smart_fast.backends import auto

    assert auto.elements("native", "cuda") == auto.SMALL
    assert auto.elements("native", "cpu") == math.inf
    assert auto.elements("triton", "cuda") == auto.elements("native", "xpu") == 0
    monkeypatch.setitem(auto.RULES, "cuda", ())
    assert auto.elements("native", "cuda") == 0


def test_every_rule_names_a_backend_and_a_reason() -> None:
    from smart_fast.backends import NAMES, auto

    rules = [rule for rules in auto.RULES.values() for rule in rules]
    assert all(rule.backend in NAMES and rule.why for rule in rules)


def test_noise_of_pytorch_from_a_seed() -> None:
    """As the contract has it: the seed decides, masked rows stay, and the noise is what was added."""
    embed, mask = torch.ones(3, 4), torch.tensor([True, False, True])
    seed = torch.tensor([5])
    perturbed, noise = PYTORCH.perturb(embed, seed, 0.5, mask, True, None)
    expected = 0.5 * torch.randn(3, 4, generator=torch.Generator().manual_seed(5)) * mask.unsqueeze(-1)
    torch.testing.assert_close(noise, expected, rtol=0, atol=0)
    torch.testing.assert_close(perturbed, embed + expected, rtol=0, atol=0)
    assert not torch.equal(PYTORCH.perturb(embed, seed + 1, 0.5, mask, True, None)[1], noise)
