"""Hidden states of some tokens at a time, projected: the chunks that linear losses are computed by.

Of logits there is never more than a chunk of tokens: t = target @ weight.T + bias, and their difference
d = (input - target) @ weight.T as a GEMM of its own, which keeps its relative precision where the logits' own rounding
would drown it. With a second projection for the target there is no such GEMM, and both sides' logits are made.
What becomes of a chunk before the next one begins is `smart_fast.losses.passes`' business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.base import Backend, DivergenceSpec
from .softcap import Capped

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
    scale: float  # of logits, or of the hyperbolic tangent of capped ones; 1 / temperature is part of it
    dtypes: tuple[torch.dtype, torch.dtype]  # of the GEMMs of input and target
    chunk: int  # tokens
    group: Any = None  # processes that hold the rest of the vocabulary
    inner: float | None = None  # what raw logits are multiplied by before the hyperbolic tangent; None: no softcap
    shared: bool = True  # one projection for both sides

    @property
    def precision(self) -> torch.dtype:
        """What losses, statistics and sums over tokens are in."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    @property
    def gain(self) -> float:
        return _FP16_GAIN if torch.float16 in self.dtypes else 1.0

    def spec(self, alpha: float, weight: float = 1.0) -> DivergenceSpec:
        """What the backend computes of a chunk: differences of logits wherever there are any."""
        from_difference = self.shared or self.inner is not None
        return DivergenceSpec(self.kind, "rows", alpha, weight, self.scale, from_difference)


class Operands(NamedTuple):
    """The tensors of one call, of any floating dtypes."""

    input: Tensor  # [N, H]
    target: Tensor  # [N, H], or [N, H_target] with a projection of its own
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    target_weight: Tensor | None = None  # [V, H_target]; None: `weight` and `bias` are those of both
    target_bias: Tensor | None = None  # [V]
    mask: Tensor | None = None  # [N]

    def cast(self, plan: Plan) -> Operands:
        """With weights and biases in the dtypes of the GEMMs."""
        ours, theirs = plan.dtypes
        dtypes = (None, None, ours, ours, theirs, theirs, None)
        return Operands(*(
            each if dtype is None or each is None else each.to(dtype)
            for each, dtype in zip(self, dtypes, strict=True)
        ))  # type: ignore[arg-type]  # fmt: skip


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


class Chunk(NamedTuple):
    """Some tokens: their hidden states, and logits as the backend takes them."""

    rows: slice  # among the tokens that are computed
    tokens: slice | Tensor  # the same, among all
    input: Tensor
    target: Tensor
    first: Tensor  # logits of the input, or their difference; this and the next are overwritten by the next chunk
    logits: Tensor  # of the target
    mask: Tensor | None
    capped: Capped | None


def kept(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``(index of real tokens, mask)``: on a CPU masked tokens are left out. Elsewhere finding them would synchronize;
    there they stay, as zeros, and the kernels skip them."""
    if mask is None or mask.device.type != "cpu":
        return None, mask
    return mask.nonzero().squeeze(-1), None


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden.to(weight.dtype), weight.t(), out=out)
    else:
        torch.addmm(bias, hidden.to(weight.dtype), weight.t(), out=out)


def chunks(plan: Plan, operands: Operands) -> Iterator[Chunk]:
    """The tokens of ``operands``, which `Operands.cast` has prepared, in order."""
    input, target, weight, bias, target_weight, target_bias, mask = operands
    index, mask = kept(mask)
    count = input.shape[0] if index is None else index.shape[0]
    size = min(plan.chunk, count)
    if target_weight is None:
        other, other_bias = weight, bias
    else:
        other, other_bias = target_weight, target_bias
    first, logits = (each.new_empty(size, weight.shape[0]) for each in (weight, other))
    for start in range(0, count, plan.chunk):
        rows = slice(start, min(start + plan.chunk, count))
        tokens: slice | Tensor = rows if index is None else index[rows]
        x, t = input[tokens].to(plan.precision), target[tokens].to(plan.precision)
        part = None if mask is None else mask[rows]
        if part is not None:  # whatever they hold must not reach the sums over tokens
            x, t = (torch.where(part.unsqueeze(-1), each, 0.0) for each in (x, t))
        n = rows.stop - rows.start
        if plan.shared:
            _project(x - t, weight, None, first[:n])
        else:
            _project(x, weight, bias, first[:n])
        _project(t, other, other_bias, logits[:n])
        if plan.inner is None:
            yield Chunk(rows, tokens, x, t, first[:n], logits[:n], part, None)
        else:
            capped = Capped(first[:n], logits[:n], plan.inner, plan.shared, plan.precision)
            yield Chunk(rows, tokens, x, t, capped.difference, capped.target, part, capped)
