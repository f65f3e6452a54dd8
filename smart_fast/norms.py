"""Norms that scale the noise: of each token, or of each sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Norm = Callable[[Tensor], Tensor]

__all__ = ["inf_norm", "l1_norm", "l2_norm", "sentence_norm"]


def inf_norm(x: Tensor) -> Tensor:
    """Largest absolute value over the last dimension: ``[..., D] -> [..., 1]``. The default of `SMARTLoss`."""
    return torch.norm(x, p=float("inf"), dim=-1, keepdim=True)


def l2_norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension: ``[..., D] -> [..., 1]``."""
    return torch.norm(x, p=2, dim=-1, keepdim=True)


def l1_norm(x: Tensor) -> Tensor:
    """Sum of absolute values over the last dimension: ``[..., D] -> [..., 1]``."""
    return torch.norm(x, p=1, dim=-1, keepdim=True)


class _SentenceNorm:
    """A norm of everything but the batch dimension. A class, so that it pickles and compares by value."""

    def __init__(self, norm_fn: Norm) -> None:
        self.norm_fn = norm_fn

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(
                f"sentence_norm needs a tensor with a batch dimension, [B, ..., D], got shape {tuple(x.shape)}"
            )
        norm = self.norm_fn(x.flatten(1))
        return norm.reshape(x.shape[0], *([1] * (x.dim() - 1)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SentenceNorm) and self.norm_fn == other.norm_fn

    def __hash__(self) -> int:
        return hash((_SentenceNorm, self.norm_fn))

    def __repr__(self) -> str:
        return f"sentence_norm({getattr(self.norm_fn, '__name__', repr(self.norm_fn))})"


def sentence_norm(norm_fn: Norm) -> Norm:
    """The norm of a whole sentence: ``[B, ..., D] -> [B, 1, ..., 1]``, mt-dnn's ``norm_level=1``.

    Args:
        norm_fn: `inf_norm`, `l2_norm`, `l1_norm`, or any function that maps ``[B, N]`` to ``[B, 1]``.

    Raises:
        TypeError: ``norm_fn`` is not callable.
        ValueError: when called, the tensor has no batch dimension.
    """
    if not callable(norm_fn):
        raise TypeError(f"norm_fn must be callable, got {type(norm_fn).__name__}")
    return _SentenceNorm(norm_fn)


class KnownNorm(NamedTuple):
    """A norm that the fused kernels compute: ``kind`` is "inf", "l2" or "l1"; ``scope`` "row" or "group"."""

    kind: str
    scope: str


_KNOWN: dict[Norm, KnownNorm] = {
    norm: KnownNorm(kind, "row") for norm, kind in ((inf_norm, "inf"), (l2_norm, "l2"), (l1_norm, "l1"))
}


def known_norm(norm_fn: Norm) -> KnownNorm | None:
    """How a fused kernel computes ``norm_fn``, or None if only calling it can tell."""
    if isinstance(norm_fn, _SentenceNorm):
        inner = known_norm(norm_fn.norm_fn)
        return KnownNorm(inner.kind, "group") if inner and inner.scope == "row" else None
    try:
        return _KNOWN.get(norm_fn)
    except TypeError:  # an unhashable callable
        return None
