"""The options of `SMARTLoss`: one dataclass, which checks itself. `SMARTLoss` takes its signature from here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .ascent import DIRECTIONS, precision
from .backends import check_name, updates
from .backends.base import UPDATES, Step
from .checks import check_bool, check_callable, check_choice, check_count, check_number
from .noise import NOISES
from .norms import Norm, inf_norm

SCALES = ("absolute", "relative")


@dataclass(frozen=True)
class Options:
    """Options of `SMARTLoss`, each an attribute of it too. The first five in smart-pytorch's order, with its defaults.

    Args:
        norm_fn: norm that scales the noise, ``[..., D] -> [..., 1]``: `inf_norm`, `l2_norm`, `l1_norm`, `sentence_norm`
            of one of them (computed in the kernel), or any callable.
        num_steps: number of ascent steps K, K >= 0. The cost is that of ``1 + K`` forward passes and
            ``1 + K`` backward passes of ``eval_fn``, K of them to the input only.
        step_size: length of the step along the gradient.
        epsilon: added to the norm before dividing by it; with ``update="paper"`` and ``"sign"`` the radius of the ball.
        noise_var: standard deviation of the initial noise (the name is smart-pytorch's).
        backend: ``"torch"``, ``"triton"``, ``"native"``, or ``"auto"``: the fastest one for the tensors at hand.
        update: ``"smart-pytorch"``, noise <- s / (norm(s) + epsilon) with s = noise + step_size * g; or ``"sift"``,
            noise <- noise + step_size * g / (norm(g) + epsilon); or ``"paper"`` (its Algorithm 1),
            noise + step_size * g / norm(g) projected onto the ball of radius epsilon; or ``"sign"``,
            noise + step_size * sign(g) clipped to +-epsilon, whatever the norm.
        ascent: ``"perturbed"``: the gradient of ``loss_fn`` at the perturbed embedding; or ``"fisher"``: the product of
            softmax(state) - onehot(argmax state) with the Jacobian of the clean state, without a perturbed pass, for
            one step. ``embed`` must then require grad, and ``state`` be computed from it.
        scale: ``"absolute"``; or ``"relative"``: noise_var, step_size and epsilon are in units of the root mean square
            of each token's embedding, so that one setting suits word embeddings and normalized ones.
        noise: the initial noise: ``"normal"``; or ``"uniform"``, on +-sqrt(3) noise_var, whose standard deviation is
            the same.
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
            pass has drawn. That pass must be a call of ``eval_fn``, made after the `SMARTLoss` was.
        freeze_batch_norm: True: the perturbed passes of ``eval_fn``, a Module, normalize by statistics of the batch, as
            ever in training mode, but leave the running statistics of BatchNorm alone.
        every_n_steps, start_step: compute the regularizer in call number ``start_step`` (from 0) in training mode and
            in every n-th one after it. The others return a zero of no graph, which can take part in a sum that goes
            backward. `SMARTLoss.steps`, a plain attribute, counts the calls: it is in no ``state_dict``.
        skip_in_eval: True: return zero, without any pass, in eval mode.
        diagnose: True: `SMARTLoss.diagnostics` tells what the ascent does to the noise, at the cost of some passes over
            it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a negative ``num_steps``, a non-finite number, an unknown ``backend``, ``update``, ``ascent``,
            ``scale``, ``noise`` or ``ascent_dtype``.
    """

    norm_fn: Norm = inf_norm
    num_steps: int = 1
    step_size: float | Tensor = 1e-3
    epsilon: float | Tensor = 1e-6
    noise_var: float | Tensor = 1e-5
    _: KW_ONLY
    backend: str = "auto"
    update: str = "smart-pytorch"
    ascent: str = "perturbed"
    scale: str = "absolute"
    noise: str = "normal"
    ascent_dtype: torch.dtype | None = None
    generator: torch.Generator | None = None
    loss_scale: float | torch.amp.GradScaler | None = None
    freeze_parameters: bool | None = None
    ascent_dropout: bool = True
    shared_dropout: bool = False
    freeze_batch_norm: bool = False
    every_n_steps: int = 1
    start_step: int = 0
    skip_in_eval: bool = False
    diagnose: bool = False

    def __post_init__(self) -> None:
        check_callable("norm_fn", self.norm_fn)
        check_count("num_steps", self.num_steps)
        for name in ("step_size", "epsilon", "noise_var"):
            check_number(name, getattr(self, name))
        check_name(self.backend)
        check_choice("update", self.update, UPDATES)
        check_choice("ascent", self.ascent, tuple(DIRECTIONS))
        if updates.rule(self.update).ball and not isinstance(self.epsilon, Tensor) and self.epsilon < 0:
            raise ValueError(f"epsilon, the radius of a ball, must not be negative, got {self.epsilon}")
        if self.ascent == "fisher" and self.num_steps > 1:
            raise ValueError(f"ascent='fisher' takes one step: num_steps must be 0 or 1, got {self.num_steps}")
        check_choice("scale", self.scale, SCALES)
        check_choice("noise", self.noise, tuple(NOISES))
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(self.generator).__name__}")
        precision.check_ascent_dtype(self.ascent_dtype)
        precision.check_loss_scale(self.loss_scale)
        check_count("every_n_steps", self.every_n_steps, least=1)
        check_count("start_step", self.start_step)
        for name in ("ascent_dropout", "shared_dropout", "freeze_batch_norm", "skip_in_eval", "diagnose"):
            check_bool(name, getattr(self, name))
        if self.freeze_parameters is not None:
            check_bool("freeze_parameters", self.freeze_parameters)

    def check_eval_fn(self, eval_fn: Any) -> None:
        """Check that ``eval_fn`` is a Module where an option controls one.

        Raises:
            TypeError: it is not callable.
            ValueError: it is no Module.
        """
        check_callable("eval_fn", eval_fn)
        needs_module = {
            "freeze_parameters=True": self.freeze_parameters,
            "ascent_dropout=False": not self.ascent_dropout,
            "shared_dropout=True": self.shared_dropout,
            "freeze_batch_norm=True": self.freeze_batch_norm,
        }
        for setting, used in needs_module.items():
            if used and not isinstance(eval_fn, nn.Module):
                raise ValueError(f"{setting} needs an eval_fn that is a Module, got {type(eval_fn).__name__}")

    @property
    def step(self) -> Step:
        """What an ascent step takes."""
        numbers = self.noise_var, self.step_size, self.epsilon
        tensors = tuple(each for each in numbers if isinstance(each, Tensor))
        return Step(self.norm_fn, *numbers, self.update, tensors, self.noise)

    def skips(self, number: int, training: bool) -> bool:
        """Whether call ``number`` in that mode gives zero.

        Raises:
            RuntimeError: inside torch.compile, where a number that changes would be compiled anew each time.
        """
        if not training:
            return self.skip_in_eval
        if self.every_n_steps == 1 and self.start_step == 0:
            return False
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "every_n_steps and start_step do not work inside torch.compile: compile eval_fn, or decide outside"
            )
        return number < self.start_step or (number - self.start_step) % self.every_n_steps != 0

    @staticmethod
    def given(positional: tuple[Any, ...], named: dict[str, Any]) -> Options:
        """The options that follow the three arguments of `SMARTLoss` that are none.

        Raises:
            TypeError: there are more without a name than may be, counted as the caller counts them.
        """
        most = sum(not each.kw_only for each in fields(Options))
        if len(positional) > most:
            raise TypeError(
                f"SMARTLoss() takes at most {3 + most} arguments without their names, got {3 + len(positional)}"
            )
        return Options(*positional, **named)

    @staticmethod
    def of(module: Any) -> Options:
        """The options that stand on ``module``, checked."""
        return Options(**{name: getattr(module, name) for name in NAMES})


# Who writes SMARTLoss(typo=1) is told of SMARTLoss.
Options.__init__.__qualname__ = "SMARTLoss.__init__"


def signature(init: Callable[..., None]) -> inspect.Signature:
    """That of ``init``, with the options, in their order, in place of its ``*args`` and ``**kwargs``."""
    own = [each for each in inspect.signature(init).parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    return inspect.Signature([*own, *inspect.signature(Options).parameters.values()], return_annotation=None)


NAMES = tuple(each.name for each in fields(Options))
_attributes, _entries = attrgetter(*NAMES), itemgetter(*NAMES)


def values(module: Any) -> tuple[Any, ...]:
    """The values of all options that stand on ``module``, in the order of `NAMES`."""
    try:
        found: tuple[Any, ...] = _entries(vars(module))  # a third of what attributes cost (`python -m bench host`)
    except KeyError:  # a Module among them stands elsewhere
        found = _attributes(module)
    return found
