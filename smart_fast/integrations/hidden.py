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

__all__ = ["Body", "BodyCall", "Hidden"]

_SAMPLE = 256  # rows that are projected where somebody wants logits
_NAMES = {loss: name for name, loss in LOSSES.items()}


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


class Body:
    """Watches the body of a language model, ``base_model`` of transformers. A hook that stays, as those of `Tap` do."""

    def __init__(self, model: nn.Module) -> None:
        inner: Any = getattr(model, "get_base_model", lambda: model)()  # in PEFT's wrappers
        body = getattr(inner, "base_model", None)
        self.head: Any = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        self._calls: list[BodyCall] | None = None
        self._handle = None
        if isinstance(body, nn.Module) and body is not inner and isinstance(self.head, nn.Module):
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
    """The `Comparison` of hidden states by the linear divergences: those of the logits, which are never whole.

    Raises:
        ValueError: a model whose logits are not the hidden states times the head's weight and a number.
    """

    def __init__(self, items: Items, model: Any, head: Any, call: BodyCall) -> None:
        config = call.body.config.get_text_config()
        if getattr(config, "final_logit_softcapping", None) is not None:
            raise ValueError("SMART without whole logits does not know the softcap of this model's logits")
        scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        self._factor = scale if scale is not None else 1.0 if divisor is None else 1.0 / divisor
        self.items, self._model, self._head, self._call = items, model, head, call
        self.clean = self._scaled(call.states)

    def again(self) -> Tensor:
        if hasattr(self._model, "unshard"):  # FSDP2, whose module gathers its own parameters when it is called itself
            self._model.unshard()
        return self._scaled(self._call.body(*self._call.args, **self._call.kwargs).last_hidden_state)

    def loss(self, divergence: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        weight, bias = self._head.weight, getattr(self._head, "bias", None)
        return LinearDivergence(weight, bias, kind=_NAMES[divergence], reduction="sum", mask=self.items.rows)

    def sample(self, state: Tensor) -> Tensor:
        rows = state.flatten(0, -2) if self.items.rows is None else state[self.items.rows]
        logits: Tensor = self._head(rows[:_SAMPLE])
        return logits

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(**self._call.autocast)

    def _scaled(self, states: Tensor) -> Tensor:
        return states if self._factor == 1.0 else states * self._factor
