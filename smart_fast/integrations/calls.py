"""Calls of a model: watched while a trainer makes them, and made again without labels."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from .tap import is_encoder_decoder

__all__ = ["Call", "Watch"]


class Call:
    """One call of a model, and what it gave.

    Args:
        model: what is called when the call is repeated.
        args, kwargs: what the model was called with.
        outputs: what it returned.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        inner: Any = getattr(model, "get_base_model", lambda: model)()  # PEFT's own forward names no arguments
        parameters = list(inspect.signature(inner.forward).parameters)
        self.model, self.outputs = model, outputs
        self.named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        self.args = tuple(
            None if is_label(name) else value
            for name, value in zip([*parameters, *[""] * len(args)], args, strict=False)
        )
        self.kwargs = {name: value for name, value in kwargs.items() if not is_label(name)}
        # Else encoder-decoder models make the decoder's inputs of the labels.
        labels = self.named.get("labels")
        if (
            is_encoder_decoder(model)
            and isinstance(labels, Tensor)
            and labels.dim() == 2
            and "decoder_input_ids" in parameters
            and all(self.named.get(name) is None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        ):
            shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if shifted is None:
                self.kwargs["labels"] = labels
            else:
                self.kwargs["decoder_input_ids"] = shifted(labels=labels.clone())

    def repeat(self) -> Any:
        """The call again, without labels: the loss of the task is not wanted."""
        args, kwargs = tree_map_only(Tensor, _own, (self.args, self.kwargs))
        return self.model(*args, **kwargs)

    @property
    def batch_size(self) -> int:
        """The first dimension of what it gave."""
        return next(each.shape[0] for each in tree_iter(self.outputs) if isinstance(each, Tensor) and each.dim())


def _own(tensor: Tensor) -> Tensor:
    """Ids are copied, since some models (FSMT) shift them in place, under the feet of the clean pass's graph."""
    return tensor if tensor.is_floating_point() else tensor.clone()


def is_label(name: str) -> bool:
    """Whether an argument of that name is for the loss of the task (the rule by which transformers finds labels)."""
    return "label" in name or name in ("start_positions", "end_positions", "num_items_in_batch")


class Watch:
    """The calls of a model within `of` that build a graph."""

    def __init__(self) -> None:
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
            if torch.is_grad_enabled():
                self._calls.append((args, kwargs, outputs))

        handle = model.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def only(self, model: nn.Module, where: str, name: str) -> Call:
        """The one call that there was, to be repeated on ``model``.

        Raises:
            RuntimeError: there was none, or several. ``where`` and ``name`` say where they were looked for.
        """
        if len(self._calls) != 1:
            raise RuntimeError(f"SMART needs one call of {name} in {where}, got {len(self._calls)}")
        return Call(model, *self._calls[0])
