"""What is compared: each method makes the loss of a batch, and is tuned over a grid of the same size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from smart_fast import BregmanProximal, SMARTLoss, kl_loss, perturbation, recipes, sym_kl_loss


class Batch(NamedTuple):
    """``ids`` and ``mask`` ``[B, S]`` (mask: bool, True for real tokens), ``target`` ``[B]``."""

    ids: Tensor
    mask: Tensor
    target: Tensor


class Objective(NamedTuple):
    """Losses of a task: of logits and target; of the ascent and of what it returns; R-Drop's; Bregman's."""

    outputs: int
    task: Callable[[Tensor, Tensor], Tensor]
    ascent: Callable[..., Tensor]
    returned: Callable[..., Tensor]
    two_passes: Callable[..., Tensor]
    proximal: Callable[..., Tensor] | None


def _squared(logits: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(logits.squeeze(-1), target)


#: Means over the batch, so that one weight suits every batch size.
CLASSES = Objective(
    2, F.cross_entropy, kl_loss, functools.partial(sym_kl_loss, reduction="batchmean"), recipes.half_sym_kl, None
)
RATING = Objective(1, _squared, F.mse_loss, F.mse_loss, F.mse_loss, F.mse_loss)
OBJECTIVES = {"classes": CLASSES, "rating": RATING}


@dataclass
class Training:
    """``loss`` of a batch, after ``zero_grad``; ``after_step`` follows the optimizer's."""

    loss: Callable[[Batch], Tensor]
    after_step: Callable[[], None] = lambda: None


class Forward:
    """Word embeddings to logits: what is perturbed, and what becomes of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.words = model, model.get_input_embeddings()  # type: ignore[operator]

    def __call__(self, embed: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=embed, attention_mask=mask.long()).logits
        return logits


def regularized(
    model: nn.Module, objective: Objective, *, weight: float = 0.0, mu: float = 0.0, beta: float = 0.99,
    ascent_loss: Any = None, **settings: Any,
) -> Training:  # fmt: skip
    """The task's loss, plus SMARTLoss where it has a weight, plus the Bregman term where it has one (mu)."""
    run = Forward(model)
    smart = SMARTLoss(run, ascent_loss or objective.ascent, objective.returned, **settings) if weight else None
    proximal = BregmanProximal(model, beta, mu, loss_fn=objective.proximal) if mu else None

    def loss(batch: Batch) -> Tensor:
        embed = run.words(batch.ids)
        logits = run(embed, batch.mask)
        total = objective.task(logits, batch.target)
        if smart is not None:
            total = total + weight * smart(embed, logits, batch.mask, mask=batch.mask)
        if proximal is not None:
            total = total + proximal(logits, input_ids=batch.ids, attention_mask=batch.mask.long())
        return total

    return Training(loss, (lambda: None) if proximal is None else proximal.update)


def recommended(model: nn.Module, objective: Objective, *, radius: float, **settings: Any) -> Training:
    """RECOMMENDED with another radius: its noise and its step are in proportion to that."""
    scale = radius / recipes.RECOMMENDED["epsilon"]
    scaled = {name: scale * recipes.RECOMMENDED[name] for name in ("noise_var", "step_size", "epsilon")}
    return regularized(model, objective, **{**recipes.RECOMMENDED, **scaled, **settings})


def sift(model: nn.Module, objective: Objective, *, radius: float, **settings: Any) -> Training:
    """SiFT's update and loss; ``radius`` is the length of its step, the noise that it starts from a tenth of it."""
    scaled = {"noise_var": radius / 10, "step_size": radius, "ascent_loss": objective.returned}
    return regularized(model, objective, **{**recipes.SIFT, **scaled, **settings})


def r3f(model: nn.Module, objective: Objective, *, radius: float, weight: float) -> Training:
    """R3F; its noise in units of each token's root mean square."""
    return regularized(
        model, objective, weight=weight, **{**recipes.R3F, "noise_var": radius, "scale": "relative"}
    )  # fmt: skip


