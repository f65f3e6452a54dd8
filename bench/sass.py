"""Machine code of Triton's kernels without a GPU: what a launch would compile to, its registers, stack and loops.

The launchers of `smart_fast.backends.triton_launch` run on meta tensors with a `Recorder` in place of the kernel, so
that what is compiled is what they would launch. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
Wrap = Callable[[Any], Any]
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


class Recorder:
    """Stands in for a kernel: keeps what it would have been launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            named = dict(zip((p.name for p in self.kernel.params), args, strict=False))
            self.launches.append((self.kernel, named | options))

        return launch


def specialized(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """(signature, constants, attributes) as Triton's launcher would derive them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, param in enumerate(kernel.params):
        value = arguments[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compiled(target: str, kernel: Any, arguments: dict[str, Any]) -> Any:
    """What Triton compiles a launch to."""
    signature, constants, attributes = specialized(kernel, arguments)
    options = {"num_warps": arguments["num_warps"]}
    if target.startswith("sm_"):
        options["maxnreg"] = arguments["maxnreg"]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, bytes of stack (more than none: spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = _tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


class Instruction(NamedTuple):
    address: int
    text: str  # with its predicate
    target: int | None  # of a branch


class Loop(NamedTuple):
    """Instructions from a label to the branch back to it, those of loops within included."""

    first: int
    last: int
    body: tuple[Instruction, ...]

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, each.text)) for each in self.body)


@functools.cache
def code(cubin: bytes) -> tuple[Instruction, ...]:
    """The machine code of the one kernel in ``cubin``, without the padding behind its end."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _tool("cuobjdump", "-sass", file.name)
    found = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        found.append(Instruction(int(address, 16), text.strip(), int(branch[1], 16) if branch else None))
    while found and (found[-1].text == "NOP" or found[-1].target == found[-1].address):
        found.pop()
    return tuple(found)


def loops(instructions: tuple[Instruction, ...]) -> list[Loop]:
    """Innermost loops, in the order of their addresses."""
    spans = {
        (each.target, each.address) for each in instructions if each.target is not None and each.target < each.address
    }
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [
        Loop(first, last, tuple(each for each in instructions if first <= each.address <= last))
        for first, last in sorted(inner)
    ]
