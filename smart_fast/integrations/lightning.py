"""SMART in Lightning: `SMARTCallback`. Works with ``lightning`` and with ``pytorch_lightning``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .model import ModelRegularizer, SMARTArguments, logits_of

__all__ = ["SMARTArguments", "SMARTCallback"]


def _callback_class() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name).Callback
    raise ImportError("smart_fast.integrations.lightning needs lightning: pip install 'smart-fast[lightning]'")


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = _callback_class()

_LABELS = ("labels", "shift_labels", "start_positions", "end_positions")


class SMARTCallback(Callback):
    """Adds ``smart_weight`` times the SMART regularizer to the loss that ``training_step`` returns.

        trainer = Trainer(callbacks=[SMARTCallback(smart_weight=1.0)])

    The LightningModule stays as it is. During ``training_step`` the one call of its model is watched; afterwards the
    model runs again on the same arguments, with perturbed embeddings and without ``labels``. Logs ``smart_loss``, the
    regularizer per item. Validation, test and prediction are untouched. (A model that is compiled or wrapped inside the
    LightningModule, several models, or manual optimization: call `smart_fast.SMARTLoss` in ``training_step``.)

    Args:
        smart: the settings in one object, whose attributes may be changed between steps.
        model: path of the model in the LightningModule, ``""`` for the LightningModule itself. It returns logits, or an
            object with ``logits``.
        embeddings: path, from the LightningModule, of the module whose output ``[B, S, D]`` is perturbed; None:
            ``get_input_embeddings()`` of the model.
        **settings: the fields of `SMARTArguments` (``smart_weight=``, ``smart_steps=``, ...) instead of ``smart``.

    Raises:
        TypeError: ``smart`` of another type or together with one of its fields, or a field that does not exist.
        ValueError: a setting that does not exist; when training starts: manual optimization, or a model that does not
            fit (see `input_embeddings`); in training: inputs without input ids.
        AttributeError: when training starts: a path that does not exist.
        RuntimeError: in training: a ``training_step`` that calls the model not exactly once.
    """

    def __init__(
        self,
        smart: SMARTArguments | None = None,
        model: str = "model",
        embeddings: str | None = None,
        **settings: Any,
    ) -> None:
        self.smart = SMARTArguments.of(smart, settings)
        self.model, self.embeddings = model, embeddings
        self._resources = contextlib.ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        @functools.cache
        def prepare() -> tuple[nn.Module, ModelRegularizer]:
            if not pl_module.automatic_optimization:
                raise ValueError("SMARTCallback adds to the loss of training_step: it needs automatic optimization")
            model = pl_module.get_submodule(self.model)
            embeddings = None if self.embeddings is None else pl_module.get_submodule(self.embeddings)
            regularizer = ModelRegularizer(model, self.smart, embeddings)
            self._resources.callback(regularizer.close)
            return model, regularizer

        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if self.smart.smart_weight == 0:
                return original(*args, **kwargs)
            model, regularizer = prepare()
            with regularizer.clean_pass(), _calls_of(model) as calls:
                result = original(*args, **kwargs)
            if result is None:  # Lightning skips the batch
                return None
            if len(calls) != 1:
                where = self.model or "the LightningModule"
                raise RuntimeError(f"SMARTCallback needs one call of {where} in training_step, got {len(calls)}")
            call, outputs = calls[0]
            labels, attention_mask, shift_labels = map(call.named.get, ("labels", "attention_mask", "shift_labels"))
            smooth = regularizer(call.repeat, outputs, labels, attention_mask, shift_labels).mean
            pl_module.log("smart_loss", smooth.detach(), batch_size=logits_of(outputs).shape[0])
            extra = self.smart.smart_weight * smooth
            return {**result, "loss": result["loss"] + extra} if isinstance(result, Mapping) else result + extra

        if self.smart.smart_weight != 0:
            prepare()  # errors now rather than in the first batch
        self._resources.callback(pl_module.__dict__.pop, "training_step", None)
        pl_module.training_step = training_step

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._resources.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._resources.close()


class _Call:
    """One call of a model."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.model, self.kwargs = model, {k: v for k, v in kwargs.items() if k not in _LABELS}
        self.args = [
            None if name in _LABELS else value
            for name, value in itertools.zip_longest(itertools.islice(parameters, len(args)), args)
        ]
        self.named = {**dict(zip(parameters, args, strict=False)), **kwargs}

    def repeat(self) -> Any:
        """The call again, without labels: the loss of the task is not wanted."""
        return self.model(*self.args, **self.kwargs)


@contextlib.contextmanager
def _calls_of(model: nn.Module) -> Iterator[list[tuple[_Call, Any]]]:
    """The calls of a model within the context, and what they gave."""
    calls: list[tuple[_Call, Any]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        calls.append((_Call(model, args, kwargs), outputs))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
