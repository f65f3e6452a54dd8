"""SMART of a whole model: its input embeddings are perturbed, its logits compared. What the integrations share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import check_name
from ..backends.base import DIVERGENCES, UPDATES
from ..checks import check_choice, check_count, check_number
from ..losses.logits import LOSSES, kl_loss
from ..norms import Norm, inf_norm, sentence_norm
from ..options import SCALES
from ..smart import SMARTLoss

__all__ = ["EmbeddingTap", "ModelRegularizer", "SMARTArguments", "Smoothness", "input_embeddings"]

_NORMS: dict[str, Norm] = {"token": inf_norm, "sentence": sentence_norm(inf_norm)}
_IGNORED = -100  # the label that Hugging Face's losses skip


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SMARTArguments:
    """Settings of SMART in a training loop; ``HfArgumentParser`` makes command line options of them.

    The numbers are those of `smart_fast.SMARTLoss`, the defaults are not: what is perturbed here are word embeddings,
    whose entries have a standard deviation near 0.02 to 0.05 in pretrained models. The noise that ``"smart-pytorch"``
    ends with has a largest entry near 1 whatever the other settings are, far more than the embedding. The default,
    ``"sift"``, moves each token by ``smart_step_size`` in its largest entry. Where embeddings have another size, scale
    ``smart_step_size`` and ``smart_noise_var`` with it.
    """

    smart_weight: float = _option(1.0, "Weight of the regularizer in the loss; 0 turns SMART off.")
    smart_steps: int = _option(1, "Ascent steps, each one forward and one backward pass more.")
    smart_step_size: float = _option(1e-2, "Length of an ascent step, in units of the embeddings.")
    smart_epsilon: float = _option(1e-6, "Added to the norm before dividing by it.")
    smart_noise_var: float = _option(1e-3, "Standard deviation of the initial noise, in units of the embeddings.")
    smart_update: str = _option("sift", "Update rule of the noise: smart-pytorch, sift or paper.")
    smart_scale: str = _option("absolute", "Units of noise, step and epsilon: absolute, or relative to each token.")
    smart_norm: str = _option(
        "token", "Scope of the norm (largest entry): token or sentence. In Python also a function, [B, S, D] -> norm."
    )
    smart_divergence: str = _option("sym_kl", "What is returned: kl, sym_kl, js or jsd. The ascent climbs kl.")
    smart_backend: str = _option("auto", "Backend: auto, torch, triton or native.")

    def __post_init__(self) -> None:
        """Check the settings where they are made, under their own names.

        Raises:
            TypeError, ValueError: a setting that does not exist, or of the wrong type.
        """
        for name in ("smart_weight", "smart_step_size", "smart_epsilon", "smart_noise_var"):
            check_number(name, getattr(self, name))
        if self.smart_weight < 0:
            raise ValueError(f"smart_weight must not be negative, got {self.smart_weight}")
        check_count("smart_steps", self.smart_steps)
        check_choice("smart_update", self.smart_update, UPDATES)
        check_choice("smart_scale", self.smart_scale, SCALES)
        check_choice("smart_divergence", self.smart_divergence, DIVERGENCES)
        if not callable(self.smart_norm):
            check_choice("smart_norm", self.smart_norm, tuple(_NORMS))
        check_name(self.smart_backend, "smart_backend")

    @classmethod
    def of(cls, smart: SMARTArguments | None, given: dict[str, Any]) -> SMARTArguments:
        """The settings of somebody who takes ``smart=SMARTArguments(...)`` or the settings themselves.

        Raises:
            TypeError: both, ``smart`` of another type, or a setting that does not exist.
        """
        if smart is None:
            return cls(**given)
        if not isinstance(smart, cls):
            raise TypeError(f"smart must be a SMARTArguments, got {type(smart).__name__}")
        if given:
            raise TypeError(f"give smart= or single settings, not both: got smart and {', '.join(given)}")
        return smart

    def loss(self, eval_fn: Callable[..., Tensor], comparison: Callable[[Any], Callable[..., Tensor]]) -> SMARTLoss:
        """The `SMARTLoss` of ``eval_fn`` whose losses are ``comparison`` of a divergence."""
        return SMARTLoss(
            eval_fn,
            comparison(kl_loss),
            comparison(LOSSES[self.smart_divergence]),
            self.smart_norm if callable(self.smart_norm) else _NORMS[self.smart_norm],
            num_steps=self.smart_steps,
            step_size=self.smart_step_size,
            epsilon=self.smart_epsilon,
            noise_var=self.smart_noise_var,
            backend=self.smart_backend,
            update=self.smart_update,
            scale=self.smart_scale,
        )


class Smoothness(NamedTuple):
    """The regularizer as a sum, and the number of items (sequences, tokens or targets) that it was taken over."""

    total: Tensor
    items: Tensor

    @property
    def mean(self) -> Tensor:
        """The regularizer per item, on the scale of a mean cross-entropy or squared error."""
        return self.total / self.items.clamp(min=1)


class EmbeddingTap:
    """Reads what a module returns, or returns something else in its place, wherever a model calls it.

    A hook, not ``inputs_embeds=``: with input ids at hand models find their padding, their positions and the token to
    pool, which they cannot from embeddings (``LlamaForSequenceClassification`` would pool padding), and a sharded
    embedding is called where its shards are gathered. The hook stays in place, since torch.compile does not notice
    hooks that come and go; `close` removes it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: list[Tensor] | None = None
        self._replacement: Tensor | None = None
        self._handle = module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self._seen is not None:
            self._seen.append(output)
        return output if self._replacement is None else self._replacement

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Within the context, outputs of the module are appended to the list that it gives."""
        seen: list[Tensor] = []
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None

    @contextlib.contextmanager
    def replacing(self, output: Tensor) -> Iterator[None]:
        """Within the context the module returns ``output``.

        Raises:
            RuntimeError: the module was not called.
        """
        self._replacement = output
        try:
            with self.recording() as seen:
                yield
        finally:
            self._replacement = None
        if not seen:
            raise RuntimeError("the model did not call its input embeddings in the perturbed pass")

    def close(self) -> None:
        self._handle.remove()


class ModelRegularizer:
    """SMART of a model with one sequence of input embeddings.

        regularizer = ModelRegularizer(model, SMARTArguments())
        with regularizer.clean_pass():
            outputs = model(**inputs, labels=labels)
        smoothness = regularizer(lambda: model(**inputs), outputs, labels, inputs["attention_mask"])
        loss = outputs.loss + weight * smoothness.mean

    Args:
        model: a module with ``get_input_embeddings()``, as those of transformers (wrapped by PEFT or not) have.
        arguments: the settings.
        embeddings: the module whose output ``[B, S, D]`` is perturbed; None: ``model.get_input_embeddings()``.

    Raises:
        ValueError: a model that does not fit (see `input_embeddings`).
    """

    def __init__(self, model: nn.Module, arguments: SMARTArguments, embeddings: nn.Module | None = None) -> None:
        self.model, self.arguments = model, arguments
        self.embeddings = input_embeddings(model) if embeddings is None else embeddings
        self._tap = EmbeddingTap(self.embeddings)
        self._embeds: list[Tensor] = []
        self._shifts = _predicts_the_next_token(model)

    @contextlib.contextmanager
    def clean_pass(self) -> Iterator[None]:
        """The model runs as ever in this context; what it embeds is remembered until the regularizer is called."""
        with self._tap.recording() as self._embeds:
            yield

    def __call__(
        self,
        forward: Callable[[], Any],
        outputs: Any,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
    ) -> Smoothness:
        """The regularizer of the last clean pass.

        Args:
            forward: runs the model on the inputs of the clean pass, without labels, and returns its outputs.
            outputs: of the clean pass: an object with ``logits`` (or ``start_logits`` and ``end_logits``), or logits.
            labels: those of the task, if any: items labeled -100 do not count. Floating point labels of the shape of
                the logits mean one Bernoulli distribution each.
            attention_mask: ``[B, S]``, nonzero for real tokens. Padding gets no noise, and does not count where every
                token has logits and there are no labels.
            shift_labels: labels that are aligned with the logits already.

        Raises:
            ValueError: the clean pass called the input embeddings not exactly once.
            TypeError: outputs without logits.
        """
        embeds, self._embeds = self._embeds, []
        if len(embeds) != 1:
            raise ValueError(
                f"SMART needs one call of the input embeddings of {type(self.model).__name__} in the clean pass, got "
                f"{len(embeds)} (inputs_embeds= among the inputs bypasses them)"
            )
        (embed,) = embeds
        logits = logits_of(outputs)
        kind = _kind(getattr(self.model, "config", None), logits, labels)
        rows = self._rows(logits, labels, shift_labels, attention_mask) if kind == "classes" else None

        def evaluate(embed: Tensor) -> Tensor:
            with self._tap.replacing(embed):
                perturbed = forward()
            return _comparable(logits_of(perturbed), kind)

        def comparison(divergence: Any) -> Callable[..., Tensor]:
            # Sums over items: they do not depend on how a batch is cut into pieces.
            return _squared_error if kind == "numbers" else partial(divergence, reduction="sum", mask=rows)

        clean = _comparable(logits, kind)
        total = self.arguments.loss(evaluate, comparison)(embed, clean, mask=_token_mask(attention_mask, embed))
        if rows is not None:
            return Smoothness(total, rows.sum())
        shape = clean.shape if kind == "numbers" else clean.shape[:-1]
        return Smoothness(total, torch.full((), shape.numel(), device=logits.device))

    def close(self) -> None:
        """Take the hook off the model."""
        self._tap.close()

    def _rows(
        self, logits: Tensor, labels: Tensor | None, aligned: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        """Which rows of logits count, bool ``[...]``; None: all."""
        shape = logits.shape[:-1]
        if aligned is not None and aligned.shape == shape:
            return aligned != _IGNORED
        if labels is not None and labels.shape == shape:
            known = labels != _IGNORED
            return nn.functional.pad(known[..., 1:], (0, 1), value=False) if self._shifts else known
        if attention_mask is not None and attention_mask.shape == shape:
            return attention_mask.bool()
        return None


def input_embeddings(model: nn.Module) -> nn.Module:
    """The module whose output is perturbed.

    Raises:
        ValueError: an encoder-decoder model (it embeds two sequences), or a model without input embeddings.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model, which embeds two sequences: use smart_fast.SMARTLoss with both "
            "embeddings, as a tuple"
        )
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    embeddings = None
    # transformers raises it for models without embeddings of tokens; the error below says so of any model.
    with contextlib.suppress(NotImplementedError):
        embeddings = find()
    if not isinstance(embeddings, nn.Module):
        raise ValueError(f"{name} has no input embeddings (get_input_embeddings() gives {embeddings!r})")
    return embeddings


