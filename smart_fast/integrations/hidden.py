"""Language models whose outputs hold no logits (fused heads): their hidden states before the head are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.linear import LinearDivergence
from ..losses.logits import LOSSES
from .outputs import Items

__all__ = ["Body", "BodyCall", "Hidden", "parts"]

_SAMPLE = 256  # rows that are projected where somebody wants logits
_NAMES = {loss: name for name, loss in LOSSES.items()}


def parts(model: nn.Module) -> tuple[Any, Any]:
    """The body of a language model, ``base_model`` of transformers, and its head; None for what there is not."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()  # in PEFT's wrappers
    body = getattr(inner, "base_model", None)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    return body if isinstance(body, nn.Module) and body is not inner else None, head


@dataclass
class BodyCall:
    """A call of the body of a language model: what was given, what it gave, and the precision that it ran in.

    A fused head calls the body within the model's forward pass, where autocast may have begun.
    """

    body: Any
    args: Any
    kwargs: Any
    #: Hidden states ``[B, S, H]``.
    states: Tensor
    autocast: dict[str, Any]

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(**self.autocast)


class Body:
    """Watches the body of a language model. A hook that stays, as those of `Tap` do."""

    def __init__(self, model: nn.Module) -> None:
        body, self.head = parts(model)
        self._calls: list[BodyCall] | None = None
        self._handle = None
        if body is not None and self.head is not None:
            self._handle = body.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if self._calls is None or states is None or not torch.is_grad_enabled():
            return
        device = states.device.type
        autocast = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
        self._calls.append(BodyCall(module, args, kwargs, states, {"device_type": device, **autocast}))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[BodyCall]]:
        """Within, calls of the body that build a graph are appended to the list that it gives."""
        calls: list[BodyCall] = []
        self._calls = calls
        try:
            yield calls
        finally:
            self._calls = None

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()


class Hidden:
    """The `Comparison` of hidden states by the linear divergences: those of the logits, which are never whole."""

    def __init__(self, items: Items, model: Any, head: nn.Module, call: BodyCall) -> None:
        self.items, self.clean, self._model, self._head, self._call = items, call.states, model, head, call
        config = call.body.config.get_text_config()
        self._options: dict[str, Any] = {
            "reduction": "sum",
            "mask": items.rows,
            "logit_scale": _factor_of(config),
            "logit_softcap": getattr(config, "final_logit_softcapping", None),
        }

    def again(self) -> Tensor:
        if hasattr(self._model, "unshard"):  # FSDP2, whose module gathers its own parameters when it is called itself
            self._model.unshard()
        return self._states(self._call.body)

    def _states(self, body: Any) -> Tensor:
        states: Tensor = body(*self._call.args, **self._call.kwargs).last_hidden_state
        return states

    def loss(self, divergence: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return self._divergence(_NAMES[divergence], self._head, self._head)

    def _divergence(self, kind: str, head: Any, other: Any) -> LinearDivergence:
        return LinearDivergence(head, kind=kind, target=other, **self._options)

    def restraint(self, teacher: nn.Module) -> Tensor:
        """KL(teacher || clean) + KL(clean || teacher) of the logits, ``teacher`` being a copy of the model."""
        body, head = parts(teacher)
        with torch.no_grad():
            target = self._states(body)
        there, back = self._divergence("kl", self._head, head), self._divergence("kl", head, self._head)
        loss: Tensor = there(self.clean, target) + back(target, self.clean)
        return loss

    def sample(self, state: Tensor) -> Tensor:
        rows = state.flatten(0, -2) if self.items.rows is None else state[self.items.rows]
        logits: Tensor = self._head(rows[:_SAMPLE])
        return logits

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return self._call.precision()


def _factor_of(config: Any) -> float:
    """What a model multiplies its logits by: the names that transformers' configurations have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            return float(factor)
    factor = getattr(config, "logits_scaling", None)
    if factor is None:
        return 1.0
    return float(factor) if config.model_type == "hyperclovax" else 1.0 / float(factor)
