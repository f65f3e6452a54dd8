"""SMART of a whole model: its input embeddings are perturbed, its logits compared. What the integrations share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..loss import js_loss, kl_loss, sym_kl_loss
from ..norms import Norm, inf_norm, sentence_norm
from ..smart import SMARTLoss

__all__ = ["EmbeddingTap", "ModelRegularizer", "SMARTArguments", "Smoothness"]

_NORMS: dict[str, Norm] = {"token": inf_norm, "sentence": sentence_norm(inf_norm)}
_DIVERGENCES = {"kl": kl_loss, "sym_kl": sym_kl_loss, "js": js_loss}
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
    smart_update: str = _option("sift", "Update rule of the noise: smart-pytorch or sift.")
    smart_norm: str = _option(
        "token", "Scope of the norm (largest entry): token or sentence. In Python also a function, [B, S, D] -> norm."
    )
    smart_divergence: str = _option("sym_kl", "What is returned: kl, sym_kl or js. The ascent climbs kl.")
    smart_backend: str = _option("auto", "Backend: auto, torch, triton or native.")

    def norm_fn(self) -> Norm:
        """The norm that ``smart_norm`` names, or ``smart_norm`` itself if it is a function.

        Raises:
            ValueError: an unknown name.
        """
        if callable(self.smart_norm):
            return self.smart_norm
        if self.smart_norm not in _NORMS:
            raise ValueError(f"smart_norm must be one of {list(_NORMS)} or a function, got {self.smart_norm!r}")
        return _NORMS[self.smart_norm]


class Smoothness(NamedTuple):
    """The regularizer as a sum, and over how many items (sequences, tokens or targets) it was taken."""

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
        self._recording = False
        self._seen: list[Tensor] = []
        self._replacement: Tensor | None = None
        self._replaced = 0
        self._handle = module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self._replacement is not None:
            self._replaced += 1
            return self._replacement
        if self._recording:
            self._seen.append(output)
        return output

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Within the context, outputs of the module are appended to the list that it gives."""
        seen: list[Tensor] = []
        self._seen = seen
        self._recording = True
        try:
            yield seen
        finally:
            self._recording = False
            self._seen = []

    @contextlib.contextmanager
    def replacing(self, output: Tensor) -> Iterator[None]:
        """Within the context the module returns ``output``.

        Raises:
            RuntimeError: the module was not called.
        """
        self._replacement, self._replaced = output, 0
        try:
            yield
            if self._replaced == 0:
                raise RuntimeError("the model did not call its input embeddings in the perturbed pass")
        finally:
            self._replacement = None

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
        ValueError: an encoder-decoder model (it embeds two sequences), a model without input embeddings, or a setting
            that `SMARTLoss` does not know.
    """

    def __init__(self, model: nn.Module, arguments: SMARTArguments, embeddings: nn.Module | None = None) -> None:
        name = type(model).__name__
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{name} is an encoder-decoder model, which embeds two sequences: use smart_fast.SMARTLoss with both "
                "embeddings, as a tuple"
            )
        find: Any = getattr(model, "get_input_embeddings", None)
        if embeddings is None and find is not None:
            embeddings = find()
        if not isinstance(embeddings, nn.Module):
            raise ValueError(f"{name} has no input embeddings (get_input_embeddings() gives {embeddings!r})")
        if arguments.smart_divergence not in _DIVERGENCES:
            raise ValueError(
                f"smart_divergence must be one of {list(_DIVERGENCES)}, got {arguments.smart_divergence!r}"
            )
        self.model, self.arguments = model, arguments
        self.smart = SMARTLoss(
            self._evaluate,
            _Divergence("kl"),
            _Divergence(arguments.smart_divergence),
            arguments.norm_fn(),
            num_steps=arguments.smart_steps,
            step_size=arguments.smart_step_size,
            epsilon=arguments.smart_epsilon,
            noise_var=arguments.smart_noise_var,
            backend=arguments.smart_backend,
            update=arguments.smart_update,
        )
        self._tap = EmbeddingTap(embeddings)
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
            RuntimeError: the clean pass called the input embeddings not exactly once.
            TypeError: outputs without logits.
        """
        embeds, self._embeds = self._embeds, []
        if len(embeds) != 1:
            raise RuntimeError(
                f"SMART needs one call of the input embeddings of {type(self.model).__name__} in the clean pass, got "
                f"{len(embeds)} (inputs_embeds= among the inputs bypasses them)"
            )
        (embed,) = embeds
        logits = logits_of(outputs)
        kind = _kind(getattr(self.model, "config", None), logits, labels)
        rows = self._rows(logits, labels, shift_labels, attention_mask) if kind == "classes" else None
        clean = _State(_comparable(logits, kind), rows, kind)
        mask = _token_mask(attention_mask, embed)
        total = self.smart(embed, clean, forward, rows, kind, mask=mask)
        return Smoothness(total, _items(clean))

    def close(self) -> None:
        """Take the hook off the model."""
        self._tap.close()

    def _evaluate(self, embed: Tensor, forward: Callable[[], Any], rows: Tensor | None, kind: str) -> _State:
        with self._tap.replacing(embed):
            outputs = forward()
        return _State(_comparable(logits_of(outputs), kind), rows, kind)

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


class _State:
    """Logits, and how they are compared: one opaque state for `SMARTLoss`, which detaches it."""

    def __init__(self, logits: Tensor, rows: Tensor | None, kind: str) -> None:
        self.logits, self.rows, self.kind = logits, rows, kind

    def detach(self) -> _State:
        return _State(self.logits.detach(), self.rows, self.kind)


class _Divergence:
    """The divergence of two states, summed over items: it does not depend on how a batch is cut into pieces."""

    def __init__(self, name: str) -> None:
        self.loss = _DIVERGENCES[name]

    def __call__(self, perturbed: _State, clean: _State) -> Tensor:
        if clean.kind == "numbers":
            return (perturbed.logits.float() - clean.logits.float()).square().sum()
        return self.loss(perturbed.logits, clean.logits, reduction="sum", mask=clean.rows)


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


def _items(state: _State) -> Tensor:
    if state.rows is not None:
        return state.rows.sum()
    shape = state.logits.shape if state.kind == "numbers" else state.logits.shape[:-1]
    return torch.full((), shape.numel(), device=state.logits.device)


def _token_mask(attention_mask: Tensor | None, embed: Tensor) -> Tensor | None:
    """A mask of the embedding's positions; None for masks of another kind (``[B, 1, S, S]``)."""
    shape = embed.shape[:-1]
    if attention_mask is None or attention_mask.numel() != shape.numel():
        return None
    return attention_mask.reshape(shape).bool()  # multiple choice: [B, C, S] -> [B * C, S]


def _predicts_the_next_token(model: nn.Module) -> bool:
    """Whether the model's own loss compares logits with the labels one to the right (causal language models)."""
    loss_function = getattr(model, "loss_function", None)
    return getattr(loss_function, "__name__", "") == "ForCausalLMLoss"
