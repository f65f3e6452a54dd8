"""SMART of a whole model: its embeddings are perturbed, its logits compared. What the integrations share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..ascent import modes
from ..diagnostics import ascent_ratio
from ..noise import remember_generators
from ..training.checkpointing import checkpointed
from .arguments import SMARTArguments
from .hidden import Body, BodyCall, Hidden
from .outputs import Comparison, Items, Logits, Smoothness, logits_of, squared_error
from .tap import Seen, Tap, find, own_embeddings, sides

__all__ = ["ModelRegularizer", "SMARTArguments", "Smoothness"]

_MOST, _LEAST = 0.5, 1e-4  # noise, as a part of the embedding, outside of which something is amiss


class ModelRegularizer:
    """SMART of a model.

        regularizer = ModelRegularizer(model, SMARTArguments())
        with regularizer.clean_pass():
            outputs = model(**inputs, labels=labels)
        smoothness = regularizer(lambda: model(**inputs), outputs, labels, inputs["attention_mask"])
        loss = outputs.loss + weight * smoothness.mean

    Every call of the chosen modules that the clean pass shows is perturbed. The first call warns if the noise is out of
    proportion to what it is added to. (When to regularize, the Bregman term and the logging of diagnostics are for the
    training loop.)

    Args:
        model: a module, wrapped by PEFT or not.
        arguments: the settings.
        embeddings: what is perturbed: a module, or what ``smart_embeddings`` takes, which stands for None.

    Raises:
        ValueError: there is no such module to perturb (see `find`); parameters that are empty.
    """

    def __init__(self, model: nn.Module, arguments: SMARTArguments, embeddings: Any = None) -> None:
        self.model, self.arguments = model, arguments
        self.embeddings = arguments.smart_embeddings if embeddings is None else embeddings
        self.modules, of_ids = find(model, self.embeddings)
        self._own = own_embeddings(model)
        empty = next((name for name, each in model.named_parameters() if each.shape == (0,)), None)
        if empty is not None:
            raise ValueError(
                f"parameter {empty} is empty: models whose parameters are there only while their module runs (DeepSpeed"
                " ZeRO-3) are not supported; ZeRO-1, ZeRO-2 and FSDP2 (fully_shard) are"
            )
        self._tap, self._body = Tap(self.modules, of_ids), Body(model)
        self._seen: list[Seen] = []
        self._body_calls: list[BodyCall] = []
        self._rewind: Callable[[], None] | None = None
        self._advised = False

    def fits(self, model: nn.Module) -> bool:
        """Whether this is the regularizer of ``model``, whose embeddings are those that they were."""
        return model is self.model and own_embeddings(model) is self._own

    @contextlib.contextmanager
    def clean_pass(self) -> Iterator[None]:
        """The model runs as ever in this context; what it embeds is remembered until the regularizer is called."""
        with contextlib.ExitStack() as stack:
            fisher = self.arguments.smart_ascent == "fisher"  # goes backward to the clean embedding
            self._seen = stack.enter_context(self._tap.recording(leaves=fisher))
            self._body_calls = stack.enter_context(self._body.recording())
            if self.arguments.smart_shared_dropout:
                stack.callback(self.model.register_forward_pre_hook(self._remember).remove)
            if self.arguments.smart_checkpointed:
                stack.enter_context(_checkpointed(self.model))
            yield

    def _remember(self, model: nn.Module, args: Any) -> None:
        self._rewind = remember_generators(next(model.parameters()).device)

    def forget(self) -> None:
        """Let go of the graph of the last clean pass."""
        self._seen, self._body_calls = [], []

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """That in which the body of the model ran in the clean pass: autocast may begin in the model's forward."""
        return self._body_calls[0].precision() if self._body_calls else contextlib.nullcontext()

    def compared(
        self,
        forward: Callable[[], Any],
        outputs: Any,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
    ) -> Comparison:
        """What of the outputs of the clean pass is compared; arguments and errors as in `__call__`."""
        logits, calls = logits_of(outputs), self._body_calls
        if logits is None and len(calls) == 1 and self._body.head is not None:
            if self.arguments.smart_ascent == "fisher":
                raise ValueError("smart_ascent='fisher' needs logits, which the model's outputs do not hold")
            items = Items.of_tokens(self.model, calls[0].states, labels, attention_mask, shift_labels)
            return Hidden(items, self.model, self._body.head, calls[0])
        if logits is None:
            raise TypeError(f"the model must return logits, or an object with logits, got {type(outputs).__name__}")
        return Logits(Items.of(self.model, logits, labels, attention_mask, shift_labels), forward, outputs)

    def __call__(
        self,
        forward: Callable[[], Any],
        outputs: Any,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        figures: dict[str, float] | None = None,
    ) -> Smoothness:
        """The regularizer of the last clean pass.

        Args:
            forward: runs the model on the inputs of the clean pass, without labels, and returns its outputs.
            outputs: of the clean pass: an object with ``logits`` (or ``start_logits`` and ``end_logits``), or logits.
                Without any, the hidden states before the head are compared, so that there are no whole logits.
            labels: those of the task, if any: items labeled -100 do not count. Floating point labels of the shape of
                the logits mean one Bernoulli distribution each.
            attention_mask: ``[B, S]``, nonzero for real tokens. Padding gets no noise, and does not count where every
                token has logits and there are no labels.
            shift_labels: labels that are aligned with the logits already.
            decoder_attention_mask: ``[B, T]``; None: the decoder's inputs are padding after a token labeled -100.
            figures: is given ``smart_noise_to_embed`` and ``smart_ascent_ratio``, for a dozen passes more.

        Raises:
            ValueError: the clean pass called nothing that is to be perturbed.
            TypeError: outputs without logits, of a model that has no head on a body.
        """
        compared = self.compared(forward, outputs, labels, attention_mask, shift_labels)
        seen = self._seen
        self.forget()
        of = sides(self.model, seen)
        chosen = [
            i for i, side in enumerate(of) if self.embeddings not in ("encoder", "decoder") or side == self.embeddings
        ]
        if not chosen:
            raise ValueError(
                f"{type(self.model).__name__} did not call what is to be perturbed in the clean pass: "
                f"{', '.join(sorted({type(each).__name__ for each in self.modules}))} (inputs_embeds= among the inputs"
                " bypasses input embeddings)"
            )
        if decoder_attention_mask is None and labels is not None and labels.dim() == 2:
            decoder_attention_mask = nn.functional.pad(labels[:, :-1] != -100, (1, 0), value=True)
        given = {"encoder": attention_mask, "decoder": decoder_attention_mask}
        embeds = tuple(seen[i].output for i in chosen)
        masks = tuple(_token_mask(given[of[i]], seen[i].output) for i in chosen)
        rewind = self._rewind if self.arguments.smart_shared_dropout else None
        run = _Perturbed(self.model, self._tap, len(seen), chosen, compared.again, rewind)
        with compared.precision():
            smart = self.arguments.loss(run, compared.loss, diagnose=figures is not None or not self._advised)
            total = smart(embeds, compared.clean, mask=masks)
            if smart.diagnose:
                ratio = smart.diagnostics.get("noise_to_embed", 0.0)
                self._advise(ratio)
            if figures is not None:
                figures["smart_noise_to_embed"] = ratio
                figures["smart_ascent_ratio"] = self._ascent_ratio(run, compared, embeds, masks)
        return Smoothness(total, compared.items.count)

    def _ascent_ratio(
        self, run: _Perturbed, compared: Comparison, embeds: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]
    ) -> float:
        """That of `smart_fast.ascent_ratio`, in the precision of training; no random number is used up."""

        def sampled(*inputs: Tensor) -> Tensor:
            return compared.sample(run(*inputs))

        squared = compared.items.kind == "numbers"
        comparison = (lambda _: squared_error) if squared else (lambda divergence: partial(divergence, reduction="sum"))
        back = remember_generators(embeds[0].device)
        try:
            with modes.setting(list(self.model.modules()), "training", False):
                return ascent_ratio(self.arguments.loss(sampled, comparison), embeds, mask=masks)
        finally:
            back()

    def _advise(self, ratio: float) -> None:
        """Warn, once, of noise out of proportion, with the setting that it hangs on."""
        if self._advised:
            return
        self._advised = True
        if _LEAST <= ratio <= _MOST:
            return
        name = _decisive(self.arguments)
        warnings.warn(
            f"SMART's noise is {ratio:.1e} times what it is added to, because of"
            f" {name}={getattr(self.arguments, name)!r}: from {_LEAST:g} to {_MOST:g} is usual. Change {name}, or take"
            " smart_recipe='recommended', whose noise has the size of the embedding's entries as its unit",
            UserWarning,
            stacklevel=2,
        )

    def close(self) -> None:
        """Take the hooks off the model."""
        self._tap.close()
        self._body.close()


