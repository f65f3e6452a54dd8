"""Divergences of projected hidden states, chunk by chunk: GEMMs around the divergence of a backend.

Of logits there is never more than a chunk of tokens: t = target @ weight.T + bias, and their difference
d = (input - target) @ weight.T as a GEMM of its own, which keeps its relative precision where the logits' own rounding
would drown it. Gradients to logits become gradients to hidden states and weight before the next chunk begins.

No autograd here; `smart_fast.autograd` calls `losses` and `gradients`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.base import STATISTICS, Backend, DivergenceSpec
from . import sharded
from .divergences import Matrix, divergence

#: Gradients to fp16 logits are computed this much larger, or they would underflow (a probability of a large vocabulary
#: is near 2**-17) before the upstream gradient reaches them. A power of two, small enough that 2**8 |r| does not
#: overflow for log-ratios r below 250.
_FP16_GAIN = 2.0**8


@dataclass(frozen=True)
class Plan:
    """How the losses of one call are computed."""

    backend: Backend
    kind: str
    alpha: float
    scale: float  # 1 / temperature
    dtype: torch.dtype  # of the GEMMs
    chunk: int  # tokens
    group: Any = None  # processes that hold the rest of the vocabulary

    @property
    def precision(self) -> torch.dtype:
        """What losses, statistics and sums over tokens are in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def gain(self) -> float:
        return _FP16_GAIN if self.dtype == torch.float16 else 1.0


class Wanted(NamedTuple):
    """Which gradients."""

    input: bool
    target: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of the sum of the losses, times `Plan.gain`; `finished` makes them what autograd is given."""

    hidden: list[Tensor | None]  # [N, H] for each matrix of the kind, before its multipliers
    weight: Tensor | None
    bias: Tensor | None


def chunk_tokens(count: int, width: int, itemsize: int, chunk_bytes: int | None, device: torch.device) -> int:
    """Tokens a chunk, so that its logits take up to ``chunk_bytes``.

    By default 64 MiB (256 MiB on a GPU, where small GEMMs would leave multiprocessors idle), but at least 256 tokens:
    each chunk reads the weight four times and updates its gradient, which fewer tokens do not pay for. And at most
    4096: GEMMs do not get faster beyond that. Never a number of chunks that grows with V / H. Chunks of equal size.
    """
    if chunk_bytes is None:
        budget = (64 if device.type == "cpu" else 256) << 20
        most = min(max(budget // (width * itemsize), 256), 4096)
    else:
        most = max(chunk_bytes // (width * itemsize), 1)
    return math.ceil(count / math.ceil(count / most))


class _Chunk(NamedTuple):
    rows: slice  # among the tokens that are computed
    tokens: slice | Tensor  # the same, among all
    input: Tensor
    target: Tensor
    difference: Tensor  # of the logits; this and the next are overwritten by the next chunk
    logits: Tensor  # of the target
    mask: Tensor | None


def _kept(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``(index of real tokens, mask)``: on a CPU masked tokens are left out. Elsewhere finding them would synchronize;
    there they stay, as zeros, and the kernels skip them."""
    if mask is None or mask.device.type != "cpu":
        return None, mask
    return mask.nonzero().squeeze(-1), None


