"""Divergences between two sets of logits, as drop-in replacements of ``smart_pytorch.loss``.

Every function compares ``input`` (the perturbed logits) with ``target`` (the clean ones), both ``[..., V]``. On the
fused backends arithmetic is fp32, scalar losses are fp32, gradients have their tensor's dtype, and the formulas do not
cancel when the two distributions are nearly equal; ``backend="torch"`` is bit for bit smart-pytorch 0.0.4.
`jsd_loss`, which smart-pytorch lacks, computes in fp32 and without cancellation on every backend.

What each computes is a row of `smart_fast.losses.divergences`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autograd
from ..backends import backend_of_caller, calling, check_name, loaded, plain_divergence, select
from ..backends.base import REDUCTIONS
from ..checks import check_choice, check_mask, check_number, check_positive, check_same_device, check_tensor
from . import sharded, states
from .divergences import divergence

__all__ = ["hellinger_loss", "js_loss", "jsd_loss", "kl_loss", "stable_sym_kl_loss", "sym_kl_loss"]


def kl_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "batchmean",
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
    process_group: Any = None,
) -> Tensor:
    """KL(softmax(target) || softmax(input)), differentiable in both.

    Args:
        input: logits ``[..., V]``, float16, bfloat16, float32 or float64.
        target: logits of the same shape, on the same device.
        reduction: ``"batchmean"`` (the sum divided by ``input.size(0)``), ``"sum"``, ``"mean"`` (divided by the number
            of unmasked elements, V per row) or ``"none"`` (elementwise terms ``[..., V]``).
        mask: bool ``[...]``, True where a row counts. Masked rows give neither loss nor gradient, whatever they hold.
        temperature: positive. Logits are divided by it and the loss is multiplied by its square, so that gradients keep
            their size (Hinton et al., "Distilling the knowledge in a neural network", 2015).
        backend: ``"torch"``, ``"triton"``, ``"native"`` or ``"auto"``. None: the backend of the `SMARTLoss` that calls
            this function, else ``"auto"``.
        process_group: the `torch.distributed` group over which the vocabulary is sharded. Each process passes its
            slice ``[..., V_local]`` (of any width, the same of both sides) and gets the loss of the whole; gradients
            are those of its slice, provided that every process goes backward with the same upstream gradient.
            ``"none"`` gives the terms of the slice. DTensors that are ``Shard(-1)`` on a mesh of one dimension need
            no ``process_group``; their gradients, and the terms, are DTensors.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        TypeError: not a tensor, not floating point, a mask that is not bool, a reduction that is not a string, a
            ``process_group`` that is none.
        ValueError: shapes that do not match, an empty last dimension, two devices, an unknown reduction or backend, a
            temperature that is not positive and finite, DTensors with other placements.
    """
    return _divergence("kl", input, target, reduction, 1.0, mask, temperature, backend, process_group)


def sym_kl_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "sum",
    alpha: float = 1.0,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
    process_group: Any = None,
) -> Tensor:
    """alpha * KL(softmax(target) || softmax(input)) + KL(softmax(input) || softmax(target)).

    Each term holds its first distribution constant (detached), as in smart-pytorch and mt-dnn. Shapes, ``mask``,
    ``temperature``, ``backend``, ``process_group`` and errors as in `kl_loss`; ``alpha`` must be finite.
    """
    return _divergence("sym_kl", input, target, reduction, alpha, mask, temperature, backend, process_group)


def js_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "sum",
    alpha: float = 1.0,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
    process_group: Any = None,
) -> Tensor:
    """alpha * (KL(m || softmax(input)) + KL(m || softmax(target))), m their detached mean.

    smart-pytorch's and mt-dnn's Jensen-Shannon loss (with the mean as first argument, it is unbounded). Shapes,
    ``mask``, ``temperature``, ``backend``, ``process_group`` and errors as in `kl_loss`; ``alpha`` must be finite.
    """
    return _divergence("js", input, target, reduction, alpha, mask, temperature, backend, process_group)


def jsd_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "batchmean",
    beta: float = 0.5,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
    process_group: Any = None,
) -> Tensor:
    """beta * KL(softmax(target) || m) + (1 - beta) * KL(softmax(input) || m), m = beta * softmax(target) + (1 - beta) *
    softmax(input), differentiable in both, through m as well.

    The generalized Jensen-Shannon divergence of GKD (Agarwal et al., "On-Policy Distillation of Language Models", ICLR
    2024), with ``input`` the student and ``target`` the teacher. Bounded by log(2), and finite where only one side
    leaves a class out. Never negative, whatever the dtypes of the two sides (they may differ). fp32 inside, float64 for
    float64 logits: scalars have that dtype, the terms of ``"none"`` the promoted dtype of the logits. Where the sides
    have nearly nothing in common the gradients, which are then nearly zero, are exact to about 1e-7, not to their size.

    Shapes, ``mask``, ``temperature``, ``backend``, ``process_group`` and errors as in `kl_loss`. ``beta`` is a number
    between 0 and 1 and no tensor. The loss vanishes at both ends; divided by beta or by 1 - beta its limits are
    ``kl_loss(input, target)`` (beta to 0) and ``kl_loss(target, input)`` (beta to 1).

    Raises:
        TypeError: ``beta`` is not a real number; what `kl_loss` raises.
        ValueError: ``beta`` is not in (0, 1); what `kl_loss` raises.
    """
    beta = divergence("jsd").check(beta)  # before any short way
    return _divergence("jsd", input, target, reduction, beta, mask, temperature, backend, process_group)


#: The losses above by kind.
LOSSES: dict[str, Callable[..., Tensor]] = {"kl": kl_loss, "sym_kl": sym_kl_loss, "js": js_loss, "jsd": jsd_loss}


#: Kind, reduction and alpha of these losses where nothing else is asked for.
DEFAULTS = {loss: (kind, divergence(kind).reduction, divergence(kind).alpha) for kind, loss in LOSSES.items()}


def compare(name: str, loss_fn: Any, perturbed: Any, state: Any, backend: str, ascent: bool = False) -> Tensor:
    """``loss_fn`` (of that ``name``) of two states, as `states.compare` has it, with ``backend`` for the losses of this
    package. ``ascent``: gradients to ``perturbed`` alone will be asked for."""
    known = DEFAULTS.get(loss_fn) if type(loss_fn) is FunctionType else None
    if known is not None and not torch.compiler.is_compiling():
        found = _plain_divergence(backend, perturbed, state, *known)
        if found is not None:
            return found
    with calling(backend, ascent=ascent):
        loss: Tensor = states.compare(name, loss_fn, perturbed, state)
    return loss


def _plain_divergence(backend: str, input: Any, target: Any, kind: str, reduction: str, alpha: float) -> Tensor | None:
    """In eager mode the divergence of two tensors about which there is nothing to say, by a fused backend; None of
    others."""
    short = plain_divergence(backend)
    found = None if short is None else short(input, target, kind, reduction, alpha)
    if found is not None:
        return found
    if type(input) is not Tensor or type(target) is not Tensor or input.shape != target.shape or input.numel() == 0:
        return None
    chosen = loaded(backend, input, target, kind) if input.device == target.device else None
    if chosen is None:
        return None
    return autograd.divergence(chosen, input, target, kind, reduction, alpha, None)


def hellinger_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    alpha: float = 1.0,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """alpha * (sqrt(softmax(input)) - sqrt(softmax(target)))**2, differentiable in both.

    The value of mt-dnn's ``HLCriterion`` (its mean over elements is the default here). mt-dnn detaches both sides, so
    that its criterion trains nothing; this one has gradients. Runs in PyTorch, in fp32, on every backend. Shapes,
    ``mask``, ``backend`` and errors as in `kl_loss`; ``alpha`` must be finite.
    """
    input, target = _prepare(input, target, reduction, alpha, mask, backend)
    log_p = F.log_softmax(input, dim=-1, dtype=_compute_dtype(input))
    log_q = F.log_softmax(target, dim=-1, dtype=_compute_dtype(target))
    # exp(log / 2), not sqrt(exp(log)): the gradient stays finite where a probability underflows.
    terms = ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square()
    return alpha * _reduce(terms, reduction, mask)


def stable_sym_kl_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "batchmean",
    alpha: float = 1.0,
    *,
    epsilon: float = 1e-6,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """alpha * 2 (p - q) (c(p) - c(q)) with the bounded log-odds c(p) = -log(1 / (p + epsilon) - 1 + epsilon).

    mt-dnn's ``NsSymKlCriterion`` (the loss of its adversarial training): p = softmax(input), q = softmax(target), the
    log-odds detached. ``"batchmean"`` divides by ``input.size(0)``; mt-dnn by the number of rows, the same for
    ``[B, V]``. Runs in PyTorch, in fp32, on every backend. Shapes, ``mask``, ``backend`` and errors as in `kl_loss`;
    ``alpha`` and ``epsilon`` must be finite.
    """
    check_number("epsilon", epsilon)
    input, target = _prepare(input, target, reduction, alpha, mask, backend)
    p = F.softmax(input, dim=-1, dtype=_compute_dtype(input))
    q = F.softmax(target, dim=-1, dtype=_compute_dtype(target))
    odds = (_bounded_log_odds(p, epsilon) - _bounded_log_odds(q, epsilon)).detach()
    return alpha * _reduce(2.0 * (p - q) * odds, reduction, mask)


def _divergence(
    kind: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    alpha: Any,
    mask: Tensor | None,
    temperature: float,
    backend: str | None,
    group: Any,
) -> Tensor:
    check_choice("reduction", reduction, REDUCTIONS)
    backend = _backend(backend)
    if (
        mask is None and group is None and type(alpha) is float and type(temperature) is float and temperature == 1.0
        and reduction != "none" and math.isfinite(alpha) and not torch.compiler.is_compiling()
    ):  # fmt: skip
        loss = _plain_divergence(backend, input, target, kind, reduction, alpha)
        if loss is not None:
            return loss
    if sharded.is_dtensor(input) or sharded.is_dtensor(target):
        input, target, mask, group, rewrap = sharded.local(input, target, mask, group)
        loss = _divergence(kind, input, target, reduction, alpha, mask, temperature, backend, group)
        return rewrap(loss) if reduction == "none" else loss
    _check_pair(input, target, mask)
    divergence(kind).check(alpha)
    if type(temperature) is not float or temperature != 1.0:  # the default costs nothing
        check_positive("temperature", temperature)
    if group is not None:
        sharded.check_group(group)
        if input.shape != target.shape:
            raise ValueError(
                f"input and target must have the same shape, got {tuple(input.shape)} and {tuple(target.shape)}"
            )
    if input.numel() == 0 or target.numel() == 0:
        return _nothing(input, target, reduction)
    # smart-pytorch lets leading dimensions broadcast; so does the path that is bit for bit the same.
    same = input.shape == target.shape
    chosen = select(backend if same else "torch", input, target, numbers=(alpha,), kind=kind)
    if group is not None:
        return autograd.parallel_divergence(chosen, input, target, kind, reduction, alpha, mask, temperature, group)
    return autograd.divergence(chosen, input, target, kind, reduction, alpha, mask, temperature)


def _backend(backend: str | None) -> str:
    if backend is None:
        return backend_of_caller()
    return check_name(backend)


def _check_pair(input: Any, target: Any, mask: Tensor | None) -> None:
    for name, logits in (("input", input), ("target", target)):
        if check_tensor(name, logits).is_complex():
            raise TypeError(f"{name} must hold real logits, got {logits.dtype}")
    if input.shape != target.shape:
        try:
            torch.broadcast_shapes(input.shape, target.shape)
            matching = input.dim() > 0 and target.dim() > 0 and input.shape[-1] == target.shape[-1] and mask is None
        except RuntimeError:
            matching = False
        if not matching:
            raise ValueError(
                f"input and target must have the same shape, got {tuple(input.shape)} and {tuple(target.shape)}"
            )
    check_same_device("input", input.device, "target", target.device)
    if mask is not None:
        check_mask(mask, input.shape, input.device, "input")


def _nothing(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The loss of an empty batch: zero (or no terms), with zero gradients."""
    terms = (input + target) * 0.0
    return terms if reduction == "none" else terms.sum()


def _prepare(
    input: Tensor, target: Tensor, reduction: str, alpha: Any, mask: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Checked arguments, with masked logits replaced before they can reach a gradient."""
    check_choice("reduction", reduction, REDUCTIONS)
    _backend(backend)
    _check_pair(input, target, mask)
    check_number("alpha", alpha)
    if mask is None:
        return input, target
    rows = mask.unsqueeze(-1)
    return torch.where(rows, input, 0.0), torch.where(rows, target, 0.0)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _bounded_log_odds(p: Tensor, epsilon: float) -> Tensor:
    return -(1.0 / (p + epsilon) - 1.0 + epsilon).log()


def _reduce(terms: Tensor, reduction: str, mask: Tensor | None) -> Tensor:
    if mask is not None:
        terms = torch.where(mask.unsqueeze(-1), terms, 0.0)
    if reduction == "none":
        return terms
    total = terms.sum()
    if reduction == "sum" or terms.numel() == 0:
        return total
    if reduction == "batchmean":
        return total / terms.size(0)
    return total / (terms.numel() if mask is None else (mask.sum() * terms.size(-1)).clamp(min=1))
