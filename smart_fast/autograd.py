"""The operations of SMART as autograd sees them, whichever backend computes them.

The only file that knows `save_for_backward`. Fused gradients are computed by kernels and are not differentiable
themselves (no double backward); ``backend="torch"`` is ordinary PyTorch and is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import log_ratio
from .backends.base import Backend, DivergenceSpec, Step
from .losses import passes, sharded
from .losses.chunks import Operands, Plan
from .losses.softcap import Capped
from .noise import draw_seed
from .training import compiling


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, which nobody waits for where gradients are not differentiated."""
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def first(ctx: Any, *grads: Tensor) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return first


class _Shift(torch.autograd.Function):
    """embed -> embed + something constant: the gradient passes through, except at masked rows."""

    @staticmethod
    def forward(ctx: Any, embed: Tensor, perturbed: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            ctx.save_for_backward(mask)
        return _as_output(ctx, perturbed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        for mask in ctx.saved_tensors:
            grad = torch.where(mask.unsqueeze(-1), grad, 0.0)
        return grad, None, None


class _Track(torch.autograd.Function):
    """A tensor that requires grad and is no leaf: unlike a leaf, ``eval_fn`` may modify it in place."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, perturbed: Tensor) -> Tensor:
        return _as_output(ctx, perturbed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _as_output(ctx: Any, perturbed: Tensor) -> Tensor:
    """The input itself, as autograd allows where it was modified; a view could not be modified in place later on."""
    if torch.compiler.is_compiling():
        return perturbed.clone()  # which Inductor takes out again
    ctx.mark_dirty(perturbed)
    return perturbed


def track(perturbed: Tensor) -> Tensor:
    """``perturbed``, requiring grad as smart-pytorch's does even for frozen embeddings."""
    if perturbed.requires_grad:
        return perturbed
    if torch.compiler.is_compiling():
        anchor = compiling.anchor(perturbed.device)
    else:
        anchor = torch.empty((), requires_grad=True)
    tracked: Tensor = _Track.apply(anchor, perturbed)
    return tracked


def perturb(
    backend: Backend,
    embed: Tensor,
    noise_var: Any,
    generator: torch.Generator | None,
    mask: Tensor | None,
    keep_noise: bool,
    unit: Tensor | None = None,
    noise_kind: str = "normal",
) -> tuple[Tensor, Tensor]:
    """``embed`` plus fresh noise of a ``noise_kind`` (`smart_fast.noise.NOISES`), and that noise, as `ascend` of the
    same backend takes it (if ``keep_noise``)."""
    if _has_nodes(backend):
        return backend.perturb_fresh(embed, generator, noise_var, mask, keep_noise, unit, noise_kind)
    seed = draw_seed(embed.device, generator)
    perturbed, noise = backend.perturb(embed.detach(), seed, float(noise_var), mask, keep_noise, unit, noise_kind)
    return shift(embed, perturbed, mask), noise


def noise_values(
    backend: Backend, embed: Tensor, noise: Tensor, noise_var: Any, mask: Tensor | None,
    unit: Tensor | None, noise_kind: str = "normal",
) -> Tensor:  # fmt: skip
    """The noise itself, where `perturb` gave its seed."""
    if noise.dtype != torch.int64:
        return noise
    zeros = torch.zeros_like(embed, dtype=torch.float32)
    return backend.perturb(zeros, noise, float(noise_var), mask, False, unit, noise_kind)[0]


def _has_nodes(backend: Backend) -> bool:
    """Whether the operations of ``backend`` are differentiable by themselves: in C++ that costs a fraction of what it
    costs here. A compiler traces the functions of this file instead."""
    return backend.nodes == "always" or (backend.nodes == "eager" and not torch.compiler.is_compiling())


def ascend(
    backend: Backend, embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None,
    keep_noise: bool, unit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``embed`` plus the noise moved along ``grad``, and that noise if another step will need it."""
    if _has_nodes(backend):
        return backend.ascend(embed, grad, noise, step, mask, keep_noise, unit)
    perturbed, noise_out = backend.ascend(embed.detach(), grad.detach(), noise, step, mask, keep_noise, unit)
    return shift(embed, perturbed, mask), noise_out


def shift(embed: Tensor, perturbed: Tensor, mask: Tensor | None) -> Tensor:
    """``perturbed``, ``embed`` plus something constant, with a graph back to it where one is wanted."""
    if torch.is_grad_enabled() and embed.requires_grad:
        shifted: Tensor = _Shift.apply(embed, perturbed, mask)
        return shifted
    return perturbed


class _Owe(torch.autograd.Function):
    """A tensor whose gradient is increased by a constant on its way."""

    @staticmethod
    def forward(ctx: Any, perturbed: Tensor, owed: Tensor) -> Tensor:
        ctx.save_for_backward(owed)
        return perturbed.view_as(perturbed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (owed,) = ctx.saved_tensors
        return grad + owed.to(grad.dtype), None


def owe(perturbed: Tensor, owed: Tensor, mask: Tensor | None) -> Tensor:
    """``perturbed``, through which a backward pass adds ``owed`` (at unmasked rows) to the gradient it brings."""
    owing: Tensor = _Owe.apply(perturbed, owed if mask is None else torch.where(mask.unsqueeze(-1), owed, 0.0))
    return owing


class _Divergence(torch.autograd.Function):
    """Row statistics are saved, probabilities recomputed."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, mask: Tensor | None, backend: Backend, spec: DivergenceSpec
    ) -> Tensor:
        want_input, want_target = ctx.needs_input_grad[:2]
        loss, stats = backend.divergence_forward(input, target, spec, mask, want_input, want_target)
        if want_input or want_target:
            ctx.save_for_backward(input, target, mask, stats)
            ctx.options = backend, spec
        return loss

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, target, mask, stats = ctx.saved_tensors
        backend, spec = ctx.options
        gradients = backend.divergence_backward(grad, input, target, stats, spec, mask, *ctx.needs_input_grad[:2])
        return *gradients, None, None, None


def divergence(
    backend: Backend, input: Tensor, target: Tensor, kind: str, reduction: str, alpha: Any,
    mask: Tensor | None, temperature: float = 1.0, exact: bool = False,
) -> Tensor:  # fmt: skip
    """The divergence ``kind`` of logits ``[..., V]``, reduced as `torch.nn.functional.kl_div` reduces.

    Of ``logits / temperature``, times ``temperature**2``. ``exact``: by formulas that do not cancel, also where the
    backend would compute as smart-pytorch does.
    """
    if backend.loss is not None and not exact:
        return backend.loss(input, target, kind, reduction, alpha, mask, temperature)
    square = temperature * temperature
    if reduction == "none":
        spec = DivergenceSpec(kind, "terms", float(alpha), 1.0, 1.0 / temperature)
        terms = _differentiable_divergence(backend, input, target, spec, mask)
        return terms if square == 1.0 else terms * square
    count = 1
    if reduction == "batchmean":
        count = input.size(0)
    elif reduction == "mean" and mask is None:
        count = input.numel()
    outside = torch.compiler.is_compiling()
    spec = DivergenceSpec(kind, "sum", float(alpha), square if outside else square / count, 1.0 / temperature)
    loss = _differentiable_divergence(backend, input, target, spec, mask)
    if outside and reduction != "sum":
        loss = loss / count
    if reduction == "mean" and mask is not None:
        loss = loss / (mask.sum() * input.size(-1)).clamp(min=1)
    return loss


def _differentiable_divergence(
    backend: Backend, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None
) -> Tensor:
    if backend.divergence is not None and not torch.compiler.is_compiling():
        return backend.divergence(input, target, spec, mask)
    loss: Tensor = _Divergence.apply(input, target, mask, backend, spec)
    return loss


class _ParallelDivergence(torch.autograd.Function):
    """Rows or terms of logits of which this process holds a slice of the vocabulary, and the vocabulary's width.

    The gradient of rows needs no communication. That of terms sums over the row under any upstream gradient, so there
    the slices have to meet once more.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, mask: Tensor | None, backend: Backend, spec: DivergenceSpec, group: Any
    ) -> tuple[Tensor, Tensor]:
        if spec.output == "terms":
            stats, width = sharded.statistics(backend, input, target, spec, mask, group)
            loss = log_ratio.terms(input, target, stats, spec, mask)
        else:
            rows, stats, width = sharded.rows(backend, input, target, spec, mask, group)
            loss = rows.view(input.shape[:-1])
        ctx.save_for_backward(input, target, mask, stats)
        ctx.options = backend, spec, group
        ctx.mark_non_differentiable(width)
        return loss, width

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        input, target, mask, stats = ctx.saved_tensors
        backend, spec, group = ctx.options
        want_input, want_target = ctx.needs_input_grad[:2]
        if spec.output == "terms":
            gradients = log_ratio.divergence_backward(
                grad, input, target, stats, spec, mask, want_input, want_target,
                reduce=lambda sums: sharded.all_reduce(sums, group),
            )  # fmt: skip
        else:
            gradients = backend.divergence_backward(grad, input, target, stats, spec, mask, want_input, want_target)
        return *gradients, None, None, None, None


def parallel_divergence(
    backend: Backend, input: Tensor, target: Tensor, kind: str, reduction: str, alpha: float,
    mask: Tensor | None, temperature: float, group: Any,
) -> Tensor:  # fmt: skip
    """`divergence` of logits sharded over the vocabulary: local logits ``[..., V_local]``, the same loss everywhere."""
    output = "terms" if reduction == "none" else "rows"
    spec = DivergenceSpec(kind, output, float(alpha), scale=1.0 / temperature)
    loss, width = _ParallelDivergence.apply(input, target, mask, backend, spec, group)
    if temperature != 1.0:
        loss = loss * temperature**2
    if reduction == "none":
        terms: Tensor = loss
        return terms
    total: Tensor = loss.sum()
    if reduction == "batchmean":
        return total / (input.size(0) if input.dim() > 1 else width)
    if reduction == "mean":
        count = loss.numel() if mask is None else mask.sum().clamp(min=1)
        return total / (count * width)
    return total


class _LinearDivergence(torch.autograd.Function):
    """The losses of projected hidden states: their sum (``total``), or one for each token.

    The gradients of a sum are known but for a factor, so they come with the forward pass, while its logits are there.
    Those of single losses wait for their upstream gradients and compute the logits again.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, total: bool, *tensors: Tensor | None) -> Tensor:
        operands = Operands(*tensors)  # type: ignore[arg-type]
        wanted = passes.Wanted(*ctx.needs_input_grad[2:8])
        with torch.autocast(operands.input.device.type, enabled=False):
            loss, stats, ctx.gradients = passes.losses(
                plan, operands, keep=any(wanted), now=wanted if total and any(wanted) else None
            )
        if any(wanted):
            ctx.save_for_backward(*operands, stats)
            ctx.plan, ctx.total = plan, total
        return loss.sum() if total else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, stats = ctx.saved_tensors
        operands = Operands(*tensors)
        wanted = passes.Wanted(*ctx.needs_input_grad[2:8])
        # Used up: a second backward pass computes its own.
        sums, ctx.gradients = ctx.gradients, None
        common = grad
        with torch.autocast(operands.input.device.type, enabled=False):
            if sums is None:
                rows = grad.expand(operands.input.shape[:1])
                if operands.mask is not None:
                    rows = torch.where(operands.mask, rows, 0.0)
                # In half precision products of upstream gradients and hidden states could overflow or vanish.
                common = rows.abs().amax()
                common = torch.where(common == 0, 1.0, common)
                sums = passes.gradients(ctx.plan, operands, stats, rows / common, wanted)
                grad = grad if ctx.total else rows
            dtypes = [None if each is None else each.dtype for each in operands[:6]]
            found = passes.finished(ctx.plan, sums, wanted, grad, common, dtypes)
        return None, None, *found, None


def linear_divergence(plan: Plan, operands: Operands, total: bool) -> Tensor:
    """The divergence of the logits of ``operands``, summed or for each of N tokens."""
    if not torch.is_grad_enabled():  # inside the Function that is not to be seen, and gradients come with the loss
        operands = Operands(*(None if each is None else each.detach() for each in operands))  # type: ignore[arg-type]
    loss: Tensor = _LinearDivergence.apply(plan, total, *operands)
    return loss


class _ProjectedDivergence(torch.autograd.Function):
    """Losses of rows of raw logits, as a head gave them: before their scale and softcap."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, logits: Tensor, mask: Tensor | None, plan: Plan) -> Tensor:
        keep = any(ctx.needs_input_grad[:2])
        sides, _ = _as_compared(plan, first, logits)
        rows, stats = plan.backend.divergence_forward(*sides, plan.spec(plan.alpha), mask, keep, keep)
        if keep:
            ctx.save_for_backward(first, logits, mask, stats)
            ctx.plan = plan
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, logits, mask, stats = ctx.saved_tensors
        plan, (want_first, want_logits) = ctx.plan, ctx.needs_input_grad[:2]
        sides, capped = _as_compared(plan, first, logits)
        # The target's logits are part of the input's where those are given as a difference.
        want_input = want_first or (want_logits and plan.shared)
        dx, dt = plan.backend.divergence_backward(
            grad, *sides, stats, plan.spec(plan.alpha), mask, want_input, want_logits
        )
        to_first, to_logits = dx, dt
        if capped is not None:
            to_first = None if dx is None else dx * capped.slope(0)
            to_logits = None if dt is None else dt * capped.slope(1)
        if plan.shared and dx is not None and dt is not None:
            to_logits = dx + dt if capped is None else (dx + dt) * capped.slope(1) + dx * capped.slope(2)
        return (
            to_first.to(first.dtype) if want_first and to_first is not None else None,
            to_logits.to(logits.dtype) if want_logits and to_logits is not None else None,
            None, None,
        )  # fmt: skip


def _as_compared(plan: Plan, first: Tensor, logits: Tensor) -> tuple[tuple[Tensor, Tensor], Capped | None]:
    """Both sides as the backend takes them."""
    if plan.inner is None:
        return (first, logits), None
    capped = Capped(first, logits, plan.inner, plan.shared, plan.precision)
    return (capped.difference, capped.target), capped


def projected_divergence(plan: Plan, first: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """The divergence of each row ``[n]`` of raw logits ``[n, V]``; ``first`` are the input's or (``plan.shared``) by
    how much they exceed the target's."""
    rows: Tensor = _ProjectedDivergence.apply(first, logits, mask, plan)
    return rows
