"""Compiles every specialization that the launchers ask for, for GPUs that need not be present.

    python tests/compile_kernels.py sm_90            one JSON line per specialization: kernel, options, registers, stack

The launchers run on meta tensors with a recorder in place of the kernel, so what is compiled is what they would launch.
Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from smart_fast.kernels.launch import MAX_BLOCK

from bench import sass
from smart_fast.backends import triton_launch as ops
from smart_fast.backends.base import STATISTICS

#: A width for each kind of tile: several rows a program (one class, unaligned, aligned), one row, a row in blocks.
WIDTHS = (1, 3, 20, 768, 5000, 30522)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def launches(full: bool = False) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every (kernel, arguments), once per specialization.

    ``full`` crosses every width, dtype and option. Otherwise every option appears in fp32 at one width, and the
    options that need the most registers go through every width and dtype.
    """
    recorded: list[tuple[Any, dict[str, Any]]] = []

    def wrap(kernel: Any) -> sass.Recorder:
        return sass.Recorder(kernel, recorded)

    for dtype, width in itertools.product(DTYPES, WIDTHS):
        if dtype is torch.float16 and width != 768 and not full:
            continue  # compiles as bfloat16 does, but for the conversions
        if dtype is torch.bfloat16 and width < 20 and not full:
            continue  # rows of a few classes: what is particular to them is in fp32, what to bfloat16 at other widths
        _record_fisher(dtype, width, wrap)
        every = full or (dtype is torch.float32 and width == 768)
        if every:  # without a mask there is less to compile
            _record_ascent(dtype, width, False, full, wrap)
            _record_divergence(dtype, width, False, full, full, wrap)
        _record_ascent(dtype, width, True, every, wrap)
        _record_divergence(dtype, width, True, every, full, wrap)

    yield from _distinct(
        recorded, lambda kernel, arguments: (kernel.fn.__name__, repr(sass.specialized(kernel, arguments)))
    )


def one_of_each() -> Iterator[tuple[Any, dict[str, Any]]]:
    """A (kernel, arguments) of each kernel: bf16, masked, the last divergence of the table."""
    recorded: list[tuple[Any, dict[str, Any]]] = []

    def wrap(kernel: Any) -> sass.Recorder:
        return sass.Recorder(kernel, recorded)

    for width in (30522, 768):  # the last ones are taken
        _record_fisher(torch.bfloat16, width, wrap)
        _record_ascent(torch.bfloat16, width, True, False, wrap)
        _record_divergence(torch.bfloat16, width, True, False, False, wrap)
    yield from _distinct(recorded[::-1], lambda kernel, arguments: kernel.fn.__name__)


