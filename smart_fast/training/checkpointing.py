"""Activation checkpointing of the clean pass: one graph at a time, where SMART otherwise holds two."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from ..ascent import modes
from ..checks import check_callable
from . import ddp_fsdp

__all__ = ["checkpointed"]


def checkpointed(eval_fn: Callable[..., Any]) -> Callable[..., Any]:
    """``eval_fn`` without a graph that waits for the backward pass: there, it runs once more.

    For the clean pass of a training step with `SMARTLoss`::

        state = checkpointed(eval_fn)(embed)
        loss = task_loss(state) + weight * smart(embed, state)  # smart = SMARTLoss(eval_fn, ...)
        loss.backward()

    The backward pass takes the perturbed branch first, since it was computed last, and frees it on the way; only then
    is the clean pass recomputed. So the step never holds two graphs, for one more forward pass (9 F instead of 8 F with
    one ascent step, where plain fine-tuning costs 3 F). For that, the sum must go backward at once: a backward pass for
    each term recomputes the clean pass each time, and with ``retain_graph=True`` the perturbed branch stays.

    Results and gradients are those of ``eval_fn``: dropout draws the same masks, autocast is that of the forward pass,
    BatchNorm counts its batch once, a `DistributedDataParallel` in ``eval_fn`` is not called a second time.
    `torch.utils.checkpoint` (not reentrant) does the work; as ever with it, ``eval_fn`` must compute the same again,
    from arguments that nobody has modified.

    It may be the ``eval_fn`` of `SMARTLoss` as well, but has little to save there: the graph of an ascent step is used
    up at once, and that of the last pass comes first in the backward pass. Each pass costs a forward pass more.

    Args:
        eval_fn: a `Module` or another callable of any arguments. It may return any structure of tensors.

    Returns:
        For a `Module`, a `Module` with the same parameters, whose ``state_dict()`` has the same keys, alone or within
        other modules (names of ``named_parameters()`` begin with ``eval_fn.``), and which has its attributes to read.
        For other callables, a callable.

    Raises:
        TypeError: ``eval_fn`` is not callable.
    """
    check_callable("eval_fn", eval_fn)
    return _Checkpointed(eval_fn) if isinstance(eval_fn, nn.Module) else functools.partial(_run, eval_fn)


class _Checkpointed(nn.Module):
    def __init__(self, eval_fn: nn.Module) -> None:
        super().__init__()
        self.eval_fn = eval_fn
        self.training = eval_fn.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self.eval_fn, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "eval_fn":  # not there yet: a copy is being made
                raise
            return getattr(self.eval_fn, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.eval_fn.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}eval_fn.{key[len(prefix) :]}"] = state_dict.pop(key)


def _run(eval_fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # what a compiler recomputes has no side effects
        return checkpoint(_call, kwargs, eval_fn, *args, use_reentrant=False)

    def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return contextlib.nullcontext(), _Recomputation(eval_fn)

    return checkpoint(_call, kwargs, eval_fn, *args, use_reentrant=False, context_fn=contexts)


def _call(kwargs: dict[str, Any], eval_fn: Callable[..., Any], *args: Any) -> Any:
    """Keyword arguments as an argument: elsewhere `checkpoint` does not look for the device whose generator to keep."""
    return eval_fn(*args, **kwargs)


class _Recomputation:
    """A context, to be entered any number of times, in which ``eval_fn`` does what it did when this was made.

    BatchNorm and its like have counted this batch, and DDP has prepared for this backward pass.
    """

    def __init__(self, eval_fn: Callable[..., Any]) -> None:
        norms = [each for each in ddp_fsdp.modules(eval_fn) if isinstance(each, _NormBase) and each.training]
        self._eval_fn, self._norms = eval_fn, norms
        self._frozen = [each for each in norms if not each.track_running_stats]

    def __enter__(self) -> None:
        statistics = [buffer for each in self._norms for buffer in each.buffers(recurse=False)]
        with contextlib.ExitStack() as stack:
            stack.callback(_restore, statistics, [each.clone() for each in statistics])
            stack.enter_context(modes.setting(self._frozen, "track_running_stats", False))
            stack.enter_context(ddp_fsdp.recomputation(self._eval_fn))
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


@torch.no_grad()
def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
