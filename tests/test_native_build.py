"""Building the compiled operators: what can be missing, interrupted, concurrent or broken.

A few lines of C stand for the real sources, so that each build takes a second.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from smart_fast import build as native_build
from tests.helpers import ROOT, run_python

PROBE = """
#include <Python.h>
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define QUOTE_(a) #a
#define QUOTE(a) QUOTE_(a)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, QUOTE(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
PyMODINIT_FUNC JOIN(PyInit_, TORCH_EXTENSION_NAME)(void) {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "probe", 42);
  return module;
}
"""
USE = """
from pathlib import Path
from smart_fast import build as native_build
native_build.CPU_SOURCES = ("operators.cpp",)
native_build.sources = lambda: Path({csrc!r})
"""
BUILD = USE + "print('probe', native_build.build().probe)"

needs_tools = pytest.mark.skipif(native_build.missing() is not None, reason=str(native_build.missing()))


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """The probe's sources and an empty extension cache, for this process and for those it starts."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "operators.cpp").write_text(PROBE)
    monkeypatch.setattr(native_build, "CPU_SOURCES", ("operators.cpp",))
    monkeypatch.setattr(native_build, "sources", lambda: csrc)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return csrc


@needs_tools
def test_builds_once_and_says_so(probe, capfd):
    assert native_build.load() is None
    assert native_build.build().probe == 42
    said = capfd.readouterr().err
    assert "compiling the native backend" in said
    assert "done in" in said
    assert native_build.load().probe == 42
    assert native_build.build().probe == 42
    assert capfd.readouterr().err == ""


@pytest.mark.exhaustive
@needs_tools
def test_a_stale_lock_and_an_interrupted_build(probe, tmp_path):
    directory = native_build.build_directory()
    directory.mkdir(parents=True)
    (directory / "lock").touch()  # torch.utils.cpp_extension would wait for it for ever
    (directory / "smart_fast.lock").touch()
    (directory / f"{directory.name}.so").write_bytes(b"half a library")
    done = run_python(BUILD.format(csrc=str(probe)), cwd=tmp_path)
    assert "probe 42" in done.stdout, done.stderr


@pytest.mark.exhaustive
@needs_tools
def test_two_processes_at_once(probe, tmp_path):
    """One compiles, the other waits for it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BUILD.format(csrc=str(probe))]
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [each.communicate(timeout=120) for each in both]
    assert all("probe 42" in out for out, _ in results), results
    assert sum("compiling the native backend, once" in err for _, err in results) == 1


@needs_tools
def test_sources_torch_and_flags_name_the_build(probe, monkeypatch):
    monkeypatch.delenv("SMART_FAST_INSTRUCTION_SETS", raising=False)
    first = native_build.build_directory()
    monkeypatch.setattr(native_build, "FLAGS", ["-O1"])
    second = native_build.build_directory()
    (probe / "extra.h").write_text("")
    third = native_build.build_directory()
    monkeypatch.setenv("SMART_FAST_INSTRUCTION_SETS", "all")
    assert native_build.instruction_set() is None
    assert len({first, second, third, native_build.build_directory()}) == 4


@pytest.mark.parametrize(("torch_says", "expected"), [("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "portable")])
def test_the_widest_instruction_set_alone_is_compiled(torch_says, expected, monkeypatch):
    monkeypatch.delenv("SMART_FAST_INSTRUCTION_SETS", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torch_says)
    assert native_build.instruction_set() == expected


FALLBACK = """
import warnings, torch, smart_fast
warnings.simplefilter("always")
pair = torch.randn(2, 3), torch.randn(2, 3)
with warnings.catch_warnings(record=True) as caught:
    for _ in range(3):
        found = smart_fast.kl_loss(*pair, backend="native")
