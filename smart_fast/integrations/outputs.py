"""What of a model's outputs SMART compares: which tensor, as which kind of distribution, in which rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .tap import is_encoder_decoder

__all__ = ["Comparison", "Items", "Logits", "Smoothness", "logits_of", "squared_error"]

_IGNORED = -100  # the label that Hugging Face's losses skip


class Smoothness(NamedTuple):
    """A regularizer as a sum, and the number of items (sequences, tokens or targets) that it was taken over."""

    total: Tensor
    items: Tensor

    @property
    def mean(self) -> Tensor:
        """The regularizer per item, on the scale of a mean cross-entropy or squared error."""
        return self.total / self.items.clamp(min=1)


def logits_of(outputs: Any) -> Tensor | None:
    """The logits among a model's outputs, those of question answering stacked, ``[B, 2, S]``; None: there are none."""
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "start_logits"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            # Question answering: two distributions over the positions of a sequence.
            return torch.stack([found, outputs["end_logits"]], dim=1) if name == "start_logits" else found
    return None


@dataclass
class Items:
    """What of logits (or of hidden states before a head) ``[..., V]`` is compared.

    ``kind``: "classes" (softmax over the last dimension), "flags" (a sigmoid each) or "numbers" (regression).
    ``rows``: bool ``[...]``, those that count; None: all.
    """

    kind: str
    rows: Tensor | None
    count: Tensor

    @staticmethod
    def of(
        model: nn.Module, logits: Tensor, labels: Tensor | None, attention_mask: Tensor | None, aligned: Tensor | None
    ) -> Items:
        """Those of ``logits``; ``aligned``: labels that need no shift."""
        kind = _kind(getattr(model, "config", None), logits, labels)
        if kind != "classes":
            return Items(kind, None, torch.full((), logits.numel(), device=logits.device))
        return Items.of_tokens(model, logits, labels, attention_mask, aligned)

    @staticmethod
    def of_tokens(
        model: nn.Module, states: Tensor, labels: Tensor | None, attention_mask: Tensor | None, aligned: Tensor | None
    ) -> Items:
        """Classes, one distribution a row of ``states``."""
        rows, shape = None, states.shape[:-1]
        if aligned is not None and aligned.shape == shape:
            rows = aligned != _IGNORED
        elif labels is not None and labels.shape == shape:
            known = labels != _IGNORED
            rows = nn.functional.pad(known[..., 1:], (0, 1), value=False) if _shifts(model) else known
        elif attention_mask is not None and attention_mask.shape == shape:
            rows = attention_mask.bool()
        count = torch.full((), shape.numel(), device=states.device) if rows is None else rows.sum()
        return Items("classes", rows, count)


class Comparison(Protocol):
    """What a perturbed pass of a model is to be compared with, and how."""

    items: Items
    #: What the clean pass gave.
    clean: Tensor

    def again(self) -> Tensor:
        """What a pass gives now."""
        ...

    def loss(self, divergence: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """A divergence of `smart_fast` as a sum over items: it does not depend on how a batch is cut into pieces."""
        ...

    def sample(self, state: Tensor) -> Tensor:
        """Logits ``[N, V]`` of items of a state, of all or of some."""
        ...

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """That of the clean pass."""
        ...


class Logits:
    """The usual `Comparison`. ``forward`` runs the model, ``outputs`` are those of the clean pass."""

    def __init__(self, items: Items, forward: Callable[[], Any], outputs: Any) -> None:
        self.items, self._forward = items, forward
        self.clean = self.of(outputs)

    def of(self, outputs: Any) -> Tensor:
        """What is compared of a model's outputs."""
        logits = logits_of(outputs)
        if logits is None:
            raise TypeError(f"the model must return logits, or an object with logits, got {type(outputs).__name__}")
        # sigmoid(x) is the softmax of (x, 0).
        return torch.stack([logits, torch.zeros_like(logits)], dim=-1) if self.items.kind == "flags" else logits

    def again(self) -> Tensor:
        return self.of(self._forward())

    def loss(self, divergence: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        if self.items.kind == "numbers":
            return squared_error
        return partial(divergence, reduction="sum", mask=self.items.rows)

    def sample(self, state: Tensor) -> Tensor:
        if self.items.kind == "numbers":
            return state.reshape(-1, 1)
        return state.flatten(0, -2) if self.items.rows is None else state[self.items.rows]

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


def _kind(config: Any, logits: Tensor, labels: Tensor | None) -> str:
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return "flags"
    if problem == "regression" or logits.shape[-1] == 1:  # the softmax of one logit is constant
        return "numbers"
    flags = labels is not None and labels.is_floating_point() and labels.shape == logits.shape
    return "flags" if flags and problem is None else "classes"


def squared_error(perturbed: Tensor, clean: Tensor) -> Tensor:
    """What numbers are compared by: a sum."""
    return (perturbed.float() - clean.float()).square().sum()


def _shifts(model: nn.Module) -> bool:
    """Whether the model's own loss compares logits with the labels one to the right (causal language models).

    Of encoder-decoder models the decoder's inputs are shifted instead.
    """
    if is_encoder_decoder(model):
        return False
    if getattr(model, "loss_type", None) is None:  # unknown to transformers, whose loss_function is then a guess
        return False
    return getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