def _distinct(recorded: list[tuple[Any, dict[str, Any]]], key_of: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    seen = set()
    for kernel, arguments in recorded:
        key = key_of(kernel, arguments)
        if key not in seen:
            seen.add(key)
            yield kernel, arguments


def _record_ascent(dtype: torch.dtype, width: int, masked: bool, every: bool, wrap: Any) -> None:
    x = torch.empty(2, 3, width, dtype=dtype, device="meta")
    strided = torch.empty(3, 2, width, dtype=dtype, device="meta").transpose(0, 1)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    kept = torch.empty(2, 3, width, device="meta")
    mask = torch.empty(2, 3, dtype=torch.bool, device="meta") if masked else None
    norm = torch.empty(6, device="meta")
    unit = torch.empty(2, 3, 1, device="meta")
    for embed in (x, strided):
        ops.perturb(embed, seed, 1e-5, mask, None, wrap=wrap)
    ops.perturb(strided, seed, 1e-5, mask, unit, "uniform", wrap=wrap)
    signs = (1e-5, 1e-3, "sign", 1e-6, True, "uniform")
    for noise in (seed, kept) if every else (seed,):
        ops.ascend(strided, x, noise, None, None, mask, unit, "inf", "row", *signs, wrap=wrap)
    for update, kind, noise in itertools.product(
        ("smart-pytorch", "sift") if every else ("sift",), ("inf", "l2", "l1") if every else ("l2",), (seed, kept)
    ):
        step = (1e-5, 1e-3, update)
        ops.ascend_norm(x, noise, None, mask, None, kind, *step, wrap=wrap)
        ops.ascend_norm(x, noise, None, mask, None, "opaque", *step, wrap=wrap)
        for keep in (False, True) if every else (True,):
            ops.ascend(strided, x, noise, None, None, mask, None, kind, "row", *step, 1e-6, keep, wrap=wrap)
            ops.ascend(strided, x, noise, norm, None, mask, None, kind, "group", *step, 1e-6, keep, wrap=wrap)
            ops.ascend(strided, x, noise, norm, None, mask, None, "inf", "given", *step, 1e-6, keep, wrap=wrap)
    step = (1e-5, 1e-3, "paper")
    for kind, noise in itertools.product(("inf", "l2", "l1") if every else ("l1",), (seed, kept) if every else (kept,)):
        for units in (None, unit) if every else (unit,):
            ops.ascend(strided, x, noise, None, None, mask, units, kind, "row", *step, 1e-6, True, wrap=wrap)
        if every and kind != "l1":
            moved = None if kind == "inf" else norm
            ops.ascend(strided, x, noise, norm, moved, mask, unit, kind, "group", *step, 1e-6, True, wrap=wrap)
        ops.ascend_norm(x, noise, None, mask, None, "l2" if kind == "l1" else kind, *step, wrap=wrap)
        ops.ascend_norm(x, noise, norm, mask, unit, "l2", *step, wrap=wrap)
    if every:
        for update in ("smart-pytorch", "sift"):
            step = (1e-5, 1e-3, update)
            ops.ascend_norm(x, seed, None, mask, unit, "l2", *step, wrap=wrap)
            ops.ascend(strided, x, kept, None, None, mask, unit, "l2", "row", *step, 1e-6, True, wrap=wrap)


def _record_fisher(dtype: torch.dtype, width: int, wrap: Any) -> None:
    strided = torch.empty(3, 2, width, dtype=dtype, device="meta").transpose(0, 1)
    for wide in (False, True) if dtype is not torch.float32 else (True,):
        ops.fisher_direction(strided, wide, wrap=wrap)


def _record_divergence(dtype: torch.dtype, width: int, masked: bool, every: bool, full: bool, wrap: Any) -> None:
    x = torch.empty(2, 3, width, dtype=dtype, device="meta")
    strided = torch.empty(3, 2, width, dtype=dtype, device="meta").transpose(0, 1)
    many = torch.empty(4096, width, dtype=dtype, device="meta")
    mask = torch.empty(2, 3, dtype=torch.bool, device="meta") if masked else None
    many_mask = torch.empty(4096, dtype=torch.bool, device="meta") if masked else None
    stats = torch.empty(6, STATISTICS, device="meta")
    grads = {"terms": x, "rows": torch.empty(3, 2, device="meta").T, "sum": torch.empty((), device="meta")}
    for kind, output, scale, relative in itertools.product(
        ops.KINDS, ("terms", "rows", "sum"), (1.0, 0.5), (False, True)
    ):
        plain = scale == 1.0 and not relative
        if output == "rows":  # sums of many rows are rows too, so that plain ones are there
            wanted = kind == "sym_kl" and (every or (scale != 1.0 and relative))
        else:
            wanted = plain or (kind == "sym_kl" and output == "terms" and scale != 1.0 and relative)
        if not (wanted or full):
            continue
        spec = (kind, output, 1.0, 1.0, scale, relative)
        crossed = every and (plain or full)
        for keep in (False, True) if crossed else (True,):
            ops.divergence_forward(x, strided, mask, *spec, keep, wrap=wrap)
            if output == "sum" or width > MAX_BLOCK:  # rows and terms do not depend on how many rows stay on chip
                ops.divergence_forward(many, many, many_mask, *spec, keep, wrap=wrap)
        for want in ((True, True), (True, False), (False, True)) if crossed else ((True, True),):
            ops.divergence_backward(grads[output], x, strided, stats, mask, *spec, *want, wrap=wrap)
        if output == "rows":
            ops.divergence_parts(x, strided, mask, *spec, wrap=wrap)
            ops.divergence_finish(x, strided, stats, mask, *spec, wrap=wrap)


def compile_for(target: str, kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Compile one specialization; registers and bytes of stack from the machine code's own report."""
    compiled = sass.compiled(target, kernel, arguments)
    if target.startswith("sm_"):
        registers, stack = sass.resources(compiled.asm["cubin"])
    else:
        registers, stack = _resources_amd(compiled.asm["amdgcn"])
    signature, constants, _ = sass.specialized(kernel, arguments)
    return {
        "kernel": kernel.fn.__name__,
        "options": {k: v for k, v in constants.items() if k.isupper()}
        | {k: arguments[k] for k in ("num_warps", "maxnreg")},
        "types": [t for t in signature.values() if t.startswith("*")],
        "registers": registers,
        "stack": stack,
    }


def _resources_amd(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    stack = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    assert registers, assembly[-2000:]
    assert stack, assembly[-2000:]
    return int(registers[1]), int(stack[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sass.TARGETS)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th specialization, starting with the I-th")
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--full", action="store_true", help="cross every width, dtype and option (many minutes)")
    scope.add_argument("--brief", action="store_true", help="one of each kernel")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    chosen = one_of_each() if arguments.brief else launches(arguments.full)
    for kernel, launch in itertools.islice(chosen, part, None, parts):
        print(json.dumps(compile_for(arguments.target, kernel, launch)), flush=True)


if __name__ == "__main__":
    main()
