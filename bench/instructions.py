"""``python -m bench instructions``: instructions an element in the hot loops of the Triton kernels, without a GPU.

A kernel that copies at full speed leaves 2.87e13 lane-instructions a second over 3.0e12 bytes a second on an H100 (132
multiprocessors of 128 lanes at 1.7 GHz): 9.6 instructions a byte moved.
The code that Triton would launch is compiled for sm_90 and read back: instructions between a loop's label and its
branch, predicated ones included, over the elements that a thread takes a turn. Kernels without a loop count as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from smart_fast.backends import triton_launch as ops
from smart_fast.backends.base import STATISTICS

from . import sass

TARGET = "sm_90"
BUDGET_PER_BYTE = 2.87e13 / 3.0e12
#: The loops of `divergence_forward_kernel` over the blocks of a row, in the order of their code.
NEAR, FAR, TERMS = 0, 1, 2

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 8192


@dataclass(frozen=True)
class Case:
    """A launch, and which of its loops an element goes through (none: there is no loop). ``moved``: tensors of the
    elements' dtype that it reads and writes. ``limit``: instructions an element that it may take; None: 15 % more than
    the budget."""

    name: str
    dtype: torch.dtype
    moved: int
    launch: Callable[[sass.Wrap], Any]
    loops: tuple[int, ...] = ()
    limit: float | None = None

    @property
    def budget(self) -> float:
        return BUDGET_PER_BYTE * self.moved * self.dtype.itemsize

    @property
    def most(self) -> float:
        return 1.15 * self.budget if self.limit is None else self.limit


class Found(NamedTuple):
    """Instructions an element; those of them that exchange between threads; registers a thread, bytes of stack, and
    blocks of threads that a multiprocessor's registers hold."""

    instructions: float
    exchanges: float
    registers: int
    stack: int
    blocks: int


def _meta(width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(ROWS, width, dtype=dtype, device="meta")


def _forward(kind: str, width: int, dtype: torch.dtype) -> Callable[[sass.Wrap], Any]:
    x, t = _meta(width, dtype), _meta(width, dtype)
    return lambda wrap: ops.divergence_forward(x, t, None, kind, "sum", 1.0, 1.0, 1.0, False, True, wrap=wrap)


def _backward(kind: str, width: int, dtype: torch.dtype) -> Callable[[sass.Wrap], Any]:
    x, t = _meta(width, dtype), _meta(width, dtype)
    g, stats = torch.empty((), device="meta"), torch.empty(ROWS, STATISTICS, device="meta")
    return lambda wrap: ops.divergence_backward(
        g, x, t, stats, None, kind, "sum", 1.0, 1.0, 1.0, False, True, True, wrap=wrap
    )


def _ascend(width: int, dtype: torch.dtype) -> Callable[[sass.Wrap], Any]:
    embed, grad, seed = _meta(width, dtype), _meta(width, dtype), torch.empty(1, dtype=torch.int64, device="meta")
    step = (1e-5, 1e-3, "smart-pytorch")
    return lambda wrap: ops.ascend(
        embed, grad, seed, None, None, None, None, "inf", "row", *step, 1e-6, False, wrap=wrap
    )


def _perturb(dtype: torch.dtype) -> Callable[[sass.Wrap], Any]:
    embed, seed = _meta(768, dtype), torch.empty(1, dtype=torch.int64, device="meta")
    return lambda wrap: ops.perturb(embed, seed, 1e-5, None, None, wrap=wrap)


def cases() -> list[Case]:
    found = []
    for dtype in (BF16, FP32):
        for kind in ("kl", "sym_kl", "js"):
            for width in (32000, 30522) if kind == "sym_kl" else (32000,):
                name = f"{kind} forward, {{}} rows of {width}"
                launch = _forward(kind, width, dtype)
                found.append(Case(name.format("near"), dtype, 2, launch, (NEAR,), 45.0 if dtype is BF16 else None))
                limit = 80.0 if dtype is BF16 else None
                found.append(Case(name.format("far"), dtype, 2, launch, (FAR, TERMS), limit))
        # jsd needs the log-ratio of the row before its terms: near rows, too, are walked over twice.
        found.append(
            Case("jsd forward, near rows of 32000", dtype, 2, _forward("jsd", 32000, dtype), (NEAR, TERMS), 200.0)
        )
        for kind, width in (("sym_kl", 32000), ("sym_kl", 30522), ("kl", 32000)):
            found.append(Case(f"{kind} backward, rows of {width}", dtype, 4, _backward(kind, width, dtype)))
        found += [Case(f"ascend, rows of {width}", dtype, 3, _ascend(width, dtype)) for width in (768, 1024, 4096)]
        found.append(Case("perturb", dtype, 2, _perturb(dtype)))
    return found


def count(case: Case) -> Found:
    """What ``case`` compiles to."""
    recorded: list[tuple[Any, dict[str, Any]]] = []
    case.launch(lambda kernel: sass.Recorder(kernel, recorded))
    ((kernel, arguments),) = recorded
    cubin = sass.compiled(TARGET, kernel, arguments).asm["cubin"]
    code = sass.code(cubin)
    threads = 32 * arguments["num_warps"]
    each = arguments["ROWS"] * arguments["BLOCK"] / threads * (1 if case.loops else arguments.get("BLOCKS", 1))
    loops = sass.loops(code)
    bodies = [loops[k].body for k in case.loops] if case.loops else [code]
    exchanges = sum(each.text.find("SHFL") >= 0 or each.text.find("BAR.") >= 0 for body in bodies for each in body)
    registers, stack = sass.resources(cubin)
    granted = -(-registers // 8) * 8 * threads
    return Found(
        sum(map(len, bodies)) / each, exchanges / each, registers, stack, min(65536 // granted, 2048 // threads)
    )


def rows(text: str = "") -> list[dict[str, Any]]:
    """The table: a dict for each case whose name contains ``text``, as it is committed."""
    table = []
    for case in cases():
        if text not in case.name:
            continue
        found = count(case)
        table.append(
            {
                "case": case.name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "instructions": round(found.instructions, 1),
                "budget": round(case.budget, 1),
                "limit": round(case.most, 1),
                "exchanges": round(found.exchanges, 2),
                "registers": found.registers,
                "stack": found.stack,
                "blocks": found.blocks,
            }
        )
    return table


def show(table: list[dict[str, Any]], console: Console) -> None:
    shown = Table(title=f"instructions an element, {TARGET}", box=box.SIMPLE_HEAD)
    for column in table[0] if table else ():
        shown.add_column(column, no_wrap=column != "case", justify="left" if column in ("case", "dtype") else "right")
    for row in table:
        over = row["instructions"] > row["limit"] or row["stack"]
        shown.add_row(*map(str, row.values()), style="red" if over else None)
    console.print(shown)


def write(path: Path, environment: dict[str, Any], table: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"target": TARGET, "environment": environment, "rows": table}, indent=1) + "\n")
