"""The contract of a backend, and the shapes its kernels see.

A backend is an object with one typed contract, `Backend`. `smart_fast.autograd` makes differentiable what is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..losses.divergences import NAMES
from ..norms import Norm
from .updates import RULES

#: The divergences, in the order of their table, `smart_fast.losses.divergences`.
DIVERGENCES = NAMES
REDUCTIONS = ("none", "sum", "mean", "batchmean")
UPDATES = tuple(RULES)
#: What the fused kernels compute in fp32. Other floating dtypes are served by PyTorch.
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: fp32 numbers that a divergence keeps of each row for its backward pass.
STATISTICS = 8
#: fp32 numbers of a slice of a row, to be merged.
PARTS = 7


Nodes = Literal["always", "eager", "never"]
PlainDivergence = Callable[..., Tensor | None]


@dataclass(frozen=True)
class Step:
    """The hyper-parameters of one ascent step; ``update`` names a row of `smart_fast.backends.updates`, ``noise`` one
    of `smart_fast.noise.NOISES`, which the first step may have to make again from its seed."""

    norm_fn: Norm
    noise_var: float | Tensor
    step_size: float | Tensor
    epsilon: float | Tensor
    update: str
    #: Those of the numbers that are tensors.
    tensors: tuple[Tensor, ...] = ()
    noise: str = "normal"


class DivergenceSpec(NamedTuple):
    """What a divergence kernel computes. Operators take the fields one by one, in this order.

    ``output``: "terms", elementwise ``[..., V]`` in the promoted dtype of the logits; "rows", fp32 ``[...]``, one loss
    a row; or "sum", an fp32 scalar. Rows and sums are multiplied by ``weight``, terms are not. Both logits are
    multiplied by ``scale`` (one over a temperature), which gradients see by the chain rule. With ``from_difference``,
    ``input`` holds the difference x - t of the unscaled logits instead of x, and a class whose t is minus infinity is
    masked on both sides; gradients are still those to the logits x and t. ``alpha`` is the parameter of the divergence,
    whatever its name.
    """

    kind: str
    output: str
    alpha: float = 1.0
    weight: float = 1.0
    scale: float = 1.0
    from_difference: bool = False


class Backend(Protocol):
    """What a backend provides; PyTorch is one of them.

    Shapes: ``embed``, ``grad`` and ``perturbed`` ``[..., D]``; ``mask`` bool ``[...]`` or None; logits ``[..., V]``
    with the same ``...`` for ``input`` and ``target``. Tensors may have any strides. Nothing passed in is written to.
    """

    name: str
    #: When `perturb_fresh` and `ascend` are differentiable by themselves: always (PyTorch operations), in eager mode
    #: (nodes in C++), or never, so that `smart_fast.autograd` wraps them.
    nodes: Nodes
    #: The divergences that it knows.
    kinds: frozenset[str]

    def unavailable(self) -> str | None:
        """Why it cannot be used in this process, or None."""
        ...

    def cannot_serve(self, device: torch.device, kind: str | None = None) -> str | None:
        """Why tensors on ``device``, and a divergence ``kind`` of them, cannot be served, or None."""
        ...

    def perturb(
        self, embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None, noise_kind: str = "normal",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``embed + noise_var * unit * noise(seed)``, in the dtype of ``embed``, masked rows unchanged; and the noise.

        ``noise_kind``: a name of `smart_fast.noise.NOISES`.

        ``unit``: fp32 ``[..., 1]``, contiguous, or None for 1.

        ``seed``: int64 ``[1]`` on the device of ``embed``, read there. The noise is what `ascend` takes: the seed, or,
        where the backend prefers that and ``keep_noise`` says that a step follows, its values in fp32.
        """
        ...

    def perturb_fresh(
        self, embed: Tensor, generator: torch.Generator | None, noise_var: Any, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None, noise_kind: str = "normal",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`perturb` by noise, or a seed, drawn from ``generator``. Compilers only see it where `nodes` is "always"."""
        ...

    def ascend(
        self, embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, keep_noise: bool,
        unit: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """One update of the noise and its sum with ``embed``: ``(perturbed, new noise or None)``.

        ``noise`` is what `perturb` gave (an int64 seed or fp32 values), then the fp32 noise that the last step kept.
        """
        ...

    @property
    def divergence(self) -> Callable[[Tensor, Tensor, DivergenceSpec, Tensor | None], Tensor] | None:
        """``(input, target, spec, mask)``: the loss of `divergence_forward`, differentiable in eager mode; None:
        `smart_fast.autograd` makes it of the two passes below."""
        ...

    @property
    def loss(self) -> Callable[[Tensor, Tensor, str, str, Any, Tensor | None, float], Tensor] | None:
        """``(input, target, kind, reduction, alpha, mask, temperature)``: whole losses by smart-pytorch's own
        operations, bit for bit; None: this backend has its own formulas."""
        ...

    @property
    def plain_divergence(self) -> PlainDivergence | None:
        """``(input, target, kind, reduction, alpha)``: the reduced divergence of two ordinary tensors of one shape at
        the least cost, or None where something about them needs more. None: there is no such way. The native one takes
        ``fewer_than``, by keyword: only of so few elements, where they are on a GPU."""
        ...

    @property
    def gradient_functions(self) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
        """`torch.autograd.graph.get_gradient_edge` and `torch.autograd.grad` without what Python adds, if in C++."""
        ...

    def empty_cache(self) -> int:
        """Free memory that is kept for outputs to come; the number of bytes it was."""
        ...

    def divergence_forward(
        self, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None, want_input: bool,
        want_target: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """``(loss, row statistics for the backward pass where a gradient is wanted)``.

        Statistics: fp32 ``[rows, STATISTICS]``, namely max t, 1 / sum exp(t - max t), max x, 1 / sum exp(x - max x)
        of scaled logits; c, a difference x - t of unscaled logits that is typical of the row (or zero), and L, so that
        log p - log q is (x - t - c) * scale - L; and the first and the second sum of the row, as `divergence_finish`
        has them, where `divergence_backward` of rows or a sum reads them (`Divergence.needs_sums` in the table); other
        divergences may leave anything finite there. Masked rows give no loss.

        Softmax does not see a constant added to a row. So neither does precision: x - t - c is not rounded where x - t
        would be.
        """
        ...

    def divergence_backward(
        self, grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None,
        want_input: bool, want_target: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients to ``input`` and ``target``, each in its tensor's dtype, contiguous; None where not wanted.

        ``grad``: ``[..., V]`` for "terms", ``[...]`` for "rows", a scalar for "sum"; any strides, 0 included. With
        the statistics of a whole vocabulary and a slice of its columns: that slice of the gradients of "rows" or "sum".
        """
        ...

    def divergence_parts(self, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None) -> Tensor:
        """Statistics of a slice of the vocabulary, fp32 ``[rows, PARTS]``: max x, sum exp(x - max x), max t,
        sum exp(t - max t), max abs(delta) where delta = x - t - c, all of scaled logits; c, of unscaled ones, which
        each slice chooses for itself; and sum exp(t - max t) expm1(delta), meaningful while max abs(delta) is at most
        one.

        In place of a maximum of logits any number will do that sums of exponentials relative to it bear: Triton's may
        be 60 below. Slices without a finite logit: minus infinity in place of these two, and zeros.
        """
        ...

    def divergence_finish(
        self, input: Tensor, target: Tensor, stats: Tensor, spec: DivergenceSpec, mask: Tensor | None
    ) -> Tensor:
        """fp32 ``[rows, 2]``, contiguous: the given columns' share of the two sums that make a row's loss, not
        weighted, from statistics as `divergence_forward` gives them (the last two columns are not read). Masked rows
        have zeros.

        `Divergence.rows` in the table makes losses of whole sums: kl, sym_kl and js have their loss in the first and
        zero in the second; jsd has KL(q || m) and KL(p || m).
        """
        ...

    def fisher_direction(self, logits: Tensor, wide: bool) -> Tensor:
        """``softmax(logits) - onehot(argmax logits)`` over the last dimension, contiguous, in the dtype of ``logits``,
        or in fp32 if ``wide``. The entry of the largest (the first of equal ones) is minus the sum of the others.

        ``logits``: ``[..., V]``, any strides. Rows whose softmax is NaN are NaN throughout.
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Tensors of one leading shape seen as ``count`` rows: sizes of the inner leading dimensions, strides of each."""

    count: int
    size1: int
    size2: int
    tensors: tuple[Tensor, ...]
    strides: tuple[tuple[int, int, int], ...]


def as_rows(*tensors: Tensor, free: Tensor | None = None) -> Rows:
    """Describe ``[..., D]`` tensors of one shape as rows addressed by up to three leading strides.

    Leading dimensions that every tensor allows to merge are merged. A tensor is copied only when its last dimension is
    not dense or when more than three leading dimensions remain. ``free`` comes last in the result; its last dimension
    may have any stride.
    """
    shape = tensors[0].shape
    count = math.prod(shape[:-1])
    if count >= 2**31:
        raise ValueError(f"the fused kernels take fewer than 2**31 rows, got shape {tuple(shape)}")
    tensors = tuple(t if t.stride(-1) == 1 or shape[-1] == 1 else t.contiguous() for t in tensors)
    if free is not None:
        tensors = (*tensors, free)
    if all(t.is_contiguous() for t in tensors):
        return Rows(count, 1, 1, tensors, ((shape[-1], 0, 0),) * len(tensors))

    sizes, strides = _merge_leading(shape[:-1], [t.stride()[:-1] for t in tensors])
    if len(sizes) > 3:
        return as_rows(*(t.contiguous() for t in tensors))
    if len(sizes) == 1:  # inner sizes of one let the launcher specialize the divisions away
        return Rows(count, 1, 1, tensors, tuple((s[0], 0, 0) for s in strides))
    if len(sizes) == 2:
        return Rows(count, 1, sizes[1], tensors, tuple((s[0], 0, s[1]) for s in strides))
    return Rows(count, sizes[1], sizes[2], tensors, tuple((s[0], s[1], s[2]) for s in strides))


def _merge_leading(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Drop dimensions of size one and merge neighbors that all tensors step through evenly."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        steps = [s[dim] for s in strides]
        if sizes and all(m[-1] == size * step for m, step in zip(merged, steps, strict=True)):
            sizes[-1] *= size
            for m, step in zip(merged, steps, strict=True):
                m[-1] = step
        else:
            sizes.append(size)
            for m, step in zip(merged, steps, strict=True):
                m.append(step)
    if not sizes:
        return [1], [(0,) for _ in strides]
    return sizes, [tuple(m) for m in merged]


def new_output(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized output of a kernel. One place, so that tests can hand out poisoned memory."""
    return torch.empty(shape, dtype=dtype, device=device)
