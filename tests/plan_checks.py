"""What launch plans do, on a stub of the CUDA driver: run by test_triton_plan.py, without TRITON_INTERPRET.

    python tests/plan_checks.py            one JSON line a check: its name, and what is wrong or null

A plan's launches are compared with those of the launcher itself: compiled kernel, grid, block, shared memory, stream,
and every parameter, pointers by the tensor that they point to. The kernels have their own parameters and no bodies, so
that hundreds of them compile in no time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

from bench.driver_stub import Launch, StubDriver
from smart_fast.backends import triton_launch as ops
from smart_fast.backends import triton_plan
from smart_fast.backends.base import STATISTICS
from smart_fast.backends.triton_plan import Planned
from tests.helpers import report_checks

STUB = StubDriver()
DTYPES = (torch.float32, torch.bfloat16)

Make = Callable[[], tuple[Any, ...]]


def without_bodies(directory: str) -> dict[str, Any]:
    """The kernels that `triton_launch` launches, by name, as kernels that do nothing."""
    kernels = {name: each for name, each in vars(ops).items() if isinstance(each, triton.JITFunction)}
    source = "import triton\nimport triton.language as tl\n"
    for name, kernel in kernels.items():
        parameters = (f"{each.name}: tl.constexpr" if each.is_constexpr else each.name for each in kernel.params)
        source += f"\n\n@triton.jit\ndef {name}({', '.join(parameters)}):\n    pass\n"
    path = Path(directory) / "without_bodies.py"
    path.write_text(source)
    specification = importlib.util.spec_from_file_location("without_bodies", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return {name: getattr(module, name) for name in kernels}


def strided(rows: tuple[int, ...], width: int, dtype: torch.dtype, how: str) -> Tensor:
    """A tensor ``[*rows, width]``: contiguous, not aligned, of wider rows, transposed, of one row, or of every other
    column."""
    if how == "unaligned":
        memory = torch.zeros(rows[0] * rows[1] * width + 1, dtype=dtype)
        return memory[1:].view(*rows, width)
    if how == "sliced":
        return torch.zeros(*rows, width + 3, dtype=dtype)[..., :width]
    if how == "transposed":
        return torch.zeros(*rows[::-1], width, dtype=dtype).transpose(0, 1)
    if how == "expanded":
        return torch.zeros(1, 1, width, dtype=dtype).expand(*rows, width)
    if how == "spaced":
        return torch.zeros(*rows, 2 * width, dtype=dtype)[..., ::2]
    return torch.zeros(*rows, width, dtype=dtype)


LAYOUTS = ("unaligned", "sliced", "transposed", "expanded", "spaced")


def views() -> Iterator[tuple[tuple[int, int], int, torch.dtype, str]]:
    """Shapes, dtypes and layouts that launches differ by: one thing at a time."""
    yield from (((2, 3), 16, dtype, "contiguous") for dtype in DTYPES)
    yield from (((2, 3), 16, torch.float32, how) for how in LAYOUTS)
    yield from (((2, 3), width, torch.float32, "contiguous") for width in (1, 10, 12))
    yield (16, 1), 16, torch.float32, "contiguous"


def perturb_calls() -> Iterator[Make]:
    for view, masked, united in itertools.product(views(), (False, True), (False, True)):
        if (masked or united) and view[:2] != ((2, 3), 16):
            continue

        def make(view: Any = view, masked: bool = masked, united: bool = united) -> tuple[Any, ...]:
            rows = view[0]
            mask = torch.ones(rows, dtype=torch.bool) if masked else None
            unit = torch.ones(*rows, 1) if united else None
            return (
                strided(*view),
                torch.zeros(1, dtype=torch.int64),
                number(),
                mask,
                unit,
                "uniform" if united else "normal",
            )

        yield make


def norm_calls() -> Iterator[Make]:
    for kind, update in (("inf", "smart-pytorch"), ("l2", "paper"), ("opaque", "sift")):

        def make(kind: str = kind, update: str = update) -> tuple[Any, ...]:
            grad = torch.zeros(2, 3, 16)
            return grad, torch.zeros(2, 3, 16), None, None, None, kind, number(), number(), update, "normal"

        yield make


def ascend_calls() -> Iterator[Make]:
    for view, seeded, keep in itertools.product(views(), (False, True), (False, True)):
        if (seeded or keep) and view[1:] != (16, torch.float32, "contiguous"):
            continue

        def make(view: Any = view, seeded: bool = seeded, keep: bool = keep) -> tuple[Any, ...]:
            noise = torch.zeros(1, dtype=torch.int64) if seeded else torch.zeros(*view[0], view[1])
            numbers = number(), number()
            update = "smart-pytorch", number(), keep, "uniform" if seeded else "normal"
            grad = torch.zeros(*view[0], view[1])
            return strided(*view), grad, noise, None, None, None, None, "inf", "row", *numbers, *update

        yield make

    def grouped() -> tuple[Any, ...]:
        embed, grad, noise, norm = torch.zeros(2, 3, 16), torch.zeros(2, 3, 16), torch.zeros(2, 3, 16), torch.zeros(6)
        numbers = number(), number(), "sift", number()
        return (
            embed,
            grad,
            noise,
            norm,
            None,
            torch.ones(2, 3, dtype=torch.bool),
            None,
            "l2",
            "group",
            *numbers,
            True,
            "normal",
        )

    yield grouped


def specs() -> Iterator[tuple[Any, ...]]:
    for output in ("sum", "rows", "terms"):
        yield "kl", output, number(), number(), 1.0, False
    yield "kl", "sum", number(), number(), 0.5, False
    yield "jsd", "sum", 0.5, number(), 1.0, True


def forward_calls() -> Iterator[Make]:
    for view, masked in itertools.product(views(), (False, True)):
        if masked and view[1:] != (16, torch.float32, "contiguous"):
            continue

        def make(view: Any = view, masked: bool = masked) -> tuple[Any, ...]:
            target = torch.zeros(*view[0], view[1], dtype=torch.bfloat16 if masked else torch.float32)
            mask = torch.ones(view[0], dtype=torch.bool) if masked else None
            return strided(*view), target, mask, "kl", "sum", number(), number(), 1.0, False, True

        yield make
    for spec, keep in itertools.product(specs(), (False, True)):
        yield lambda spec=spec, keep=keep: (torch.zeros(2, 3, 16), torch.zeros(2, 3, 16), None, *spec, keep)
    yield lambda: (  # a sum over several programs
        torch.zeros(200, 16), torch.zeros(200, 16), None, "kl", "sum", number(), number(), 1.0, False, True
    )  # fmt: skip
    for output in ("sum", "terms"):  # rows that several programs share
        yield lambda output=output: (
            torch.zeros(2, 9000), torch.zeros(2, 9000), None, "kl", output, number(), number(), 1.0, False, True
        )  # fmt: skip


def backward_calls() -> Iterator[Make]:
    for spec, wanted in itertools.product(specs(), ((True, True), (True, False), (False, True))):
        if wanted != (True, True) and spec[1] != "sum":
            continue

        def make(spec: Any = spec, wanted: Any = wanted) -> tuple[Any, ...]:
            shapes = {"terms": (2, 3, 16), "rows": (2, 3), "sum": ()}
            logits = torch.zeros(2, 3, 16), torch.zeros(2, 3, 16)
            return torch.zeros(shapes[spec[1]]), *logits, torch.zeros(6, STATISTICS), None, *spec, *wanted

        yield make
    for grad in (lambda: torch.zeros(()).expand(2, 3, 16), lambda: torch.zeros(3, 2, 16).transpose(0, 1)):
        yield lambda grad=grad: (
            grad(), torch.zeros(2, 3, 16), torch.zeros(2, 3, 16), torch.zeros(6, STATISTICS), None, "kl", "terms", 1.0,
            1.0, 1.0, False, True, True,
        )  # fmt: skip


def slice_calls(*before: Any) -> Iterator[Make]:
    for width in (16, 9000):
        stats = (torch.zeros(6, STATISTICS),) if before else ()
        yield lambda width=width, stats=stats: (
            torch.zeros(2, 3, width), torch.zeros(2, 3, width), *stats, None, "kl", "rows", 1.0, 1.0, 1.0, False
        )  # fmt: skip


def fisher_calls() -> Iterator[Make]:
    for view, wide in itertools.product(views(), (False, True)):
        if not wide or view[2] != torch.float32:
            yield lambda view=view, wide=wide: (strided(*view), wide)


CALLS: dict[Any, Callable[[], Iterator[Make]]] = {
    ops.perturb: perturb_calls,
    ops.ascend_norm: norm_calls,
    ops.ascend: ascend_calls,
    ops.divergence_forward: forward_calls,
    ops.divergence_backward: backward_calls,
    ops.divergence_parts: slice_calls,
    ops.divergence_finish: lambda: slice_calls(True),
    ops.fisher_direction: fisher_calls,
}

_numbers = itertools.count(1)


def number() -> float:
    """Another one each time."""
    return next(_numbers) / 7


def launched(call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[list[Launch], Any]:
    """What ``call`` launches, in the place of each pointer what it points to, and what it returns."""
    STUB.record()
    result = call(*args)
    launches = STUB.launches()
    STUB.record(False)
    names = {each.data_ptr(): f"tensor {place}" for place, each in enumerate(args) if isinstance(each, Tensor)}
    for place, each in enumerate((result,) if isinstance(result, Tensor) else result):
        if each.numel() and each.data_ptr() not in names:
            names[each.data_ptr()] = f"result {place}"
    found = []
    for each in launches:
        parameters = [
            names.setdefault(value, f"other {len(names)}") if value > 1 << 40 else value for value in each.parameters
        ]
        found.append(dataclasses.replace(each, parameters=tuple(parameters)))
    return found, result


def described(result: Any) -> list[Any]:
    results = (result,) if isinstance(result, Tensor) else result
    return [(each.shape, each.stride(), each.dtype) for each in results]


def check_launches(launcher: Any) -> None:
    """All calls of a launcher through one cache, twice over, so that a key that lacks something finds a wrong plan."""
    planned = Planned(launcher)
    calls = list(CALLS[launcher]())
    for _ in range(2):
        for make in calls:
            args = make()
            found, result = launched(planned, args)
            expected, plain = launched(launcher, args)
            assert found == expected, f"{args}\n{found}\n{expected}"
            assert described(result) == described(plain)
    assert planned.plans > len(calls) // 2


def check_numbers_are_passed_on() -> None:
    """A schedule of them neither makes plans nor sees the first ones again."""
    planned = Planned(ops.perturb)
    for count in range(20):
        args = torch.zeros(2, 8), torch.zeros(1, dtype=torch.int64), number(), None, None, "normal"
        assert launched(planned, args)[0] == launched(ops.perturb, args)[0]
        assert planned.plans == 1, count


def check_numbers_are_not_computed_with() -> None:
    """A plan would hold what came out for the first ones."""

    def doubled(embed: Tensor, seed: Tensor, noise_var: float, wrap: Any) -> Tensor:
        return ops.perturb(embed, seed, noise_var + noise_var, None, None, "normal", wrap)

    with pytest.raises(TypeError, match="launchers pass numbers on"):
        Planned(doubled)(torch.zeros(2, 8), torch.zeros(1, dtype=torch.int64), number())


def check_one_tensor_twice() -> None:
    planned, spec = Planned(ops.divergence_forward), (None, "kl", "sum", 1.0, 1.0, 1.0, False, True)
    both = torch.zeros(2, 8)
    for args in ((both, both, *spec), (torch.zeros(2, 8), torch.zeros(2, 8), *spec), (both, both, *spec)):
        assert launched(planned, args)[0] == launched(ops.divergence_forward, args)[0]


def check_streams() -> None:
    planned, args = Planned(ops.perturb), (torch.zeros(2, 8), torch.zeros(1, dtype=torch.int64), 1.0, None, None)
    args = (*args, "normal")
    planned(*args)
    for stream in (7, 11, 0):
        STUB.stream = stream
        assert [each.stream for each in launched(planned, args)[0]] == [stream]


def check_hooks_see_every_launch() -> None:
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    planned, args = Planned(ops.perturb), (torch.zeros(2, 8), torch.zeros(1, dtype=torch.int64), 1.0, None, None)
    args = (*args, "normal")
    planned(*args)
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        planned(*args)
        planned(*args)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    planned(*args)
    assert seen == ["perturb_kernel"] * 2, seen


def check_few_are_kept_and_threads_share_them() -> None:
    planned, wrong = Planned(ops.perturb), []

    def work(seed: int) -> None:
        try:
            for count in range(200):
                embed = torch.zeros(1 + (seed + count) % 5, 8)
                out = planned(embed, torch.zeros(1, dtype=torch.int64), 1.0, None, None, "normal")
                assert out.shape == embed.shape
        except Exception:
            wrong.append(traceback.format_exc())

    work(0)  # compiles: Python 3.11's ast.parse, which Triton calls for that, is not made for threads
    STUB.record(False)
    with mock.patch.object(triton_plan, "MOST", 3):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not wrong, wrong[0]
    assert STUB.count() == 800
    assert planned.plans <= 3 + len(threads)


def check_copies_are_not_planned() -> None:
    """A copy is made anew for each call, so the launcher makes each call."""
    planned = Planned(ops.fisher_direction)
    for _ in range(3):
        args = strided((2, 3), 16, torch.float32, "spaced"), False
        assert launched(planned, args)[0] == launched(ops.fisher_direction, args)[0]


def main() -> None:
    checks: dict[str, Callable[[], None]] = {
        f"launches of {launcher.__name__}": lambda launcher=launcher: check_launches(launcher) for launcher in CALLS
    }
    checks |= {name.removeprefix("check_").replace("_", " "): check for name, check in globals().items()
               if name.startswith("check_") and name != "check_launches"}  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, STUB, mock.patch.multiple(ops, **without_bodies(directory)):
        report_checks(checks)


if __name__ == "__main__":
    main()
