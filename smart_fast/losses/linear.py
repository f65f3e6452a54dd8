"""Divergences of projected hidden states, for vocabularies whose logits do not fit: never the whole ``[N, V]``.

The loss of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, with the gradients that `smart_fast.loss`
documents, to both hidden states, the weight and the bias. Tokens are projected and compared in chunks.
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
from ..checks import check_choice, check_mask, check_positive, check_same_device, check_tensor
from . import sharded
from .chunks import Plan, chunk_tokens
from .divergences import divergence

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
) -> Tensor:
    """`kl_loss` of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, without whole logits.

    Arithmetic on logits is fp32 (float64 for float64 arguments). The GEMMs run in the dtype of the arguments; their
    difference of logits is a GEMM of the difference of hidden states, so that a loss of nearly equal bfloat16 states
    means something. Under autocast they run in its dtype, as those of `torch.nn.functional.linear` would.

    Args:
        input: hidden states ``[..., H]``, float16, bfloat16, float32 or float64.
        target: hidden states of the same shape, dtype and device.
        weight: ``[V, H]``, the projection that both share.
        bias: ``[V]`` or None. Classes with a bias of -inf are left out.
        reduction: ``"batchmean"`` (the sum divided by ``input.size(0)``; by V for one token ``[H]``, as `kl_loss` of
            its logits), ``"sum"``, ``"mean"`` (divided by the number of unmasked tokens times V) or ``"none"``: unlike
            `kl_loss`, one loss a token ``[...]``, since its terms would be as large as the logits.
        mask: bool ``[...]``, True where a token counts. Masked ones give neither loss nor gradient, whatever they hold,
            and cost no GEMM on a CPU.
        temperature: logits are divided by it and the loss is multiplied by its square, which keeps the size of
            gradients (Hinton et al., 2015).
        chunk_bytes: the size of one chunk of logits; three (kl and jsd: four) matrices of that size are alive at once.
            None: 64 MiB, 256 MiB on a GPU, but between 256 and 4096 tokens.
        backend: as in `kl_loss`. The GEMMs are always torch's.
        process_group: the `torch.distributed` group over which ``weight`` and ``bias`` are sharded: each process
            passes its rows ``[V_local, H]``, the same hidden states and mask, and gets the loss of the whole. Gradients
            to hidden states are summed over the group in the backward pass, in which every process must take part
            with the same upstream gradient; those to weight and bias are local.

    Returns:
        A scalar, or the losses of the tokens, fp32 (float64 for float64).

    Raises:
        TypeError: not tensors, or not of one floating dtype (outside autocast); a mask that is not bool; a temperature
            or ``chunk_bytes`` that is no number; a ``process_group`` that is none.
        ValueError: shapes that do not match, two devices, an unknown reduction or backend, a temperature that is not
            finite and positive, ``chunk_bytes`` that is not positive.
    """
    return _linear(
        "kl", input, target, weight, bias, reduction, 1.0, mask, temperature, chunk_bytes, backend, process_group
    )


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
) -> Tensor:
    """`sym_kl_loss` of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, without whole logits.

    Arguments and errors as in `linear_kl_loss`; ``alpha`` must be a finite number.
    """
    return _linear(
        "sym_kl", input, target, weight, bias, reduction, alpha, mask, temperature, chunk_bytes, backend, process_group
    )


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
) -> Tensor:
    """`js_loss` of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, without whole logits.

    Arguments and errors as in `linear_kl_loss`; ``alpha`` must be a finite number.
    """
    return _linear(
        "js", input, target, weight, bias, reduction, alpha, mask, temperature, chunk_bytes, backend, process_group
    )


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
) -> Tensor:
    """`jsd_loss` of ``input @ weight.T + bias`` against ``target @ weight.T + bias``, without whole logits.

    Arguments and errors as in `linear_kl_loss`; ``beta`` as in `jsd_loss`.
    """
    return _linear(
        "jsd", input, target, weight, bias, reduction, beta, mask, temperature, chunk_bytes, backend, process_group
    )


_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": linear_kl_loss, "sym_kl": linear_sym_kl_loss, "js": linear_js_loss, "jsd": linear_jsd_loss,
}  # fmt: skip


class LinearDivergence(nn.Module):
    """A linear divergence as ``loss_fn`` of `SMARTLoss`, for an ``eval_fn`` that returns hidden states.

    ``weight`` and ``bias`` are the model's own: they are held, not registered, so that ``parameters()`` and
    ``state_dict()`` have them once, where the model has them. In the ascent of `SMARTLoss` they count as constants and
    no GEMM is spent on their gradients.

    Args:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        kind: ``"kl"``, ``"sym_kl"``, ``"js"`` or ``"jsd"``.
        **options: keyword arguments of `linear_kl_loss`, `linear_sym_kl_loss`, `linear_js_loss` or `linear_jsd_loss`.

    Raises:
        TypeError: ``weight`` is not a tensor, an option that the loss does not take.
        ValueError: an unknown ``kind``.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, kind: str = "sym_kl", **options: Any) -> None:
        super().__init__()
        check_choice("kind", kind, DIVERGENCES)
        check_tensor("weight", weight)
        allowed = list(inspect.signature(_LOSSES[kind]).parameters)[4:]
        if unknown := sorted(options.keys() - set(allowed)):
            raise TypeError(f"options of kind={kind!r} must be among {allowed}, got {unknown}")
        object.__setattr__(self, "weight", weight)  # past nn.Module, which would register a Parameter
        object.__setattr__(self, "bias", bias)
        self.kind = kind
        self.options = options

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states ``[..., H]``."""
        return _LOSSES[self.kind](input, target, self.weight, self.bias, **self.options)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"vocabulary={self.weight.shape[0]}, kind={self.kind!r}{options}"


def _linear(
    kind: str, input: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, reduction: str, alpha: Any,
    mask: Tensor | None, temperature: Any, chunk_bytes: Any, backend: str | None, group: Any,
) -> Tensor:  # fmt: skip
    check_choice("reduction", reduction, REDUCTIONS)
    backend = backend_of_caller() if backend is None else check_name(backend)
    dtype = _check_tensors(input, target, weight, bias)
    if mask is not None:
        check_mask(mask, input.shape, input.device, "input")
    alpha = divergence(kind).check(alpha)
    if isinstance(alpha, Tensor):
        raise TypeError("alpha must be a plain number, got a Tensor")
    alpha, temperature = float(alpha), check_positive("temperature", temperature)
    _check_bytes(chunk_bytes)
    if group is not None:
        sharded.check_group(group)
    if ascending():
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    if input.numel() == 0:
        return _nothing(input, target, weight, bias, reduction)

    tokens = input.shape[:-1]
    count = math.prod(tokens)
    widths = [weight.shape[0]]
    if group is not None:
        same = count, input.shape[-1], chunk_bytes or 0
        widths = sharded.agree("(tokens, H, chunk_bytes)", same, weight.shape[0], group, input.device)
    plan = Plan(
        select(backend, input, target, weight, kind=kind), kind, alpha, 1.0 / temperature, dtype,
        chunk_tokens(count, max(widths), dtype.itemsize, chunk_bytes, input.device), group,
    )  # fmt: skip
    sides = input.reshape(count, -1), target.reshape(count, -1)
    flat = None if mask is None else mask.reshape(-1)
    loss = autograd.linear_divergence(plan, *sides, weight, bias, flat, total=reduction != "none")
    if temperature != 1.0:
        loss = loss * temperature**2
    if reduction == "none":
        return loss.view(tokens)
    if reduction == "batchmean":
        return loss / (input.shape[0] if input.dim() > 1 else sum(widths))
    if reduction == "mean":
        return loss / ((count if mask is None else mask.sum().clamp(min=1)) * sum(widths))
    return loss


def _check_tensors(input: Any, target: Any, weight: Any, bias: Any) -> torch.dtype:
    """Check shapes, dtypes and devices; returns the dtype of the GEMMs."""
    tensors = {"input": input, "target": target, "weight": weight}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if check_tensor(name, tensor).is_complex():
            raise TypeError(f"{name} must be real, got {tensor.dtype}")
        if sharded.is_dtensor(tensor):  # sharded for data or over the vocabulary? Only the caller knows
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor: pass its local part and process_group, or all"
            )
        check_same_device(name, tensor.device, "input", input.device)
    if input.dim() == 0 or input.shape != target.shape:
        raise ValueError(
            "input and target must be hidden states of the same shape [..., H], "
            f"got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape [V, {input.shape[-1]}], H being that of input, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},), one for each row of weight, got {tuple(bias.shape)}"
        )

    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if torch.is_autocast_enabled(input.device.type):
        to = torch.get_autocast_dtype(input.device.type)  # of everything but float64, as autocast has it
        dtypes = {name: dtype if dtype == torch.float64 else to for name, dtype in dtypes.items()}
    if len(set(dtypes.values())) > 1:
        given = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"input, target, weight and bias must have one dtype outside autocast, got {given}")
    return dtypes["input"]


def _check_bytes(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"chunk_bytes must be an integer or None, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {value}")


def _nothing(input: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, reduction: str) -> Tensor:
    """The loss of no tokens: zero (or none), with zero gradients."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    terms = (input + target).sum(-1).to(dtype)
    for parameter in (weight, bias):
        if parameter is not None:
            terms = terms + parameter.flatten()[:0].sum().to(dtype)
    return terms if reduction == "none" else terms.sum()
