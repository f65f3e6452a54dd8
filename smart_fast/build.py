"""Building and finding the compiled operators of the native backend. Nothing here runs when smart_fast is imported.

One extension per content of csrc/, torch version, Python and instruction set, in torch's own extension cache
(TORCH_EXTENSIONS_DIR).
A file lock that the system releases when its holder dies makes concurrent builds wait for one another; a stamp written
last tells a finished build from one that was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: No -march=native: a binary may run on other machines; csrc/cpu picks the instruction set when it runs.
#: -fopenmp without linking a runtime: torch has loaded one, whose threads are the ones to use.
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"] + (
    ["-fopenmp"] if sys.platform == "linux" else []
)
#: By widest instruction set. Each is a third of the compiler's work on csrc/cpu.
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
CPU_SOURCES = (
    "operators.cpp",  # includes all that include torch's headers
    "cpu/dispatch.cpp",
    *(f"cpu/{each}.cpp" for each in INSTRUCTION_SETS),
)
_SUFFIXES = (".h", ".cpp", ".cuh", ".cu")
_STAMP = "smart_fast.built"


class BuildError(RuntimeError):
    """The native backend cannot be built here; the message says what is missing and what would fix it."""


def sources() -> Path | None:
    """The directory csrc/: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for directory in (package / "csrc", package.parent / "csrc"):
        if (directory / "operators.cpp").is_file():
            return directory
    return None


def cuda_sources(directory: Path) -> list[Path]:
    """The CUDA sources, if torch was built for CUDA, there is an nvcc to compile them, and a GPU to compile them for:
    one in this machine, or those that TORCH_CUDA_ARCH_LIST names."""
    if torch.version.cuda is None:
        return []
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        return []
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if shutil.which("nvcc") is None and not (Path(home) / "bin" / "nvcc").is_file():
        return []
    return sorted((directory / "cuda").glob("*.cu")) + sorted((directory / "cuda").glob("*.cpp"))


def instruction_set() -> str | None:
    """The one that is compiled on first use: the widest of this CPU. None stands for all of them, to choose from when
    the extension runs: so SMART_FAST_INSTRUCTION_SETS=all asks, and so a build at installation is."""
    if os.environ.get("SMART_FAST_INSTRUCTION_SETS") == "all":
        return None
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")


def build_directory() -> Path | None:
    """Where this version of the extension is built, in torch's extension cache; None without sources."""
    directory = sources()
    if directory is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(each for each in directory.rglob("*") if each.suffix in _SUFFIXES):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0" + path.read_bytes())
    cuda = bool(cuda_sources(directory))
    for detail in (torch.__version__, sys.implementation.cache_tag, " ".join(FLAGS), instruction_set(), cuda):
        digest.update(f"\0{detail}".encode())
    return _cache() / f"smart_fast_native_{digest.hexdigest()[:12]}"


def _cache() -> Path:
    """`torch.utils.cpp_extension`'s cache, computed without that module: importing it takes half a second."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME") or (
        "~/Library/Caches" if sys.platform == "darwin" else os.path.join("~", ".cache")
    )
    if torch.version.cuda is not None:
        accelerator = "cu" + torch.version.cuda.replace(".", "")
    elif torch.version.hip is not None:
        accelerator = "rocm" + torch.version.hip.replace(".", "")
    else:
        accelerator = "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(root).expanduser() / "torch_extensions" / f"{python}_{accelerator}"


def missing() -> str | None:
    """What a build would lack, with the fix; None if it can start."""
    if sys.platform == "win32":
        return "the native backend is compiled by GCC or Clang: use Linux, macOS or WSL"
    if sources() is None:
        return "this installation holds no C++ sources (csrc/): reinstall smart-fast from its wheel or sdist"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return (
            f"no C++ compiler: {compiler!r} is not on PATH (fix: apt install g++, dnf install gcc-c++ or "
            "xcode-select --install; or set CXX)"
        )
    with _tools_on_path():
        if shutil.which("ninja") is None:
            return "ninja is not on PATH (fix: pip install ninja)"
    if importlib.util.find_spec("setuptools") is None:
        return "setuptools is not installed, torch builds extensions with it (fix: pip install setuptools)"
    headers = sysconfig.get_paths()["include"]
    if not os.path.isfile(os.path.join(headers, "Python.h")):
        return f"Python's headers are not in {headers} (fix: apt install python3-dev or dnf install python3-devel)"
    if not (Path(torch.__file__).parent / "include" / "torch" / "library.h").is_file():
        return "this build of torch has no C++ headers (fix: install torch from its wheels)"
    return None


@contextlib.contextmanager
def _tools_on_path() -> Iterator[None]:
    """Programs that pip installed beside this Python are found even if its environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts")]).strip(os.pathsep)
    try:
        yield
    finally:
        os.environ["PATH"] = before


