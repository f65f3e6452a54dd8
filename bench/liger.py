"""Liger-Kernel's losses beside ours. They compute other things, so they are timed as such and are nobody's rivals:

    KLDiv            KL(q || p) from log p and q, which torch makes of the logits first; gradient to the input only
    JSD              the Jensen-Shannon divergence proper (beta = 1/2: bounded; smart-pytorch's and ours holds the mean
                     constant as first argument); takes log-probabilities; gradient to the input only
    FusedLinearJSD   the same from hidden states, the target's projection constant; gradients to input and weight

None has a gradient to the target, and there is no symmetric KL. Results are checked against float64 of what each
computes.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .language_model import LinearDivergence
from .operations import Divergence
from .task import Finding, deviation, finding

NAME = "Liger-Kernel"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}

Compute = Callable[..., tuple[Tensor, ...]]


def why_not(device: torch.device) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if device.type == "cuda" else "its kernels are Triton's: they need a GPU"


def contestants(task: Any, device: torch.device) -> Iterator[tuple[str, Compute | None, Any]]:
    """``(name, timed call, check)`` of what there is to compare with ``task``; no call where it cannot run."""
    found: list[tuple[str, str, Callable[[], Compute], Callable[..., Any]]] = []
    if isinstance(task, Divergence) and task.kind == "kl":
        found.append(("KLDiv", "input", _kl_div, _exact_kl))
    if isinstance(task, Divergence) and task.kind == "js":
        found.append(("JSD", "input", _jsd, _exact_jsd))
    if isinstance(task, LinearDivergence) and task.kind == "js":
        found.append(("FusedLinearJSD", "input and weight", _fused_linear_jsd, _exact_linear_jsd))
    for name, gradients, make, exact in found:
        run = None if why_not(device) else make()
        yield f"{NAME} {name} (gradient to {gradients} only)", run, _check(exact)


def _check(exact: Callable[..., tuple[Tensor, ...]]) -> Callable[..., list[Finding]]:
    def check(run: Compute, inputs: tuple[Any, ...]) -> list[Finding]:
        results = run(*inputs)
        doubles = [each.detach().double().requires_grad_() for each in inputs]
        expected = exact(*doubles)
        tolerance = TOLERANCE[inputs[0].dtype]
        return [
            finding("loss", deviation(results[:1], expected[:1]), tolerance),
            finding("gradients", deviation(results[1:], expected[1:]), tolerance),
        ]

    return check


def _kl_div() -> Compute:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss_fn = LigerKLDIVLoss(reduction="batchmean")

    def run(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss = loss_fn(input.log_softmax(-1), target.detach().softmax(-1))
        return loss, *torch.autograd.grad(loss, input)

    return run


def _exact_kl(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    loss = F.kl_div(x.log_softmax(-1), t.detach().softmax(-1), reduction="batchmean")
    return loss.detach(), *torch.autograd.grad(loss, x)


def _jsd() -> Compute:
    from liger_kernel.transformers import LigerJSD

    loss_fn = LigerJSD(beta=0.5)

    def run(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss = loss_fn(input.log_softmax(-1), target.detach().log_softmax(-1))
        return loss, *torch.autograd.grad(loss, input)

    return run


def _jensen_shannon(x: Tensor, t: Tensor) -> Tensor:
    """The mean over rows."""
    log_p, log_q = x.log_softmax(-1), t.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * terms.sum() / x.shape[0]


def _exact_jsd(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    loss = _jensen_shannon(x, t.detach())
    return loss.detach(), *torch.autograd.grad(loss, x)


def _fused_linear_jsd() -> Compute:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss_fn = LigerFusedLinearJSD(jsd_beta=0.5)

    def run(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        loss = loss_fn(input, weight, target.detach(), weight.detach(), None)
        return loss, *torch.autograd.grad(loss, (input, weight))

    return run


def _exact_linear_jsd(x: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    loss = _jensen_shannon(F.linear(x, w), F.linear(t, w).detach())
    return loss.detach(), *torch.autograd.grad(loss, (x, w))