def neftune(model: nn.Module, objective: Objective, *, alpha: float) -> Training:
    run = Forward(model)

    def loss(batch: Batch) -> Tensor:
        embed = run.words(batch.ids)
        noisy = perturbation(
            lambda x: x.sum(), embed, noise_var=recipes.uniform_within(alpha, embed), mask=batch.mask, **recipes.NEFTUNE
        ).perturbed
        return objective.task(run(noisy, batch.mask), batch.target)

    return Training(loss)


def r_drop(model: nn.Module, objective: Objective, *, weight: float) -> Training:
    run = Forward(model)

    def loss(batch: Batch) -> Tensor:
        embed = run.words(batch.ids)
        one, other = run(embed, batch.mask), run(embed, batch.mask)  # two draws of dropout
        task = objective.task(one, batch.target) + objective.task(other, batch.target)
        return task / 2 + weight * objective.two_passes(one, other)

    return Training(loss)


def freelb(model: nn.Module, objective: Objective, *, radius: float) -> Training:
    """``radius``: of the l2 ball of a sentence; step and first noise are in proportion to it, as in the recipe."""
    run = Forward(model)
    scale = radius / recipes.FREELB["epsilon"]
    settings = {**recipes.FREELB, "epsilon": radius, "step_size": scale * recipes.FREELB["step_size"]}

    def loss(batch: Batch) -> Tensor:
        embed = run.words(batch.ids)

        def loss_of(x: Tensor) -> Tensor:
            return objective.task(run(x, batch.mask), batch.target)

        start = recipes.uniform_within(0.32 * scale, embed)
        found = perturbation(loss_of, embed, noise_var=start, mask=batch.mask, **settings)
        return loss_of(found.perturbed) / (settings["num_steps"] + 1)

    return Training(loss)


def grid(**values: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(values, each, strict=True)) for each in itertools.product(*values.values()))


class Method(NamedTuple):
    """``make``: of model, objective and settings. ``candidates``: settings to choose from on validation data; those of
    a method that is ``made_of`` others are what was chosen for them."""

    make: Callable[..., Training]
    candidates: tuple[dict[str, Any], ...] = ({},)
    made_of: tuple[str, ...] = ()


PLAIN, SMART_PYTORCH, RECOMMENDED, NEFTUNE, BREGMAN = "plain", "smart-pytorch", "RECOMMENDED", "NEFTune", "Bregman"
SHIPPED = "RECOMMENDED as shipped"
#: Radii are in units of each token's root mean square.
WEIGHT_AND_RADIUS = grid(weight=(0.3, 1.0), radius=(0.3, 1.0))
METHODS: Mapping[str, Method] = {
    PLAIN: Method(regularized),
    SMART_PYTORCH: Method(regularized, grid(weight=(0.02, 0.3, 1.0, 3.0))),
    RECOMMENDED: Method(recommended, WEIGHT_AND_RADIUS),
    SHIPPED: Method(recommended, grid(weight=(1.0,), radius=(recipes.RECOMMENDED["epsilon"],))),
    "fisher": Method(functools.partial(recommended, ascent="fisher"), WEIGHT_AND_RADIUS),
    "SiFT": Method(sift, WEIGHT_AND_RADIUS),
    "R3F": Method(r3f, WEIGHT_AND_RADIUS),
    NEFTUNE: Method(neftune, grid(alpha=(1.0, 5.0, 10.0, 15.0))),
    "R-Drop": Method(r_drop, grid(weight=(0.5, 1.0, 3.0, 5.0))),
    "FreeLB": Method(freelb, grid(radius=(0.2, 0.7, 1.5, 3.0))),
    BREGMAN: Method(regularized, grid(mu=(1.0, 3.0), beta=(0.9, 0.99))),
    f"{RECOMMENDED} + {BREGMAN}": Method(recommended, made_of=(RECOMMENDED, BREGMAN)),
}
