"""Triton's CUDA launcher without a GPU: the real compiler, the real launcher, and in the place of libcuda.so.1 a stub
that launches nothing (driver_stub.c).

What a call costs the host is then all there but for the driver's own work; what it would have launched can be read back
parameter by parameter. Kernels see the memory of CPU tensors and do not run: outputs hold whatever was there.
"""

from __future__ import annotations

import collections
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

SOURCE = Path(__file__).with_name("driver_stub.c")
CAPABILITY = (9, 0)
MOST_PARAMETERS = 64
BYTES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8}


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64 * MOST_PARAMETERS),
    )


@dataclass(frozen=True)
class Launch:
    """What the driver was asked for. ``function`` tells compiled kernels of one name apart. ``parameters``: the bytes
    of each as an integer, but for those that the launcher itself adds."""

    name: str
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    parameters: tuple[int, ...]


def unavailable() -> str | None:
    """Why there can be no stub here, or None."""
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, and interpreted kernels are not launched"
    try:
        subprocess.run(["gcc", "--version"], capture_output=True, check=True)
    except OSError:
        return "no gcc on PATH"
    return None


class StubDriver:
    """Triton's driver while it is active (`with`): a current ``device`` and ``stream`` that may be set at will."""

    def __init__(self) -> None:
        self.device = 0
        self._streams: collections.defaultdict[Any, int] = collections.defaultdict(int)
        self._folder = tempfile.TemporaryDirectory()
        self._library = _library(Path(self._folder.name))
        os.environ["TRITON_LIBCUDA_PATH"] = self._folder.name
        from triton.backends.nvidia import driver as nvidia

        self._driver: Any = nvidia.CudaDriver()
        self._driver.get_device_capability = lambda _=None: CAPABILITY
        self._driver.get_current_device = lambda: self.device
        self._driver.get_current_stream = self._streams.__getitem__  # in C, as that of a GPU is
        self._driver.launcher_cls = self._launcher
        self._launcher_of = nvidia.CudaLauncher

    @property
    def stream(self) -> int:
        return self._streams[self.device]

    @stream.setter
    def stream(self, stream: int) -> None:
        self._streams.clear()
        self._streams.default_factory = lambda: stream

    def _launcher(self, source: Any, metadata: Any) -> Any:
        """The real one. What it is made of tells the stub how long the parameters of the next function are."""
        kinds = [each for each in source.signature.values() if each != "constexpr"]
        sizes = [8 if each.startswith("*") else BYTES[each] for each in kinds]
        self._library.stub_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        return self._launcher_of(source, metadata)

    def __enter__(self) -> StubDriver:
        triton.runtime.driver.set_active(self._driver)
        return self

    def __exit__(self, *error: object) -> None:
        triton.runtime.driver.set_active(None)

    def record(self, on: bool = True) -> None:
        """Forget what was launched so far, and keep what follows (if ``on``; else it is only counted)."""
        self._library.stub_record(int(on))

    def count(self) -> int:
        return int(self._library.stub_launch_count())

    def launches(self) -> Sequence[Launch]:
        """What was launched since `record`."""
        found = []
        for index in range(self.count()):
            launch = self._library.stub_launch(index).contents
            count = self._library.stub_parameter_count(launch.function)
            found.append(
                Launch(
                    self._library.stub_name(launch.function).decode(), launch.function, tuple(launch.grid),
                    tuple(launch.block), launch.shared, launch.stream, tuple(launch.parameters[:count]),
                )
            )  # fmt: skip
        return found


def _library(folder: Path) -> Any:
    """The stub, built and loaded under the name by which Triton's launcher asks for the driver."""
    path = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", SOURCE, "-o", path]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.stub_launch.restype = ctypes.POINTER(_Launch)
    library.stub_launch.argtypes = (ctypes.c_int64,)
    library.stub_launch_count.restype = ctypes.c_int64
    library.stub_name.restype = ctypes.c_char_p
    return library
