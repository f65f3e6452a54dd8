"""Half precision: scaling the ascent loss, and noise that is too small for the embedding's dtype."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import updates
from ..backends.base import Step
from ..checks import check_positive
from ..training.compiling import when_traced

if TYPE_CHECKING:
    from ..options import Options

HALF = (torch.bfloat16, torch.float16)
_PEAK = 2.0**8  # far from both ends of float16, whose models' gradients may grow as well as shrink
_TYPICAL = 0.02  # standard deviation of the word embeddings of BERT and its kin: as small as embeddings get


def check_ascent_dtype(dtype: Any) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"ascent_dtype must be a torch.dtype or None, got {type(dtype).__name__}")
    if dtype not in (None, *HALF):
        raise ValueError(f"ascent_dtype must be None or one of {list(HALF)}, got {dtype}")


def check_loss_scale(loss_scale: Any) -> None:
    if loss_scale is not None and not isinstance(loss_scale, torch.amp.GradScaler):
        try:
            check_positive("loss_scale", loss_scale)
        except TypeError:
            raise TypeError(
                f"loss_scale must be a real number, a torch.amp.GradScaler or None, got {type(loss_scale).__name__}"
            ) from None


def current_scale(loss_scale: Any, device: torch.device) -> float | Tensor:
    """The factor of the ascent loss: a GradScaler's is a tensor on its device, which the host never reads."""
    if not isinstance(loss_scale, torch.amp.GradScaler):
        return float(loss_scale)
    # Its methods read the scale, or are none that Dynamo traces.
    if not loss_scale._enabled:
        return 1.0
    if loss_scale._scale is None:  # before its first use
        return float(loss_scale._init_scale)
    return loss_scale._scale.to(device, non_blocking=True)


def unscale(grad: Tensor, scale: float | Tensor) -> Tensor:
    """Divided in fp32 at least, where nothing underflows; exactly, if the scale is a power of two."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32)) / scale


def by_sample(embeds: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether the first dimension of all of them is that of the samples of a batch."""
    sizes = {each.shape[:1] for each in (*embeds, *outputs)}
    return len(sizes) == 1 and all(each.dim() > 1 for each in embeds)


def sample_scale(grads: Sequence[Tensor], own: bool) -> Tensor:
    """A factor for each sample ``[B]``, or one for all ``[1]`` if not ``own``: a power of two that brings the largest
    entry of ``grads`` near `_PEAK`. One for samples without an entry but zeros, or with infinite ones."""
    rows = grads[0].shape[0] if own else 1
    peaks = [torch.linalg.vector_norm(each.reshape(rows, -1), float("inf"), dim=-1) for each in grads]
    peak = functools.reduce(torch.maximum, peaks).float()
    exponent = (peak / _PEAK).log2().floor().clamp(-120, 120)
    return torch.where((peak > 0) & peak.isfinite(), torch.exp2(-exponent), 1.0)


def like_samples(scale: Tensor, tensor: Tensor) -> Tensor:
    """``scale``, ``[B]`` or one for all, shaped to multiply ``tensor`` ``[B, ...]``."""
    if tensor.shape[0] != scale.shape[0]:  # one for all
        scale = scale[:1]
    return scale.view(-1, *([1] * (tensor.dim() - 1)))


class Rescale(torch.autograd.Function):
    """``states`` in fp32. Their gradients, which come in fp32, go on in the states' dtypes, each sample times a factor
    at which nothing underflows; the factors, `sample_scale`, come out as the gradient of ``carrier`` ``[B]``."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, own: bool, *states: Tensor) -> tuple[Tensor, ...]:
        ctx.own, ctx.dtypes, ctx.size = own, [each.dtype for each in states], carrier.shape[0]
        return tuple(each.to(torch.promote_types(each.dtype, torch.float32), copy=True) for each in states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = sample_scale(grads, ctx.own)
        scaled = [(g * like_samples(scale, g)).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return scale.expand(ctx.size), None, *scaled


def underflows(embed: Tensor, ascent_dtype: torch.dtype | None) -> bool:
    """Whether the ascent's gradients are in float16, of which most are too small for it."""
    if ascent_dtype is not None:
        return ascent_dtype == torch.float16
    device = embed.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return autocast or embed.dtype == torch.float16


def lost_noise(dtype: torch.dtype, step: Step, num_steps: int, relative: bool) -> tuple[str, float] | None:
    """The setting, if there is one, that keeps most of the final noise too small to change an embedding of ``dtype``.

    Told from settings alone, since looking at the embedding would synchronize its device: ``relative`` ones are in
    units of its entries, others are compared with entries as small as they usually get.
    """
    if dtype not in HALF or isinstance(step.noise_var, Tensor) or isinstance(step.step_size, Tensor):
        return None
    name, size = "noise_var", abs(step.noise_var)
    value = step.noise_var
    if num_steps > 0:
        if step.update == "smart-pytorch":
            return None  # its noise has a norm near one, whatever it was drawn as
        size = max(size, num_steps * abs(step.step_size))
        if updates.rule(step.update).ball:
            if isinstance(step.epsilon, Tensor):
                return None
            if abs(step.epsilon) < size:
                name, size, value = "epsilon", abs(step.epsilon), step.epsilon
    least = torch.finfo(dtype).eps * (1.0 if relative else _TYPICAL) / 8  # of which a fifth of the entries change
    return (name, value) if 0 < size < least else None


def warns_of_lost_noise(embeds: Iterable[Tensor], options: Options) -> bool:
    """Warn if `lost_noise` finds a setting; whether it was told to somebody who will not be told again.

    Under torch.compile it is told when traced: a flag that changed would trace anew.
    """
    relative = options.scale == "relative"
    for dtype in {each.dtype for each in embeds if each.dtype in HALF}:
        lost = lost_noise(dtype, options.step, options.num_steps, relative)
        if lost is not None:
            warn_of_lost_noise(dtype, *lost, relative)
            return not torch.compiler.is_compiling()
    return False


@when_traced
def warn_of_lost_noise(dtype: torch.dtype, name: str, value: float, relative: bool) -> None:
    epsilon = torch.finfo(dtype).eps
    enough = 4 * epsilon
    kind = str(dtype).removeprefix("torch.")
    if relative:
        remedy = "works"
    else:
        remedy = (
            f"times the root mean square of the embedding works: {enough * _TYPICAL:.1e} for word embeddings (rms"
            f" {_TYPICAL:g}), {enough:.1e} after a LayerNorm (rms 1)"
        )
    warnings.warn(
        f"{name}={value:g} is mostly lost when it is added to a {kind} embedding: rounding takes what is below"
        f" {epsilon / 4:.1e} of an entry. {name} of {enough:.1e} {remedy}; so does a float32 embedding (autocast)",
        UserWarning,
        stacklevel=6,
    )
