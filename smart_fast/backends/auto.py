"""What ``backend="auto"`` means: one table, by type of device, of the backends to try and of the tensors each is for.

The first row that fits the tensors and whose backend is available serves the call; where none does, PyTorch. Reasons
stand beside the rows. `bench/gpu_check.py` times both fused backends on small calls, on rows that are not aligned,
and on large ones: where its committed lines say otherwise, they are the reason to change a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: the widest access of the kernels
#: Elements that an H200 reads twice and writes once, in fp32, in 3 us: below, the host's work is the longer part.
SMALL = 1 << 20


@dataclass(frozen=True)
class Rule:
    """``backend`` serves tensors of fewer than ``fewer_than`` elements; with ``unaligned``, any whose rows do not all
    begin at a multiple of `ALIGNMENT` bytes too. Under torch.compile only if ``traced``."""

    backend: str
    why: str
    fewer_than: float = math.inf
    unaligned: bool = False
    traced: bool = True

    def fits(self, tensor: Tensor) -> bool:
        if not self.traced and torch.compiler.is_compiling():
            return False
        return (
            self.fewer_than == math.inf or tensor.numel() < self.fewer_than or (self.unaligned and _unaligned(tensor))
        )


RULES: dict[str, tuple[Rule, ...]] = {
    "cpu": (Rule("native", "faster than PyTorch at every shape of bench/results/speed-cpu.json"),),
    "cuda": (
        Rule(
            "native",
            "small calls cost the host less than they cost it with Triton (python -m bench host), and these kernels"
            " load vectors between the ends of any rows, Triton's only of rows that lie side by side",
            fewer_than=SMALL,
            unaligned=True,
            traced=False,
        ),
        Rule("triton", "what torch.compile can see into, and large aligned rows: no GPU has timed them against native"),
    ),
    "xpu": (Rule("triton", "the only backend with kernels there"),),
}


def candidates(tensor: Tensor, device: str | None = None) -> list[str]:
    """The backends to try for a call on ``tensor``, best first; as if it were on another type of ``device``."""
    return [rule.backend for rule in RULES.get(device or tensor.device.type, ()) if rule.fits(tensor)]


def elements(backend: str, device: str) -> float:
    """Below how many elements eager calls on a type of device are those of ``backend`` before all others."""
    first = next(iter(RULES.get(device, ())), None)
    return first.fewer_than if first is not None and first.backend == backend else 0


def _unaligned(tensor: Tensor) -> bool:
    row = tensor.shape[-1] * tensor.element_size()
    return tensor.data_ptr() % ALIGNMENT != 0 or row % ALIGNMENT != 0
