"""Gradients of parameters from the ascent's own passes ("free" adversarial training).

Zhu et al., "FreeLB", ICLR 2020, Algorithm 1: a step of the ascent has gone backward through the model anyway, so that
the gradients of parameters at its point come at no further pass. The mean over all points is the gradient that an
optimizer gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .. import autograd
from ..training import ddp_fsdp
from . import modes
from .base import Passes


class Accumulated:
    """The gradient at the perturbed embeddings; of everything else that requires grad, ``share`` of it is added to
    ``.grad``.

    No hook of a parameter runs, so that DistributedDataParallel reduces nothing before the pass that the caller makes:
    what has accumulated is part of what it reduces then. What belongs to the embeddings waits for that pass, too: see
    `owe`. ``dtype``: that of autocast, or None.
    """

    def __init__(self, loss_of: Callable[..., Any], dtype: torch.dtype | None, share: float) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("accumulate=True does not work inside torch.compile: compile what loss_of calls instead")
        if not torch.is_grad_enabled():
            raise RuntimeError("accumulate=True makes gradients of parameters, but gradients are disabled here")
        if ddp_fsdp.is_sharded(loss_of):  # type: ignore[arg-type]
            raise RuntimeError("accumulate=True does not work with FSDP2, whose parameters' gradients live elsewhere")
        self.loss_of, self.dtype, self.share = loss_of, dtype, share
        self.owed: list[Tensor] | None = None

    def gradients(self, passes: Passes, perturbed: Sequence[Tensor]) -> list[Tensor]:
        """One pass forward, one backward."""
        inputs = [autograd.track(each.detach()) for each in perturbed]
        edges: list[Any] = [get_gradient_edge(each) for each in inputs]
        with ddp_fsdp.ascent(self.loss_of):
            loss = modes.in_autocast(passes.run, self.dtype, inputs[0].device.type)(*inputs)
            leaves = _leaves(loss)
            found = torch.autograd.grad(loss, [*edges, *leaves], allow_unused=True)
        grads = found[: len(edges)]
        with torch.no_grad():
            for leaf, grad in zip(leaves, found[len(edges) :], strict=True):
                if grad is None:
                    continue
                if leaf.grad is None:
                    leaf.grad = grad * self.share
                else:  # in place, as autograd does: it may be a part of something
                    leaf.grad.add_(grad, alpha=self.share)
        for grad in grads:
            if grad is None:
                raise RuntimeError("loss_of does not depend on what it is given")
        shares = [grad * self.share for grad in grads]
        self.owed = shares if self.owed is None else [a + b for a, b in zip(self.owed, shares, strict=True)]
        return list(grads)

    def owe(self, perturbed: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """``perturbed``, through which a backward pass adds what the steps before owe the embeddings: their graph, and
        what DDP does at its end, runs once."""
        if self.owed is None:
            return list(perturbed)
        owing = zip(perturbed, self.owed, masks, strict=True)
        return [autograd.owe(each, owed, mask) if each.requires_grad else each for each, owed, mask in owing]


def _leaves(loss: Tensor) -> list[Tensor]:
    """Tensors that a backward pass from ``loss`` would leave a gradient at."""
    found: list[Tensor] = []
    seen: set[Node] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.append(node.variable)  # type: ignore[attr-defined]
        waiting += [each for each, _ in node.next_functions]
    return found
