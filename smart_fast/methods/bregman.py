"""Bregman proximal point method: how far a step may take the model's outputs from those of a teacher."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import autograd
from ..ascent.precision import HALF
from ..backends import backend_of_caller, calling, check_name, select
from ..checks import check_callable, check_choice, check_count, check_number, check_tensor
from ..losses import states
from ..training import ddp_fsdp

__all__ = ["BregmanProximal", "paper_beta", "symmetric_kl"]

Beta = float | Callable[[int], float]
_REDUCTIONS = ("batchmean", "sum", "mean")


class BregmanProximal(nn.Module):
    """``mu * D(student, teacher)``, the teacher being an average of the student's past weights.

    SMART's other half (Jiang et al., 2020, section 3.2): the momentum Bregman proximal point method, MBPP::

        proximal = BregmanProximal(model, beta=0.999)
        ...
        logits = model(inputs)
        loss = task_loss(logits) + proximal(logits, inputs)
        loss.backward()
        optimizer.step()
        proximal.update()

    The teacher starts as a copy of the model when `forward`, `update` or `teacher` is first used, and moves with each
    `update`: teacher <- beta * teacher + (1 - beta) * model. ``beta=0`` is the method without momentum, VBPP: update it
    every S steps or every epoch then, since a teacher that equals the student restrains nothing.

    D is the symmetric KL divergence of the paper, KL(student || teacher) + KL(teacher || student), with its whole
    gradient to the student; `sym_kl_loss` as ``loss_fn`` has the same value and, detaching as smart-pytorch and mt-dnn
    do, only the gradient of KL(teacher || student): about half of it.

    The teacher is a `torch.optim.swa_utils.AveragedModel` beside the module tree: always in eval mode, without
    gradients, in no ``parameters()`` and no bucket of DDP, but in ``state_dict()`` (with the number of updates, in the
    keys of `AveragedModel`) and moved by ``to()``. Its buffers are the model's as of the last update, since averages of
    integer buffers would be wrong. ``model`` is held and not registered; copy or pickle the two together.

    ``model`` may be wrapped in `DistributedDataParallel`, or be a part of a module that is. With equal models, teachers
    are equal in all processes; statistics of BatchNorm are broadcast if ``model`` is the wrapper itself, as that does.

    Args:
        model: the student, a `Module`.
        beta: momentum in [0, 1], or a function of the number of updates made before, such as `paper_beta` gives.
        mu: weight of the term, at least 0.
        loss_fn: ``loss_fn(student, teacher) -> scalar`` (`torch.nn.functional.mse_loss` for regression); for several
            outputs a list, tuple or dict of them, or one function of both structures, as in `SMARTLoss`. None: the
            symmetric KL divergence of logits ``[..., V]``.
        reduction: of the default ``loss_fn``: ``"batchmean"``, ``"sum"`` or ``"mean"``, as in `kl_loss`.
        output_fn: takes from what the model returns that which is compared. None: its ``logits``, if it has such an
            attribute, else all of it.
        backend: as in `SMARTLoss`, of the default ``loss_fn`` and all others that ask.

    ``beta`` and ``mu`` are attributes that may be changed at any time; they are in no ``state_dict()``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``beta`` outside [0, 1], a negative ``mu``, an unknown ``reduction`` or ``backend``.
    """

    model: nn.Module
    _average: AveragedModel | None

    def __init__(
        self,
        model: nn.Module,
        beta: Beta = 0.99,
        mu: float = 1.0,
        *,
        loss_fn: Any = None,
        reduction: str = "batchmean",
        output_fn: Callable[[Any], Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a Module, got {type(model).__name__}")
        check_choice("reduction", reduction, _REDUCTIONS)
        if loss_fn is not None:
            states.check_losses("loss_fn", loss_fn)
        if output_fn is not None:
            check_callable("output_fn", output_fn)
        self.__dict__["model"] = model  # past nn.Module, which would register it
        self.__dict__["_average"] = None
        self.beta = beta
        self.mu = mu
        self.loss_fn = functools.partial(symmetric_kl, reduction=reduction) if loss_fn is None else loss_fn
        self.output_fn = _logits if output_fn is None else output_fn
        self.backend = check_name(backend)
        if not callable(beta):
            _check_beta(beta)
        _check_mu(mu)

    def forward(self, output: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        """``mu * loss_fn(output, teacher(*args, **kwargs))``, a scalar with the graph of ``output`` alone.

        Args:
            output: what the student returned: a tensor, a list, tuple or dict of them, an object with ``logits``.
            *args, **kwargs: what it was called with.

        Raises:
            TypeError: no inputs.
            ValueError: outputs, or losses and outputs, that differ in structure; ``mu`` is now negative.
        """
        if not (args or kwargs):
            raise TypeError("the teacher needs inputs: proximal(output, *args, **kwargs) with those of the model")
        mu = _check_mu(self.mu)
        with torch.no_grad():
            target = self.output_fn(self.teacher(*args, **kwargs))
        with calling(self.backend, ascent=False):
            loss: Tensor = states.compare("loss_fn", self.loss_fn, self.output_fn(output), target)
        return mu * loss

    @torch.no_grad()
    def update(self) -> None:
        """Move the teacher towards the model: after ``optimizer.step()``, in every process.

        Raises:
            TypeError: ``beta`` gives something else than a number.
            ValueError: ``beta`` gives a number outside [0, 1]; the model's parameters are others than the teacher's.
        """
        beta = _check_beta(self.beta(self.steps) if callable(self.beta) else self.beta)
        average, student = self._start(), _unwrapped(self.model)
        _check_same(average.module, student)
        average.multi_avg_fn = functools.partial(_move, beta)
        average.update_parameters(student)
        if isinstance(self.model, DistributedDataParallel) and self.model.broadcast_buffers:
            for buffer in average.module.buffers():
                if buffer.is_floating_point():  # statistics: those of the first process, which DDP gives the model too
                    dist.broadcast(buffer, group=self.model.process_group, group_src=0)

    @property
    def teacher(self) -> nn.Module:
        """The averaged model, in eval mode and without gradients."""
        module: nn.Module = self._start().module
        return module

    @property
    def steps(self) -> int:
        """The number of updates so far."""
        return 0 if self._average is None else int(self._average.n_averaged) - 1

    def extra_repr(self) -> str:
        return f"beta={self.beta!r}, mu={self.mu!r}, steps={self.steps}"

    def _start(self) -> AveragedModel:
        """The teacher, made when it is first needed: the model is then where it trains, and equal in all processes."""
        if self._average is None:
            if torch.compiler.is_compiling():
                raise RuntimeError("the teacher is to be made outside torch.compile: use proximal.teacher before")
            with torch.inference_mode(False):
                average = AveragedModel(_unwrapped(self.model)).eval().requires_grad_(False)
            average.n_averaged += 1  # the weights of today: the first update averages, and does not copy
            if self.beta != 0 and any(each.dtype in HALF for each in average.module.parameters()):
                warnings.warn(
                    "model has half precision parameters: the steps of their average are lost in rounding where beta is"
                    " close to 1; train float32 parameters under autocast instead",
                    stacklevel=3,
                )
            self.__dict__["_average"] = average  # past nn.Module, which would register it
        assert self._average is not None
        return self._average

    # What nn.Module does for submodules; the count of updates stays on the CPU, where reading it waits for no device.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._average is not None and recurse:
            self._average.module._apply(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._average is not None:
            self._average.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not own:  # saved before the teacher was made
            self.__dict__["_average"] = None
            return
        try:
            missing, unexpected = self._start().load_state_dict(own, strict=False)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [prefix + key for key in missing]
        unexpected_keys += [prefix + key for key in unexpected]


def paper_beta(total_steps: int) -> Callable[[int], float]:
    """``beta`` of the paper's experiments: 0.99 for the first 10 % of ``total_steps`` updates, then 0.999.

    Raises:
        TypeError, ValueError: ``total_steps`` is not an integer, or not positive.
    """
    return functools.partial(_paper_beta, check_count("total_steps", total_steps, least=1))


def _paper_beta(total_steps: int, step: int) -> float:
    return 0.99 if 10 * (step + 1) <= total_steps else 0.999


def symmetric_kl(student: Tensor, teacher: Tensor, reduction: str, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) + KL(student || teacher) of logits ``[..., V]``, without cancellation on every backend.

    ``mask``: bool ``[...]``, the rows that count.
    """
    check_tensor("output", student)
    check_tensor("the teacher's output", teacher)
    if student.shape != teacher.shape:
        raise ValueError(f"output must have the teacher's shape {tuple(teacher.shape)}, got {tuple(student.shape)}")
    if student.numel() == 0:
        return (student * 0.0).sum()
    backend = select(backend_of_caller(), student, teacher)
    pairs = (student, teacher), (teacher, student)
    one, other = (autograd.divergence(backend, *pair, "kl", reduction, 1.0, mask, exact=True) for pair in pairs)
    return one + other


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def _move(beta: float, teacher: Any, student: Any, _: Any) -> None:
    get_ema_multi_avg_fn(beta)(teacher, student, _)  # closures, which it returns, cannot be pickled


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module in the wrappers of DDP and torch.compile.

    Raises:
        TypeError: parameters are sharded by FSDP2.
    """
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = getattr(model, "module" if isinstance(model, DistributedDataParallel) else "_orig_mod")
    if ddp_fsdp.is_sharded(model):
        raise TypeError("model must not be sharded by FSDP2 (fully_shard), whose modules cannot be copied")
    return model


def _check_same(teacher: nn.Module, student: nn.Module) -> None:
    """Check that the two have the same parameters and buffers: `AveragedModel` pairs them by position."""
    here, there = (
        [(name, tuple(each.shape), each.dtype) for name, each in (*of.named_parameters(), *of.named_buffers())]
        for of in (teacher, student)
    )
    for ours, theirs in itertools.zip_longest(here, there):
        if ours != theirs:
            raise ValueError(f"model must keep the teacher's parameters and buffers, got {theirs} in place of {ours}")


def _check_beta(beta: Any) -> float:
    number = float(check_number("beta", beta))
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    return number


def _check_mu(mu: Any) -> float:
    number = float(check_number("mu", mu))
    if number < 0.0:
        raise ValueError(f"mu must not be negative, got {mu}")
    return number