class _Perturbed(nn.Module):
    """``eval_fn`` of `SMARTLoss`: what the model gives with other embeddings in the ``chosen`` of ``calls`` calls."""

    def __init__(
        self, model: nn.Module, tap: Tap, calls: int, chosen: Sequence[int], again: Callable[[], Tensor],
        rewind: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self._tap, self._calls, self._chosen, self._again, self._rewind = tap, calls, chosen, again, rewind

    def forward(self, *embeds: Tensor) -> Tensor:
        outputs: list[Tensor | None] = [None] * self._calls
        for place, embed in zip(self._chosen, embeds, strict=True):
            outputs[place] = embed
        with self._tap.replacing(outputs):
            if self._rewind is None:
                return self._again()
            back = remember_generators(embeds[0].device)
            self._rewind()  # to where the clean pass began: the same dropout
            try:
                return self._again()
            finally:
                back()


@contextlib.contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Within, ``model`` itself is there to be called, and its forward pass keeps no graph."""
    own = vars(model).get("forward")
    model.forward = checkpointed(model.forward)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _token_mask(attention_mask: Tensor | None, embed: Tensor) -> Tensor | None:
    """A mask of the embedding's positions; None for masks of another kind (``[B, 1, S, S]``)."""
    shape = embed.shape[:-1]
    if attention_mask is None or attention_mask.numel() != shape.numel():
        return None
    return attention_mask.reshape(shape).bool()  # multiple choice: [B, C, S] -> [B * C, S]


def _decisive(arguments: SMARTArguments) -> str:
    """The setting that the size of the final noise depends on most."""
    sizes: dict[str, Any] = {"smart_noise_var": arguments.smart_noise_var}
    if arguments.smart_steps:
        if arguments.smart_update == "smart-pytorch":
            return "smart_update"
        sizes["smart_step_size"] = arguments.smart_steps * float(arguments.smart_step_size or 0)
        if arguments.smart_update == "paper" and float(arguments.smart_epsilon or 0) < max(sizes.values()):
            return "smart_epsilon"
    return max(sizes, key=lambda name: abs(sizes[name]))
