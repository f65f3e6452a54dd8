"""SMART in ``transformers.Trainer`` and its subclasses: `SMARTMixin`, `SMARTTrainer`, `SMARTSeq2SeqTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

try:
    from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "smart_fast.integrations.transformers needs transformers 5 and accelerate: "
        "pip install 'smart-fast[transformers]'"
    ) from error

from .arguments import SMARTArguments
from .outputs import Smoothness
from .session import Session

__all__ = ["SMARTArguments", "SMARTMixin", "SMARTSeq2SeqTrainer", "SMARTTrainer"]

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object  # the trainer that the mixin is put in front of

_FILE = "smart.pt"  # in a checkpoint
# Of TRL, those whose loss is that of one call of the model on one batch of labeled sequences, or of pairs side by side.
_SUPPORTED = ("SFTTrainer", "RewardTrainer")


class SMARTMixin(_Base):
    """Makes a Trainer's loss that of the task plus ``smart_weight`` times the SMART regularizer.

        class SMARTSFTTrainer(SMARTMixin, SFTTrainer):
            pass

    It goes in front of any subclass of ``transformers.Trainer`` whose ``compute_loss`` calls the model once (with
    gradients): that call is watched and repeated with perturbed embeddings and without labels. So the task's loss is
    the trainer's own, and evaluation and prediction are untouched. Of TRL, ``SFTTrainer`` and ``RewardTrainer`` work.

    For models that return logits: classes, several labels, regression, tokens, causal, masked and sequence to sequence
    language models (where both the encoder's and the decoder's embeddings are perturbed), question answering; and
    language models whose head is fused with their loss, as SFTTrainer's: hidden states before the head are then
    compared, and there are no whole logits.

    The regularizer is a mean over the items that the loss is a mean over (sequences, or tokens whose label is not
    -100), over all batches of an optimizer step and, where Trainer does so, over all processes. Its mean since the
    last log is logged as ``smart_loss``, that of the Bregman term as ``smart_proximal``; ``loss`` is the whole loss.
    Checkpoints hold what resuming needs, in ``smart.pt``.

    Args:
        *args, **kwargs: those of the trainer, and fields of `SMARTArguments` (``smart_weight=``, ...).
        smart: these fields in one object, whose attributes may be changed between steps.

    Raises:
        TypeError: ``smart`` of another type or together with one of its fields, or a field that does not exist.
        ValueError: a setting that does not exist, a model that has nothing to perturb (see `ModelRegularizer`), a
            trainer of TRL that compares several passes of its own (DPO, GRPO, ...); in training, inputs without input
            ids, or ``torch.nn.DataParallel``, which Trainer uses for several GPUs in one process.
        RuntimeError: in training, a trainer that calls the model not exactly once.
    """

    def __init__(self, *args: Any, smart: SMARTArguments | None = None, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("smart_")}
        self.smart = SMARTArguments.of(smart, given)
        _check_trainer(type(self))
        self._session = Session(self.smart)
        self._unlogged: dict[str, Smoothness] = {}  # since the last log
        self._resumed: Any = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Callback(self._session, self._checkpoint))
        if self.smart.smart_weight != 0 or self.smart.smart_proximal_weight != 0:
            self._session.check(self._unwrapped(self.model))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's; the teacher of the Bregman term, too, goes on where the checkpoint left it."""
        self._resumed = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss; in training, plus the weighted terms of SMART."""
        session, step = self._session, self.state.global_step
        if not model.training or not session.active(step):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "SMARTTrainer does not work in torch.nn.DataParallel, which Trainer uses for several GPUs in one "
                "process: start it with torchrun, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )
        # Not through DDP: its forward pass prepares a reduction, and one backward pass follows all of these. Gradients
        # of all passes meet in the parameters before DDP sees them. Other wrappers hold parameters: through them.
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        session.attach(self._unwrapped(model), model if inner is not model else None)
        with session.watching(model) as watch:  # a copy of the inputs, since trainers take labels out of them
            result = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        call = watch.only(inner, f"{type(self).__name__}.compute_loss", type(inner).__name__)
        terms, figures = session.terms(call, {**call.named, **inputs}, step)
        for name, (weight, value) in terms.items():
            loss = loss + weight * self._on_the_scale_of_the_loss(value, num_items_in_batch)
            self._remember(name, value)
        if figures:
            Trainer.log(self, figures)  # not that of a subclass, which may take it for the end of an interval
        return (loss, *outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's, with ``smart_loss`` and ``smart_proximal`` where the loss of training is logged."""
        if "loss" in logs:
            for name, value in self._unlogged.items():
                total, items = (self.accelerator.reduce(each, reduction="sum") for each in value)
                logs[name] = Smoothness(total, items).mean.item()
            self._unlogged = {}
        super().log(logs, *args, **kwargs)

    def _unwrapped(self, model: nn.Module) -> Any:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _checkpoint(self) -> str | None:
        """The one that training is resumed from."""
        last = get_last_checkpoint(self.args.output_dir) if self._resumed is True else self._resumed
        return str(last) if last else None

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

    def _remember(self, name: str, value: Smoothness) -> None:
        total, items = value.total.detach().float(), value.items
        if name in self._unlogged:
            before = self._unlogged[name]
            total, items = before.total + total, before.items + items
        self._unlogged[name] = Smoothness(total, items)


class SMARTTrainer(SMARTMixin, Trainer):
    """``transformers.Trainer`` whose loss is that of the task plus ``smart_weight`` times the SMART regularizer.

        trainer = SMARTTrainer(model, args, train_dataset=data, smart_weight=1.0)

    See `SMARTMixin`. Combines with other trainers: ``class Mine(SMARTTrainer, OtherTrainer)``.
    """


class SMARTSeq2SeqTrainer(SMARTMixin, Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` with SMART; see `SMARTMixin`."""


class _Callback(TrainerCallback):
    """What `SMARTMixin` does between batches."""

    def __init__(self, session: Session, checkpoint: Any) -> None:
        self._session, self._checkpoint = session, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = self._checkpoint()
        file = Path(checkpoint, _FILE) if checkpoint else None
        if file is not None and file.is_file():
            self._session.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.after_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self._session.state_dict()
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if found and args.should_save and folder.is_dir():
            torch.save(found, folder / _FILE)


def _check_trainer(trainer: type) -> None:
    for each in trainer.__mro__:
        package, name = each.__module__.partition(".")[0], each.__name__
        if package == "trl" and name in _SUPPORTED:
            return
        if package == "trl" and name.endswith("Trainer") and not name.startswith("_"):
            raise ValueError(
                f"SMARTMixin supports {' and '.join(_SUPPORTED)} of trl, not {name}, whose loss compares several passes"
                " or samples of the model: call smart_fast.SMARTLoss in a compute_loss of your own"
            )
