"""What the ascent does to the noise: figures of a call, and the ascent ratio."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import autograd
from .ascent import modes
from .ascent.climb import Climbed
from .backends import log_ratio, updates
from .backends.base import DivergenceSpec, Step
from .losses import states
from .norms import l2_norm

__all__ = ["ascent_ratio"]

_STILL = 1e-2  # a step that is smaller than this part of the noise does not move it
_DRAWS = 8  # of random noise
_LOST = 0.5  # of the entries that noise was added to


class Record:
    """Figures of the last call of a `SMARTLoss`, kept as tensors until they are read."""

    def __init__(self) -> None:
        #: Perturbed minus clean embeddings, fp32.
        self.changes: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._warned = False
        #: Whether somebody was told that settings are too small for half precision.
        self.told = False

    def take(
        self, embeds: Sequence[Tensor], masks: Sequence[Tensor | None], found: Climbed, step: Step
    ) -> None:  # fmt: skip
        """Those of a call: for each embedding its noise before and after the ascent, the result, and the gradient of
        the last step."""
        if torch.compiler.is_compiling():
            raise RuntimeError("diagnose does not work inside torch.compile: diagnose in eager mode")
        self._sums, self.changes = {}, []
        for i, embed in enumerate(embeds):
            unit = found.units[i]
            before, after = (
                autograd.noise_values(found.backends[i], embed, each[i], step.noise_var, masks[i], unit, step.noise)
                for each in (found.first, found.noises)
            )
            self._add(embed, masks[i], before, after, found.perturbed[i], found.grads[i], step, unit)

    def _add(
        self, embed: Tensor, mask: Tensor | None, first: Tensor, last: Tensor, perturbed: Tensor, grad: Tensor | None,
        step: Step, unit: Tensor | None,
    ) -> None:  # fmt: skip
        self.changes.append(perturbed.detach().float() - embed.detach().float())
        real = torch.ones(embed.shape[:-1], device=embed.device) if mask is None else mask.float()
        rows = real.unsqueeze(-1)
        changed = (perturbed.detach() != embed.detach()) & (rows > 0)
        embed, first, last = (torch.where(rows > 0, each.detach().float(), 0.0) for each in (embed, first, last))
        found = {
            "rows": real.sum(),
            "entries": real.sum() * embed.shape[-1],
            "embed": embed.square().sum(),
            "first": first.square().sum(),
            "last": last.square().sum(),
            "product": (first * last).sum(),
            "changed": changed.sum(),
        }
        if grad is not None:
            size = torch.linalg.vector_norm(grad.detach().float(), float("inf"), dim=-1)
            dead = (size == 0) | ~size.isfinite()
            found["dead"] = (dead * real).sum()
            moved = torch.where(dead.unsqueeze(-1), 0.0, grad.detach().float())
            added, _ = updates.rule(step.update).step(moved, step.norm_fn, step.step_size, step.epsilon, unit)
            found["step"] = torch.where(rows > 0, added, 0.0).square().sum()
        for name, value in found.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self) -> dict[str, float]:
        """The figures; waits for the device. Warns, once, if the ascent or the rounding makes the noise useless."""
        sums = {name: float(value) for name, value in self._sums.items()}
        if not sums:
            return {}
        found = {
            "noise_to_embed": _ratio(sums["last"], sums["embed"]) ** 0.5,
            "changed": _ratio(sums["changed"], sums["entries"]),
        }
        if "step" in sums:
            found["step_to_noise"] = _ratio(sums["step"], sums["first"]) ** 0.5
            found["cosine"] = _ratio(sums["product"], (sums["first"] * sums["last"]) ** 0.5)
            found["dead_rows"] = _ratio(sums["dead"], sums["rows"])
        self._warn(found)
        return found

    def _warn(self, found: dict[str, float]) -> None:
        message = None
        if found["changed"] < _LOST:
            message = (
                f"noise is lost in rounding: it changes {found['changed']:.0%} of the embedding's entries;"
                " scale='relative' with noise_var=0.05 or more keeps it"
            )
        elif found.get("step_to_noise", 1.0) < _STILL:
            message = (
                f"the ascent is a no-op: its step is {found['step_to_noise']:.1e} of the noise; update='paper'"
                " normalizes the gradient first"
            )
        if message is not None and not self._warned:
            self._warned = True
            warnings.warn(message, UserWarning, stacklevel=4)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


@torch.no_grad()
def ascent_ratio(smart: Any, embed: Any, *args: Any, mask: Any = None, **kwargs: Any) -> float:
    """How much better than chance the ascent of ``smart`` is on a batch: the KL divergence from the clean output along
    the perturbation that its ascent ends with, over that along random noise of the same length (l2) in every token.

    One means that the ascent does nothing, as smart-pytorch's does at its defaults. The ascent runs in the precision at
    hand (autocast, too). Both divergences are then measured in float64, by a copy of ``eval_fn``, if that is a
    `Module`, so that rounding plays no part. Outputs of one number (regression) are compared by their squared
    difference. All in eval mode.

    Args:
        smart: a `SMARTLoss`.
        embed, mask, *args, **kwargs: a batch, as `SMARTLoss.forward` takes it. The clean state is computed here.

    Raises:
        TypeError: ``smart`` is no `SMARTLoss`.
    """
    if not hasattr(smart, "diagnose"):
        raise TypeError(f"smart must be a SMARTLoss, got {type(smart).__name__}")
    embeds = [each.detach() for each in (embed if isinstance(embed, (tuple, list)) else (embed,))]
    changes = _changes(smart, embeds, args, mask, kwargs)
    device = embeds[0].device.type
    evaluate, dtype = _exact(smart.eval_fn)
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and dtype is None):
        inputs, args, kwargs = tree_map_only(Tensor, lambda each: _as(each, dtype), (embeds, args, kwargs))
        clean = states.tensors(evaluate(*inputs, *args, **kwargs))

        def divergence(added: Sequence[Tensor]) -> Tensor:
            moved = [each + change.to(each.dtype) for each, change in zip(inputs, added, strict=True)]
            pairs = zip(states.tensors(evaluate(*moved, *args, **kwargs)), clean, strict=True)
            return torch.stack([_difference(x, t) for x, t in pairs]).sum()

        draws = [divergence([_random_like(each) for each in changes]) for _ in range(_DRAWS)]
        return float(divergence(changes) / torch.stack(draws).mean())


def _changes(smart: Any, embeds: list[Tensor], args: Any, mask: Any, kwargs: Any) -> list[Tensor]:
    """Perturbed minus clean embeddings of a call in eval mode."""
    inputs = [each.clone().requires_grad_() for each in embeds]
    training = smart.training
    smart.eval()
    try:
        with modes.setting([smart], "diagnose", True), modes.setting([smart], "skip_in_eval", False):
            with torch.enable_grad():
                state = smart.eval_fn(*inputs, *args, **kwargs)
                smart(tuple(inputs) if len(inputs) > 1 else inputs[0], state, *args, mask=mask, **kwargs)
            changes: list[Tensor] = smart.record.changes
    finally:
        smart.train(training)
    return changes


def _exact(eval_fn: Callable[..., Any]) -> tuple[Callable[..., Any], torch.dtype | None]:
    """``eval_fn`` in float64, and that dtype; or as it is, and None."""
    if not isinstance(eval_fn, nn.Module):
        return eval_fn, None
    return copy.deepcopy(eval_fn).double().eval(), torch.float64


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _difference(x: Tensor, t: Tensor) -> Tensor:
    x, t = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (x, t))
    if x.shape[-1] == 1:
        return (x - t).square().sum()
    return log_ratio.divergence_forward(x, t, DivergenceSpec("kl", "sum"), None, False, False)[0]


def _random_like(noise: Tensor) -> Tensor:
    random = torch.randn_like(noise)
    return random * (l2_norm(noise) / l2_norm(random))
