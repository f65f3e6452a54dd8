"""Projection onto the ball of a norm, in PyTorch: what ``update="paper"`` ends a step with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norms import Norm, known_norm


def direction(grad: Tensor, norm_fn: Norm) -> Tensor:
    """``grad / norm(grad)``, zero where the norm is zero: scaled first, so that squares of tiny entries do not vanish.

    The first scale is one for all, or each row's own where the norm is one of a row.
    """
    known = known_norm(norm_fn)
    dims = (-1,) if known is not None and known.scope == "row" else tuple(range(grad.dim()))
    peak = torch.linalg.vector_norm(grad, float("inf"), dim=dims, keepdim=True)
    grad = torch.where(peak > 0, grad / peak, 0.0)
    norm = torch.as_tensor(norm_fn(grad), device=grad.device)
    return torch.where(norm > 0, grad / norm, 0.0)


def project(noise: Tensor, norm_fn: Norm, radius: float | Tensor) -> Tensor:
    """The point of ``{x: norm(x) <= radius}`` nearest to ``noise``; ``radius`` broadcasts to the norm.

    Norms that are no `inf_norm`, `l2_norm` or `l1_norm` (of a sentence or not): the multiple of ``noise`` in the ball.
    """
    known = known_norm(norm_fn)
    radius = torch.as_tensor(radius, dtype=noise.dtype, device=noise.device)
    if known is not None and known.kind == "inf":
        return noise.clamp(-radius, radius)
    if known is not None and known.kind == "l1":
        flat = noise if known.scope == "row" else noise.flatten(1)
        limit = radius if radius.dim() == 0 or known.scope == "row" else radius.flatten(1)
        return _onto_l1(flat, limit).reshape(noise.shape)
    norm = torch.as_tensor(norm_fn(noise), dtype=noise.dtype, device=noise.device)
    return torch.where(norm > radius, noise * (radius / norm), noise)


def _onto_l1(noise: Tensor, radius: Tensor) -> Tensor:
    """Duchi et al., Efficient projections onto the l1-ball, 2008: shrink all entries by one threshold, by sorting."""
    sizes = noise.abs()
    ordered = sizes.sort(dim=-1, descending=True).values
    rank = torch.arange(1, noise.shape[-1] + 1, dtype=noise.dtype, device=noise.device)
    thresholds = (ordered.cumsum(-1) - radius) / rank
    count = (ordered > thresholds).sum(-1, keepdim=True).clamp(min=1)
    threshold = thresholds.gather(-1, count - 1).clamp(min=0)
    return noise.sign() * (sizes - threshold).clamp(min=0)
