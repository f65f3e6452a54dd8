"""The one table of cases: what is measured, on which device, and what must move (bytes) or be multiplied (FLOPs).

A case is data until it is built. ``bytes`` is the floor of one call on the memory bus: every operand read once and
every result written once (PyTorch's noise and saved probabilities are not in it, since the result does not need them).
``flops`` is that of one call on the multipliers: the GEMMs that no way of computing the results can do without.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .divergences import Divergence, LinearDivergence
from .models import Model, bert, bert_masked_lm, deberta, pooled_head, qwen2, roberta
from .operations import Ascend, Direction, Perturb
from .regularizer import Regularizer
from .task import Task
from .training import TrainingStep

FP32, BF16 = torch.float32, torch.bfloat16
GROUPS = ("ops", "lm", "regulariser", "train", "overhead")
DTYPES = {FP32: "fp32", BF16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One row of the table. ``where``: "quick" and "cpu" for runs without a GPU, "cuda" for runs with one."""

    name: str
    group: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int | None
    where: tuple[str, ...]
    build: Callable[[torch.device], Task]
    needs: str | None = None  # a package beyond those of every case
    flops: int | None = None

    @property
    def needs_same_noise(self) -> bool:
        """Whether a check must know the noise that a contestant draws."""
        return self.bytes is None and self.flops is None


def _operation(kind: str, shape: tuple[int, ...], dtype: torch.dtype, tensors: int, where: str, build: type, *args):
    return Case(
        name=f"{kind} {list(shape)} {DTYPES[dtype]}",
        group="ops",
        shape=shape,
        dtype=dtype,
        bytes=tensors * math.prod(shape) * dtype.itemsize,
        where=tuple(where.split()),
        build=functools.partial(build, *args),
    )


def perturb(shape: tuple[int, ...], dtype: torch.dtype, where: str, variant: str = "") -> Case:
    """Read the embedding, write the perturbed one (a mask or a unit is a few bytes a row: not counted)."""
    return _operation(f"perturb {variant}".strip(), shape, dtype, 2, where, Perturb, shape, dtype, variant)


def ascend(shape: tuple[int, ...], dtype: torch.dtype, where: str, update: str = "smart-pytorch") -> Case:
    """Read the embedding and the gradient, write the perturbed embedding."""
    kind = "ascend inf" if update == "smart-pytorch" else f"ascend inf {update}"
    return _operation(kind, shape, dtype, 3, where, Ascend, shape, dtype, update)


def direction(shape: tuple[int, ...], dtype: torch.dtype, where: str) -> Case:
    """Read the logits, write the direction."""
    return _operation("fisher direction", shape, dtype, 2, where, Direction, shape, dtype)


def divergence(kind: str, shape: tuple[int, ...], dtype: torch.dtype, where: str, regime: str = "far") -> Case:
    """Forward reads both logits; backward reads them again and writes both gradients. ``regime``: of divergences.py."""
    what = f"{kind} fwd+bwd {regime}"
    return _operation(what, shape, dtype, 6, where, Divergence, kind, shape, dtype, True, regime)


def lm_divergence(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, where: str, backward: bool = True, regime: str = "far"
) -> Case:
    """`divergence` of a language model's logits; without ``backward`` only the two reads of the forward pass."""
    passes, tensors = ("fwd+bwd", 6) if backward else ("fwd", 2)
    name = f"lm-divergence {kind} {passes} {regime}"
    case = _operation(name, shape, dtype, tensors, where, Divergence, kind, shape, dtype, backward, regime)
    return dataclasses.replace(case, group="lm")


def lm_linear(
    kind: str, rows: int, hidden: int, width: int, dtype: torch.dtype, where: str, regime: str = "far"
) -> Case:
    """Two GEMMs make the logits. The gradients to them are one matrix for sym_kl and js (the two are multiples of one
    another) and two for kl; each takes a GEMM for the hidden states and one for the weight."""
    gemms = 6 if kind == "kl" else 4
    return Case(
        name=f"lm-linear {kind} {regime} [{rows}, {hidden}] x [{hidden}, {width}] {DTYPES[dtype]}",
        group="lm",
        shape=(rows, width),
        dtype=dtype,
        bytes=None,
        where=tuple(where.split()),
        build=functools.partial(LinearDivergence, kind, rows, hidden, width, dtype, regime),
        flops=gemms * 2 * rows * hidden * width,
    )