assert torch.equal(found, smart_fast.kl_loss(*pair, backend="torch"))
assert len([each for each in caught if each.category is smart_fast.BackendFallbackWarning]) == 1
print(smart_fast.available_backends()["native"])
assert torch.equal(found, smart_fast.kl_loss(*pair))
"""


@pytest.mark.exhaustive
def test_no_compiler(tmp_path):
    environment = {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = run_python(FALLBACK, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "'no-such-compiler' is not on PATH" in done.stdout
    assert "apt install g++" in done.stdout
    done = run_python(["-m", "smart_fast", "build"], cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "apt install g++" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
@needs_tools
def test_a_failed_build_falls_back(probe, tmp_path):
    (probe / "operators.cpp").write_text("this is not C++;\n")
    done = run_python(USE.format(csrc=str(probe)) + FALLBACK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the compiler failed" in done.stdout
    assert "operators.cpp" in done.stdout
    assert "build.log" in done.stdout
    assert done.stderr.count("compiling") == 1


@pytest.mark.exhaustive
@needs_tools
def test_a_broken_library_falls_back(probe, tmp_path):
    undefined = 'extern "C" int nowhere();\n' + PROBE.replace('"probe", 42', '"probe", nowhere()')
    (probe / "operators.cpp").write_text(undefined)
    done = run_python(USE.format(csrc=str(probe)) + FALLBACK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cannot be loaded: ImportError" in done.stdout


@pytest.mark.parametrize(("tool", "fix"), [("ninja", "pip install ninja"), ("c++", "apt install g++")])
def test_what_is_missing(tool, fix, probe, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == tool else f"/usr/bin/{name}")
    assert fix in native_build.missing()
    with pytest.raises(native_build.BuildError, match="fix:"):
        native_build.build()


def test_no_sources(monkeypatch):
    monkeypatch.setattr(native_build, "sources", lambda: None)
    assert "no C++ sources" in native_build.missing()
    assert native_build.build_directory() is None
    assert native_build.load() is None


def test_a_cache_that_cannot_be_written(probe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(native_build, "missing", lambda: None)
    with pytest.raises(native_build.BuildError, match="TORCH_EXTENSIONS_DIR"):
        native_build.build()


@pytest.mark.exhaustive
def test_auto_never_builds(tmp_path):
    code = """
import torch, smart_fast
print(smart_fast.available_backends()["native"])
smart_fast.kl_loss(torch.randn(2, 3), torch.randn(2, 3))
net = torch.nn.Linear(3, 2)
smart_fast.SMARTLoss(net, smart_fast.kl_loss)(torch.ones(2, 3), net(torch.ones(2, 3)))
"""
    done = run_python(code, cwd=tmp_path, env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert "not built yet: `python -m smart_fast build`" in done.stdout
    assert done.stderr == ""
    assert not (tmp_path / "cache").exists()


@pytest.mark.exhaustive
@needs_tools
def test_compiled_at_installation(tmp_path):
    """SMART_FAST_BUILD_EXT=1 puts the extension into the wheel, and that is what is used."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    )
    for each in native_build.CPU_SOURCES:
        (source / "csrc" / each).write_text(PROBE if each == "operators.cpp" else "")
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    done = run_python(
        ["-c", build, str(tmp_path)], cwd=source, path=(), env={"SMART_FAST_BUILD_EXT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "from smart_fast import build; print(build.load().probe, build.load().__file__)"
    done = run_python(code, cwd=tmp_path, path=(site,))
    assert done.stdout.startswith(f"42 {site}"), done.stderr


def test_cuda_is_compiled_where_there_is_something_to_compile_it_for(monkeypatch, tmp_path):
    """A CUDA build of torch, an nvcc, and a GPU or a list of them; torch's own choice fails without either."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("")
    nvcc.chmod(0o755)
    csrc = native_build.sources()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert native_build.cuda_sources(csrc) == []
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    everything = native_build.cuda_sources(csrc)
    assert {path.suffix for path in everything} == {".cu", ".cpp"}
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert native_build.cuda_sources(csrc) == everything
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native_build.cuda_sources(csrc) == []
