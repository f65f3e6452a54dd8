"""SMARTLoss: perturb, compare, ascend, compare again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from . import autograd, options
from .ascent import fisher, modes, precision
from .ascent import perturbed as perturbed_pass
from .ascent.input_gradients import InputGradients
from .backends import calling, plain_divergence, select
from .backends.base import Step
from .checks import check_mask, check_tensor
from .diagnostics import Record
from .losses import states
from .losses.logits import DEFAULTS
from .noise import token_rms
from .norms import Norm, inf_norm
from .training import ddp_fsdp

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
        norm_fn: norm that scales the noise, ``[..., D] -> [..., 1]``: `inf_norm`, `l2_norm`, `l1_norm`, `sentence_norm`
            of one of them (computed in the kernel), or any callable.
        num_steps: number of ascent steps K, K >= 0. The cost is that of ``1 + K`` forward passes and
            ``1 + K`` backward passes of ``eval_fn``, K of them to the input only.
        step_size: length of the step along the gradient.
        epsilon: added to the norm before dividing by it; with ``update="paper"`` the radius of the ball.
        noise_var: standard deviation of the initial noise (the name is smart-pytorch's).
        backend: ``"torch"``, ``"triton"``, ``"native"``, or ``"auto"``: the fastest one for the tensors at hand.
        update: ``"smart-pytorch"``, noise <- s / (norm(s) + epsilon) with s = noise + step_size * g; or ``"sift"``,
            noise <- noise + step_size * g / (norm(g) + epsilon); or ``"paper"`` (its Algorithm 1),
            noise + step_size * g / norm(g) projected onto the ball of radius epsilon.
        ascent: ``"perturbed"``: the gradient of ``loss_fn`` at the perturbed embedding; or ``"fisher"``: the product of
            softmax(state) - onehot(argmax state) with the Jacobian of the clean state, without a perturbed pass, for
            one step. ``embed`` must then require grad, and ``state`` be computed from it.
        scale: ``"absolute"``; or ``"relative"``: noise_var, step_size and epsilon are in units of the root mean square
            of each token's embedding, so that one setting suits word embeddings and normalized ones.
        ascent_dtype: `torch.bfloat16` or `torch.float16`: the passes of the ascent run under autocast in it. The final
            pass keeps the precision of the caller.
        generator: where noise is drawn from; None: torch's default generator of the embedding's device. It must live
            on that device.
        loss_scale: factor of the ascent loss, so that its gradients do not underflow in float16: a number, or the
            `torch.amp.GradScaler` of the training loop. The gradient is divided by it, in float32; exactly, where it is
            a power of two.
        freeze_parameters: True: parameters of ``eval_fn``, a Module, do not require grad while the ascent runs, so that
            nobody computes their gradients there. None: if ``eval_fn`` is a compiled module, which otherwise does.
        ascent_dropout: False: ``eval_fn``, a Module, runs without dropout in the ascent (its submodules but BatchNorm
            and its like are in eval mode there).
        shared_dropout: True: the perturbed passes of ``eval_fn``, a Module, draw the dropout masks that its last clean
            pass has drawn. That pass must be a call of ``eval_fn``, made after this module was.
        freeze_batch_norm: True: the perturbed passes of ``eval_fn``, a Module, normalize by statistics of the batch, as
            ever in training mode, but leave the running statistics of BatchNorm alone.
        every_n_steps, start_step: compute the regularizer in call number ``start_step`` (from 0) in training mode and
            in every n-th one after it. The others return a zero of no graph, which can take part in a sum that goes
            backward. `steps`, a plain attribute, counts the calls: it is in no ``state_dict``.
        skip_in_eval: True: return zero, without any pass, in eval mode.
        diagnose: True: `diagnostics` tells what the ascent does to the noise, at the cost of some passes over it.

    Every argument stays an attribute and may be changed between calls.

    `torch.compile` takes the whole into one graph, but for ``every_n_steps`` and ``start_step``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a negative ``num_steps``, a non-finite number, an unknown ``backend``, ``update``, ``ascent``,
            ``scale`` or ``ascent_dtype``; a control of Modules with an ``eval_fn`` that is none.
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
        loss_scale: float | torch.amp.GradScaler | None = None,
        freeze_parameters: bool | None = None,
        ascent_dropout: bool = True,
        shared_dropout: bool = False,
        freeze_batch_norm: bool = False,
        every_n_steps: int = 1,
        start_step: int = 0,
        skip_in_eval: bool = False,
        diagnose: bool = False,
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
        self.loss_scale = loss_scale
        self.freeze_parameters = freeze_parameters
        self.ascent_dropout = ascent_dropout
        self.shared_dropout = shared_dropout
        self.freeze_batch_norm = freeze_batch_norm
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.skip_in_eval = skip_in_eval
        self.diagnose = diagnose
        self.steps = 0
        self._warned = False
        self._record = Record()
        self._input_gradients = InputGradients()
        self._checked = self._check_settings()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in options.NAMES:
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
        step = self._checked or self._check_settings()
        if self._skips():
            first = check_tensor("embed", embed[0] if isinstance(embed, (tuple, list)) and embed else embed)
            return torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=torch.is_grad_enabled())
        if self.freeze_batch_norm:
            with modes.setting(modes.training_batch_norms(self.eval_fn), "track_running_stats", False):
                return self._regularizer(step, embed, state, args, mask, kwargs)
        return self._regularizer(step, embed, state, args, mask, kwargs)

    def _regularizer(self, step: Step, embed: Any, state: Any, args: Any, mask: Any, kwargs: Any) -> Tensor:
        run, num_steps = self.eval_fn, self.num_steps
        if self.shared_dropout:
            run = modes.ReplayedDropout.of(run).replay
        several = isinstance(embed, (tuple, list))
        embeds = tuple(embed) if several else (embed,)
        masks = self._check_inputs(embeds, mask, several)
        if num_steps > 0:
            states.check_match("loss_fn", self.loss_fn, state)
            clean = states.detach(state) if self.ascent == "perturbed" else state
        states.check_match("loss_last_fn", self.loss_last_fn, state)
        for each in embeds:
            if each.numel() == 0:
                return _nothing(embeds, state, self.parameters())
            if each.dtype in precision.HALF and not self._warned:
                self._warn_of_lost_noise(each.dtype, step)
        backends = [select(self.backend, each, numbers=step.tensors) for each in embeds]

        units = [token_rms(each) if self.scale == "relative" else None for each in embeds]
        each_embed, keep = range(len(embeds)), self.diagnose
        perturbed: list[Any] = [None] * len(embeds)
        noises: list[Any] = [None] * len(embeds)
        for i in each_embed:
            perturbed[i], noises[i] = autograd.perturb(
                backends[i], embeds[i], step.noise_var, self.generator, masks[i], num_steps > 0 or keep, units[i]
            )
        started = list(noises)
        grads: list[Any] = [None] * len(embeds)
        for taken in range(1, num_steps + 1):
            grads = self._ascent_gradients(run, embeds, perturbed, clean, args, kwargs)
            for i in each_embed:
                perturbed[i], noises[i] = autograd.ascend(
                    backends[i], embeds[i], grads[i], noises[i], step, masks[i], taken < num_steps or keep, units[i]
                )
        if self.diagnose:
            self._diagnose(embeds, masks, started, noises, perturbed, grads, step, units, backends)
        if torch.is_grad_enabled():
            perturbed = [autograd.track(each) for each in perturbed]
        perturbed_state = run(*perturbed, *args, **kwargs)
        return self._compare("loss_last_fn", self.loss_last_fn, perturbed_state, state)

    @property
    def diagnostics(self) -> dict[str, float]:
        """Figures of the last call, if ``diagnose`` is set (else none); reading them waits for the device.

        ``noise_to_embed``: norm of the final noise over that of the embedding. ``changed``: share of the embedding's
        entries that noise changed. With an ascent also ``step_to_noise``, norm of the last step before projection over
        that of the initial noise; ``cosine`` of the noise before and after; ``dead_rows``, share of rows whose gradient
        is zero or not finite. Warns once where noise is lost in rounding or the ascent does not move it.
        """
        return self._record.read()

    def _diagnose(self, embeds: Any, masks: Any, first: Any, last: Any, perturbed: Any, grads: Any, step: Step,
                  units: Any, backends: Any) -> None:  # fmt: skip
        if torch.compiler.is_compiling():
            raise RuntimeError("diagnose does not work inside torch.compile: diagnose in eager mode")
        self._record.start()
        for i, embed in enumerate(embeds):
            before, after = (
                autograd.noise_values(backends[i], embed, each, step.noise_var, masks[i], units[i])
                for each in (first[i], last[i])
            )
            self._record.add(embed, masks[i], before, after, perturbed[i], grads[i], step, units[i])

    def extra_repr(self) -> str:
        names = ("num_steps", "step_size", "epsilon", "noise_var", "backend", "update", "ascent", "scale")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _check_settings(self) -> Step:
        """Check the attributes; the settings of a step. Remembered until an attribute changes."""
        step = options.check(self)
        if not torch.compiler.is_compiling():
            self.__dict__["_checked"] = step
            self.__dict__["_wrapped"] = ddp_fsdp.is_wrapped(self.eval_fn)
            if self.shared_dropout:
                modes.ReplayedDropout.of(self.eval_fn)
        return step

    def _skips(self) -> bool:
        """Whether this call is to give zero; counts it."""
        if not self.training:
            return self.skip_in_eval
        always = self.every_n_steps == 1 and self.start_step == 0
        if torch.compiler.is_compiling():  # a number that changes would be compiled anew each time
            if not always:
                raise RuntimeError(
                    "every_n_steps and start_step do not work inside torch.compile: compile eval_fn, or decide outside"
                )
            return False
        number = self.steps
        self.__dict__["steps"] = number + 1
        return not always and (number < self.start_step or (number - self.start_step) % self.every_n_steps != 0)

    def _warn_of_lost_noise(self, dtype: torch.dtype, step: Step) -> None:
        relative = self.scale == "relative"
        if (lost := precision.lost_noise(dtype, step, self.num_steps, relative)) is not None:
            precision.warn_of_lost_noise(dtype, *lost, relative)
            if not torch.compiler.is_compiling():  # there it is told when traced, and a flag would trace anew
                self._warned = True

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

    def _ascent_gradients(
        self, run: Any, embeds: Sequence[Tensor], perturbed: list[Tensor], state: Any, args: Any, kwargs: Any
    ) -> list[Tensor]:
        """Gradients to the perturbed embeddings, or what ``ascent`` takes in their place."""
        if self.ascent == "fisher":
            return fisher.gradients(self.eval_fn, embeds, state, args, kwargs, self.backend)
        return perturbed_pass.gradients(self, run, perturbed, state, args, kwargs)

    def _compare(self, name: str, loss_fn: Any, perturbed: Any, state: Any) -> Tensor:
        known = DEFAULTS.get(loss_fn) if type(loss_fn) is FunctionType else None
        if known is not None and (short := plain_divergence(self.backend)) is not None:
            found = short(perturbed, state, *known)
            if found is not None:
                return found
        with calling(self.backend, ascent=name == "loss_fn"):
            loss: Tensor = states.compare(name, loss_fn, perturbed, state)
        return loss

    def _outside_inference_mode(self, *args: Any, **kwargs: Any) -> Tensor:
        """The ascent needs gradients, which inference tensors cannot take part in: continue on ordinary copies."""
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
            return self.forward(*args, **kwargs)


def _nothing(embeds: tuple[Tensor, ...], state: Any, parameters: Iterable[Tensor]) -> Tensor:
    """The loss of an empty batch: zero, with zero gradients, even where means over nothing are NaN in ``state``."""
    tensors = [t for t in tree_iter((embeds, state, list(parameters))) if isinstance(t, Tensor)]
    empty = [t.flatten()[:0].sum().to(embeds[0]) for t in tensors if t.is_floating_point()]
    return sum(empty, start=embeds[0].new_zeros(()))
