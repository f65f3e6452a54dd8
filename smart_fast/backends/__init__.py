"""The backends: one typed contract (base.py), an object each, and the registry that finds them by name."""

from .registry import (
    NAMES,
    BackendFallbackWarning,
    ascending,
    available_backends,
    backend_of_caller,
    build_native,
    calling,
    check_name,
    default_backend,
    empty_cache,
    loaded,
    plain_divergence,
    select,
    set_default_backend,
    short_way_to_gradients,
)

__all__ = [
    "NAMES",
    "BackendFallbackWarning",
    "ascending",
    "available_backends",
    "backend_of_caller",
    "build_native",
    "calling",
    "check_name",
    "default_backend",
    "empty_cache",
    "loaded",
    "plain_divergence",
    "select",
    "set_default_backend",
    "short_way_to_gradients",
]
