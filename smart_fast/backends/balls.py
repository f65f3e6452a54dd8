"""Norms of gradients and projections onto balls, in PyTorch: what ``update="paper"`` takes beside additions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..norms import Norm, known_norm


def norm(x: Tensor, norm_fn: Norm) -> Tensor:
    """``norm_fn(x)``, of entries of any magnitude: squares of what the largest of them has divided do not vanish.

    The largest of a row or of a sentence where the norm is known to be one of those, else of all.
    """
    known = known_norm(norm_fn)
    if known is None:
        dims = tuple(range(x.dim()))
    else:
        dims = (-1,) if known.scope == "row" else tuple(range(1, x.dim()))
    peak = torch.linalg.vector_norm(x, float("inf"), dim=dims, keepdim=True)
    return norm_fn(x / torch.where(peak > 0, peak, 1.0)) * peak


def direction(grad: Tensor, norm_fn: Norm) -> Tensor:
    """``grad / norm(grad)``, zero where the norm is zero."""
    size = norm(grad, norm_fn)
    return torch.where(size > 0, grad / size, 0.0)


def project(x: Tensor, norm_fn: Norm, radius: float | Tensor) -> Tensor:
    """The point of ``{y: norm(y) <= radius}`` nearest to ``x``.

    Norms that are no `inf_norm`, `l2_norm` or `l1_norm` (of a sentence or not): the multiple of ``x`` in the ball.
    """
    known = known_norm(norm_fn)
    if known is not None and known.kind == "inf":
        bound: Any = radius  # number or tensor, which the types of clamp keep apart
        return x.clamp(-bound, bound)
    if known is not None and known.kind == "l1":
        threshold = _threshold(x if known.scope == "row" else x.flatten(1), radius)
        lost = threshold.view(*threshold.shape[:-1], *([1] * (x.dim() - threshold.dim() + 1)))
        return x.sign() * (x.abs() - lost).clamp(min=0)
    size = torch.as_tensor(norm_fn(x))  # a plain number is a norm too
    return x * torch.where(size > radius, radius / size, 1.0)


def _threshold(x: Tensor, radius: float | Tensor) -> Tensor:
    """Duchi et al., Efficient projections onto the l1-ball, 2008, by sorting each row."""
    ordered = x.abs().sort(dim=-1, descending=True).values
    rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    thresholds = (ordered.cumsum(-1) - radius) / rank
    count = (ordered > thresholds).sum(-1, keepdim=True).clamp(min=1)
    return thresholds.gather(-1, count - 1).clamp(min=0)