def load() -> ModuleType | None:
    """The extension if it is there already: compiled at installation, or built earlier for these sources and torch.

    Raises:
        ImportError: it is there and cannot be loaded.
    """
    if importlib.util.find_spec("smart_fast._native") is not None:
        return importlib.import_module("smart_fast._native")
    directory = build_directory()
    return None if directory is None else _load_from(directory)


def _load_from(directory: Path) -> ModuleType | None:
    try:
        library = directory / (directory / _STAMP).read_text().strip()
    except OSError:
        return None
    if not library.is_file():
        return None
    spec = importlib.util.spec_from_file_location(directory.name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> ModuleType:
    """Compile the extension unless that has been done, and load it. Says so on stderr.

    Raises:
        BuildError: something is missing, or the compiler failed.
        ImportError: what was compiled cannot be loaded.
    """
    found = load()
    if found is not None:
        return found
    reason = missing()
    if reason is not None:
        raise BuildError(reason)
    directory, csrc = build_directory(), sources()
    assert directory is not None
    assert csrc is not None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / "smart_fast.lock"):
            found = _load_from(directory)  # another process may just have built it
            return _compile(directory, csrc) if found is None else found
    except OSError as error:
        raise BuildError(
            f"cannot write to the extension cache: {error} (fix: set TORCH_EXTENSIONS_DIR to a directory that can be "
            "written to)"
        ) from error


def _compile(directory: Path, csrc: Path) -> ModuleType:
    # torch's own lock file, left by a process that died: whoever builds this holds our lock first.
    (directory / "lock").unlink(missing_ok=True)
    cuda = cuda_sources(csrc)
    only = instruction_set()
    skipped = () if only is None else tuple(f"cpu/{each}.cpp" for each in INSTRUCTION_SETS if each != only)
    defined = ["-DSMART_FAST_CUDA"] * bool(cuda) + [f"-DSMART_FAST_ONLY={only}"] * (only is not None)
    _say(f"compiling the native backend{' with CUDA' if cuda else ''}, once (about half a minute) … ", end="")
    start = time.monotonic()
    try:
        with _tools_on_path():
            from torch.utils import cpp_extension

            module: Any = cpp_extension.load(
                name=directory.name,
                sources=[str(csrc / each) for each in CPU_SOURCES if each not in skipped]
                + [str(each) for each in cuda],
                extra_cflags=FLAGS + defined,
                extra_include_paths=[str(csrc)],
                build_directory=str(directory),
                with_cuda=bool(cuda),
            )
    except ImportError:
        _say("failed\n", prefix="")
        raise
    except Exception as error:
        _say("failed\n", prefix="")
        log = directory / "build.log"
        log.write_text(str(error))
        raise BuildError(f"the compiler failed: {_first_error(str(error))} (whole output: {log})") from error
    (directory / _STAMP).write_text(Path(module.__file__).name)
    _say(f"done in {time.monotonic() - start:.0f} s\n", prefix="")
    return module


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "no output")


def _say(text: str, end: str = "", prefix: str = "smart_fast: ") -> None:
    if sys.stderr is not None:
        sys.stderr.write(prefix + text + end)
        sys.stderr.flush()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``. The kernel releases it with its process: there are no stale ones."""
    import fcntl

    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is compiling the native backend, waiting for it\n")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: two builds at once are merely wasteful
        yield


def report(module: ModuleType) -> dict[str, Any]:
    """How ``module`` was built, and what it runs on."""
    about: dict[str, Any] = module.built_with()
    return {**about, "flags": " ".join(FLAGS), "file": module.__file__}
