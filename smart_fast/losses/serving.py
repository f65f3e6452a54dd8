"""Backends that do not know a divergence are not asked for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..backends import BackendFallbackWarning


def knowing(kind: str, backend: Any, asked: str) -> Any:
    """``backend``, or None (PyTorch) where its kernels do not compute the divergence ``kind``.

    Says so once if the caller ``asked`` for the backend by name.
    """
    if backend is None or kind in backend.kinds:
        return backend
    if asked == backend.name and not torch.compiler.is_compiling():
        warnings.warn(
            f"backend {asked!r} falls back to PyTorch: its kernels do not compute the divergence {kind!r}",
            BackendFallbackWarning,
            stacklevel=4,
        )
    return None
