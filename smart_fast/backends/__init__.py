"""Which backend serves a call: names, availability, the meaning of "auto", and fallbacks that say so.

A fused backend is represented by its module; ``None`` stands for plain PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..training.compiling import when_traced
from .auto import candidates
from .base import FUSED_DTYPES

NAMES = ("torch", "triton", "native")


class BackendFallbackWarning(UserWarning):
    """A backend that was asked for by name could not serve the tensors at hand; PyTorch did instead."""


class _Caller(threading.local):
    def __init__(self) -> None:  # in every thread; torch.compile cannot guard a default of the class
        #: The backend that losses take, and whether gradients to the perturbed embedding only are wanted.
        self.state: tuple[str | None, bool] = (None, False)


_caller = _Caller()
_default = "auto"
# Read once: what SMART_FAST_BACKEND says is checked when "auto" is first resolved, not at import.
_from_environment = os.environ.get("SMART_FAST_BACKEND", "").strip() or None
_triton: ModuleType | str | None = None  # the module, or the reason why it cannot be imported
_native: ModuleType | str | None = None  # the module, or the reason why it cannot be built or loaded
_native_sought = False  # whether an extension that was built before has been looked for


def _load_triton() -> ModuleType | str:
    global _triton
    if _triton is None:
        if importlib.util.find_spec("triton") is None:
            _triton = "triton is not installed (pip install triton; wheels exist for Linux)"
        else:
            try:
                from . import triton

                _triton = triton
            except Exception as error:
                _triton = f"triton cannot be imported: {type(error).__name__}: {error}"
    return _triton


_NOT_BUILT = "not built yet: `python -m smart_fast build` compiles it once; so does the first use of backend='native'"


@when_traced  # a compiler that meets the first use is not to trace through file systems
def _seek_native(build: bool) -> str:
    """Set ``_native`` if that can be done; returns why not, or nothing. Looks once for what was built earlier."""
    global _native, _native_sought
    if _native is None and (build or not _native_sought):
        from .. import build as native_build

        _native_sought = True
        try:
            extension = native_build.build() if build else native_build.load()
            if extension is not None:
                from . import native

                native.extension = extension
                _native = native
        except native_build.BuildError as error:
            _native = f"it cannot be built: {error}"
        except Exception as error:
            _native = f"the compiled operators cannot be loaded: {type(error).__name__}: {error}"
    if _native is None:
        return _NOT_BUILT
    return _native if isinstance(_native, str) else ""


def _load_native(build: bool) -> ModuleType | str:
    """The native backend, or why not. Compiles it only if ``build``."""
    if isinstance(_native, ModuleType):
        return _native
    reason = _seek_native(build)
    if reason:
        return reason
    assert isinstance(_native, ModuleType)
    return _native


def build_native() -> ModuleType:
    """Compile the native backend unless that has been done; a failure of an earlier attempt is forgotten.

    Raises:
        RuntimeError: it cannot be built; the message says what is missing.
    """
    global _native
    if isinstance(_native, str):
        _native = None
    module = _load_native(build=True)
    if isinstance(module, str):
        raise RuntimeError(f"the native backend is not available: {module}")
    return module


def empty_cache() -> int:
    """Free the CPU memory that the native backend keeps for its next large outputs; the number of bytes it was."""
    return int(_native.extension.empty_cache()) if isinstance(_native, ModuleType) else 0


def _unavailable(backend: str) -> str | None:
    if backend == "torch":
        return None
    if backend == "triton":
        module = _load_triton()
        return module if isinstance(module, str) else module.unavailable()
    module = _load_native(build=False)
    return module if isinstance(module, str) else None


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it can be used in this process, otherwise the reason why not."""
    return {backend: _unavailable(backend) for backend in NAMES}


def check_name(backend: Any, argument: str = "backend") -> str:
    """Return ``backend`` if it is a name that exists, "auto" included.

    Raises:
        TypeError: ``backend`` is not a string.
        ValueError: no such backend; the message lists those that exist and why any of them is unavailable.
    """
    if not isinstance(backend, str):
        raise TypeError(f"{argument} must be a string, got {type(backend).__name__}")
    if backend != "auto" and backend not in NAMES:
        states = "; ".join(f"{n!r} ({w or 'available'})" for n, w in available_backends().items())
        raise ValueError(f"{argument} {backend!r} does not exist; choose 'auto' or one of {states}")
    return backend


