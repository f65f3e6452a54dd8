"""The Triton kernels that the stages launch, and their compilation ahead, on any machine.

The operators are called on meta tensors of the stages' shapes with a recorder in the place of the launcher; what it got
is compiled by `JITFunction.warmup`, the path that a launch takes too, so that a launch finds it in Triton's cache: the
key is made of the kernel's source, the dtypes and constants, which arguments are one or divisible by 16, the options,
the target and the version of the compiler, and of nothing else. All of these are the launch's own here; an address of a
meta tensor counts as divisible by 16, as those of PyTorch's allocator are. What is not in the list is compiled when it
is first launched, as always; the runner counts that (`compiled` in the line of a stage).

Needs kernels that are not interpreted: a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import kernels

from .shapes import BF16, FP32, Shapes

META = torch.device("meta")


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for what the compiler treats alike. Constants, tiles and flags are given by name."""
        named = sorted((name, value) for name, value in self.options.items() if name != "grid")
        return (self.name, *map(_alike, self.arguments), repr(named))


def _alike(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if isinstance(value, float):
        return "float"
    return "one" if value == 1 else (value % 16 == 0, value.bit_length() > 31)


def recorded(calls: Sequence[Callable[[], Any]]) -> list[Launch]:
    """What ``calls`` would launch, once for each specialization."""
    from triton.runtime.jit import JITFunction

    found: dict[tuple[Any, ...], Launch] = {}

    def record(kernel: Any, *arguments: Any, warmup: bool = False, **options: Any) -> None:
        launch = Launch(kernel, arguments, options)
        found.setdefault(launch.key, launch)

    with mock.patch.object(JITFunction, "run", record):
        for call in calls:
            call()
    return list(found.values())


def listed(shapes: Shapes, device: torch.device = META) -> list[Launch]:
    """What the stages at ``shapes`` launch: the kernels alone, SMARTLoss of small heads and of BERT, the projected
    loss. The most expensive first, so that processes that share them end together."""
    found = recorded(list(_calls(shapes, device)))
    return sorted(found, key=lambda launch: launch.options.get("BLOCKS", 1) == 1)


def _calls(shapes: Shapes, device: torch.device) -> Iterator[Callable[[], Any]]:
    from smart_fast.backends.base import STATISTICS, DivergenceSpec
    from smart_fast.backends.triton import TRITON as backend

    def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def embeddings(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
        seed = empty(1, dtype=torch.int64)
        inputs = empty(*shape, dtype=dtype), empty(*shape, dtype=dtype), seed, seed
        for run in kernels.of_embeddings(backend).values():
            yield lambda run=run: run(*inputs)

    def logits(
        shape: tuple[int, int], dtype: torch.dtype, output: str, from_difference: bool,
        wants: Sequence[tuple[bool, bool]], kinds: Sequence[str],
    ) -> Iterator[Callable[[], Any]]:  # fmt: skip
        x, t = empty(*shape, dtype=dtype), empty(*shape, dtype=dtype)
        stats = empty(shape[0], STATISTICS)
        grad = empty() if output == "sum" else empty().expand(shape[0])
        for kind in kinds:
            spec = DivergenceSpec(kind, output, from_difference=from_difference)
            yield lambda spec=spec: backend.divergence_forward(x, t, spec, None, True, True)
            for want in wants:
                yield lambda spec=spec, want=want: backend.divergence_backward(grad, x, t, stats, spec, None, *want)

    both, ascent = (True, True), (True, False)
    for dtype in shapes.dtypes:
        for shape in shapes.embeds:
            yield from embeddings(shape, dtype)
        for rows, width in shapes.logits:
            x = empty(rows, width, dtype=dtype)
            yield lambda x=x: backend.fisher_direction(x, False)
            yield from logits((rows, width), dtype, "sum", False, [both], ("kl", "sym_kl", "js"))
    for batch, width, classes in shapes.heads:
        yield from itertools.islice(embeddings((batch, width), FP32), 2)  # perturb and the default step
        yield from logits((batch, classes), FP32, "sum", False, [ascent, both], ("kl", "sym_kl"))
    _, width, batch, tokens = shapes.bert
    yield from itertools.islice(embeddings((batch, tokens, width), FP32), 2)
    yield from logits((batch, 3), BF16, "sum", False, [ascent, both], ("kl", "sym_kl"))
    for rows, width, dtype in shapes.rivals:
        yield from logits((rows, width), dtype, "sum", False, [both], ("sym_kl",))
    rows, _, width, dtype = shapes.linear
    yield from logits((rows, width), dtype, "rows", True, [ascent], ("sym_kl",))


class Elsewhere:
    """What Triton asks its driver for when it compiles, for a GPU that need not be here: no process that compiles
    touches the device, so that many can be forked from one."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_elsewhere(capability: int) -> None:
    """From now on this process compiles for a GPU of ``capability`` (90 for sm_90), and launches nothing."""
    from triton.runtime.driver import driver

    driver.set_active(Elsewhere(capability))


def compiled(launch: Launch) -> Any:
    """The compiled kernel, which is in Triton's cache from here on."""
    return launch.kernel.warmup(*launch.arguments, **launch.options)


def seconds_on(cores: int, costs: Sequence[float]) -> float:
    """How long ``cores`` processes take that are dealt the costs in turn, as `build` deals them."""
    return max((math.fsum(costs[start::cores]) for start in range(cores)), default=0.0)
