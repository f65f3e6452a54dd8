"""What torch.compile needs to take a whole `SMARTLoss` into one graph. Little here runs in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def when_traced(function: F) -> F:
    """Dynamo calls ``function`` while it traces, instead of tracing into it.

    What `torch.compiler.assume_constant_result` does, but for importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_anchors: dict[str, Tensor] = {}


def anchor(device: torch.device) -> Tensor:
    """A scalar of ``device`` that requires grad and is an input of the graph: what depends on it requires grad too."""
    key = str(device)
    _make_anchor(key)
    return _anchors[key]


@when_traced
def _make_anchor(key: str) -> None:
    if key not in _anchors:
        # Dynamo traces under a mode that would make it a fake tensor.
        with torch.utils._python_dispatch._disable_current_modes(), torch.inference_mode(False):
            _anchors[key] = torch.zeros((), device=key, requires_grad=True)


def grad(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, into the graph: Dynamo has a setting for that, which holds for this call only."""
    with _trace_autograd():
        return torch.autograd.grad(loss, inputs, allow_unused=True)


def vector_jacobian_product(
    outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of several outputs, whose graph is kept; into the graph where torch.compile traces."""
    if not torch.compiler.is_compiling():
        return torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True)
    with _trace_autograd():
        return torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True)


@when_traced
def _trace_autograd() -> Any:
    from torch._dynamo import config, decorators

    if not hasattr(config, "trace_autograd_ops"):
        raise RuntimeError(
            "this version of torch cannot compile SMARTLoss (torch._dynamo.config.trace_autograd_ops is missing): use"
            " torch 2.11 or newer, or compile eval_fn instead"
        )
    name, patches = "trace_autograd_ops", decorators._allowed_config_patches
    if name not in patches:  # asked when the graph breaks within, and Python takes over
        decorators._allowed_config_patches = (*patches, name)  # type: ignore[assignment]
    return decorators.DynamoConfigPatchProxy(config.patch(name, True))
