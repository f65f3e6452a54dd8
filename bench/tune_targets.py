"""What `bench.tune` sweeps: every kernel with launch choices, at the shapes of the bench; its inputs and its calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from smart_fast.kernels import launch
from torch import Tensor

from smart_fast.backends import triton_launch as ops

from .cases import BF16, DTYPES, FP32

ELEMENTS = 1 << 26  # of the first tensor, where rows are many: what one call reads is several times a GPU's L2 cache
SHARED_ROWS = 16
WIDTHS = (3, 128, 768, 1024, 4096, 8192, 30522, 32000, 128256, 151936)
COUNTS = (1 << 22, 1 << 26)  # contiguous elements
#: Swept first, in this order: what a time limit cuts off is worth less.
FIRST = {
    "divergence_backward": (128256, 32000, 151936, 3),
    "divergence_forward": (128256, 32000, 151936, 3),
    "ascend": (768, 1024),
    "perturb_stream": COUNTS,
    "divergence_split": (151936, 128256, 32000),
    "perturb": (768, 1024),
    "ascend_norm": (768, 1024),
    "divergence_backward_elementwise": (32000, 3),
    "fisher_direction": (128256, 3),
}
Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Target:
    """A kernel of `tuning.KERNELS` at a shape ``(rows, width)`` and a dtype."""

    kernel: str
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.kernel} {list(self.shape)} {DTYPES[self.dtype]}"


def targets(containing: str = "") -> list[Target]:
    """What is swept on a GPU, most valuable first, of which the name contains a text."""
    found = [_target(kernel, width, dtype) for dtype in (BF16, FP32) for kernel in FIRST for width in FIRST[kernel]]
    for width, kernel, dtype in itertools.product(WIDTHS, FIRST, (BF16, FP32)):
        if kernel != "perturb_stream" and (kernel != "divergence_split" or width > launch.MAX_BLOCK):
            found.append(_target(kernel, width, dtype))
    return [each for each in dict.fromkeys(found) if containing.lower() in each.name.lower()]


def _target(kernel: str, width: int, dtype: torch.dtype) -> Target:
    if kernel == "divergence_split":
        return Target(kernel, (SHARED_ROWS, width), dtype)
    return Target(kernel, (1 if kernel == "perturb_stream" else ELEMENTS // width, width), dtype)


STEP = (1e-5, 1e-3)  # noise_var, step_size


class Job:
    """A target's inputs, the call that is timed, and the variants that must come out right as well. Calls take the
    inputs and the launchers' ``wrap``."""

    def __init__(self, target: Target, device: torch.device) -> None:
        self.target, self.device = target, device
        self.call, *self.variants = _CALLS[target.kernel]
        # Tensors of the target's shape that must move; the forward passes and most others: two.
        tensors = {"ascend": 3, "ascend_norm": 1, "divergence_backward": 4, "divergence_backward_elementwise": 4}
        rows, width = target.shape
        self.bytes = tensors.get(target.kernel, 2) * rows * width * target.dtype.itemsize

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """x, its partner and the fp32 unit, all standard normal, a mask, a seed, and statistics for backward passes."""
        generator = torch.Generator(self.device).manual_seed(seed)
        rows = self.target.shape[0]

        def normal(*shape: int) -> Tensor:
            # Made in the dtype itself: fp32 copies of the largest shapes would take the memory of the measurement.
            return torch.randn(shape, device=self.device, dtype=self.target.dtype, generator=generator)

        x, other = normal(*self.target.shape), normal(*self.target.shape)
        mask = torch.rand(rows, device=self.device, generator=generator) < 0.75
        unit = torch.rand(rows, 1, device=self.device, generator=generator) + 0.5
        noise = torch.randint(2**62, (1,), device=self.device, generator=generator)
        stats = torch.empty(0, device=self.device)
        if "backward" in self.target.kernel:
            _, stats = ops.divergence_forward(x, other, None, *_spec("sym_kl", "rows"), True)
        return x, other, mask, unit, noise, stats


def _spec(kind: str, output: str, scale: float = 1.0) -> tuple[Any, ...]:
    return kind, output, 1.0, 1.0, scale, False


