"""SMART in Lightning: `SMARTCallback`. Works with ``lightning`` and with ``pytorch_lightning``."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .arguments import SMARTArguments
from .session import Session

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


class SMARTCallback(Callback):
    """Adds ``smart_weight`` times the SMART regularizer to the loss that ``training_step`` returns.

        trainer = Trainer(callbacks=[SMARTCallback(smart_weight=1.0)])

    The LightningModule stays as it is. During ``training_step`` the one call of its model is watched; afterwards the
    model runs again on the same arguments, with perturbed embeddings and without ``labels``. Logs ``smart_loss``, the
    regularizer per item, and ``smart_proximal``, the Bregman term. Checkpoints hold what resuming needs. Validation,
    test and prediction are untouched. (A model that is compiled or wrapped inside the LightningModule, several models,
    or manual optimization: call `smart_fast.SMARTLoss` in ``training_step``.)

    Args:
        smart: the settings in one object, whose attributes may be changed between steps.
        model: path of the model in the LightningModule, ``""`` for the LightningModule itself. It returns logits, or an
            object with ``logits``.
        embeddings: path, from the LightningModule, of the module whose output ``[B, S, D]`` is perturbed; None: what
            ``smart_embeddings`` says of the model, by default its input embeddings.
        **settings: the fields of `SMARTArguments` (``smart_weight=``, ``smart_steps=``, ...) instead of ``smart``.

    Raises:
        TypeError: ``smart`` of another type or together with one of its fields, or a field that does not exist.
        ValueError: a setting that does not exist; when training starts: manual optimization, or a model that does not
            fit (see `ModelRegularizer`); in training: inputs without input ids.
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
        self._session = Session(self.smart)
        self._steps = 0
        self._resources = contextlib.ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        @functools.cache
        def prepare() -> nn.Module:
            if not pl_module.automatic_optimization:
                raise ValueError("SMARTCallback adds to the loss of training_step: it needs automatic optimization")
            model = pl_module.get_submodule(self.model)
            self._session.embeddings = None if self.embeddings is None else pl_module.get_submodule(self.embeddings)
            self._session.attach(model)
            self._resources.callback(self._session.close)
            return model

        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            step = trainer.global_step
            if not self._session.active(step):
                return original(*args, **kwargs)
            model = prepare()
            self._session.attach(model)
            with self._session.watching(model) as watch:
                result = original(*args, **kwargs)
            if result is None:  # Lightning skips the batch
                return None
            call = watch.only(model, "training_step", self.model or "the LightningModule")
            terms, figures = self._session.terms(call, call.named, step)
            extra: Any = 0.0
            for name, (weight, value) in terms.items():
                extra = extra + weight * value.mean
                pl_module.log(name, value.mean.detach(), batch_size=call.batch_size)
            for name, figure in figures.items():
                pl_module.log(name, figure, batch_size=call.batch_size)
            return {**result, "loss": result["loss"] + extra} if isinstance(result, Mapping) else result + extra

        if self.smart.smart_weight != 0 or self.smart.smart_proximal_weight != 0:
            prepare()  # errors now rather than in the first batch
        self._steps = trainer.global_step
        self._resources.callback(pl_module.__dict__.pop, "training_step", None)
        pl_module.training_step = training_step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step != self._steps:  # not while gradients accumulate
            self._steps = trainer.global_step
            self._session.after_step()

    def state_dict(self) -> dict[str, Any]:
        return self._session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._session.load_state_dict(state_dict)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._resources.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._resources.close()
