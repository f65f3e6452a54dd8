"""Logits y = cap tanh(a / cap) of raw ones a, compared and differentiated without cancellation.

With u = a / cap of the input, v of the target, and sigma the logistic function:

    tanh u - tanh v = sign(u - v) 2 sigma(2 max(u, v)) sigma(-2 min(u, v)) (-expm1(-2 |u - v|))
    tanh' u         = 4 sigma(2 u) sigma(-2 u)
    tanh' u - tanh' v = -(tanh u - tanh v) (tanh u + tanh v)

The first is sinh(u - v) / (cosh u cosh v) written so that nothing overflows: every factor keeps its relative precision,
where a difference of two hyperbolic tangents, or one minus a square, would lose it as they saturate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Capped:
    """One chunk of raw logits behind a softcap. Its results are in units of the cap.

    Args:
        first: raw logits of the input, or (``is_difference``) how much they exceed the target's.
        target: raw logits of the target.
        inner: what raw logits are multiplied by before the hyperbolic tangent.
        dtype: float32 or float64.
    """

    difference: Tensor  #: tanh u - tanh v
    target: Tensor  #: tanh v

    def __init__(self, first: Tensor, target: Tensor, inner: float, is_difference: bool, dtype: torch.dtype) -> None:
        self._inner = inner
        self._u, self._v = first.to(dtype) * inner, target.to(dtype) * inner
        if is_difference:
            d = torch.where(self._v == -math.inf, 0.0, self._u)
            self._u = self._v + d
        else:
            d = torch.where(self._u == self._v, 0.0, self._u - self._v)
        high, low = torch.maximum(self._u, self._v), torch.minimum(self._u, self._v)
        size = (2.0 * high).sigmoid().mul_((-2.0 * low).sigmoid()).mul_((-2.0 * d.abs()).expm1_())
        self.difference = size.mul_(-2.0 * d.sign())
        self.target = self._v.tanh()

    def slope(self, which: int) -> Tensor:
        """The derivative of tanh by the raw logits: of the input (0), of the target (1), or their difference (2)."""
        if which == 2:
            return (self.target * 2.0 + self.difference).mul_(self.difference).mul_(-self._inner)
        twice = (self._u, self._v)[which] * 2.0
        return twice.sigmoid().mul_((-twice).sigmoid()).mul_(4.0 * self._inner)
