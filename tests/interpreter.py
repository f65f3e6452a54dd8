"""Triton's interpreter, without what it does again at every call of a device function."""

from __future__ import annotations

import inspect
from typing import Any


def quicken() -> None:
    """A device function's call looks through all of `triton.language` for builtins to replace, which its kernel's
    launch has replaced: more than a third of the time of our tests. What they are is found once, and whether they are
    replaced is seen by the first of them. Nothing happens where Triton has it otherwise."""
    from triton.runtime import interpreter

    if getattr(interpreter, "_patch_builtin", None) is None or hasattr(interpreter._patch_builtin, "names"):
        return
    patch, is_builtin = interpreter._patch_attr, interpreter.tl.core.is_builtin
    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        known = names[package]
        if known and is_builtin(getattr(package, known[0])):
            for name in known:
                patch(package, name, getattr(package, name), builder, *scope)

    patch_builtin.names = names  # type: ignore[attr-defined]
    interpreter._patch_builtin = patch_builtin
