"""Stage "rivals": our divergences against the same formula in eager PyTorch and under torch.compile, interleaved.

Forward and backward as a user has them: ``(0.3 * loss).backward()``, on leaves, near rows and far ones. The formula is
smart-pytorch's, written out here so that its package need not be there; a test holds it to the package bit for bit.
Everyone is checked against float64 before anyone is timed (divergences.py says how formulas are held on near rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import smart_fast
from bench.cases import DTYPES
from bench.divergences import REGIMES, WEIGHT, Divergence, LinearDivergence, check_logits, compare_linear, linear64
from bench.measure import copy_bandwidth, gemm_rate, input_sets, interleaved_samples, speed_interval, synchronize
from bench.task import Finding

from .lines import device, dry_run, emit, not_sound, why
from .shapes import shapes

EAGER, COMPILED = "formula, eager", "formula, torch.compile"
SECONDS = 2.0  # for each case and regime

Loss = Callable[..., Tensor]
Task = Divergence | LinearDivergence


def sym_kl(input: Tensor, target: Tensor) -> Tensor:
    """`smart_pytorch.sym_kl_loss` at its defaults."""
    return F.kl_div(
        F.log_softmax(input, dim=-1), F.softmax(target.detach(), dim=-1), reduction="sum"
    ) + F.kl_div(F.log_softmax(target, dim=-1), F.softmax(input.detach(), dim=-1), reduction="sum")  # fmt: skip


def linear_sym_kl(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return sym_kl(F.linear(input, weight), F.linear(target, weight))


def main() -> int:
    where, chosen = device(), shapes()
    copy = copy_bandwidth(where, 1 << (22 if dry_run() else 32))
    wrong = 0
    for rows, width, dtype in chosen.rivals:
        name = f"sym_kl fwd+bwd [{rows}, {width}] {DTYPES[dtype]}"
        fused = {backend: _of(smart_fast.sym_kl_loss, backend) for backend in _ours()}

        def make(regime: str, rows: int = rows, width: int = width, dtype: torch.dtype = dtype) -> Divergence:
            return Divergence("sym_kl", (rows, width), dtype, True, regime, where)

        floor = {"bytes": 6 * rows * width * dtype.itemsize, "limit": copy, "dtype": str(dtype)}
        wrong += _case(name, make, sym_kl, fused, floor)
    rows, hidden, width, dtype = chosen.linear
    fused = {backend: _of(smart_fast.linear_sym_kl_loss, backend) for backend in _ours()}
    flops = 4 * 2 * rows * hidden * width
    floor = {"flops": flops, "limit": gemm_rate(where, dtype, 64 if dry_run() else None), "dtype": str(dtype)}
    wrong += _case(
        f"linear sym_kl fwd+bwd [{rows}, {hidden}] x [{hidden}, {width}] {DTYPES[dtype]}",
        lambda regime: LinearDivergence("sym_kl", rows, hidden, width, dtype, regime, where),
        linear_sym_kl, fused, floor,
    )  # fmt: skip
    return 1 if wrong else 0


def _ours() -> Iterator[str]:
    """The backends of ours that run here; why the others do not is a line."""
    for backend in ("triton", "native"):
        reason = not_sound(backend)
        if reason is None and backend == "native":
            from smart_fast.backends import build_native

            build_native()
        if reason is None:
            yield backend
        else:
            emit("skipped", "against torch.compile", backend=backend, error=reason)


def _of(loss: Loss, backend: str) -> Loss:
    return lambda *inputs: loss(*inputs, backend=backend)


def step(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    """A user's step; ``(loss, *gradients)`` as they are left in the leaves."""

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        value = loss(*leaves)
        (WEIGHT * value).backward()
        return value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)

    return run


def check(
    task: Task, run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], formula: bool
) -> list[Finding]:
    """Against float64."""
    results = run(*inputs)
    rounding = task.rounding() if formula else None
    if isinstance(task, LinearDivergence):
        return compare_linear(results, linear64(inputs, task.exact, rounding=rounding))
    return check_logits(results, inputs, task.exact, rounding)


def _case(name: str, make: Callable[[str], Task], formula: Loss, fused: dict[str, Loss], floor: dict[str, Any]) -> int:
    """A line for everyone in each regime; how many were wrong."""
    torch.compiler.reset()  # cases share code objects, and each deserves a fresh cache
    contestants = {EAGER: formula}
    if dry_run() and formula is not sym_kl:  # on a CPU each takes ten seconds of g++
        emit("skipped", name, contestant=COMPILED, error="a dry run compiles one case")
    else:
        contestants[COMPILED] = torch.compile(formula, dynamic=False)
    contestants |= {f"smart-fast {backend}": loss for backend, loss in fused.items()}
    return sum(_regime(f"{name}, {regime}", regime, make(regime), contestants, floor) for regime in REGIMES)


def _regime(name: str, regime: str, task: Task, contestants: dict[str, Loss], floor: dict[str, Any]) -> int:
    where, found, wrong = device(), {}, 0
    inputs = task.inputs(1000)
    for who, loss in contestants.items():
        try:
            found[who] = check(task, step(loss), inputs, formula=who in (EAGER, COMPILED))
            synchronize(where)
        except Exception as error:
            emit("rival", name, contestant=who, regime=regime, ok=False, error=why(error))
            wrong += 1
    del inputs
    right = {who: step(contestants[who]) for who, each in found.items() if not any(one.wrong for one in each)}
    samples = {}
    if right:
        samples = interleaved_samples(right, input_sets(task.inputs, where), where, 0.05 if dry_run() else SECONDS)
    peers = [samples[who] for who in (EAGER, COMPILED) if who in samples]
    for who, each in found.items():
        errors = {one.what: one.error for one in each}
        fields: dict[str, Any] = {"contestant": who, "regime": regime, "errors": errors, **floor}
        if who not in samples:
            allowed = {one.what: one.tolerance for one in each}
            emit("rival", name, ok=False, allowed=allowed, error="wrong", **fields)
            wrong += 1
            continue
        timing = samples[who].timing()
        work = floor.get("bytes") or floor["flops"]
        fields |= {"seconds": timing.median, "share": work / timing.median / floor["limit"]}
        if peers and who not in (EAGER, COMPILED):
            fastest = min(peer.timing().median for peer in peers)
            fields |= {"speed": fastest / timing.median, "interval": speed_interval(peers, samples[who])}
        emit("rival", name, ok=True, **fields)
    if where.type == "cuda":
        torch.cuda.empty_cache()
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
