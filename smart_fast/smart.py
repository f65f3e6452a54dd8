"""SMARTLoss: perturb, compare, ascend, compare again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from . import autograd, distributed, states
from ._checks import check_callable, check_choice, check_count, check_mask, check_number, check_tensor
from .ascent import InputGradients
from .backends import calling, check_name, select
from .backends.base import UPDATES, Step
from .norms import Norm, inf_norm

__all__ = ["SMARTLoss"]

#: What `SMARTLoss` checks when it has changed.
_SETTINGS = frozenset(
    (
        *("eval_fn", "loss_fn", "loss_last_fn", "norm_fn", "num_steps", "step_size", "epsilon", "noise_var"),
        *("backend", "update", "ascent", "scale", "ascent_dtype", "generator"),
    )
)


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
        norm_fn: norm that scales the noise, ``[..., D] -> [..., 1]``: `inf_norm`, `l2_norm`, `l1_norm`, `sentence_norm`
            of one of them (computed in the kernel), or any callable.
        num_steps: number of ascent steps K, K >= 0. The cost is that of ``1 + K`` forward passes and
            ``1 + K`` backward passes of ``eval_fn``, K of them to the input only.
        step_size: length of the step along the gradient.
        epsilon: added to the norm before dividing by it.
        noise_var: standard deviation of the initial noise (the name is smart-pytorch's).
        backend: ``"torch"``, ``"triton"``, ``"native"``, or ``"auto"``: the fastest one for the tensors at hand.
        update: ``"smart-pytorch"``, noise <- s / (norm(s) + epsilon) with s = noise + step_size * g; or ``"sift"``,
            noise <- noise + step_size * g / (norm(g) + epsilon).
        ascent, scale, ascent_dtype: only ``"perturbed"``, ``"absolute"`` and None in this version.
        generator: where noise is drawn from; None: torch's default generator of the embedding's device. It must live
            on that device.

    Every argument stays an attribute and may be changed between calls.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a negative ``num_steps``, a non-finite number, an unknown ``backend``, ``update``, ``ascent`` or
            ``scale``.
    """

    _wrapped = False

    def __init__(
        self,
        eval_fn: Callable[..., Any],
        loss_fn: Any,
        loss_last_fn: Any = None,
        norm_fn: Norm = inf_norm,
        num_steps: int = 1,
        step_size: float = 1e-3,
        epsilon: float = 1e-6,
        noise_var: float = 1e-5,
        *,
        backend: str = "auto",
        update: str = "smart-pytorch",
        ascent: str = "perturbed",
        scale: str = "absolute",
        ascent_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.eval_fn = eval_fn
        self.loss_fn = loss_fn
        self.loss_last_fn = loss_fn if loss_last_fn is None else loss_last_fn
        self.norm_fn = norm_fn
        self.num_steps = num_steps
        self.step_size = step_size
        self.epsilon = epsilon
        self.noise_var = noise_var
        self.backend = backend
        self.update = update
        self.ascent = ascent
        self.scale = scale
        self.ascent_dtype = ascent_dtype
        self.generator = generator
        self._input_gradients = InputGradients()
        self._checked = self._check_settings()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _SETTINGS:
            self.__dict__["_checked"] = None

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
            return self._outside_inference_mode(embed, state, *args, mask=mask, **kwargs)
        step, num_steps = self._checked or self._check_settings(), self.num_steps
        several = isinstance(embed, (tuple, list))
        embeds = tuple(embed) if several else (embed,)
        masks = self._check_inputs(embeds, mask, several)
        if num_steps > 0:
            states.check_match("loss_fn", self.loss_fn, state)
            clean = states.detach(state)
        states.check_match("loss_last_fn", self.loss_last_fn, state)
        for each in embeds:
            if each.numel() == 0:
                return _nothing(embeds, state, self.parameters())
        numbers = (step.noise_var, step.step_size, step.epsilon)
        backends = [select(self.backend, each, numbers=numbers) for each in embeds]

        perturbed, noises = _unzip(
            [
                autograd.perturb(backend, each, step.noise_var, self.generator, each_mask, keep_noise=num_steps > 0)
                for backend, each, each_mask in zip(backends, embeds, masks, strict=True)
            ]
        )
        for taken in range(1, num_steps + 1):
            grads = self._ascent_gradients(perturbed, clean, args, kwargs)
            perturbed, noises = _unzip(
                [
                    autograd.ascend(backend, each, grad, noise, step, each_mask, keep_noise=taken < num_steps)
                    for backend, each, grad, noise, each_mask in zip(
                        backends, embeds, grads, noises, masks, strict=True
                    )
                ]
            )
        if torch.is_grad_enabled():
            perturbed = [autograd.track(each) for each in perturbed]
        perturbed_state = self.eval_fn(*perturbed, *args, **kwargs)
        return self._compare("loss_last_fn", self.loss_last_fn, perturbed_state, state)

    def extra_repr(self) -> str:
        names = ("num_steps", "step_size", "epsilon", "noise_var", "backend", "update")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _check_settings(self) -> Step:
        """Check the attributes; the settings of a step. Remembered until an attribute changes."""
        check_callable("eval_fn", self.eval_fn)
        states.check_losses("loss_fn", self.loss_fn)
        states.check_losses("loss_last_fn", self.loss_last_fn)
        check_callable("norm_fn", self.norm_fn)
        check_count("num_steps", self.num_steps)
        for name in ("step_size", "epsilon", "noise_var"):
            check_number(name, getattr(self, name))
        check_name(self.backend)
        check_choice("update", self.update, UPDATES, planned=("paper",))
        check_choice("ascent", self.ascent, ("perturbed",), planned=("fisher",))
        check_choice("scale", self.scale, ("absolute",), planned=("relative",))
        if self.ascent_dtype is not None:
            raise ValueError(f"ascent_dtype={self.ascent_dtype} is not available in this version; it must be None")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(self.generator).__name__}")
        step = Step(self.norm_fn, self.noise_var, self.step_size, self.epsilon, self.update)
        if not torch.compiler.is_compiling():
            self.__dict__["_checked"] = step
            self.__dict__["_wrapped"] = distributed.is_wrapped(self.eval_fn)
        return step

    def _check_inputs(self, embeds: tuple[Any, ...], mask: Any, several: bool) -> tuple[Tensor | None, ...]:
        """Check embeddings, masks and generator; return one mask or None for each embedding."""
        if not embeds:
            raise ValueError("embed must hold at least one embedding, got an empty tuple")
        masks = tuple(mask) if isinstance(mask, (tuple, list)) else (mask,) * len(embeds)
        if len(masks) != len(embeds):
            raise ValueError(f"mask must hold one mask for each of the {len(embeds)} embeddings, got {len(masks)}")
        for index, (embed, each_mask) in enumerate(zip(embeds, masks, strict=True)):
            name = f"embed[{index}]" if several else "embed"
            check_tensor(name, embed)
            if each_mask is not None:
                check_mask(each_mask, embed.shape, embed.device, name)
            if self.generator is not None and self.generator.device.type != embed.device.type:
                raise ValueError(
                    f"generator must be on the device of {name}, {embed.device}, got {self.generator.device}"
                )
        return masks

    def _ascent_gradients(self, perturbed: list[Tensor], clean: Any, args: Any, kwargs: Any) -> list[Tensor]:
        eval_fn, loss_fn = self.eval_fn, self.loss_fn
        if self._wrapped and torch.compiler.is_compiling():
            return distributed.eagerly(self._ascent_gradients, perturbed, clean, args, kwargs)

        def loss_of(*inputs: Tensor) -> Tensor:
            return distributed.check_loss(self._compare("loss_fn", loss_fn, eval_fn(*inputs, *args, **kwargs), clean))

        with torch.enable_grad(), distributed.ascent(eval_fn):
            return self._input_gradients(loss_of, [autograd.track(each) for each in perturbed])

    def _compare(self, name: str, loss_fn: Any, perturbed: Any, state: Any) -> Tensor:
        with calling(self.backend, ascent=name == "loss_fn"):
            loss: Tensor = states.compare(name, loss_fn, perturbed, state)
        return loss

    def _outside_inference_mode(self, *args: Any, **kwargs: Any) -> Tensor:
        """The ascent needs gradients, which inference tensors cannot take part in: continue on ordinary copies."""
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
            return self.forward(*args, **kwargs)


def _unzip(pairs: list[tuple[Tensor, Tensor | None]]) -> tuple[list[Tensor], list[Any]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _nothing(embeds: tuple[Tensor, ...], state: Any, parameters: Iterable[Tensor]) -> Tensor:
    """The loss of an empty batch: zero, with zero gradients, even where means over nothing are NaN in ``state``."""
    tensors = [t for t in tree_iter((embeds, state, list(parameters))) if isinstance(t, Tensor)]
    empty = [t.flatten()[:0].sum().to(embeds[0]) for t in tensors if t.is_floating_point()]
    return sum(empty, start=embeds[0].new_zeros(()))