#: Names of cases as they were before they named their regime, which was "far".
_WITHOUT_REGIME = re.compile(
    r"^((?:overhead, )?(?:lm-divergence )?(?:kl|sym_kl|js) fwd(?:\+bwd)?|lm-linear (?:kl|sym_kl|js)) (?=\[)"
)


def named(case: str) -> str:
    """The present name of a case of older results."""
    return _WITHOUT_REGIME.sub(r"\1 far ", case)


def regularizer(
    name: str, shape: tuple[int, ...], where: str, build: Callable[[], nn.Module], *,
    dtype: torch.dtype = FP32, needs: str | None = "transformers",
) -> Case:  # fmt: skip
    """``shape`` ``[B, S, D]`` of embedded words or ``[B, D]`` of pooled features."""
    # Word embeddings of BERT have a standard deviation of 0.02; pooled features are of order one.
    scale = 0.02 if len(shape) == 3 else 1.0
    return Case(
        name=f"{name}, {list(shape[:-1] if len(shape) == 3 else shape)}{'' if dtype == FP32 else f' {DTYPES[dtype]}'}",
        group="regulariser",
        shape=shape,
        dtype=dtype,
        bytes=None,
        where=tuple(where.split()),
        build=functools.partial(Regularizer, build, shape, scale, dtype),
        needs=needs,
    )


def training(name: str, shape: tuple[int, int], where: str, build: Callable[[], Model]) -> Case:
    """A whole training step on ``[B, S]`` tokens."""
    dtype = BF16 if where == "cuda" else FP32
    return Case(
        name=f"step of {name}, {list(shape)} {DTYPES[dtype]}",
        group="train",
        shape=shape,
        dtype=dtype,
        bytes=None,
        where=tuple(where.split()),
        build=functools.partial(TrainingStep, build, shape),
        needs="transformers",
    )


def overhead(case: Case) -> Case:
    """A case so small that what is timed is the host: Python, autograd and launches."""
    return dataclasses.replace(case, group="overhead", name=f"overhead, {case.name}")


BERT_BASE, BERT_SHALLOW = functools.partial(bert, 12, 768), functools.partial(bert, 2, 768)
ROBERTA_LARGE, DEBERTA_BASE = functools.partial(roberta, 24, 1024), functools.partial(deberta, 12, 768)
QWEN = functools.partial(qwen2, 24, 896)
HEAD, TINY_HEAD = functools.partial(pooled_head, 768, 3), functools.partial(pooled_head, 8, 2)
TINY_LM, TINIER_LM = functools.partial(bert_masked_lm, 2, 128), functools.partial(bert_masked_lm, 1, 128)

