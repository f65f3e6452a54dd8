"""What ``backend="auto"`` means: one table, by type of device, of the backends to try and of the tensors each is for.

The first row that fits the tensors and whose backend is available serves the call; where none does, PyTorch. A row is
added or bounded by measurement only: ``bench/gpu_check.py`` times both fused backends on small calls, on rows that are
not 16-byte aligned and on large ones, and its committed lines are the reason to write here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: the widest access of the kernels


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
        # By instruction counts the native kernels should serve small calls and unaligned rows: Rule("native", …,
        # fewer_than=…, unaligned=True, traced=False) in front of this one, once a GPU has timed both.
        Rule("triton", "no GPU has timed either backend: the kernels that torch.compile can see into"),
    ),
    "xpu": (Rule("triton", "the only backend with kernels there"),),
}


def candidates(tensor: Tensor) -> list[str]:
    """The backends to try for a call on ``tensor``, best first."""
    return [rule.backend for rule in RULES.get(tensor.device.type, ()) if rule.fits(tensor)]


def _unaligned(tensor: Tensor) -> bool:
    row = tensor.shape[-1] * tensor.element_size()
    return tensor.data_ptr() % ALIGNMENT != 0 or row % ALIGNMENT != 0