def _perturb(masked: bool, units: bool) -> Call:
    def call(x, other, mask, unit, noise, stats, wrap=ops._plain):
        return (ops.perturb(x, noise, STEP[0] * 1e4, mask if masked else None, unit if units else None, wrap=wrap),)

    return call


def _norm(kind: str, update: str, units: bool) -> Call:
    def call(x, other, mask, unit, noise, stats, wrap=ops._plain):
        rest = (mask, unit) if units else (None, None)
        return (ops.ascend_norm(other, noise, None, *rest, kind, *STEP, update, wrap=wrap),)

    return call


def _ascend(kind: str, update: str, units: bool, keep: bool = False) -> Call:
    def call(x, other, mask, unit, noise, stats, wrap=ops._plain):
        rest = (mask, unit) if units else (None, None)
        radius = 1e-6 if update != "paper" else 5e-4
        return ops.ascend(x, other, noise, None, None, *rest, kind, "row", *STEP, update, radius, keep, wrap=wrap)

    return call


def _fisher(wide: bool) -> Call:
    def call(x, other, mask, unit, noise, stats, wrap=ops._plain):
        return (ops.fisher_direction(x, wide, wrap=wrap),)

    return call


def _upstream(x: Tensor, unit: Tensor, output: str) -> Tensor:
    """The gradient of a sum, of rows, or of terms, expanded as autograd does."""
    return unit.expand(x.shape) if output == "terms" else unit[0, 0] if output == "sum" else unit[:, 0]


def _loss(kind: str, output: str) -> Call:
    def call(x, other, mask, unit, noise, stats, wrap=ops._plain):
        return ops.divergence_forward(x, other, None, *_spec(kind, output), True, wrap=wrap)[:1]

    return call


def _forward(kind: str, output: str, masked: bool = False, scale: float = 1.0) -> Call:
    """The loss, and gradients that its statistics make. Those themselves are not comparable: what they are relative to
    is taken from a row's first block."""

    def call(x, other, mask, unit, noise, stats, wrap=ops._plain):
        spec, chosen = _spec(kind, output, scale), mask if masked else None
        loss, stats = ops.divergence_forward(x, other, chosen, *spec, True, wrap=wrap)
        upstream = _upstream(x, unit, output)
        return loss, *ops.divergence_backward(upstream, x, other, stats, chosen, *spec, True, True, wrap=wrap)

    return call


def _backward(kind: str, output: str, masked: bool = False) -> Call:
    def call(x, other, mask, unit, noise, stats, wrap=ops._plain):
        spec, chosen = _spec(kind, output), mask if masked else None
        upstream = _upstream(x, unit, output)
        return ops.divergence_backward(upstream, x, other, stats, chosen, *spec, True, True, wrap=wrap)

    return call


_FORWARDS = (
    _loss("sym_kl", "sum"), _forward("sym_kl", "sum"), _forward("kl", "sum"), _forward("js", "sum"),
    _forward("kl", "rows", True, 0.5), _forward("sym_kl", "terms", True),
)  # fmt: skip
_CALLS: dict[str, tuple[Call, ...]] = {
    "perturb_stream": (_perturb(False, False),),
    "perturb": (_perturb(True, False), _perturb(True, True)),
    "ascend_norm": (_norm("inf", "smart-pytorch", False), _norm("l2", "paper", True), _norm("l1", "sift", True)),
    "ascend": (
        _ascend("inf", "smart-pytorch", False), _ascend("inf", "paper", True), _ascend("l2", "paper", True, True),
        _ascend("l1", "paper", True, True), _ascend("l2", "sift", True, True),
    ),
    "divergence_forward": _FORWARDS,
    "divergence_split": _FORWARDS,
    "divergence_backward": (
        _backward("sym_kl", "sum"), _backward("kl", "sum"), _backward("js", "sum"), _backward("sym_kl", "rows", True),
    ),
    "divergence_backward_elementwise": (
        _backward("sym_kl", "terms"), _backward("kl", "terms", True), _backward("js", "terms", True),
    ),
    "fisher_direction": (_fisher(False), _fisher(True)),
}  # fmt: skip