def _chunks(
    plan: Plan, input: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Iterator[_Chunk]:
    index, mask = _kept(mask)
    count = input.shape[0] if index is None else index.shape[0]
    size = min(plan.chunk, count)
    difference, logits = (weight.new_empty(size, weight.shape[0]) for _ in range(2))
    for start in range(0, count, plan.chunk):
        rows = slice(start, min(start + plan.chunk, count))
        tokens: slice | Tensor = rows if index is None else index[rows]
        x, t = input[tokens].to(plan.precision), target[tokens].to(plan.precision)
        part = None if mask is None else mask[rows]
        if part is not None:  # whatever they hold must not reach the sums over tokens
            x, t = (torch.where(part.unsqueeze(-1), each, 0.0) for each in (x, t))
        n = rows.stop - rows.start
        torch.mm((x - t).to(plan.dtype), weight.t(), out=difference[:n])
        if bias is None:
            torch.mm(t.to(plan.dtype), weight.t(), out=logits[:n])
        else:
            torch.addmm(bias, t.to(plan.dtype), weight.t(), out=logits[:n])
        yield _Chunk(rows, tokens, x, t, difference[:n], logits[:n], part)


def losses(
    plan: Plan, input: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, keep: bool,
    now: Wanted | None,
) -> tuple[Tensor, Tensor | None, Gradients | None]:  # fmt: skip
    """The loss of each token ``[N]``, statistics for `gradients` (if ``keep``), and the gradients ``now`` wanted.

    ``input`` and ``target`` ``[N, H]``, ``weight`` ``[V, H]``, ``bias`` ``[V]``, ``mask`` ``[N]``; any floating dtypes.
    """
    weight, bias = weight.to(plan.dtype), None if bias is None else bias.to(plan.dtype)
    count = input.shape[0]
    loss = torch.zeros(count, dtype=plan.precision, device=input.device)
    kept = torch.empty((count, STATISTICS), dtype=plan.precision, device=input.device) if keep else None
    sums = None if now is None else _Sums(plan, input, weight, mask, now)
    spec = DivergenceSpec(plan.kind, "rows", plan.alpha, scale=plan.scale, from_difference=True)
    for chunk in _chunks(plan, input, target, weight, bias, mask):
        sides = chunk.difference, chunk.logits
        stats: Tensor | None
        if plan.group is not None:
            rows, stats, _ = sharded.rows(plan.backend, *sides, spec, chunk.mask, plan.group)
        else:
            rows, stats = plan.backend.divergence_forward(*sides, spec, chunk.mask, keep, keep)
        loss[chunk.tokens] = rows
        if kept is not None:
            assert stats is not None
            kept[chunk.rows] = stats
        if sums is not None:
            assert stats is not None
            sums.add(chunk, stats, None)
    return loss, kept, None if sums is None else sums.result


def gradients(
    plan: Plan, input: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stats: Tensor, upstream: Tensor, wanted: Wanted,
) -> Gradients:  # fmt: skip
    """Gradients, the logits being computed once more. Those to weight and bias are those of
    ``(upstream * losses).sum()``, ``upstream`` ``[N]``; those to hidden states still lack that factor.
    """
    weight, bias = weight.to(plan.dtype), None if bias is None else bias.to(plan.dtype)
    sums = _Sums(plan, input, weight, mask, wanted)
    for chunk in _chunks(plan, input, target, weight, bias, mask):
        sums.add(chunk, stats[chunk.rows], upstream[chunk.tokens].to(plan.precision))
    return sums.result


class _Sums:
    """Gradients as they grow chunk by chunk."""

    def __init__(self, plan: Plan, input: Tensor, weight: Tensor, mask: Tensor | None, wanted: Wanted) -> None:
        self._plan, self._weight, self._wanted = plan, weight, wanted
        alpha, self._matrices = divergence(plan.kind).matrices(plan.alpha)
        self._spec = DivergenceSpec(plan.kind, "rows", alpha, plan.gain, plan.scale, from_difference=True)
        self._started = False
        # The first chunk overwrites; only masked tokens, which no chunk may hold, need zeros.
        make = functools.partial(
            torch.empty if mask is None else torch.zeros, dtype=plan.precision, device=input.device
        )
        self.result = Gradients(
            [make(input.shape) if self._wanted_of(matrix) else None for matrix in self._matrices],
            make(weight.shape) if wanted.weight else None,
            make(weight.shape[:1]) if wanted.bias else None,
        )

    def _wanted_of(self, matrix: Matrix) -> bool:
        to_input, to_target = matrix
        return (self._wanted.input and to_input is not None) or (self._wanted.target and to_target is not None)

    def add(self, chunk: _Chunk, stats: Tensor, upstream: Tensor | None) -> None:
        """The part of one chunk; ``upstream`` (None: ones) multiplies the parts of weight and bias."""
        plan, (hidden, weight, bias) = self._plan, self.result
        ones = stats.new_ones(()).expand(chunk.input.shape[:1])
        needed = [self._wanted.weight or self._wanted.bias or self._wanted_of(matrix) for matrix in self._matrices]
        to_logits = plan.backend.divergence_backward(
            ones,
            chunk.difference,
            chunk.logits,
            stats,
            self._spec,
            chunk.mask,
            needed[0],
            needed[-1] and len(needed) > 1,
        )
        for matrix, to_hidden, logits in zip(self._matrices, hidden, to_logits, strict=False):
            if to_hidden is not None and logits is not None:
                to_hidden[chunk.tokens] = _product(logits, self._weight, plan.precision)
            if logits is None:
                continue
            if weight is not None:
                combined = _combine(matrix, chunk, upstream).to(plan.dtype)
                _accumulate(weight, logits.t(), combined, self._started)
            if bias is not None:
                factor = (ones if upstream is None else upstream).to(plan.dtype).unsqueeze(1)
                part = _product(logits.t(), factor, plan.precision).squeeze(1)
                part *= (matrix.to_input or 0.0) + (matrix.to_target or 0.0)
                bias.copy_(part if not self._started else bias + part)
            self._started = True


def _combine(matrix: Matrix, chunk: _Chunk, upstream: Tensor | None) -> Tensor:
    """What the gradient to the weight multiplies a matrix with. Where the multipliers are opposite that is a
    difference of hidden states, taken before it is rounded."""
    sides = zip(matrix, (chunk.input, chunk.target), strict=True)
    parts = [states if factor == 1.0 else factor * states for factor, states in sides if factor is not None]
    combined = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return combined if upstream is None else combined * upstream.unsqueeze(-1)


def finished(
    plan: Plan, sums: Gradients, wanted: Wanted, upstream: Tensor, common: Tensor, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients to input, target, weight and bias in ``dtypes``. ``sums`` are used up.

    ``upstream`` (a scalar, or ``[N]``) multiplies those to hidden states, the scalar ``common`` the others. With the
    vocabulary sharded, those to hidden states are partial sums: one all_reduce of ``[N, H]`` for each matrix.
    """
    sides: list[Tensor | None] = [None, None]
    for matrix, hidden in zip(divergence(plan.kind).matrices(plan.alpha).parts, sums.hidden, strict=True):
        if hidden is None:
            continue
        if plan.group is not None:
            sharded.all_reduce(hidden, plan.group)
        for side, factor in enumerate(matrix):
            if wanted[side] and factor is not None:
                scaled = hidden * (upstream * (factor / plan.gain)).unsqueeze(-1)
                sides[side] = scaled.to(dtypes[side])
    rest = [None if each is None else each.mul_(common / plan.gain).to(dtype)
            for each, dtype in zip(sums[1:], dtypes[2:], strict=True)]  # fmt: skip
    return *sides, *rest


_known: dict[tuple[Any, ...], bool] = {}


def _has_out_dtype(operator: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether "mm" or "addmm" of this half precision gives fp32 results here: on CUDA, in most builds. Tried once."""
    if device.type != "cuda":
        return False
    key = operator, device, dtype
    if key not in _known:
        try:
            a, out = torch.ones((16, 16), dtype=dtype, device=device), torch.zeros((16, 16), device=device)
            if operator == "mm":
                torch.mm(a, a, torch.float32)
            else:
                torch.addmm(out, a, a, torch.float32, out=out)
            _known[key] = True
        except (RuntimeError, TypeError):
            _known[key] = False
    return _known[key]


# The compiler is to take the answer, not to trace the attempt (as in `smart_fast.backends`).
_has_out_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``, rounded once where GEMMs allow that."""
    if a.dtype != dtype and _has_out_dtype("mm", a.device, a.dtype):
        return torch.mm(a, b, dtype)
    return torch.mm(a, b).to(dtype)


def _accumulate(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """``out = a @ b``, or ``+=`` if ``add``, summed in the precision of ``out``."""
    if a.dtype == torch.float16 and not _has_out_dtype("mm", a.device, a.dtype):
        a, b = a.to(out.dtype), b.to(out.dtype)  # sums over tokens may exceed what fp16 holds
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=1 if add else 0)
    elif _has_out_dtype("addmm", a.device, a.dtype):
        torch.addmm(out, a, b, out.dtype, beta=1 if add else 0, out=out)
    elif add:
        out.add_(_product(a, b, out.dtype))
    else:
        out.copy_(_product(a, b, out.dtype))
