"""Liger-Kernel's divergences (https://github.com/linkedin/Liger-Kernel), where there is a GPU and the package.

None of them is SMART's loss as it stands: each gives gradients to one side only. Where two calls of one add up to
exactly smart-pytorch's loss with all of its gradients, the pair is a rival; the others are shown beside the case,
checked in float64 against what they compute, and compared with nobody.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .divergences import Divergence, LinearDivergence, check_logits, compare_linear, divergence64, linear64
from .task import Contestant, Finding, Task

LIGER = "Liger-Kernel "
LOG_SOFTMAX = "it takes log-probabilities: torch's log_softmax, forward and backward, is in its time"
TWICE = (
    "two calls, one a side, each with the other side's distribution held constant: together smart-pytorch's loss and "
    "all of its gradients"
)
NOTES = {
    "KLDiv twice": f"{TWICE}; {LOG_SOFTMAX}",
    "KLDiv": f"KL(target || input) with a gradient to the input only; {LOG_SOFTMAX}",
    "JSD": "the true Jensen-Shannon divergence (beta = 0.5, its mean is not held constant), divided by the number of "
    f"rows, with a gradient to the input only; {LOG_SOFTMAX}",
    "FusedLinearKLDiv twice": f"{TWICE}; it takes probabilities [N, V], which a GEMM and a softmax make whole for each",
    "FusedLinearKLDiv": "KL(target || input) with gradients to the input and, from its side, the weight; it takes the "
    "target's probabilities [N, V], which a GEMM and a softmax make whole",
    "FusedLinearJSD": "the true Jensen-Shannon divergence (beta = 0.5), divided by the number of tokens, with gradients"
    " to the input and, from its side, the weight; the target and the weight on its side are constant",
}
CLASSES = {
    "KLDiv": "LigerKLDIVLoss",
    "JSD": "LigerJSD",
    "FusedLinearKLDiv": "LigerFusedLinearKLDivLoss",
    "FusedLinearJSD": "LigerFusedLinearJSD",
}


def contestants(task: Task, device: torch.device) -> Iterator[Contestant]:
    """Those of Liger-Kernel's losses that have something to do with ``task``; skipped ones say why."""
    if isinstance(task, Divergence):
        names = ["KLDiv"] if task.kind == "kl" else ["KLDiv twice"]
        names += ["JSD"] if task.kind == "js" else []
        make: Callable[..., Contestant] = on_logits
    elif isinstance(task, LinearDivergence):
        names = ["FusedLinearKLDiv"] if task.kind == "kl" else ["FusedLinearKLDiv twice"]
        names += ["FusedLinearJSD"] if task.kind == "js" else []
        make = on_hidden_states
    else:
        return
    reason = why_not(device)
    for name in names:
        role = "rival" if name.endswith(" twice") else "other"
        kernel, missing = (None, reason) if reason else _kernel(name.removesuffix(" twice"))
        if kernel is None:
            yield Contestant(LIGER + name, role, None, skipped=missing, note=NOTES[name])
        else:
            yield make(name, role, kernel, task)


def why_not(device: torch.device) -> str | None:
    """Why none of them can run on ``device``, or None."""
    if device.type != "cuda":
        return "its kernels are Triton's and need a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    return None


def _kernel(name: str) -> tuple[Any, str | None]:
    """``(class, None)`` or ``(None, why not)``."""
    try:
        module = importlib.import_module("liger_kernel.transformers")
    except Exception as error:
        return None, f"liger-kernel cannot be imported: {type(error).__name__}"
    kernel = getattr(module, CLASSES[name], None)
    version = importlib.metadata.version("liger-kernel")
    return kernel, None if kernel else f"liger-kernel {version} has no {CLASSES[name]}"


def true_js64(x: Tensor, t: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, summed over rows: half of KL(p || m) + KL(q || m), m the mean of p and q."""
    log_p, log_q = x.log_softmax(-1), t.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum() / 2


def on_logits(name: str, role: str, kernel: Any, task: Divergence) -> Contestant:
    """A contestant on logits ``[N, V]``; ``kernel`` is Liger-Kernel's class."""
    if name == "KLDiv twice":
        run = task.call(_kldiv_twice(task.kind, kernel))
        return Contestant(LIGER + name, role, run, note=NOTES[name])
    loss = kernel(reduction="batchmean", log_target=True) if name == "KLDiv" else kernel(beta=0.5)

    def one_sided(input: Tensor, target: Tensor) -> Tensor:
        result: Tensor = loss(input.log_softmax(-1), target.detach().log_softmax(-1))
        return result

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return (divergence64("kl", x, t) if name == "KLDiv" else true_js64(x, t)) / task.rows

    def check(run: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Finding]:
        return check_logits(run(*inputs), inputs, exact, task.rounding())

    return Contestant(LIGER + name, role, task.call(one_sided, sides=1), check=check, note=NOTES[name])


def _kldiv_twice(kind: str, kernel: Any) -> Callable[..., Tensor]:
    if kind == "sym_kl":
        loss = kernel(reduction="sum", log_target=True)

        def sym_kl(input: Tensor, target: Tensor) -> Tensor:
            log_p, log_q = input.log_softmax(-1), target.log_softmax(-1)
            result: Tensor = loss(log_p, log_q.detach()) + loss(log_q, log_p.detach())
            return result

        return sym_kl
    loss = kernel(reduction="sum", log_target=False)

    def js(input: Tensor, target: Tensor) -> Tensor:
        log_p, log_q = input.log_softmax(-1), target.log_softmax(-1)
        mean = (log_p.detach().exp() + log_q.detach().exp()) / 2
        result: Tensor = loss(log_p, mean) + loss(log_q, mean)
        return result

    return js


def on_hidden_states(name: str, role: str, kernel: Any, task: LinearDivergence) -> Contestant:
    """A contestant on hidden states ``[N, H]`` and a weight ``[V, H]``."""
    if name == "FusedLinearKLDiv twice":
        run = task.call(_linear_kldiv_twice(task.kind, kernel(reduction="sum")))
        return Contestant(LIGER + name, role, run, note=NOTES[name])
    loss = kernel(reduction="batchmean") if name == "FusedLinearKLDiv" else kernel(jsd_beta=0.5)

    def one_sided(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        if name == "FusedLinearKLDiv":
            result: Tensor = loss(input, weight, _probabilities(target, weight))
        else:
            result = loss(input, weight, target.detach(), weight.detach(), None)
        return result

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return (divergence64("kl", x, t) if name == "FusedLinearKLDiv" else true_js64(x, t)) / task.rows

    def check(run: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Finding]:
        return compare_linear(run(*inputs), linear64(inputs, exact, sides=1, rounding=task.rounding()))

    return Contestant(LIGER + name, role, task.call(one_sided, sides=1), check=check, note=NOTES[name])


@torch.no_grad()
def _probabilities(states: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(states, weight).softmax(-1)


def _linear_kldiv_twice(kind: str, loss: Callable[..., Any]) -> Callable[..., Tensor]:
    def both(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        if kind == "js":
            mean = (_probabilities(input, weight) + _probabilities(target, weight)) / 2
            result: Tensor = loss(input, weight, mean) + loss(target, weight, mean)
            return result
        first = loss(input, weight, _probabilities(target, weight))  # one set of probabilities at a time
        result = first + loss(target, weight, _probabilities(input, weight))
        return result

    return both
