"""SMART in ``transformers.Trainer``: `SMARTTrainer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "smart_fast.integrations.transformers needs transformers 5 and accelerate: "
        "pip install 'smart-fast[transformers]'"
    ) from error

from .model import ModelRegularizer, SMARTArguments, Smoothness

__all__ = ["SMARTArguments", "SMARTTrainer"]


class SMARTTrainer(Trainer):
    """``transformers.Trainer`` whose loss is that of the task plus ``smart_weight`` times the SMART regularizer.

        trainer = SMARTTrainer(model, args, train_dataset=data, smart=SMARTArguments(smart_weight=1.0))

    For models of one sequence of input embeddings: ``...ForSequenceClassification`` (classes, several labels,
    regression), ``...ForTokenClassification``, ``...ForCausalLM``, ``...ForMaskedLM``, and others that return logits.
    The clean pass is Trainer's own: label smoothing and ``compute_loss_func`` work, and evaluation and prediction are
    untouched. The regularizer is a mean over the items that the loss is a mean over (sequences, or tokens whose label
    is not -100), over all batches of an optimizer step and, where Trainer does so, over all processes. Its mean since
    the last log is logged as ``smart_loss``; ``loss`` is the whole loss.

    Combines with other trainers: ``class Mine(SMARTTrainer, OtherTrainer)``.

    Args:
        *args, **kwargs: those of Trainer.
        smart: the settings; None: the defaults. Changes between steps of what is not ``smart_weight`` have no effect.

    Raises:
        TypeError: ``smart`` of another type.
        ValueError: in training: a setting or model that does not fit (see `ModelRegularizer`), or
            ``torch.nn.DataParallel``, which Trainer uses for several GPUs in one process.
    """

    def __init__(self, *args: Any, smart: SMARTArguments | None = None, **kwargs: Any) -> None:
        self.smart = SMARTArguments() if smart is None else smart
        if not isinstance(self.smart, SMARTArguments):
            raise TypeError(f"smart must be a SMARTArguments, got {type(smart).__name__}")
        self._regularizer: ModelRegularizer | None = None
        self._unlogged: list[Tensor] = []  # the sum of the regularizer and of items since the last log
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's loss; in training, plus the weighted regularizer."""
        if not model.training or self.smart.smart_weight == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)  # Trainer takes labels out of it
        labels = {name: inputs[name] for name in (*self.label_names, "shift_labels") if name in inputs}
        unlabeled = {name: value for name, value in inputs.items() if name not in labels}
        regularizer = self._regularizer_of(model)
        with regularizer.clean_pass():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # Not through DDP: its forward pass prepares a reduction, and one backward pass follows all of these. Gradients
        # of all passes meet in the parameters before DDP sees them. Other wrappers hold parameters: through them.
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        smoothness = regularizer(
            lambda: inner(**unlabeled),
            outputs,
            labels.get("labels"),
            inputs.get("attention_mask"),
            labels.get("shift_labels"),
        )
        self._remember(smoothness)
        loss = loss + self.smart.smart_weight * self._on_the_scale_of_the_loss(smoothness, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with ``smart_loss`` where the loss of training is logged."""
        if "loss" in logs and self._unlogged:
            sums = self.accelerator.reduce(torch.stack(self._unlogged), reduction="sum")
            logs["smart_loss"] = Smoothness(sums[0], sums[1]).mean.item()
            self._unlogged = []
        super().log(logs, *args, **kwargs)

    def _regularizer_of(self, model: nn.Module) -> ModelRegularizer:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "SMARTTrainer does not work in torch.nn.DataParallel, which Trainer uses for several GPUs in one "
                "process: start it with torchrun, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if self._regularizer is None or self._regularizer.model is not unwrapped:  # model_init makes new models
            if self._regularizer is not None:
                self._regularizer.close()
            self._regularizer = ModelRegularizer(unwrapped, self.smart)
        return self._regularizer

    def _on_the_scale_of_the_loss(self, smoothness: Smoothness, num_items_in_batch: Any) -> Tensor:
        """A mean over this batch, or this batch's part of the mean over the batches of an optimizer step: what
        ``Trainer.training_step`` expects of a loss."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        if not scaled:  # Trainer will divide by the number of batches
            return smoothness.mean
        if num_items_in_batch is None:
            return smoothness.mean / self.current_gradient_accumulation_steps
        part = smoothness.total / num_items_in_batch
        if self.args.average_tokens_across_devices:  # items of all processes, whose gradients DDP averages
            part = part * (self.accelerator.num_processes // self.get_tp_size())
        return part

    def _remember(self, smoothness: Smoothness) -> None:
        new = [smoothness.total.detach().double(), smoothness.items.double()]
        self._unlogged = [a + b for a, b in zip(self._unlogged, new, strict=True)] if self._unlogged else new
