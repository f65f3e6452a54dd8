"""Which backend serves a call: names, availability, the meaning of "auto", and fallbacks that say so."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..training.compiling import when_traced
from .auto import candidates, elements
from .base import FUSED_DTYPES, Backend
from .pytorch import PYTORCH

if TYPE_CHECKING:
    from .native import Native

NAMES = ("torch", "triton", "native")
_NOT_BUILT = "not built yet: `python -m smart_fast build` compiles it once; so does the first use of backend='native'"


class BackendFallbackWarning(UserWarning):
    """A backend that was asked for by name could not serve the tensors at hand; PyTorch did instead."""


@dataclass
class _State:
    """Of this process. ``found``: backends by name, or the reason why there is none; absent until it was looked for."""

    found: dict[str, Backend | str] = field(default_factory=lambda: {"torch": PYTORCH})
    native_sought: bool = False  # whether an extension that was built before has been looked for
    default: str = "auto"
    # Read once: what SMART_FAST_BACKEND says is checked when "auto" is first resolved, not at import.
    environment: str | None = os.environ.get("SMART_FAST_BACKEND", "").strip() or None


state = _State()


class _Caller(threading.local):
    def __init__(self) -> None:  # in every thread; torch.compile cannot guard a default of the class
        #: The backend that losses take, and whether gradients to the perturbed embedding only are wanted.
        self.state: tuple[str | None, bool] = (None, False)


_caller = _Caller()


def _find(name: str, build: bool = False) -> Backend | str:
    """The backend of a name, or why there is none. The native one is compiled only if ``build``."""
    found = state.found.get(name)
    if found is not None and not (build and found == _NOT_BUILT):
        return found
    if name == "triton":
        return _load_triton()
    _seek_native(build)
    return state.found.get(name, _NOT_BUILT)


def _load_triton() -> Backend | str:
    found: Backend | str
    if importlib.util.find_spec("triton") is None:
        found = "triton is not installed (pip install triton; wheels exist for Linux)"
    else:
        try:
            from .triton import TRITON, through

            _seek_native(build=False)
            native = state.found.get("native")
            found = TRITON if native is None or isinstance(native, str) else through(cast("Native", native).extension)
        except Exception as error:
            found = f"triton cannot be imported: {type(error).__name__}: {error}"
    state.found["triton"] = found
    return found


@when_traced  # a compiler that meets the first use is not to trace through file systems
def _seek_native(build: bool) -> None:
    """Look once for what was built earlier; build it if asked to."""
    if state.native_sought and not build:
        return
    from .. import build as native_build

    state.native_sought = True
    try:
        extension = native_build.build() if build else native_build.load()
        if extension is not None:
            from .native import Native

            state.found["native"] = Native(extension)
            state.found.pop("triton", None)  # which goes through the extension where there is one
    except native_build.BuildError as error:
        state.found["native"] = f"it cannot be built: {error}"
    except Exception as error:
        state.found["native"] = f"the compiled operators cannot be loaded: {type(error).__name__}: {error}"


def build_native() -> Native:
    """Compile the native backend unless that has been done; a failure of an earlier attempt is forgotten.

    Raises:
        RuntimeError: it cannot be built; the message says what is missing.
    """
    if isinstance(state.found.get("native"), str):
        del state.found["native"]
    found = _find("native", build=True)
    if isinstance(found, str):
        raise RuntimeError(f"the native backend is not available: {found}")
    return cast("Native", found)


def empty_cache() -> int:
    """Free the CPU memory that the native backend keeps for its next large outputs; the number of bytes it was."""
    return sum(each.empty_cache() for each in state.found.values() if not isinstance(each, str))


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it can be used in this process, otherwise the reason why not."""
    found = {name: _find(name) for name in NAMES}
    return {name: each if isinstance(each, str) else each.unavailable() for name, each in found.items()}


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
    state.default = check_name(name, "name")
    state.environment = None


def default_backend() -> str:
    """What "auto" means now: "auto" itself, or the name that was set."""
    if state.environment is not None:
        state.default = check_name(state.environment, "environment variable SMART_FAST_BACKEND:")
        state.environment = None
    return state.default


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


def select(backend: str, *tensors: Tensor, numbers: tuple[Any, ...] = (), kind: str | None = None) -> Backend:
    """The backend that serves ``tensors`` when ``backend`` is asked for.

    ``numbers`` are the hyper-parameters of the call, ``kind`` its divergence. float64 and other dtypes without a kernel
    are PyTorch's silently.
    """
    if backend == "auto":
        backend = default_backend()
    if backend == "torch":
        return PYTORCH
    for tensor in tensors:  # plain loops: on small tensors a call costs as much as its kernels
        if tensor.dtype not in FUSED_DTYPES or tensor.dim() == 0:
            return PYTORCH
    for number in numbers:
        if not isinstance(number, Tensor):
            continue
        if backend != "auto":
            _warn_once(
                f"backend {backend!r} falls back to PyTorch: kernels take plain numbers, not tensors, as settings"
            )
        return PYTORCH
    device = tensors[0].device
    if backend == "auto":
        for name in candidates(tensors[0]):
            found = _find(name)
            if not isinstance(found, str) and found.cannot_serve(device, kind) is None:
                return found
        return PYTORCH
    found = state.found.get(backend) or _NOT_BUILT
    if isinstance(found, str):
        found = _find(backend, build=True)
    reason = found if isinstance(found, str) else found.cannot_serve(device, kind)
    if reason is None and not isinstance(found, str):
        return found
    _warn_once(f"backend {backend!r} falls back to PyTorch: {reason}")
    return PYTORCH


def loaded(backend: str, input: Tensor, target: Tensor, kind: str) -> Backend | None:
    """The fused backend that `select` would give to two ordinary tensors, found without a word. None: ask `select`."""
    if backend == "auto":
        backend = default_backend()
    if input.dtype not in FUSED_DTYPES or target.dtype not in FUSED_DTYPES or input.dim() == 0:
        return None
    for name in candidates(input) if backend == "auto" else (backend,):
        found = state.found.get(name)
        if found is None:
            return None
        if not isinstance(found, str) and found.cannot_serve(input.device, kind) is None:
            return None if found.loss is not None else found
    return None


def plain_divergence(backend: str) -> Callable[..., Tensor | None] | None:
    """The short way to a divergence in eager mode (`Backend.plain_divergence`), if ``backend`` has one. Of "auto" it is
    the native one's: what that gives to others is none of its business."""
    if backend == "auto":
        backend = default_backend()
    found = state.found.get("native" if backend == "auto" else backend)
    if found is None or isinstance(found, str) or found.plain_divergence is None:
        return None
    if backend == "auto":
        return functools.partial(found.plain_divergence, fewer_than=elements("native", "cuda"))
    return found.plain_divergence


def short_way_to_gradients() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """`torch.autograd.graph.get_gradient_edge` and `torch.autograd.grad` without what Python adds, if C++ is there."""
    found = state.found.get("native")
    return None if found is None or isinstance(found, str) else found.gradient_functions


_said: dict[Any, Any] = {}


def _warn_once(message: str) -> None:
    """Warn once per message, and anew whenever the warning filters have changed (as Python's own registries do)."""
    if torch.compiler.is_compiling():
        return
    warnings.warn_explicit(message, BackendFallbackWarning, __file__, 1, __name__, _said)
    _said[(message, BackendFallbackWarning, 1)] = True