# The cheapest first within a group: what a time limit cuts off is the tail.
TABLE: tuple[Case, ...] = (
    perturb((1024, 768), FP32, "quick cpu"),
    perturb((1024, 768), BF16, "cpu"),
    perturb((4096, 768), FP32, "cpu"),
    perturb((4096, 768), BF16, "cpu"),
    perturb((8192, 1024), FP32, "cpu"),
    perturb((8192, 1024), BF16, "cpu"),
    perturb((4096, 768), FP32, "cpu", variant="masked"),
    perturb((4096, 768), FP32, "cpu", variant="relative"),
    perturb((32, 128, 768), FP32, "cuda"),
    perturb((64, 512, 1024), FP32, "cuda"),
    perturb((64, 512, 1024), BF16, "cuda"),
    perturb((64, 1024, 1024), FP32, "cuda"),
    perturb((64, 512, 1024), BF16, "cuda", variant="masked"),
    ascend((1024, 768), FP32, "cpu"),
    ascend((1024, 768), BF16, "cpu"),
    ascend((4096, 768), FP32, "quick cpu"),
    ascend((4096, 768), BF16, "cpu"),
    ascend((8192, 1024), FP32, "cpu"),
    ascend((8192, 1024), BF16, "cpu"),
    ascend((4096, 768), FP32, "cpu", update="paper"),
    ascend((32, 128, 768), FP32, "cuda"),
    ascend((64, 512, 1024), FP32, "cuda"),
    ascend((64, 512, 1024), BF16, "cuda"),
    ascend((64, 1024, 1024), FP32, "cuda"),
    divergence("sym_kl", (32, 3), FP32, "quick cpu cuda"),
    divergence("sym_kl", (4096, 2), FP32, "cpu cuda"),
    divergence("sym_kl", (4096, 2), FP32, "cpu cuda", "near"),
    divergence("sym_kl", (256, 30522), FP32, "quick"),
    divergence("sym_kl", (256, 30522), FP32, "quick", "near"),
    divergence("sym_kl", (1024, 30522), FP32, "cpu"),
    divergence("sym_kl", (1024, 30522), FP32, "cpu", "near"),
    divergence("sym_kl", (1024, 30522), BF16, "cpu"),
    divergence("sym_kl", (1024, 30522), BF16, "cpu", "near"),
    divergence("sym_kl", (512, 128256), FP32, "cpu"),
    divergence("sym_kl", (512, 128256), BF16, "cpu"),
    divergence("kl", (32, 3), FP32, "cpu cuda"),
    divergence("kl", (4096, 2), FP32, "cpu"),
    divergence("kl", (1024, 30522), FP32, "cpu"),
    divergence("kl", (1024, 30522), FP32, "cpu", "near"),
    divergence("kl", (1024, 30522), BF16, "cpu"),
    divergence("kl", (512, 128256), FP32, "cpu"),
    divergence("kl", (512, 128256), BF16, "cpu"),
    divergence("js", (32, 3), FP32, "cpu"),
    divergence("js", (4096, 2), FP32, "cpu"),
    divergence("js", (1024, 30522), FP32, "cpu"),
    divergence("js", (1024, 30522), FP32, "cpu", "near"),
    divergence("js", (1024, 30522), BF16, "cpu"),
    divergence("js", (512, 128256), FP32, "cpu"),
    divergence("js", (512, 128256), BF16, "cpu"),
    direction((4096, 2), FP32, "cpu cuda"),
    direction((1024, 30522), FP32, "cpu"),
    direction((1024, 30522), BF16, "cpu"),
    direction((8192, 32000), BF16, "cuda"),
    lm_linear("sym_kl", 256, 64, 8000, FP32, "quick cpu cuda"),
    regularizer("pooled head 768 to 3", (32, 768), "quick cpu cuda", HEAD, needs=None),
    regularizer("masked LM 1x128, V=30522", (4, 32, 128), "quick", TINIER_LM),
    regularizer("masked LM 2x128, V=30522", (8, 64, 128), "cpu cuda", TINY_LM),
    regularizer("masked LM 2x128, V=30522", (32, 128, 128), "cuda", TINY_LM),
    regularizer("bert-base classifier 12x768", (8, 128, 768), "cuda", BERT_BASE),
    regularizer("bert-base classifier 12x768", (32, 128, 768), "cuda", BERT_BASE),
    regularizer("bert-base classifier 12x768", (2, 32, 768), "cpu", BERT_BASE),
    regularizer("bert classifier 2x768", (4, 32, 768), "quick", BERT_SHALLOW),
    regularizer("roberta-large classifier 24x1024", (16, 128, 1024), "cuda", ROBERTA_LARGE, dtype=BF16),
    regularizer("deberta-v3-base classifier 12x768", (16, 128, 768), "cuda", DEBERTA_BASE, dtype=BF16),
    regularizer("qwen2.5-0.5b LM 24x896, V=151936", (4, 512, 896), "cuda", QWEN, dtype=BF16),
    regularizer("bert-base classifier 12x768", (64, 128, 768), "cuda", BERT_BASE, dtype=BF16),
    regularizer("bert-base classifier 12x768", (8, 512, 768), "cuda", BERT_BASE, dtype=BF16),
    regularizer("roberta-large classifier 24x1024", (8, 512, 1024), "cuda", ROBERTA_LARGE, dtype=BF16),
    regularizer("deberta-v3-base classifier 12x768", (64, 128, 768), "cuda", DEBERTA_BASE, dtype=BF16),
    regularizer("deberta-v3-base classifier 12x768", (8, 512, 768), "cuda", DEBERTA_BASE, dtype=BF16),
    regularizer("roberta-large classifier 24x1024", (64, 128, 1024), "cuda", ROBERTA_LARGE, dtype=BF16),
    training("bert classifier 1x64", (4, 16), "quick", functools.partial(bert, 1, 64)),
    training("bert classifier 2x128", (8, 32), "cpu", functools.partial(bert, 2, 128)),
    training("qwen2 2x64, V=8000", (2, 64), "cpu", functools.partial(qwen2, 2, 64, 8000)),
    training("bert-base classifier", (16, 128), "cuda", BERT_BASE),
    training("bert-base classifier", (64, 128), "cuda", BERT_BASE),
    training("qwen2.5-0.5b, V=151936", (4, 512), "cuda", QWEN),
    training("roberta-large classifier", (16, 128), "cuda", ROBERTA_LARGE),
    training("deberta-v3-base classifier", (16, 128), "cuda", DEBERTA_BASE),
    overhead(regularizer("head 8 to 2", (1, 8), "quick cpu cuda", TINY_HEAD, needs=None)),
    overhead(perturb((1, 8), FP32, "cpu cuda")),
    overhead(ascend((1, 8), FP32, "cpu cuda")),
    overhead(divergence("kl", (1, 4), FP32, "cpu cuda")),
    overhead(divergence("sym_kl", (1, 4), FP32, "cpu cuda")),
    lm_divergence("sym_kl", (8192, 32000), BF16, "cuda", backward=False),
    lm_divergence("sym_kl", (8192, 32000), BF16, "cuda", backward=False, regime="near"),
    lm_divergence("sym_kl", (8192, 32000), BF16, "cuda"),
    lm_divergence("sym_kl", (8192, 32000), BF16, "cuda", regime="near"),
    lm_linear("sym_kl", 8192, 4096, 128256, BF16, "cuda"),
    lm_divergence("sym_kl", (8192, 128256), BF16, "cuda", backward=False),
    lm_divergence("sym_kl", (8192, 128256), BF16, "cuda"),
    lm_divergence("sym_kl", (8192, 128256), BF16, "cuda", regime="near"),
    lm_divergence("sym_kl", (4096, 151936), BF16, "cuda"),
    lm_divergence("kl", (8192, 32000), BF16, "cuda"),
    lm_divergence("js", (8192, 32000), BF16, "cuda"),
    lm_linear("sym_kl", 8192, 4096, 128256, BF16, "cuda", "near"),
    lm_linear("kl", 8192, 4096, 128256, BF16, "cuda"),
    lm_linear("js", 8192, 4096, 128256, BF16, "cuda"),
    lm_divergence("sym_kl", (16, 151936), BF16, "cuda"),
    lm_divergence("js", (8192, 128256), BF16, "cuda"),
    lm_divergence("sym_kl", (8192, 32000), FP32, "cuda"),
    lm_divergence("sym_kl", (8192, 32000), FP32, "cuda", regime="near"),
    lm_divergence("sym_kl", (4096, 151936), FP32, "cuda"),
    lm_divergence("sym_kl", (8192, 128256), FP32, "cuda"),
    lm_divergence("kl", (8192, 32000), FP32, "cuda"),
    lm_divergence("sym_kl", (512, 151936), FP32, "cpu"),
    lm_divergence("sym_kl", (512, 151936), BF16, "cpu"),
    lm_divergence("sym_kl", (512, 151936), BF16, "cpu", regime="near"),
    lm_linear("sym_kl", 2048, 512, 32000, FP32, "cpu"),
    lm_linear("sym_kl", 2048, 512, 32000, FP32, "cpu", "near"),
    lm_linear("kl", 2048, 512, 32000, FP32, "cpu"),
    lm_linear("js", 2048, 512, 32000, FP32, "cpu"),
)


def select(
    device: torch.device, *, quick: bool = False, groups: Sequence[str] = ("all",), containing: str = ""
) -> list[Case]:
    """The cases of the table for a device, whose name contains a text (case and spaces as printed)."""
    where = "cuda" if device.type == "cuda" else "quick" if quick else "cpu"
    if device.type == "cuda" and quick:
        return [case for case in select(device, groups=groups, containing=containing) if _small(case)]
    chosen = [case for case in TABLE if where in case.where]
    chosen = [case for case in chosen if "all" in groups or case.group in groups]
    return [case for case in chosen if containing.lower() in case.name.lower()]


def _small(case: Case) -> bool:
    return math.prod(case.shape) <= 1 << 25
