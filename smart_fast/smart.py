"""SMARTLoss: perturb, compare, ascend, compare again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import autograd, diagnostics
from .ascent import modes, precision
from .ascent.base import Passes
from .ascent.climb import climb
from .checks import check_embeddings
from .losses import states
from .losses.logits import compare
from .options import Options, signature
from .prepared import Prepared, prepare

__all__ = ["SMARTLoss"]


class SMARTLoss(nn.Module):
    """Smoothness-inducing adversarial regularization (SMART; Jiang et al., ACL 2020).

    Looks for a small perturbation of an embedding that changes the output of ``eval_fn`` as much as possible, and
    returns how much it changes. Drop-in for ``smart_pytorch.SMARTLoss`` 0.0.4: the first eight parameters are its own.

    Args:
        eval_fn: maps an embedding to a state (usually logits), or to a list, tuple or dict of states. A `Module`
            becomes a submodule.
        loss_fn: compares the perturbed state with the clean one, ``loss_fn(perturbed, state) -> scalar``. With several
            states, a list, tuple or dict of such functions (their sum is taken), or one function of both structures.
        loss_last_fn: the loss that is returned; None: ``loss_fn``.
        others: the options of `smart_fast.options.Options`, by keyword or in their order there, and documented there.

    Every argument stays an attribute and may be changed between calls; what it is changed to is checked at the next.
    `torch.compile` takes the whole into one graph, but for ``every_n_steps`` and ``start_step``.
    """

    def __init__(
        self, eval_fn: Callable[..., Any], loss_fn: Any, loss_last_fn: Any = None, *positional: Any, **named: Any
    ) -> None:
        super().__init__()
        self.eval_fn = eval_fn
        self.loss_fn = loss_fn
        self.loss_last_fn = loss_fn if loss_last_fn is None else loss_last_fn
        for name, value in vars(Options.given(positional, named)).items():
            setattr(self, name, value)
        self.steps = 0
        self.record = diagnostics.Record()
        self._prepared = prepare(self, None)

    def forward(
        self, embed: Tensor | tuple[Tensor, ...], state: Any, *args: Any, mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """The regularizer, a scalar with the graph of ``embed``, ``state`` and the parameters of ``eval_fn``.

        Args:
            embed: clean embedding ``[..., D]``, floating point; or a tuple of them, passed to ``eval_fn`` in order.
            state: what ``eval_fn`` gives for the clean embedding. The ascent compares with it detached, the returned
                loss with its graph.
            *args, **kwargs: passed to ``eval_fn`` after the perturbed embedding (attention masks, say).
            mask: bool ``[...]``, True for real tokens; a tuple of masks or None for a tuple of embeddings. Masked
                positions get no noise and no gradient, and do not count in a norm over more than the last dimension.

        Works under `torch.no_grad` and `torch.inference_mode`. An embedding without elements gives zero.

        Raises:
            TypeError: an argument of the wrong type, an integer embedding among them.
            ValueError: an empty last dimension; a mask that does not fit; states, or losses and states, that differ in
                structure; a loss that is not a scalar.
            RuntimeError: the loss does not depend on the perturbed embedding.
        """
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # The ascent needs gradients, which inference tensors cannot take part in: go on with ordinary copies.
            with torch.inference_mode(False), torch.no_grad():
                embed, state, args, mask, kwargs = tree_map_only(
                    Tensor, torch.clone, (embed, state, args, mask, kwargs)
                )
                return self.forward(embed, state, *args, mask=mask, **kwargs)
        prepared = prepare(self, self._prepared)
        if prepared is not self._prepared:  # a module's attributes are set slowly
            self._prepared = prepared
        number = self.steps
        if self.training and not torch.compiler.is_compiling():  # a number that changes would be compiled anew
            vars(self)["steps"] = number + 1
        if prepared.options.skips(number, self.training):
            return states.no_graph(embed)
        run = modes.runner(prepared.eval_fn, args, kwargs, prepared.options.shared_dropout)
        if not prepared.options.freeze_batch_norm:
            return self._regularizer(prepared, run, embed, state, mask)
        with modes.frozen_batch_norm(self.eval_fn):
            return self._regularizer(prepared, run, embed, state, mask)

    def _regularizer(self, prepared: Prepared, run: Callable[..., Any], embed: Any, state: Any, mask: Any) -> Tensor:
        chosen = prepared.options
        embeds, masks = check_embeddings(embed, mask, chosen.generator)
        states.check_matches(self.loss_fn if chosen.num_steps > 0 else None, self.loss_last_fn, state)
        for each in embeds:
            if each.numel() == 0:
                return states.nothing(embeds, state, self.parameters())
        self.record.told = self.record.told or precision.warns_of_lost_noise(embeds, chosen)
        climbed = partial(compare, "loss_fn", self.loss_fn, backend=chosen.backend, ascent=True)
        passes = Passes(run, climbed, embeds, state)
        found = climb(prepared.direction, passes, masks, chosen, prepared.step, chosen.diagnose)
        if chosen.diagnose:
            self.record.take(embeds, masks, found, prepared.step)
        perturbed = found.perturbed
        if torch.is_grad_enabled():
            perturbed = [autograd.track(each) for each in perturbed]
        return compare("loss_last_fn", self.loss_last_fn, run(*perturbed), state, chosen.backend)

    @property
    def diagnostics(self) -> dict[str, float]:
        """Figures of the last call, if ``diagnose`` is set (else none); reading them waits for the device.

        ``noise_to_embed``: norm of the final noise over that of the embedding. ``changed``: share of the embedding's
        entries that noise changed. With an ascent also ``step_to_noise``, norm of the last step before projection over
        that of the initial noise; ``cosine`` of the noise before and after; ``dead_rows``, share of rows whose gradient
        is zero or not finite. Warns once where noise is lost in rounding or the ascent does not move it.
        """
        return self.record.read()

    def extra_repr(self) -> str:
        names = ("num_steps", "step_size", "epsilon", "noise_var", "backend", "update", "ascent", "scale")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


SMARTLoss.__init__.__signature__ = signature(SMARTLoss.__init__)  # type: ignore[attr-defined]
