"""What a training loop does with SMART in a step: both of its terms, figures to log, and what a checkpoint holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..methods.bregman import BregmanProximal, symmetric_kl
from .arguments import SMARTArguments
from .calls import Call, Watch
from .hidden import Hidden
from .model import ModelRegularizer
from .outputs import Smoothness, squared_error

__all__ = ["Session", "Term"]


class Term(NamedTuple):
    """A part of the loss, ``weight`` times the mean of ``value``."""

    weight: float
    value: Smoothness


class Session:
    """SMART in one training loop.

    Args:
        arguments: the settings, whose attributes may be changed between steps.
        embeddings: what is perturbed, as in `ModelRegularizer`.
    """

    def __init__(self, arguments: SMARTArguments, embeddings: Any = None) -> None:
        self.arguments, self.embeddings = arguments, embeddings
        self._regularizer: ModelRegularizer | None = None
        self._proximal: BregmanProximal | None = None
        self._diagnosed = -1  # the last step that was
        self._loaded: dict[str, Any] = {}

    def active(self, step: int) -> bool:
        """Whether optimizer step ``step`` has a term of SMART."""
        return self.arguments.runs(step) or self.arguments.smart_proximal_weight != 0

    def attach(self, model: nn.Module, wrapper: nn.Module | None = None) -> None:
        """Make ready for ``model``, which trains within ``wrapper`` (DDP). Errors as those of `ModelRegularizer`."""
        if self._regularizer is None or not self._regularizer.fits(model):  # a new model, or resized embeddings
            self.close()
            self._regularizer = ModelRegularizer(model, self.arguments, self.embeddings)
        if self._proximal is None and self.arguments.smart_proximal_weight != 0:
            self._proximal = BregmanProximal(wrapper or model, beta=self.arguments.smart_proximal_beta)
            _let_go_of_patches(self._proximal.teacher)
            if "proximal" in self._loaded:
                self._proximal.load_state_dict(self._loaded.pop("proximal"))

    def check(self, model: nn.Module) -> None:
        """Errors of `attach` before there is anything to regularize; leaves nothing behind."""
        ModelRegularizer(model, self.arguments, self.embeddings).close()

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[Watch]:
        """Around the loss of the task, in which ``model`` is called once."""
        assert self._regularizer is not None
        watch = Watch()
        with self._regularizer.clean_pass(), watch.of(model):
            yield watch

    def terms(self, call: Call, inputs: Mapping[str, Any], step: int) -> tuple[dict[str, Term], dict[str, float]]:
        """The terms of the loss after `watching`, by the names that they are logged under, and figures to log.

        Args:
            call: the model's.
            inputs: the batch: labels and masks.
            step: number of the optimizer step, from 0.
        """
        assert self._regularizer is not None
        arguments = self.arguments
        found: dict[str, Term] = {}
        figures: dict[str, float] = {}
        labels, mask, shifted, decoder_mask = (
            each if isinstance(each := inputs.get(name), Tensor) else None
            for name in ("labels", "attention_mask", "shift_labels", "decoder_attention_mask")
        )
        if self._proximal is not None and arguments.smart_proximal_weight != 0:
            compared = self._regularizer.compared(call.repeat, call.outputs, labels, mask, shifted)
            with self._regularizer.precision():
                found["smart_proximal"] = Term(arguments.smart_proximal_weight, self._restraint(call, compared))
        if arguments.runs(step):
            diagnose = arguments.diagnoses(step) and step != self._diagnosed
            wanted = figures if diagnose else None
            value = self._regularizer(call.repeat, call.outputs, labels, mask, shifted, decoder_mask, figures=wanted)
            found["smart_loss"] = Term(arguments.smart_weight, value)
            self._diagnosed = step
        else:
            self._regularizer.forget()
        return found, figures

    def _restraint(self, call: Call, compared: Any) -> Smoothness:
        """The Bregman term, over the items of the regularizer."""
        proximal, items = self._proximal, compared.items
        assert proximal is not None
        if isinstance(compared, Hidden):
            return Smoothness(compared.restraint(proximal.teacher), items.count)
        if items.kind == "numbers":
            proximal.loss_fn = squared_error
        else:
            proximal.loss_fn = partial(symmetric_kl, reduction="sum", mask=items.rows)
        proximal.backend, proximal.output_fn, proximal.beta = (
            self.arguments.smart_backend, compared.of, self.arguments.smart_proximal_beta,
        )  # fmt: skip
        return Smoothness(proximal(call.outputs, *call.args, **call.kwargs), items.count)

    def after_step(self) -> None:
        """Move the teacher: after each optimizer step."""
        if self._proximal is not None:
            self._proximal.update()

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the model: the teacher, and the state of a generator of one's own."""
        state: dict[str, Any] = {}
        if self._proximal is not None:
            state["proximal"] = self._proximal.state_dict()
        if self.arguments.smart_generator is not None:
            state["generator"] = self.arguments.smart_generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before training goes on."""
        self._loaded, self._proximal = dict(state), None
        if "generator" in state and self.arguments.smart_generator is not None:
            self.arguments.smart_generator.set_state(state["generator"].cpu())

    def close(self) -> None:
        """Take the hooks off the model."""
        if self._regularizer is not None:
            self._regularizer.close()
            self._regularizer = None


def _let_go_of_patches(teacher: nn.Module) -> None:
    """Forward methods that TRL and accelerate put on a model, and that would run the model in its copy. (Those that
    move layers between devices stay.)"""
    for each in teacher.modules():
        if not hasattr(each, "_hf_hook"):
            vars(each).pop("forward", None)
