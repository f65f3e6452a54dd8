"""Stage "tests": about 120 of the 1700 tests marked ``gpu``, and the plugin of pytest that picks them.

All would take many minutes: each brings kernels of its own to compile. Picked are

- every test of what only a device shows (no emulator has it): graphs, streams, generators, synchronization, agreement
  of native with Triton on one device;
- of every other test function of a kernel one set of parameters for each of Triton and native, the last, since
  parameters are listed from small to large: the widest rows, which take the most of a block, are where a GPU differs
  from the interpreter and the emulation.

Left out are whole functions that test Python around the kernels, which has no device in it, or that try random or very
many shapes (`LEFT_OUT`). Every result is a line the moment it exists; a failure is printed when it comes.
"""

from __future__ import annotations

import collections
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from .lines import FILE, dry_run, emit

FILES = (
    "test_native_cuda", "test_compile", "test_noise_kernels", "test_divergence_kernels", "test_divergence_wide",
    "test_ascend_kernels", "test_fisher_kernels", "test_linear",
)  # fmt: skip
DRY_FILES, DRY_TESTS = ("test_noise_kernels",), 4
LEFT_OUT = {
    "test_a_norm_of_another_shape_is_named": "an error that Python raises",
    "test_second_derivatives_are_an_error": "an error that autograd raises",
    "test_nothing_to_do": "empty tensors launch nothing",
    "test_traced": "fake tensors",
    "test_any_shape_and_value": "random shapes: each would be compiled",
    "test_perturbed_embeddings_pass_gradients_on": "the autograd node",
    "test_the_loss_takes_it": "the loss around the kernel",
    "test_reference_cancels_where_we_do_not": "smart-pytorch's formula",
    "test_inputs_are_not_written": "the sanitizer's and the emulation's",
    "test_long_groups": "PyTorch's own reduction of long groups",
    "test_smart_loss_mask": "test_mask and test_smart_loss have the kernels",
    "test_fp16_extremes": "test_half_precision has the kernels in fp16",
    "test_dimensions": "test_strides has the kernels",
    "test_one_dimension": "a row as others are",
    "test_one_class_is_zero": "a row as others are",
    "test_signs_reach_the_corners": "test_signs has the kernels",
    "test_steps_from_uniform_noise": "test_uniform_noise_is_the_same_everywhere has the noise",
    "test_uniform_distribution": "test_uniform_noise_is_the_same_everywhere has the noise",
    "test_perturbed_embeddings": "test_smart_loss has the kernels",
    "test_whole_logits_agree_in_kernels": "test_half_precision_in_kernels has them",
}


def _backend(item: pytest.Item) -> str | None:
    """The kernels that a test is run on, None where it takes none of the fixture's."""
    parameters = getattr(item, "callspec", None)
    found = None if parameters is None else parameters.params.get("kernels")
    return found if isinstance(found, str) else None


def choose(items: Iterable[pytest.Item], backends: tuple[str, ...]) -> list[pytest.Item]:
    """Those of ``items`` that this module's docstring describes, native before Triton, which compiles."""
    alone, last = [], {}
    for item in items:
        name, backend = getattr(item, "originalname", item.name), _backend(item)
        if name in LEFT_OUT:
            continue
        if backend is None:
            alone.append(item)
        elif backend in backends:
            last[backends.index(backend), item.path.name, name] = item
    return alone + [last[key] for key in sorted(last, key=lambda key: key[0])]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if dry_run():
        kept = [each for each in choose(items, ("native", "triton")) if _backend(each)]
        kept = kept[: DRY_TESTS // 2] + kept[len(kept) - DRY_TESTS // 2 :]  # of either
    else:
        marked = [each for each in items if "gpu" in each.keywords]
        kept = choose(marked, ("native-cuda", "triton-cuda"))
    left = [each for each in items if each not in kept]
    config.hook.pytest_deselected(items=left)
    items[:] = kept


class Reporter:
    """Lives where reports arrive: with xdist in the process that has the workers, not in them."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.outcomes[report.outcome] += 1
        error = str(report.longrepr)[-1500:] if report.failed else None
        if report.failed:
            print(f"\n{report.nodeid} FAILED\n{report.longreprtext[-3000:]}", flush=True)
        ok: Any = {"passed": True, "failed": False}.get(report.outcome)
        emit("test", report.nodeid, ok=ok, outcome=report.outcome, seconds=report.duration, error=error)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        emit("tests", "in all", ok=exitstatus == 0, **self.outcomes)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter())


def main() -> int:
    # Triton compiles what these tests alone launch: shared out, though two workers may compile the same.
    # "-m gpu" asks for the exhaustive ones as well.
    workers = [] if dry_run() else ["-n", "8", "-m", "gpu"]
    folder = pathlib.Path(os.environ[FILE]).parent if FILE in os.environ else pathlib.Path()
    files = [f"tests/{each}.py" for each in (DRY_FILES if dry_run() else FILES)]
    command = [
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "bench.gpu.chosen_tests", *workers,
        f"--junitxml={folder / 'junit.xml'}", *files,
    ]  # fmt: skip
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
