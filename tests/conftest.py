"""Where the kernels run: on the GPU if there is one, else interpreted on the CPU.

TRITON_INTERPRET must be set before Triton is first imported, hence here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import interpreter

if TYPE_CHECKING:
    from smart_fast.backends.base import Backend
    from smart_fast.backends.native import Native
    from tests import cuda_emulation

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The interpreter computes in numpy; infinities and NaN are inputs here, not accidents.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_configure(config: pytest.Config) -> None:
    if "not exhaustive" not in config.option.markexpr:
        os.environ.setdefault("SMART_FAST_INSTRUCTION_SETS", "all")  # all of csrc/cpu is compiled and tested
    if not torch.cuda.is_available():
        config.pluginmanager.register(Sampling())


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


LONGEST = (
    "test_every_stage_leaves_lines", "test_every_kernel_compiles", "test_distributed", "test_devices_are_asked_once",
    "test_kernels_under_address_and_undefined_behavior_sanitizer",
)  # fmt: skip


class Sampling:
    """Emulators take ten times as long as what they stand for: `.ci/run` sees a third of their exhaustive tests, and
    of wide rows two divergences, one with one sum and one with two. The others are the sweep's."""

    @pytest.hookimpl(tryfirst=True)  # before -m chooses
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            names = [*(each for each in given.values() if isinstance(each, str)), *getattr(item, "fixturenames", ())]
            emulated = "triton" in names or "emulated" in names
            if "exhaustive" not in item.keywords or not emulated:
                continue
            wide = given.get("width", 0) >= 9000 and given.get("kind") in ("kl", "js")
            if wide or zlib.crc32(item.nodeid.encode()) % 3:
                item.add_marker(pytest.mark.sweep)


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # By far the longest first, or one of several workers has them left at the end.
    items.sort(
        key=lambda item: "compile_only" not in item.keywords and getattr(item, "originalname", None) not in LONGEST
    )
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> cuda_emulation.Emulated:
    """The CUDA kernels on this CPU; in exhaustive runs under the sanitizer of undefined behavior."""
    from tests import cuda_emulation

    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cuda_emulation"
    thorough = "not exhaustive" not in request.config.option.markexpr
    return cuda_emulation.Emulated(cuda_emulation.shared_library(directory, thorough))


@pytest.fixture
def pytorch_by_default() -> Iterator[None]:
    """For tests of what holds in plain PyTorch, noise included: "auto" means "torch", whatever has been built here."""
    from smart_fast import set_default_backend

    set_default_backend("torch")
    yield
    set_default_backend("auto")


# Every kernel test runs on each of these: Triton interpreted on the CPU or compiled on the GPU (a process can only do
# one of them), and the compiled operators with another number of threads and with every instruction set.
GPU = pytest.mark.gpu
KERNELS = {
    "triton": ("triton", "cpu"),
    "triton-cuda": ("triton", "cuda"),
    "native": ("native", "cpu"),
    "native-2-threads": ("native", "cpu"),
    "native-avx2": ("native", "cpu"),
    "native-portable": ("native", "cpu"),
    "native-cuda": ("native", "cuda"),
}


@pytest.fixture(scope="session")
def native() -> Native:
    """The native backend, compiled if need be."""
    from smart_fast import build as native_build
    from smart_fast.backends import build_native

    if native_build.load() is None and (reason := native_build.missing()):
        pytest.skip(reason)
    return build_native()


# What a test learns of one number of threads and one instruction set holds of the others as a rule.
EXHAUSTIVE = ("native-2-threads", "native-avx2", "native-portable")


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [GPU] * ("cuda" in name) + [pytest.mark.exhaustive] * (name in EXHAUSTIVE)


@contextlib.contextmanager
def serving(request: pytest.FixtureRequest, chosen: str) -> Iterator[tuple[Backend, torch.device]]:
    """One of `KERNELS`, made the default backend, and the device to run it on."""
    from smart_fast.backends import set_default_backend

    name, device = KERNELS[chosen][0], torch.device(KERNELS[chosen][1])
    if name == "triton":
        if device.type == "cpu" and torch.cuda.is_available():
            pytest.skip("kernels are compiled here; TRITON_INTERPRET=1 with CUDA_VISIBLE_DEVICES= interprets them")
        module = pytest.importorskip("smart_fast.backends.triton").TRITON
        if device.type == "cpu":
            interpreter.quicken()
    else:
        module = request.getfixturevalue("native")
        if reason := module.cannot_serve(device):
            pytest.skip(reason)
        chosen = chosen.removeprefix("native-")
        if chosen == module.extension.built_with()["instruction_set"]:
            pytest.skip(f"{chosen} is what this CPU gets anyway")
        if chosen in ("avx2", "portable") and not module.extension.use_instruction_set(chosen):
            pytest.skip(f"this CPU does not run {chosen}")
        if chosen == "2-threads":
            torch.set_num_threads(2)
    set_default_backend(name)
    yield module, device
    set_default_backend("auto")
    if name == "native":
        torch.set_num_threads(1)
        module.extension.use_instruction_set("auto")


@pytest.fixture(params=[pytest.param(each, marks=marks(each)) for each in KERNELS])
def kernels(request: pytest.FixtureRequest) -> Iterator[tuple[Backend, torch.device]]:
    with serving(request, request.param) as served:
        yield served


@pytest.fixture
def backend(kernels: tuple[Backend, torch.device]) -> Backend:
    return kernels[0]


@pytest.fixture
def device(kernels: tuple[Backend, torch.device]) -> torch.device:
    return kernels[1]


@pytest.fixture
def poison(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernel outputs start as NaN: whatever is not written shows."""
    if backend.name == "native":
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills uninitialized memory, and so do we
        yield
        torch.use_deterministic_algorithms(False)
        return

    from smart_fast.backends import triton_plan

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    def poisoned_strided(shape: tuple[int, ...], _: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return poisoned(shape, dtype, device)

    monkeypatch.setattr(triton_plan, "allocate", poisoned)
    monkeypatch.setattr(triton_plan, "allocate_strided", poisoned_strided)
    yield
