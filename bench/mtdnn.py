"""mt-dnn's formulas (https://github.com/namisan/mt-dnn, the code of SMART's authors), written anew from its sources.

Its criteria compute in fp32 whatever the logits' dtype. Those that are smart-pytorch's losses up to a constant factor
are rivals, summed as those are; the "stable" divergences and the whole perturbation built on them are something else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import WEIGHT, Divergence, check_logits, divergence64
from .operations import EPSILON, STEP_SIZE, Ascend, Perturb
from .regularizer import NOISE_VAR, Regularizer
from .task import Contestant, Finding, Task

MTDNN = "mt-dnn "
ODDS_EPSILON = 1e-6
IN_FP32 = "smart-pytorch's loss and all of its gradients, computed in fp32"
NOTES = {
    "generate_noise": "the same noise: drawn, scaled, added",
    "SmartPerturbation step": "smart-pytorch's step and norm, and a test on the host whether the gradient is finite; "
    "without mt-dnn's diagnostics",
    "KlCriterion": IN_FP32,
    "SymKlCriterion": f"{IN_FP32}; summed, not divided by the batch",
    "JSCriterion": f"{IN_FP32}; summed, not divided by the batch",
    "stable_kl": "2 p (c(p) - c(q)) with constant bounded log-odds c, divided by the number of rows: not a KL "
    "divergence; a gradient to the input only",
    "NsSymKlCriterion": "stable_kl in both directions, 2 (p - q) (c(p) - c(q)) with constant bounded log-odds c",
    "SmartPerturbation": "SMART whose ascent climbs the sum of stable_kl, not the mean of KL; SymKlCriterion is "
    "returned; without mt-dnn's diagnostics",
}
OTHERS = ("stable_kl", "NsSymKlCriterion", "SmartPerturbation")  # they compute something else
CRITERIA = {"kl": "KlCriterion", "sym_kl": "SymKlCriterion", "js": "JSCriterion"}


def contestants(task: Task) -> Iterator[Contestant]:
    """Those of mt-dnn's formulas that have something to do with ``task``."""
    if isinstance(task, Perturb) and not task.variant:
        yield _contestant("generate_noise", task.call(_perturb(task.noise_var)))
    elif isinstance(task, Ascend) and task.update == "smart-pytorch":
        yield _contestant("SmartPerturbation step", task.call(_step))
    elif isinstance(task, Divergence):
        yield _contestant(CRITERIA[task.kind], task.call(_criterion(task.kind)))
        yield from _stable(task)
    elif isinstance(task, Regularizer):
        yield _contestant("SmartPerturbation", task.call(_smart(task.model)), _smart_check(task))


def _contestant(name: str, run: Callable[..., Any], check: Callable[..., list[Finding]] | None = None) -> Contestant:
    return Contestant(MTDNN + name, "other" if name in OTHERS else "rival", run, check=check, note=NOTES[name])


def _noise_like(embed: Tensor, noise_var: float) -> Tensor:
    return torch.empty_like(embed, requires_grad=False).normal_() * noise_var


def _perturb(noise_var: float) -> Callable[..., Tensor]:
    return lambda embed, mask, unit: embed + _noise_like(embed, noise_var)


def _moved(noise: Tensor, grad: Tensor) -> Tensor:
    length = grad.norm()
    if length.isnan() or length.isinf():  # mt-dnn's call ends here, with a loss of zero
        raise FloatingPointError("the gradient of the ascent is not finite")
    step = noise + STEP_SIZE * grad
    return step / (step.abs().max(-1, keepdim=True)[0] + EPSILON)


def _step(embed: Tensor, grad: Tensor, noise: Tensor, kept: Tensor, seed: Tensor) -> Tensor:
    return embed + _moved(noise, grad)


