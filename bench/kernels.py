"""``python -m bench kernels``: one line a kernel of the fused backends: the bytes it moves over the time it takes.

Each operator of the backend contract (`smart_fast.backends.base.Backend`) alone, on cold inputs; every tensor that
it is given or returns counts once. Beside it the rate of a large copy, measured in the same run. Kernels of two logits
take another branch where they are near (divergences.py says what near and far are): both are timed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

import smart_fast
from smart_fast.backends import select
from smart_fast.backends.base import DivergenceSpec, Step

from .divergences import REGIMES
from .measure import Timing, input_sets, interleaved, size_of

NOISE_VAR, STEP_SIZE, RADIUS = 1e-5, 1e-3, 5e-4
#: Embeddings and logits: large enough for the caches not to matter, small ones for tests.
SIZES = {"cuda": ((64, 1024, 1024), (4096, 128256)), "cpu": ((8192, 1024), (512, 30522))}
SMALL = ((16, 33), (4, 130))

ALONE = "fisher direction"  # the one kernel of logits that reads one side only

Operator = Callable[..., Any]


@dataclass(frozen=True)
class Kernel:
    """``bytes``: of the arguments and results of one call. ``copy_share``: their rate as a share of a copy's.
    ``regime``: "near" or "far", of kernels that two logits go into."""

    backend: str
    kernel: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    timing: Timing
    copy_share: float | None = None
    regime: str | None = None

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.timing.median


class Failed(NamedTuple):
    """A kernel that could not be run, and what it raised."""

    backend: str
    kernel: str
    shape: tuple[int, ...]
    dtype: str
    regime: str | None
    error: Exception


def measure(
    device: torch.device, backends: Sequence[str], seconds: float, *, small: bool = False,
    say: Callable[[str], None] = lambda doing: None,
) -> Iterator[Kernel]:  # fmt: skip
    """Every operator of ``backends`` in float32 and bfloat16; small ones on ``SMALL`` shapes."""
    embeds, logits = SMALL if small else SIZES[device.type]
    for name in backends:
        for dtype in (torch.float32, torch.bfloat16):
            for each in measure_shapes(device, name, dtype, [embeds], [logits], seconds, say):
                if isinstance(each, Failed):
                    raise each.error
                yield each


def measure_shapes(
    device: torch.device, backend: str, dtype: torch.dtype, embeds: Sequence[tuple[int, ...]],
    logits: Sequence[tuple[int, int]], seconds: float, say: Callable[[str], None] = lambda doing: None,
    only: Collection[str] | None = None,
) -> Iterator[Kernel | Failed]:  # fmt: skip
    """Every operator of a backend, or ``only`` these, at the given shapes of embeddings and of logits; nothing if it
    does not serve ``device``. One that raises does not keep the others from being measured."""
    backend_here = select(backend, torch.empty(1, dtype=dtype, device=device))
    if backend_here.name != backend:
        return
    name = str(dtype).removeprefix("torch.")
    for shape, regime, make, operators in _groups(backend_here, dtype, embeds, logits, device):
        sets = input_sets(make, device)
        for kernel, run in operators.items():
            if only is not None and kernel not in only:
                continue
            say(f"{backend}, {kernel}, {list(shape)}{'' if regime is None else ' ' + regime}")
            try:
                moved = _given(kernel, sets[0]) + size_of(run(*sets[0]))
                timing = interleaved({kernel: run}, sets, device, seconds)[kernel]
            except Exception as error:
                yield Failed(backend, kernel, shape, name, regime, error)
            else:
                yield Kernel(backend, kernel, shape, name, moved, timing, regime=regime)
        del sets


def _groups(
    backend: Any, dtype: torch.dtype, embeds: Sequence[tuple[int, ...]], logits: Sequence[tuple[int, int]],
    device: torch.device,
) -> Iterator[tuple[tuple[int, ...], str | None, Operator, dict[str, Operator]]]:  # fmt: skip
    """``(shape, regime, what makes inputs, the operators that take them)``."""
    for shape in embeds:
        yield shape, None, _embeddings(backend, shape, dtype, device), of_embeddings(backend)
    for shape in logits:
        pairs = of_logits(backend)
        yield shape, None, _logits(backend, shape, dtype, "far", device), {ALONE: pairs.pop(ALONE)}
        for regime in REGIMES:
            yield shape, regime, _logits(backend, shape, dtype, regime, device), pairs


def compare_with_copy(found: Sequence[Kernel], copy_rate: float) -> list[Kernel]:
    return [dataclasses.replace(each, copy_share=each.rate / copy_rate) for each in found]


def _embeddings(module: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Operator:
    def make(seed: int) -> tuple[Tensor, ...]:
        """``(embed, gradient, seed, noise as the backend keeps it)``."""
        generator = torch.Generator(device).manual_seed(seed)
        embed, grad = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(2))
        seeds = torch.randint(2**63 - 1, (1,), device=device, generator=generator)
        return embed, grad, seeds, module.perturb(embed, seeds, NOISE_VAR, None, True, None)[1]

    return make


def of_embeddings(module: Any) -> dict[str, Operator]:
    def perturb(embed: Tensor, grad: Tensor, seed: Tensor, noise: Tensor) -> Any:
        return module.perturb(embed, seed, NOISE_VAR, None, False, None)[0]

    def ascend(norm: Any, epsilon: float, update: str, keep: bool) -> Operator:
        step = Step(norm, NOISE_VAR, STEP_SIZE, epsilon, update)

        def run(embed: Tensor, grad: Tensor, seed: Tensor, noise: Tensor) -> Any:
            return module.ascend(embed, grad, noise, step, None, keep, None)

        return run

    return {
        "perturb": perturb,
        "ascend inf": ascend(smart_fast.inf_norm, 1e-6, "smart-pytorch", False),
        "ascend inf, noise kept": ascend(smart_fast.inf_norm, 1e-6, "smart-pytorch", True),
        "ascend l2": ascend(smart_fast.l2_norm, 1e-6, "smart-pytorch", False),
        "ascend inf paper": ascend(smart_fast.inf_norm, RADIUS, "paper", False),
        "ascend l2 paper": ascend(smart_fast.l2_norm, RADIUS, "paper", False),
        "ascend l1 paper": ascend(smart_fast.l1_norm, RADIUS, "paper", False),
    }


def _logits(module: Any, shape: tuple[int, ...], dtype: torch.dtype, regime: str, device: torch.device) -> Operator:
    def make(seed: int) -> tuple[Any, ...]:
        """``(x, t, statistics of their rows, the gradient of a sum)``."""
        generator = torch.Generator(device).manual_seed(seed)
        t = torch.randn(shape, device=device, generator=generator)
        x = torch.randn(shape, device=device, generator=generator).mul_(REGIMES[regime]).add_(t)
        x, t = x.to(dtype), t.to(dtype)
        stats = module.divergence_forward(x, t, DivergenceSpec("kl", "sum"), None, True, True)[1]
        return x, t, stats, torch.ones((), device=device)

    return make


def of_logits(module: Any) -> dict[str, Operator]:
    def forward(kind: str) -> Operator:
        def run(x: Tensor, t: Tensor, stats: Tensor, one: Tensor) -> Any:
            return module.divergence_forward(x, t, DivergenceSpec(kind, "sum"), None, True, True)

        return run

    def backward(kind: str) -> Operator:
        def run(x: Tensor, t: Tensor, stats: Tensor, one: Tensor) -> Any:
            return module.divergence_backward(one, x, t, stats, DivergenceSpec(kind, "sum"), None, True, True)

        return run

    found: dict[str, Operator] = {}
    for kind in ("kl", "sym_kl", "js"):
        found |= {f"{kind} forward": forward(kind), f"{kind} backward": backward(kind)}
    found[ALONE] = lambda x, t, stats, one: module.fisher_direction(x, False)
    return found


#: Which of the inputs that `make` gives a kernel reads: the others are for its neighbors.
_READS = {"perturb": (0, 2), "ascend": (0, 1, 3), "forward": (0, 1), "backward": (0, 1, 2, 3), "direction": (0,)}


def _given(kernel: str, inputs: tuple[Tensor, ...]) -> int:
    words = kernel.split()
    places = next(places for word, places in _READS.items() if word in words)
    return size_of(tree_leaves([inputs[place] for place in places]))


def show(found: Sequence[Kernel], copy_rate: float, console: Console) -> None:
    if not console.is_terminal:
        console.width = max(console.width, 120)
    shown = Table(
        title=f"bytes over time of each kernel; a large copy: {copy_rate / 1e9:.0f} GB/s", box=box.SIMPLE_HEAD
    )
    for name in ("backend", "kernel", "shape", "dtype", "rows", "median", "spread", "rate", "of a copy"):
        shown.add_column(name, justify="left" if name in ("backend", "kernel", "shape", "dtype", "rows") else "right")
    from .report import duration

    for each in found:
        share = "" if each.copy_share is None else f"{each.copy_share:.0%}"
        shape = str(list(each.shape)).replace("[", r"\[")
        time, spread = duration(each.timing.median), f"{each.timing.spread:.0%}"
        rate = f"{each.rate / 1e9:.1f} GB/s"
        shown.add_row(each.backend, each.kernel, shape, each.dtype, each.regime or "", time, spread, rate, share)
    console.print(shown)


def save(found: Sequence[Kernel], copy_rate: float, environment: dict[str, Any], path: pathlib.Path) -> None:
    content = {
        "environment": environment,
        "copy_rate": copy_rate,
        "kernels": [dataclasses.asdict(each) for each in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
