"""SMART in ``transformers.Trainer``: `SMARTTrainer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "smart_fast.integrations.transformers needs transformers 5 and accelerate: "
        "pip install 'smart-fast[transformers]'"
    ) from error

from .model import ModelRegularizer, SMARTArguments, Smoothness, input_embeddings

__all__ = ["SMARTArguments", "SMARTTrainer"]


class SMARTTrainer(Trainer):
    """``transformers.Trainer`` whose loss is that of the task plus ``smart_weight`` times the SMART regularizer.

        trainer = SMARTTrainer(model, args, train_dataset=data, smart_weight=1.0)

    For models of one sequence of input embeddings: ``...ForSequenceClassification`` (classes, several labels,
    regression), ``...ForTokenClassification``, ``...ForCausalLM``, ``...ForMaskedLM``, and others that return logits.
    The clean pass is Trainer's own: label smoothing and ``compute_loss_func`` work, and evaluation and prediction are
    untouched. The regularizer is a mean over the items that the loss is a mean over (sequences, or tokens whose label
    is not -100), over all batches of an optimizer step and, where Trainer does so, over all processes. Its mean since
    the last log is logged as ``smart_loss``; ``loss`` is the whole loss.

    Combines with other trainers: ``class Mine(SMARTTrainer, OtherTrainer)``.

    Args:
        *args, **kwargs: those of Trainer, and fields of `SMARTArguments` (``smart_weight=``, ``smart_steps=``, ...).
        smart: these fields in one object, whose attributes may be changed between steps.

    Raises:
        TypeError: ``smart`` of another type or together with one of its fields, or a field that does not exist.
        ValueError: a setting that does not exist or a model that does not fit (see `input_embeddings`); in training,
            inputs without input ids, or ``torch.nn.DataParallel``, which Trainer uses for several GPUs in one process.
    """

    def __init__(self, *args: Any, smart: SMARTArguments | None = None, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("smart_")}
        self.smart = SMARTArguments.of(smart, given)
        self._regularizer: ModelRegularizer | None = None
        self._unlogged: Smoothness | None = None  # since the last log
        super().__init__(*args, **kwargs)
        if self.smart.smart_weight != 0:
            input_embeddings(self._unwrapped(self.model))  # whether there are any

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
        if "loss" in logs and self._unlogged is not None:
            total, items = (self.accelerator.reduce(each, reduction="sum") for each in self._unlogged)
            logs["smart_loss"] = Smoothness(total, items).mean.item()
            self._unlogged = None
        super().log(logs, *args, **kwargs)

    def _unwrapped(self, model: nn.Module) -> Any:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _regularizer_of(self, model: nn.Module) -> ModelRegularizer:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "SMARTTrainer does not work in torch.nn.DataParallel, which Trainer uses for several GPUs in one "
                "process: start it with torchrun, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )
        unwrapped = self._unwrapped(model)
        embeddings = input_embeddings(unwrapped)
        if self._regularizer is None or self._regularizer.embeddings is not embeddings:  # of a new model, or resized
            if self._regularizer is not None:
                self._regularizer.close()
            self._regularizer = ModelRegularizer(unwrapped, self.smart, embeddings)
        return self._regularizer

    def _on_the_scale_of_the_loss(self, smoothness: Smoothness, num_items_in_batch: Any) -> Tensor:
        """A mean over this batch, or this batch's part of the mean over the batches of an optimizer step: what
        ``Trainer.training_step`` expects of a loss."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # not in transformers 5.0
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
        total, items = smoothness.total.detach().float(), smoothness.items
        before = self._unlogged
        self._unlogged = (
            Smoothness(total, items) if before is None else Smoothness(before[0] + total, before[1] + items)
        )
