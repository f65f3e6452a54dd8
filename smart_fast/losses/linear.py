"""Divergences of projected hidden states, for vocabularies whose logits do not fit: never the whole ``[N, V]``.

The loss of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, with the gradients that `smart_fast.loss`
documents, to both hidden states, the weight and the bias; or of two projections, one for each side. Tokens are
projected and compared in chunks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import autograd
from ..backends import ascending, backend_of_caller, check_name, select
from ..backends.base import DIVERGENCES, REDUCTIONS
from ..checks import check_choice, check_mask, check_positive, check_tensor
from . import heads, modules, sharded
from .chunks import Operands, Plan, chunk_tokens
from .divergences import divergence
from .heads import Head, Weights

__all__ = ["LinearDivergence", "linear_js_loss", "linear_jsd_loss", "linear_kl_loss", "linear_sym_kl_loss"]


def linear_kl_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reduction: str = "batchmean",
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    process_group: Any = None,
    target_weight: Tensor | None = None,
    target_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """`kl_loss` of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, without whole logits.

    Arithmetic on logits is fp32 (float64 for float64 arguments). The GEMMs run in the dtype of the arguments; their
    difference of logits is a GEMM of the difference of hidden states, so that a loss of nearly equal bfloat16 states
    means something (not so with a ``target_weight``: each side's logits are rounded). Under autocast they run in its
    dtype, as those of `torch.nn.functional.linear` would.

    Args:
        input: hidden states ``[..., H]``, float16, bfloat16, float32 or float64.
        target: hidden states of the same shape, dtype and device; with ``target_weight``, of a hidden size and a dtype
            of their own.
        weight: ``[V, H]``, the projection that both share.
        bias: ``[V]`` or None. Classes with a bias of -inf are left out.
        reduction: ``"batchmean"`` (the sum divided by ``input.size(0)``; by V for one token ``[H]``, as `kl_loss` of
            its logits), ``"sum"``, ``"mean"`` (divided by the number of unmasked tokens times V) or ``"none"``: unlike
            `kl_loss`, one loss a token ``[...]``, since its terms would be as large as the logits.
        mask: bool ``[...]``, True where a token counts. Masked ones give neither loss nor gradient, whatever they hold,
            and cost no GEMM on a CPU.
        temperature: logits are divided by it and the loss is multiplied by its square, which keeps the size of
            gradients (Hinton et al., 2015).
        chunk_bytes: the size of one chunk of logits; three (kl and jsd: four; with a softcap some ten, in fp32)
            matrices of that size are alive at once. None: 64 MiB, 256 MiB on a GPU, but between 256 and 4096 tokens.
        backend: as in `kl_loss`. The GEMMs are always torch's.
        process_group: the `torch.distributed` group over which ``weight`` and ``bias`` are sharded: each process
            passes its rows ``[V_local, H]``, the same hidden states and mask, and gets the loss of the whole. Gradients
            to hidden states are summed over the group in the backward pass, in which every process must take part
            with the same upstream gradient; those to weight and bias are local.
        target_weight: ``[V, H_target]``, a projection of the target's own, as a teacher of another size has. The two
            vocabularies must be one. None: ``weight``. Whatever side is frozen (requires no gradient: detach the
            teacher's weight, too) costs neither a product nor memory for gradients.
        target_bias: ``[V]``. None: ``bias`` (pass zeros for a target without one).
        logit_scale: positive; logits are multiplied by it, as Cohere's and (its inverse) Granite's are.
        logit_softcap: positive; logits become ``cap * tanh(logits / cap)``, after ``logit_scale`` and before
            ``temperature``, as Gemma 2's do. Differences and derivatives of the hyperbolic tangents are computed
            without cancellation, also where they saturate. A bias of -inf then means a logit of -cap, as in the model.

    Returns:
        A scalar, or the losses of the tokens, fp32 (float64 for float64).

    Raises:
        TypeError: not tensors, or not of one floating dtype a side (outside autocast); a mask that is not bool; a
            temperature, scale, softcap or ``chunk_bytes`` that is no number; a ``process_group`` that is none.
        ValueError: shapes that do not match, two vocabularies, a weight that is empty or flat (sharded by ZeRO-3 or
            FSDP), two devices, an unknown reduction or backend, a temperature, scale or softcap that is not finite and
            positive, ``chunk_bytes`` that is not positive.
    """
    return _linear(
        "kl", input, target, *_heads(weight, bias, target_weight, target_bias), reduction, 1.0,
        mask, temperature, chunk_bytes, backend, process_group, logit_scale, logit_softcap,
    )  # fmt: skip


def linear_sym_kl_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reduction: str = "sum",
    alpha: float = 1.0,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    process_group: Any = None,
    target_weight: Tensor | None = None,
    target_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """`sym_kl_loss` of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, without whole logits.

    Arguments and errors as in `linear_kl_loss`; ``alpha`` must be a finite number.
    """
    return _linear(
        "sym_kl", input, target, *_heads(weight, bias, target_weight, target_bias), reduction, alpha,
        mask, temperature, chunk_bytes, backend, process_group, logit_scale, logit_softcap,
    )  # fmt: skip


def linear_js_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reduction: str = "sum",
    alpha: float = 1.0,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    process_group: Any = None,
    target_weight: Tensor | None = None,
    target_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """`js_loss` of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, without whole logits.

    Arguments and errors as in `linear_kl_loss`; ``alpha`` must be a finite number.
    """
    return _linear(
        "js", input, target, *_heads(weight, bias, target_weight, target_bias), reduction, alpha,
        mask, temperature, chunk_bytes, backend, process_group, logit_scale, logit_softcap,
    )  # fmt: skip


def linear_jsd_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.5,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    process_group: Any = None,
    target_weight: Tensor | None = None,
    target_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """`jsd_loss` of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, without whole logits.

    Arguments and errors as in `linear_kl_loss`; ``beta`` as in `jsd_loss`.
    """
    return _linear(
        "jsd", input, target, *_heads(weight, bias, target_weight, target_bias), reduction, beta,
        mask, temperature, chunk_bytes, backend, process_group, logit_scale, logit_softcap,
    )  # fmt: skip


_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": linear_kl_loss, "sym_kl": linear_sym_kl_loss, "js": linear_js_loss, "jsd": linear_jsd_loss,
}  # fmt: skip


class LinearDivergence(nn.Module):
    """A linear divergence as ``loss_fn`` of `SMARTLoss`, for an ``eval_fn`` that returns hidden states.

    The head is the model's own: it is held, not registered, so that ``parameters()`` and ``state_dict()`` have it once,
    where the model has it. In the ascent of `SMARTLoss` it counts as constant and no GEMM is spent on its gradients.

    A module counts as what its forward pass computes, and gradients reach all that it is made of. A `torch.nn.Linear`
    is read, anew in each call: weights that are parametrized, or replaced, are what they are then. Any other module
    (PEFT's LoRA or DoRA around a Linear, quantized weights that are dequantized in the forward pass, hooks) is called,
    chunk by chunk, with hidden states ``[n, H]``; the backward pass calls it once more. Dropout inside is drawn for
    each side and token, as in the model. Pass the module that the model calls: taken before PEFT wrapped it, or as its
    ``weight``, it does not know of the adapter.

    Args:
        weight: ``[V, H]``, or the module.
        bias: ``[V]`` or None. Modules have their own.
        kind: ``"kl"``, ``"sym_kl"``, ``"js"`` or ``"jsd"``.
        target: another weight ``[V, H_target]`` or module for the second side; None: the same. A module's bias is its
            own; that of a weight is ``target_bias``, None: ``bias``.
        **options: keyword arguments of `linear_kl_loss`, `linear_sym_kl_loss`, `linear_js_loss` or `linear_jsd_loss`.
            ``process_group`` is for weights, and modules that are read.

    Raises:
        TypeError: ``weight`` or ``target`` is neither a tensor nor a module, an option that the loss does not take.
        ValueError: an unknown ``kind``, a bias beside a module, two targets.
    """

    weight: Tensor | nn.Module
    bias: Tensor | None
    target: Tensor | nn.Module | None

    def __init__(
        self, weight: Tensor | nn.Module, bias: Tensor | None = None, kind: str = "sym_kl",
        target: Tensor | nn.Module | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("kind", kind, DIVERGENCES)
        allowed = list(inspect.signature(_LOSSES[kind]).parameters)[4:]
        if unknown := sorted(options.keys() - set(allowed)):
            raise TypeError(f"options of kind={kind!r} must be among {allowed}, got {unknown}")
        if (other := options.pop("target_weight", None)) is not None:
            if target is not None:
                raise ValueError("target and target_weight must not both be given: they are the same")
            target = other
        for name, head, its_bias in (("weight", weight, bias), ("target", target, options.get("target_bias"))):
            if isinstance(head, nn.Module):
                if its_bias is not None:
                    raise ValueError(f"{name} must be a tensor where a bias is given: a module has its own")
            elif head is not None or name == "weight":
                check_tensor(name, head)
        for name, held in (("weight", weight), ("bias", bias), ("target", target)):
            object.__setattr__(self, name, held)  # past nn.Module, which would register it
        self.kind = kind
        self.options = options

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states ``[..., H]``."""
        entry = divergence(self.kind)
        options = {"reduction": entry.reduction, **self.options}
        alpha = options.pop(entry.parameter.name, entry.alpha) if entry.parameter else entry.alpha
        bias = options.pop("target_bias", None)
        head, other = _heads(self.weight, self.bias, self.target, bias)
        return _linear(self.kind, input, target, head, other, alpha=alpha, **options)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        head = self.weight
        shown = f"head={type(head).__name__}" if isinstance(head, nn.Module) else f"vocabulary={head.shape[0]}"
        return f"{shown}, kind={self.kind!r}{options}"


def _heads(weight: Any, bias: Any, target: Any, target_bias: Any) -> tuple[Head, Head | None]:
    """What projects the input, and what the target if that is something else."""
    head: Head = heads.of_module(weight) if isinstance(weight, nn.Module) else Weights(weight, bias)
    if target_bias is None and (target is None or target is weight):
        return head, None
    if isinstance(target, nn.Module):
        return head, heads.of_module(target)
    if isinstance(head, Weights):  # what is None is shared
        target = head.weight if target is None else target
        target_bias = head.bias if target_bias is None else target_bias
        if target is head.weight and target_bias is head.bias:
            return head, None
    elif target is None:
        raise ValueError("target_bias must come with a weight of the target where the head is a module")
    return head, Weights(target, target_bias)


def _linear(
    kind: str, input: Tensor, target: Tensor, head: Head, other: Head | None, reduction: str, alpha: Any,
    mask: Tensor | None = None, temperature: Any = 1.0, chunk_bytes: Any = None, backend: str | None = None,
    process_group: Any = None, logit_scale: Any = 1.0, logit_softcap: Any = None,
) -> Tensor:  # fmt: skip
    check_choice("reduction", reduction, REDUCTIONS)
    backend = backend_of_caller() if backend is None else check_name(backend)
    words, dtypes = heads.check(input, target, head, other)
    if mask is not None:
        check_mask(mask, input.shape, input.device, "input")
    alpha = divergence(kind).check(alpha)
    if isinstance(alpha, Tensor):
        raise TypeError("alpha must be a plain number, got a Tensor")
    alpha, temperature = float(alpha), check_positive("temperature", temperature)
    scale, inner = check_positive("logit_scale", logit_scale), None
    if logit_softcap is not None:
        cap = check_positive("logit_softcap", logit_softcap)
        scale, inner = cap, scale / cap
    _check_bytes(chunk_bytes)
    called = [type(each).__name__ for each in (head, other) if isinstance(each, nn.Module)]
    if process_group is not None:
        sharded.check_group(process_group)
        if called:
            raise ValueError(f"process_group must be None for a head that is called, as {called[0]} is")
    if ascending():
        head, other = heads.constant(head), None if other is None else heads.constant(other)
    if input.numel() == 0:
        return _nothing(input, target, head, other, reduction)

    tokens = input.shape[:-1]
    count = math.prod(tokens)
    widths = [words]
    if process_group is not None:
        same = count, input.shape[-1], chunk_bytes or 0
        widths = sharded.agree("(tokens, H, chunk_bytes)", same, words, process_group, input.device)
    tensors = input, target, *(each.weight for each in (head, other) if isinstance(each, Weights))
    itemsize = max(dtype.itemsize for dtype in dtypes)
    plan = Plan(
        select(backend, *tensors, kind=kind), kind, alpha, scale / temperature, dtypes,
        chunk_tokens(count, max(widths), itemsize, chunk_bytes, input.device), process_group, inner,
        modules.shares_differences(head, other),
    )  # fmt: skip
    sides = input.reshape(count, -1), target.reshape(count, -1)
    flat = None if mask is None else mask.reshape(-1)
    if isinstance(head, Weights) and (other is None or isinstance(other, Weights)):
        theirs = (None, None) if other is None else other
        operands = Operands(*sides, head.weight, head.bias, theirs[0], theirs[1], flat)
        loss = autograd.linear_divergence(plan, operands, total=reduction != "none")
    else:
        loss = modules.losses(plan, *sides, head, other, flat)
        loss = loss if reduction == "none" else loss.sum()
    if temperature != 1.0:
        loss = loss * temperature**2
    if reduction == "none":
        return loss.view(tokens)
    if reduction == "batchmean":
        return loss / (input.shape[0] if input.dim() > 1 else sum(widths))
    if reduction == "mean":
        return loss / ((count if mask is None else mask.sum().clamp(min=1)) * sum(widths))
    return loss


def _check_bytes(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"chunk_bytes must be an integer or None, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {value}")


def _nothing(input: Tensor, target: Tensor, head: Head, other: Head | None, reduction: str) -> Tensor:
    """The loss of no tokens: zero (or none), with zero gradients."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    terms = (input.sum(-1) + target.sum(-1)).to(dtype)
    for each in (head, other):
        for parameter in each if isinstance(each, Weights) else ():
            if parameter is not None:
                terms = terms + parameter.flatten()[:0].sum().to(dtype)
    return terms if reduction == "none" else terms.sum()
