"""Matrix products of half precision whose results are wider."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``, rounded once where GEMMs allow that."""
    if a.dtype != dtype and _has_out_dtype("mm", a.device, a.dtype):
        return torch.mm(a, b, dtype)
    return torch.mm(a, b).to(dtype)


def accumulate(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """``out = a @ b``, or ``+=`` if ``add``, summed in the precision of ``out``."""
    if a.dtype == torch.float16 and not _has_out_dtype("mm", a.device, a.dtype):
        a, b = a.to(out.dtype), b.to(out.dtype)  # sums over tokens may exceed what fp16 holds
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=1 if add else 0)
    elif _has_out_dtype("addmm", a.device, a.dtype):
        torch.addmm(out, a, b, out.dtype, beta=1 if add else 0, out=out)
    elif add:
        out.add_(product(a, b, out.dtype))
    else:
        out.copy_(product(a, b, out.dtype))
