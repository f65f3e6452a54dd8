"""What ``eval_fn`` returns: one tensor, or a list, tuple or dict of them, compared by one or several losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_leaves, tree_map

from ..checks import check_tensor

Loss = Callable[..., Any]


def detach(state: Any) -> Any:
    """``state`` with every tensor detached, in the same kinds of containers."""
    if type(state) is Tensor:  # the usual case, and the fastest
        return state.detach()
    return _detach(state) if hasattr(state, "detach") else tree_map(_detach, state)


def _detach(value: Any) -> Any:
    if hasattr(value, "detach"):
        return value.detach()
    if value is None:
        return None
    if isinstance(value, Mapping):  # of a kind that torch does not know
        return {key: detach(each) for key, each in value.items()}
    raise TypeError(f"state must be a tensor, or a list, tuple or dict of tensors, got {type(value).__name__}")


def tensors(state: Any) -> list[Tensor]:
    """The tensors that ``state`` is made of.

    Raises:
        TypeError: it is made of something else.
    """
    found = list(state.values()) if isinstance(state, Mapping) else tree_leaves(state)
    for each in found:
        if not isinstance(each, Tensor):
            raise TypeError(f"state must be a tensor, or a list, tuple or dict of tensors, got {type(each).__name__}")
    return found


def check_losses(name: str, loss_fn: Any) -> None:
    """Check that ``loss_fn`` is a callable or a non-empty list, tuple or dict of callables."""
    losses = _items(loss_fn)
    if losses is None:
        if not callable(loss_fn):
            raise TypeError(
                f"{name} must be callable, or a list, tuple or dict of callables, got {type(loss_fn).__name__}"
            )
        return
    if not losses:
        raise ValueError(f"{name} must hold at least one loss, got an empty {type(loss_fn).__name__}")
    for key, loss in losses.items():
        if not callable(loss):
            raise TypeError(f"{name}[{key!r}] must be callable, got {type(loss).__name__}")


def check_match(name: str, loss_fn: Any, state: Any) -> None:
    """Check that several losses stand for the states one to one."""
    if type(loss_fn) is FunctionType:
        return
    losses, items = _items(loss_fn), _items(state)
    if losses is not None and (items is None or losses.keys() != items.keys()):
        raise ValueError(f"{name} must match the states one to one, got {_describe(loss_fn)} for {_describe(state)}")


def check_matches(loss_fn: Any, loss_last_fn: Any, state: Any) -> None:
    """`check_match` of the loss of the ascent (None if there is none) and of the one that is returned."""
    if type(loss_fn) is FunctionType and type(loss_last_fn) is FunctionType:
        return
    if loss_fn is not None:
        check_match("loss_fn", loss_fn, state)
    check_match("loss_last_fn", loss_last_fn, state)


def compare(name: str, loss_fn: Any, perturbed: Any, state: Any) -> Any:
    """``loss_fn`` of the two states, or the sum over states of one loss each.

    Raises:
        ValueError: the states, or the losses and the states, differ in structure.
    """
    if type(loss_fn) is FunctionType and isinstance(perturbed, Tensor) and isinstance(state, Tensor):
        return loss_fn(perturbed, state)  # the usual case, without further ado
    left, right = _items(perturbed), _items(state)
    if (left is None) != (right is None) or (left is not None and right is not None and left.keys() != right.keys()):
        mismatch = ValueError(
            f"eval_fn must return the structure of state, got {_describe(perturbed)} from eval_fn"
            f" and {_describe(state)} as state"
        )
        if right is not None or _items(loss_fn) is not None:
            raise mismatch
        try:  # smart-pytorch leaves it to the loss, which may well pick what it compares
            return loss_fn(perturbed, state)
        except (TypeError, AttributeError) as error:
            raise mismatch from error
    check_match(name, loss_fn, state)
    losses = _items(loss_fn)
    if losses is None or left is None or right is None:
        return loss_fn(perturbed, state)
    terms = [loss(left[key], right[key]) for key, loss in losses.items()]
    return sum(terms[1:], start=terms[0])


def nothing(embeds: tuple[Tensor, ...], state: Any, parameters: Iterable[Tensor]) -> Tensor:
    """The loss of an empty batch: zero, with zero gradients, even where means over nothing are NaN in ``state``."""
    found = [t for t in tree_iter((embeds, state, list(parameters))) if isinstance(t, Tensor)]
    empty = [t.flatten()[:0].sum().to(embeds[0]) for t in found if t.is_floating_point()]
    return sum(empty, start=embeds[0].new_zeros(()))


def no_graph(embed: Any) -> Tensor:
    """Zero in the dtype and on the device of ``embed``: of a call that is skipped. A sum with it may go backward."""
    first = check_tensor("embed", embed[0] if isinstance(embed, (tuple, list)) and embed else embed)
    return torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=torch.is_grad_enabled())


def _items(value: Any) -> dict[Any, Any] | None:
    """A container by key or position; None for anything else, a single callable or tensor."""
    if isinstance(value, (Tensor, FunctionType)):  # the usual case, and isinstance of a Mapping is slow
        return None
    if isinstance(value, (Mapping, nn.ModuleDict)):
        return dict(value.items())
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return dict(enumerate(value))
    return None


def _describe(value: Any) -> str:
    items = _items(value)
    if items is None:
        return f"one {type(value).__name__}"
    if isinstance(value, (Mapping, nn.ModuleDict)):
        return f"a dict with keys {list(items)}"
    return f"a {type(value).__name__} of {len(items)}"
