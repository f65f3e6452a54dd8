"""``python -m bench host``: what a call costs the host, of a model so small that nothing else counts. Needs no GPU.

Every contestant runs on CPU tensors in one process, in turns: smart-pytorch, the model's own passes alone, and our
backends. Triton's kernels are compiled for a GPU and launched through Triton's own launcher into a stub of the CUDA
driver (driver_stub.py): the host does all that it would do, and no kernel runs. smart-pytorch's figure holds its CPU
arithmetic, in the place of which a GPU has a launch for each operation, as the native one holds its kernels.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

import smart_fast

from .models import pooled_head

if TYPE_CHECKING:  # a step is timed where rich is not installed, too
    from rich.console import Console

REFERENCE, PASSES = "smart-pytorch", "model passes only"
OURS = ("triton", "native")
ROUNDS, CALLS = 400, 1
WIDTH, CLASSES = 8, 2
LOGITS = (4, 10)

Run = Callable[[], Any]


@dataclass(frozen=True)
class Cost:
    """Seconds of host time of one call. ``share``: of what smart-pytorch's costs, the model's own passes taken off."""

    case: str
    contestant: str
    median: float
    best: float
    share: float | None


def step(model: nn.Module, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A user's step: ``(0.3 * regularizer(embed, state)).backward()``, with the gradients of the last one gone."""
    if backend == REFERENCE:
        import smart_pytorch

        smart: Any = smart_pytorch.SMARTLoss(model, smart_pytorch.kl_loss, smart_pytorch.sym_kl_loss)
    else:
        smart = smart_fast.SMARTLoss(model, smart_fast.kl_loss, smart_fast.sym_kl_loss, backend=backend)
    parameters = list(model.parameters())

    def run(embed: Tensor, state: Tensor) -> Tensor:
        embed.grad = None
        for each in parameters:
            each.grad = None
        loss = smart(embed, state)
        (0.3 * loss).backward()
        return loss.detach()  # type: ignore[no-any-return, unused-ignore]

    return run


def passes(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """The model's own passes of such a step: forward and input gradient of the ascent, then forward and backward."""
    parameters = list(model.parameters())

    def run(embed: Tensor, state: Tensor) -> None:
        embed.grad = None
        for each in parameters:
            each.grad = None
        moved = embed.detach().requires_grad_()
        torch.autograd.grad(model(moved), moved, state)
        model(embed).backward(state)

    return run


def divergence(backend: str) -> Run:
    """``sym_kl_loss(input, target).backward()``, gradients to both."""
    input, target = (torch.randn(LOGITS, requires_grad=True) for _ in range(2))
    if backend == REFERENCE:
        import smart_pytorch

        loss: Callable[..., Tensor] = smart_pytorch.sym_kl_loss
    else:

        def loss(input: Tensor, target: Tensor) -> Tensor:
            return smart_fast.sym_kl_loss(input, target, backend=backend)

    def run() -> None:
        input.grad = target.grad = None
        loss(input, target).backward()

    return run


def contestants(backends: tuple[str, ...] = OURS) -> dict[str, dict[str, Run]]:
    """By case, what to time. Those of Triton only run while it is stubbed."""
    torch.manual_seed(0)
    model = pooled_head(WIDTH, CLASSES)
    embed = torch.randn(1, WIDTH, requires_grad=True)
    state = model(embed).detach()
    steps: dict[str, Callable[..., Any]] = {REFERENCE: step(model, REFERENCE), PASSES: passes(model)}
    steps |= {name: step(model, name) for name in backends}
    return {
        f"SMARTLoss K=1, head {WIDTH} to {CLASSES}, [1, {WIDTH}], forward and backward": {
            name: lambda run=run: run(embed, state) for name, run in steps.items()
        },
        f"sym_kl_loss {list(LOGITS)}, forward and backward": {
            name: divergence(name) for name in (REFERENCE, *backends)
        },
    }


@contextlib.contextmanager
def stubbed() -> Iterator[Any]:
    """Within, Triton's kernels are launched into the stub, of CPU tensors too."""
    from smart_fast.backends.triton import Triton

    from .driver_stub import StubDriver

    def serves(*_: Any) -> None:  # a mock would take longer than the call that is timed
        return None

    with StubDriver() as driver, mock.patch.object(Triton, "cannot_serve", serves):
        yield driver


def measure(runs: dict[str, dict[str, Run]], rounds: int = ROUNDS) -> list[Cost]:
    """Every contestant of a case in turn: what slows the machine down slows all of them. Time is that of the thread,
    so that other programs' turns do not count."""
    found = []
    for case, each in runs.items():
        times: dict[str, list[float]] = {name: [] for name in each}
        for name in each:
            for _ in range(10):  # compiles, plans
                each[name]()
        order = list(each)
        for _ in range(rounds):
            for name in order:
                run, begin = each[name], time.thread_time()
                for _ in range(CALLS):
                    run()
                times[name].append((time.thread_time() - begin) / CALLS)
            order.append(order.pop(0))
        found += costs(case, times)
    return found


def costs(case: str, times: dict[str, list[float]]) -> Iterator[Cost]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    model = medians.get(PASSES, 0.0)
    for name, values in times.items():
        share = None if name in (REFERENCE, PASSES) else (medians[name] - model) / (medians[REFERENCE] - model)
        yield Cost(case, name, medians[name], min(values), share)


def show(costs: list[Cost], console: Console) -> None:
    from rich.table import Table

    for case in dict.fromkeys(each.case for each in costs):
        table = Table(title=case, title_justify="left")
        for column in ("contestant", "median", "best", "beside the model, of smart-pytorch's"):
            table.add_column(column, justify="left" if column == "contestant" else "right")
        for each in costs:
            if each.case == case:
                share = "" if each.share is None else f"{each.share:.0%}"
                table.add_row(each.contestant, f"{each.median * 1e6:.1f} us", f"{each.best * 1e6:.1f} us", share)
        console.print(table)


def save(costs: list[Cost], environment: dict[str, Any], path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "costs": [asdict(each) for each in costs]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
