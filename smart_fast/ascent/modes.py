"""How ``eval_fn`` runs in the perturbed passes: its modes, its parameters, its precision."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_iter

from ..noise import remember_generators
from ..training import ddp_fsdp


@contextlib.contextmanager
def setting(objects: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Within, the attribute ``name`` of each of ``objects`` is ``value``."""
    before = [getattr(each, name) for each in objects]
    try:
        for each in objects:
            setattr(each, name, value)
        yield
    finally:
        for each, old in zip(objects, before, strict=True):
            setattr(each, name, old)


@contextlib.contextmanager
def in_ascent(eval_fn: Any, frozen: bool, dropout: bool) -> Iterator[None]:
    """Within, parameters of ``eval_fn`` do not require grad if ``frozen``; without ``dropout`` there is none."""
    with (
        setting(parameters(eval_fn) if frozen else (), "requires_grad", False),
        setting(() if dropout else training_modules(eval_fn), "training", False),
    ):
        yield


def parameters(eval_fn: nn.Module) -> list[nn.Parameter]:
    """Those that require grad now."""
    return [each for each in eval_fn.parameters() if each.requires_grad]


def training_modules(eval_fn: nn.Module) -> list[nn.Module]:
    """Submodules in training mode whose statistics do not depend on that mode: all but BatchNorm and its like.

    Not the dropout modules alone, since attention layers call `torch.nn.functional.dropout` by their own mode.
    """
    return [each for each in eval_fn.modules() if each.training and not isinstance(each, _NormBase)]


def training_batch_norms(eval_fn: Any) -> list[nn.Module]:
    """BatchNorm modules that would update running statistics (they do not where ``track_running_stats`` is False)."""
    return [
        each
        for each in eval_fn.modules()
        if isinstance(each, _BatchNorm) and each.training and each.track_running_stats
    ]


def frozen_batch_norm(eval_fn: Any) -> contextlib.AbstractContextManager[None]:
    """Within, BatchNorm in ``eval_fn`` normalizes as ever and leaves its running statistics alone."""
    return setting(training_batch_norms(eval_fn), "track_running_stats", False)


def prepare(eval_fn: Any, shared_dropout: bool) -> bool:
    """Remember the calls of ``eval_fn`` from here on, if they are to be replayed. Whether it holds a DDP of a static
    graph, or something else whose ascent a compiler must not trace."""
    if shared_dropout:
        ReplayedDropout.of(eval_fn)
    return ddp_fsdp.is_wrapped(eval_fn)


def runner(eval_fn: Any, args: Any, kwargs: Any, shared_dropout: bool) -> Callable[..., Any]:
    """``eval_fn`` of embeddings alone, the other arguments bound; with the dropout of its last call if shared."""
    run = ReplayedDropout.of(eval_fn).replay if shared_dropout else eval_fn
    return functools.partial(_with_arguments, run, args, kwargs) if args or kwargs else run


def _with_arguments(run: Callable[..., Any], args: Any, kwargs: Any, *embeds: Any) -> Any:
    return run(*embeds, *args, **kwargs)


class ReplayedDropout:
    """Remembers where torch's generators were when a module was last called, and calls it again from there.

    A forward pre-hook of the module, found again among its hooks: it is copied and pickled with the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._rewind: Callable[[], None] | None = None
        self._replaying = False

    @classmethod
    def of(cls, module: Any) -> ReplayedDropout:
        """The one of ``module``, made if need be."""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, cls):
                return hook
        made = cls(module)
        module.register_forward_pre_hook(made, prepend=True)
        return made

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not self._replaying:
            self._rewind = remember_generators(_device_of(args))

    def replay(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the random numbers of its last call. The generators then are where they were before.

        Raises:
            RuntimeError: there was no call; or inside torch.compile.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("shared_dropout does not work inside torch.compile: compile eval_fn instead")
        if self._rewind is None:
            raise RuntimeError(
                "shared_dropout=True: eval_fn has not been called since SMARTLoss was made, so there are no dropout"
                " masks to share; compute state by calling eval_fn itself"
            )
        back = remember_generators(_device_of(args))
        self._rewind()
        self._replaying = True
        try:
            return self._module(*args, **kwargs)
        finally:
            self._replaying = False
            back()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rewind": None}


def _device_of(args: Any) -> torch.device:
    for each in tree_iter(args):
        if isinstance(each, torch.Tensor):
            return each.device
    return torch.device("cpu")


def is_compiled(eval_fn: Any) -> bool:
    """Whether ``eval_fn`` is ``torch.compile(module)``, or a module whose ``compile()`` was called."""
    if not isinstance(eval_fn, nn.Module):
        return False
    if eval_fn._compiled_call_impl is not None:
        return True
    # Importing it takes a second; who asks for it is one by that name.
    dynamo = sys.modules.get("torch._dynamo.eval_frame") if "_orig_mod" in eval_fn._modules else None
    return dynamo is not None and isinstance(eval_fn, dynamo.OptimizedModule)


def in_autocast(function: Callable[..., Any], dtype: torch.dtype | None, device: str) -> Callable[..., Any]:
    """``function`` under autocast in ``dtype`` (None: as it is around), with a cache of weights of its own.

    The cache knows neither dtypes nor that the ascent uses up its graph, which to the compiler includes the weights.
    """
    if dtype is None:
        if not (torch.compiler.is_compiling() and torch.is_autocast_enabled(device)):
            return function
        dtype = torch.get_autocast_dtype(device)

    def cast(*args: Any) -> Any:
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            return function(*args)

    return cast