def logits_of(outputs: Any) -> Tensor:
    """The logits among a model's outputs; those of question answering stacked, ``[B, 2, S]``."""
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "start_logits"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            # Question answering: two distributions over the positions of a sequence.
            return torch.stack([found, outputs["end_logits"]], dim=1) if name == "start_logits" else found
    raise TypeError(f"the model must return logits, or an object with logits, got {type(outputs).__name__}")


def _kind(config: Any, logits: Tensor, labels: Tensor | None) -> str:
    """ "classes" (softmax over the last dimension), "flags" (a sigmoid each) or "numbers" (regression)."""
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return "flags"
    if problem == "regression" or logits.shape[-1] == 1:  # the softmax of one logit is constant
        return "numbers"
    flags = labels is not None and labels.is_floating_point() and labels.shape == logits.shape
    return "flags" if flags and problem is None else "classes"


def _comparable(logits: Tensor, kind: str) -> Tensor:
    # sigmoid(x) is the softmax of (x, 0).
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1) if kind == "flags" else logits


def _squared_error(perturbed: Tensor, clean: Tensor) -> Tensor:
    return (perturbed.float() - clean.float()).square().sum()


def _token_mask(attention_mask: Tensor | None, embed: Tensor) -> Tensor | None:
    """A mask of the embedding's positions; None for masks of another kind (``[B, 1, S, S]``)."""
    shape = embed.shape[:-1]
    if attention_mask is None or attention_mask.numel() != shape.numel():
        return None
    return attention_mask.reshape(shape).bool()  # multiple choice: [B, C, S] -> [B * C, S]


def _predicts_the_next_token(model: nn.Module) -> bool:
    """Whether the model's own loss compares logits with the labels one to the right (causal language models)."""
    if getattr(model, "loss_type", None) is None:  # unknown to transformers, whose loss_function is then a guess
        return False
    return getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