def set_default_backend(name: str) -> None:
    """Change what ``backend="auto"`` means: a backend's name, or "auto" for the fastest one available.

    Takes precedence over the environment variable ``SMART_FAST_BACKEND``.

    Raises:
        TypeError, ValueError: ``name`` is not the name of a backend.
    """
    global _default, _from_environment
    _default = check_name(name, "name")
    _from_environment = None


def default_backend() -> str:
    """What "auto" means now: "auto" itself, or the name that was set."""
    global _default, _from_environment
    if _from_environment is not None:
        _default = check_name(_from_environment, "environment variable SMART_FAST_BACKEND:")
        _from_environment = None
    return _default


class calling(contextlib.AbstractContextManager[None]):
    """Within, losses that name no backend use this one: that of the `SMARTLoss` that calls them.

    ``ascent``: it will ask for gradients to the perturbed embedding only.
    """

    __slots__ = ("_before", "_within")

    def __init__(self, backend: str, ascent: bool = False) -> None:
        self._within = backend, ascent

    def __enter__(self) -> None:
        self._before = _caller.state
        _caller.state = self._within

    def __exit__(self, *error: object) -> None:
        _caller.state = self._before


def backend_of_caller() -> str:
    """The backend of the `SMARTLoss` that is calling on this thread, else "auto"."""
    return _caller.state[0] or "auto"


def ascending() -> bool:
    """Whether a `SMARTLoss` is calling on this thread that wants no gradients to the parameters of its loss."""
    return _caller.state[1]


def select(backend: str, *tensors: Tensor, numbers: tuple[Any, ...] = ()) -> Any:
    """The module of the fused backend that serves ``tensors`` when ``backend`` is asked for, or None for PyTorch.

    ``numbers`` are the hyper-parameters of the call. float64 and other dtypes without a kernel are PyTorch's silently.
    """
    if backend == "auto":
        backend = default_backend()
    if backend == "torch":
        return None
    for tensor in tensors:  # plain loops: on small tensors a call costs as much as its kernels
        if tensor.dtype not in FUSED_DTYPES or tensor.dim() == 0:
            return None
    for number in numbers:
        if not isinstance(number, Tensor):
            continue
        if backend != "auto":
            _warn_once(
                f"backend {backend!r} falls back to PyTorch: kernels take plain numbers, not tensors, as settings"
            )
        return None
    device = tensors[0].device
    if backend == "auto":
        for name in candidates(tensors[0]):
            module = _load_native(build=False) if name == "native" else _load_triton()
            if not isinstance(module, str) and module.cannot_serve(device) is None:
                return module
        return None
    module = _load_triton() if backend == "triton" else _load_native(build=True)
    reason = module if isinstance(module, str) else module.cannot_serve(device)
    if reason is None:
        return module
    _warn_once(f"backend {backend!r} falls back to PyTorch: {reason}")
    return None


def plain_divergence(backend: str) -> Callable[..., Tensor | None] | None:
    """The short way to a divergence in eager mode (`native.plain_divergence`), if ``backend`` has one."""
    if backend == "auto":
        backend = default_backend()
    if backend == "torch" or backend == "triton" or not isinstance(_native, ModuleType):
        return None
    return None if torch.compiler.is_compiling() else _native.plain_divergence


def short_way_to_gradients() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """`torch.autograd.graph.get_gradient_edge` and `torch.autograd.grad` without what Python adds, if C++ is there."""
    return (_native.extension.edge, _native.extension.gradients) if isinstance(_native, ModuleType) else None


_said: dict[Any, Any] = {}


def _warn_once(message: str) -> None:
    """Warn once per message, and anew whenever the warning filters have changed (as Python's own registries do)."""
    if torch.compiler.is_compiling():
        return
    warnings.warn_explicit(message, BackendFallbackWarning, __file__, 1, __name__, _said)
    _said[(message, BackendFallbackWarning, 1)] = True
