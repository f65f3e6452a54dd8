"""Any layer of a model as the place that is perturbed: `at_layer`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .checks import check_callable

__all__ = ["Layer", "at_layer"]


class Layer(NamedTuple):
    """``embed(*args, **kwargs) -> (hidden, state)``: one clean pass of the model, what the layer gave in it, and what
    the model did. ``eval_fn(hidden, *args, **kwargs) -> state``: the model from there on, a `Module`."""

    embed: Callable[..., tuple[Tensor, Any]]
    eval_fn: nn.Module


def at_layer(model: nn.Module, name: str, output: Callable[[Any], Any] | None = None) -> Layer:
    """What `SMARTLoss` and `perturbation` take to perturb the output of a module inside of ``model``:

        embed, eval_fn = at_layer(model, "model.layers.8")
        regularizer = SMARTLoss(eval_fn, kl_loss, sym_kl_loss)
        hidden, logits = embed(**batch)
        loss = regularizer(hidden, logits, **batch)

    What comes before the layer is not computed again: modules whose calls were over when the layer's began are replaced
    by what they gave in the clean pass, with its graph, so that what reaches the rest by other ways (positions, masks,
    residuals around the layer) is what it was. That holds of calls with the very arguments of the last ``embed``; with
    others, and for what is no module's, the model computes all of it again and the layer's output is replaced.

    Args:
        model: any Module; its methods stay what they are between calls.
        name: that of a module in ``model.named_modules()``, called once in a pass, that gives a tensor ``[..., D]``, or
            a tuple or list whose first element is one (the others are what they were).
        output: makes the state of what the model gives; None: its ``logits`` if it has any, else that itself.

    Raises:
        TypeError: ``model`` is no Module, ``output`` not callable; in a call: the layer gives no tensor.
        ValueError: no module has that name; in a call: it is not called, or more than once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    if output is not None:
        check_callable("output", output)
    modules = dict(model.named_modules())
    if not name or name not in modules:
        some = [each for each in modules if each][:20]
        raise ValueError(f"name must be that of a module of model, such as {some}, got {name!r}")
    rest = _Rest(model, name, output or _logits)
    return Layer(rest.record, rest)


def _logits(found: Any) -> Any:
    return getattr(found, "logits", found)


class _Rest(nn.Module):
    """``model`` from the output of one of its modules on."""

    def __init__(self, model: nn.Module, name: str, output: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.output = output
        #: Of the last clean pass: its arguments, the calls that were over before the layer's, and what that gave.
        self.seen: tuple[list[Any], list[tuple[nn.Module, Any]], Any] | None = None

    def record(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """A clean pass, which is remembered until the next one."""
        layer = self.model.get_submodule(self.name)
        over: list[tuple[nn.Module, Any]] = []
        found: list[Any] = []

        def recorded(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*inputs: Any, **named: Any) -> Any:
                started, before = len(over), not found
                result = forward(*inputs, **named)
                if module is layer:
                    found.append(result)
                if before and (module is layer or not found):
                    del over[started:]  # the calls of its parts
                    if module is not layer:
                        over.append((module, result))
                return result

            return run

        with _forwards({each: recorded(each, each.forward) for each in self.model.modules()}):
            state = self.output(self.model(*args, **kwargs))
        if len(found) != 1:
            raise ValueError(f"{self.name!r} must be called once in a pass of the model, it was {len(found)} times")
        self.seen = tree_leaves((args, kwargs)), over, found[0]
        return _first(found[0], self.name), state

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The state for another output of the layer, ``hidden``."""
        layer = self.model.get_submodule(self.name)
        calls: list[None] = []

        def replaced(result: Any) -> Any:
            calls.append(None)
            return _with_first(result, hidden)

        instead: dict[nn.Module, Callable[..., Any]] = {}
        given = tree_leaves((args, kwargs))
        before, over, found = self.seen or ([], [], None)
        if self.seen and len(given) == len(before) and all(a is b for a, b in zip(given, before, strict=True)):
            for module in {each for each, _ in over}:
                results = iter([result for each, result in over if each is module])
                instead[module] = _in_place_of(module.forward, results)
            instead[layer] = lambda *_, **__: replaced(found)
        else:
            forward = layer.forward
            instead[layer] = lambda *inputs, **named: replaced(forward(*inputs, **named))
        with _forwards(instead):
            state = self.output(self.model(*args, **kwargs))
        if len(calls) != 1:
            raise ValueError(f"{self.name!r} must be called once in a pass of the model, it was {len(calls)} times")
        return state


def _in_place_of(forward: Callable[..., Any], results: Iterator[Any]) -> Callable[..., Any]:
    """Gives the results one after the other, then does what ``forward`` does."""

    def run(*inputs: Any, **named: Any) -> Any:
        for result in results:
            return result
        return forward(*inputs, **named)

    return run


@contextlib.contextmanager
def _forwards(instead: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within, modules run these functions, hooks around them as ever. Not as attributes: those are saved with them."""
    before = {each: each.__dict__.get("forward") for each in instead}
    for module, forward in instead.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():  # type: ignore[assignment]
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _first(result: Any, name: str) -> Tensor:
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    if not isinstance(first, Tensor):
        raise TypeError(f"{name!r} must give a tensor, or a tuple that begins with one, got {type(first).__name__}")
    return first


def _with_first(result: Any, hidden: Tensor) -> Any:
    """``result`` with ``hidden`` in the place of its first tensor."""
    if not isinstance(result, (tuple, list)):
        return hidden
    if hasattr(result, "_fields"):  # a named tuple
        return type(result)(hidden, *result[1:])
    return type(result)([hidden, *result[1:]])
