"""What keeps the ascent apart from data parallelism: DistributedDataParallel and FSDP2 (`fully_shard`).

The ascent wants gradients of its input only. DDP and FSDP2 take every backward pass for one that makes gradients of
parameters: a DDP with ``static_graph=True`` takes its only chance to learn the graph in the ascent, and reduces nothing
in the first step; FSDP2 shards the parameters of modules whose forward pass is still under way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["ascent", "check_loss", "eagerly", "in_use", "is_sharded", "is_wrapped", "modules", "recomputation"]

_AVAILABLE = dist.is_available()  # whether torch was built with it
_CALLABLES = (nn.Module, FunctionType, MethodType, functools.partial)


def ascent(eval_fn: Callable[..., Any]) -> contextlib.AbstractContextManager[Any]:
    """Around forward and backward passes of ``eval_fn`` that make no gradients of parameters."""
    if torch.compiler.is_compiling() or not in_use():
        return contextlib.nullcontext()
    ddp, sharded = _wrappers(eval_fn)
    stack = contextlib.ExitStack()
    for module in ddp:
        stack.enter_context(_without_reducer(module))
    if sharded:
        stack.enter_context(_without_gradient_sync(sharded))
    return stack


def recomputation(eval_fn: Callable[..., Any]) -> contextlib.AbstractContextManager[Any]:
    """Around a forward pass that a checkpoint repeats: DDP has prepared for this backward pass before."""
    stack = contextlib.ExitStack()
    if in_use():
        for module in _wrappers(eval_fn)[0]:
            stack.enter_context(_without_reducer(module))
    return stack


def is_wrapped(eval_fn: Callable[..., Any]) -> bool:
    """Whether `ascent` has anything to do; a compiler must then leave the ascent to `eagerly`."""
    global _uncompiled
    wrapped = in_use() and any(_wrappers(eval_fn))
    if wrapped and _uncompiled is None:  # not before, since it imports the compiler, as DDP and FSDP2 do
        _uncompiled = torch.compiler.disable(
            lambda function, *args: function(*args),
            reason="SMARTLoss of a DistributedDataParallel or FSDP2 module: compile the module, not the loss",
        )
    return wrapped


def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, not to be compiled, nor anything that it calls. For losses that are `is_wrapped`."""
    return _uncompiled(function, *args)


_uncompiled: Any = None


_NOT_FOUND = (
    "eval_fn calls a DistributedDataParallel with static_graph=True that SMARTLoss cannot find, and which would not"
    " reduce gradients after the ascent: give SMARTLoss the DistributedDataParallel itself or a function that holds it,"
    " or pass its .module, or call SMARTLoss inside the wrapped module's forward"
)


def check_loss(loss: Any, message: str = _NOT_FOUND) -> None:
    """Check that no DDP with a static graph that `ascent` did not find takes part in the ``loss`` of an ascent.

    Raises:
        RuntimeError: one does, and would leave the gradients of each process as they are.
    """
    if torch.compiler.is_compiling() or not (in_use() and isinstance(loss, torch.Tensor)):
        return
    # Only the nodes next to the loss: what a DDP returns is what is compared, or nearly so.
    nodes = [loss.grad_fn]
    for node in nodes:
        if type(node).__name__ == "_DDPSinkBackward" and node.ddp_weakref().static_graph:  # type: ignore[union-attr]
            raise RuntimeError(message)
        if node is not None and len(nodes) < 100:
            nodes += [each for each, _ in node.next_functions if each is not None]


def in_use() -> bool:
    """Whether this is one of several processes that work together."""
    return _AVAILABLE and dist.is_initialized()


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards the parameters of ``module`` or of a part of it."""
    return in_use() and bool(_wrappers(module)[1])


def _wrappers(eval_fn: Callable[..., Any]) -> tuple[list[Any], list[Any]]:
    """The modules of DDP and those of FSDP2 that ``eval_fn`` may call."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    found = list(modules(eval_fn))
    return (
        [each for each in found if isinstance(each, DistributedDataParallel)],
        [each for each in found if isinstance(each, FSDPModule)],
    )


@contextlib.contextmanager
def _without_reducer(ddp: Any) -> Iterator[None]:
    """Calls of ``ddp`` are calls of ``ddp.module``, on the device that DDP would move their arguments to."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if ddp.device_ids:
            (args, *_), (kwargs, *_) = ddp.to_kwargs(args, kwargs, ddp.device_ids[0])
        return ddp.module(*args, **kwargs)

    ddp.__dict__["forward"] = forward  # not an attribute of the module: that would be registered, and saved
    try:
        yield
    finally:
        ddp.__dict__.pop("forward", None)


@contextlib.contextmanager
def _without_gradient_sync(modules: list[Any]) -> Iterator[None]:
    """Backward passes reduce nothing, and modules in the middle of a forward pass stay there, with whole parameters.

    The end of a backward pass resets all modules under one root, called or not, so all of them are taken care of.
    FSDP2 has setters for some of this and getters for none, hence its private names (torch 2.11 to 2.13).
    """
    own = [module._get_fsdp_state() for module in modules]
    states = {id(state): state for each in own for state in (each, *each._state_ctx.all_states)}.values()
    with contextlib.ExitStack() as stack:
        for context in {id(state._state_ctx): state._state_ctx for state in states}.values():
            # The order of prefetches, which the last backward pass forgets, is that of the clean pass too.
            stack.enter_context(_temporarily(context, is_last_backward=False))
            stack.enter_context(_temporarily(context, "iter_forward_root"))
        for state in states:
            stack.enter_context(_temporarily(state, "_training_state"))
            for group in _groups(state):
                under_way = group._training_state.name == "FORWARD"
                stack.enter_context(_temporarily(group, "_training_state", reduce_grads=False, all_reduce_grads=False))
                if under_way:
                    stack.enter_context(_temporarily(group, reshard_after_backward=False))
        yield


def _groups(state: Any) -> list[Any]:
    """The parameters of a module: one group until torch 2.11, any number after."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


@contextlib.contextmanager
def _temporarily(owner: Any, *names: str, **values: Any) -> Iterator[None]:
    """Set attributes to ``values``, and set these and ``names`` back in the end."""
    before = {name: getattr(owner, name) for name in (*names, *values)}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def modules(eval_fn: Any) -> Iterator[nn.Module]:
    """The modules that ``eval_fn`` may call, each once.

    Its own if it is one; else those in its arguments, closures and globals, in functions of the same file that it
    names, and in the attributes of objects that these hold.
    """
    seen: set[int] = set()
    found: set[nn.Module] = set()
    waiting = [eval_fn]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type):
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            yield from (module for _, module in each.named_modules(memo=found))
        elif isinstance(each, FunctionType):
            waiting += _held_by(each)
        elif isinstance(each, MethodType):
            waiting += each.__self__, each.__func__
        elif isinstance(each, functools.partial):
            waiting += each.func, *each.args, *each.keywords.values()
        elif hasattr(each, "__dict__"):  # a trainer, say: what it can call, not all that it can reach
            waiting += [value for value in vars(each).values() if isinstance(value, _CALLABLES)]


def _held_by(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable without a value yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        foreign = isinstance(value, FunctionType) and value.__globals__ is not function.__globals__
        if not foreign and not isinstance(value, ModuleType):
            yield value
    if hasattr(function, "__wrapped__"):
        yield function.__wrapped__


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
