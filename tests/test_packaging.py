"""The sdist and the wheel: what is in them, what they declare, and that they work."""

import email
import re
import shutil
import tarfile
import zipfile

import pytest

import smart_fast
from tests.helpers import ROOT, run_python

pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 or later")

NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def build(kind, source, target):
    target.mkdir(exist_ok=True)
    done = run_python(["-c", BUILD, f"build_{kind}", str(target)], cwd=source, path=())
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a copy of this repository, and a wheel built from what the sdist holds."""
    base = tmp_path_factory.mktemp("packaging")
    source = base / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCES)
    (source / "csrc" / "cpu").mkdir(parents=True, exist_ok=True)
    (source / "csrc" / "cpu" / "probe.h").write_text("// stands for the C++ sources\n")
    (source / "kernels" / "tuned").mkdir(exist_ok=True)
    (source / "kernels" / "tuned" / "probe.json").write_text("{}\n")  # stands for a GPU's launch choices
    sdist = build("sdist", source, base / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(base / "unpacked", filter="data")
    (unpacked,) = (base / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, base / "dist")


def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_what_the_wheel_holds(built):
    found = names(built[1])
    sources = {f"smart_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    sources |= {
        f"smart_fast/{path.relative_to(ROOT)}"
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cpp", ".cuh", ".cu")
    }
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "smart_fast").rglob("*.py")}
    others = {"smart_fast/py.typed", "smart_fast/METHOD.md", "smart_fast/kernels/tuned/probe.json"}
    others |= {f"smart_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels" / "tuned").glob("*.json")}
    assert sources | others | {"smart_fast/csrc/cpu/probe.h"} <= found
    assert {name.split("/")[0] for name in found} == {"smart_fast", f"smart_fast-{smart_fast.__version__}.dist-info"}
    suffixes = (".py", ".h", ".cpp", ".cuh", ".cu")
    assert all(name.endswith(suffixes) or ".dist-info/" in name for name in found - others)


def test_what_the_wheel_declares(built):
    wheel = built[1]
    assert wheel.name == f"smart_fast-{smart_fast.__version__}-py3-none-any.whl"
    info = f"smart_fast-{smart_fast.__version__}.dist-info"
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(f"{info}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("smart-fast", smart_fast.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert f"{info}/licenses/LICENSE" in names(wheel)
    required = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
    assert len(required) == 2
    assert "torch>=2.11" in required
    assert any(re.match(r"triton>=3.*; sys_platform == .linux.", each) for each in required)
    assert {"test", "bench", "transformers"} <= set(metadata.get_all("Provides-Extra"))


def test_a_checkout_without_c_sources_builds(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCES)
    shutil.rmtree(source / "csrc", ignore_errors=True)
    found = names(build("wheel", source, tmp_path / "dist"))
    assert "smart_fast/kernels/philox.py" in found
    assert not any(name.startswith("smart_fast/csrc") for name in found)


def test_the_installed_wheel_works(built, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(built[1]).extractall(site)
    code = f"""
import importlib.metadata, importlib.util, sys, torch
import smart_fast
assert smart_fast.__file__.startswith({str(site)!r})
assert list(smart_fast.__path__) == [{str(site / "smart_fast")!r}]
assert importlib.metadata.version("smart-fast") == smart_fast.__version__
if importlib.util.find_spec("triton"):
    import smart_fast.kernels.philox
    assert smart_fast.kernels.philox.__file__.startswith({str(site)!r})
net = torch.nn.Linear(5, 3)
print(smart_fast.SMARTLoss(net, smart_fast.kl_loss)(torch.ones(2, 5), net(torch.ones(2, 5))).item())
"""
    done = run_python(code, cwd=tmp_path, path=(site,))
    assert done.returncode == 0, done.stderr