def _criterion(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    def kl(input: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(_log(input), F.softmax(target.float(), -1), reduction="batchmean")

    def sym_kl(input: Tensor, target: Tensor) -> Tensor:
        p, q = (F.softmax(each.detach().float(), -1) for each in (input, target))
        return F.kl_div(_log(input), q, reduction="sum") + F.kl_div(_log(target), p, reduction="sum")

    def js(input: Tensor, target: Tensor) -> Tensor:
        mean = 0.5 * (F.softmax(target.detach().float(), -1) + F.softmax(input.detach().float(), -1))
        return F.kl_div(_log(input), mean, reduction="sum") + F.kl_div(_log(target), mean, reduction="sum")

    return {"kl": kl, "sym_kl": sym_kl, "js": js}[kind]


def _log(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), -1)


def _stable_kl(input: Tensor, target: Tensor) -> Tensor:
    """The sum over all elements; a gradient to ``input`` only."""
    p, q = _log(input).exp(), _log(target.detach()).exp()
    odds = [-(1 / (each + ODDS_EPSILON) - 1 + ODDS_EPSILON).detach().log() for each in (p, q)]
    return (2 * p * (odds[0] - odds[1])).sum()


def stable_kl64(x: Tensor, t: Tensor) -> Tensor:
    """`_stable_kl` in float64, its bounded log-odds as log((p + e) / (1 - (1 - e) (p + e)))."""
    p, q = x.softmax(-1), t.detach().softmax(-1)
    raised = p.detach() + ODDS_EPSILON, q + ODDS_EPSILON
    of_p, of_q = (each.log() - (1 - (1 - ODDS_EPSILON) * each).log() for each in raised)
    return 2 * (p * (of_p - of_q)).sum()


def _stable(task: Divergence) -> Iterator[Contestant]:
    """mt-dnn's own divergences beside a case of the true ones."""
    rows = task.rows

    def both(x: Tensor, t: Tensor, one: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return (one(x, t) + one(t, x)) / rows

    if task.kind == "kl":
        run = task.call(lambda input, target: _stable_kl(input, target) / rows, sides=1)
        yield _contestant("stable_kl", run, _logits_check(task, lambda x, t: stable_kl64(x, t) / rows))
    elif task.kind == "sym_kl":
        run = task.call(lambda input, target: both(input, target, _stable_kl))
        yield _contestant("NsSymKlCriterion", run, _logits_check(task, lambda x, t: both(x, t, stable_kl64)))


def _logits_check(task: Divergence, exact: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., list[Finding]]:
    return lambda run, inputs: check_logits(run(*inputs), inputs, exact, task.rounding())


def _smart(model: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """One ascent step and the returned loss, from an embedding and clean logits."""
    sym_kl = _criterion("sym_kl")

    def loss(embed: Tensor, state: Tensor) -> Tensor:
        noise = _noise_like(embed, NOISE_VAR).requires_grad_()
        (grad,) = torch.autograd.grad(_stable_kl(model(embed + noise), state), noise)
        return sym_kl(model(embed + _moved(noise, grad).detach()), state)

    return loss


def _smart_check(task: Regularizer) -> Callable[..., list[Finding]]:
    return lambda run, inputs: _Smart(task).check(run, inputs, None)


class _Smart(Regularizer):
    """A regularizer's task whose reference climbs stable_kl."""

    def __init__(self, task: Regularizer) -> None:
        self.__dict__.update(task.__dict__)
        self._reference = None

    def _exact(self, embed: Tensor, state: Tensor, noise: Tensor) -> list[Tensor]:
        """Loss and gradients (embedding, clean logits, parameters) in float64, from the given noise."""
        model = copy.deepcopy(self.model).double()
        clean = state.detach().double().requires_grad_()
        start = (embed.detach().double() + noise).requires_grad_()
        (grad,) = torch.autograd.grad(stable_kl64(model(start), clean), start)
        step = noise + STEP_SIZE * grad
        moved = embed.detach().double() + step / (step.abs().amax(-1, keepdim=True) + EPSILON)
        moved.requires_grad_()
        loss = divergence64("sym_kl", model(moved), clean)
        return [loss.detach(), *torch.autograd.grad(WEIGHT * loss, (moved, clean, *self._used(model)))]
