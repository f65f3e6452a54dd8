"""The settings of SMART in a training loop, as a dataclass that command lines can fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..ascent import DIRECTIONS
from ..backends import check_name
from ..backends.base import DIVERGENCES, UPDATES
from ..checks import check_bool, check_choice, check_count, check_number
from ..losses.logits import LOSSES, kl_loss
from ..methods import recipes
from ..noise import NOISES
from ..norms import Norm, inf_norm, l1_norm, l2_norm, sentence_norm
from ..options import NAMES as OPTIONS
from ..options import SCALES
from ..smart import SMARTLoss

__all__ = ["RECIPES", "SMARTArguments"]

NORMS: dict[str, Norm] = {
    "token": inf_norm, "token-l2": l2_norm, "token-l1": l1_norm, "sentence": sentence_norm(inf_norm),
    "sentence-l2": sentence_norm(l2_norm), "sentence-l1": sentence_norm(l1_norm),
}  # fmt: skip

#: The recipes of `smart_fast.recipes` that are settings of SMARTLoss and complete, by their names in lower case. Those
#: of `smart_fast.perturbation` set more, and NEFTUNE's noise depends on the batch.
RECIPES = {
    name.lower().replace("_", "-"): recipe
    for name in recipes.__all__
    if isinstance(recipe := getattr(recipes, name), Mapping) and {"noise_var"} <= recipe.keys() <= set(OPTIONS)
}

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Options of SMARTLoss whose names here differ from smart_<name>.
_RENAMED = {"num_steps": "smart_steps", "norm_fn": "smart_norm"}
# What is meant where neither a recipe nor the user says anything.
_DEFAULTS: dict[str, Any] = {
    "smart_steps": 1, "smart_step_size": 1e-2, "smart_epsilon": 1e-6, "smart_noise_var": 1e-3, "smart_update": "sift",
    "smart_scale": "absolute", "smart_norm": "token", "smart_noise": "normal",
}  # fmt: skip


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SMARTArguments:
    """Settings of SMART in a training loop; ``HfArgumentParser`` makes command line options of them.

    ``smart_recipe`` comes first, single settings go over it: what it sets and they do not is its own. Without a recipe
    the defaults are not those of `smart_fast.SMARTLoss`: what is perturbed here are word embeddings, whose entries have
    a standard deviation near 0.02 to 0.05 in pretrained models. The noise that ``"smart-pytorch"`` ends with has a
    largest entry near 1 whatever the other settings are, far more than the embedding. The default, ``"sift"``, moves
    each token by ``smart_step_size`` in its largest entry. Where embeddings have another size, scale
    ``smart_step_size`` and ``smart_noise_var`` with it, or take ``smart_recipe="recommended"``, which is relative.

    ``smart_start_step`` and ``smart_every_n_steps`` count optimizer steps. In evaluation nothing is regularized.
    """

    smart_weight: float = _option(1.0, "Weight of the regularizer in the loss; 0 turns SMART off.")
    smart_recipe: str | None = _option(
        None, f"Settings to start from: {', '.join(RECIPES)}. Single settings go over it."
    )
    smart_embeddings: str | None = _option(
        None,
        "What is perturbed: the input embeddings of the encoder, the decoder or both (the default); or the output of"
        " named modules, separated by commas (model.layers.4).",
    )
    smart_steps: int | None = _option(None, "Ascent steps, each one forward and one backward pass more (1).")
    smart_step_size: float | None = _option(None, "Length of an ascent step, in units of the embeddings (0.01).")
    smart_epsilon: float | None = _option(
        None, "Added to the norm before dividing by it; radius of paper's ball (1e-6)."
    )
    smart_noise_var: float | None = _option(None, "Standard deviation of the initial noise (0.001).")
    smart_noise: str | None = _option(None, f"Initial noise: {', '.join(NOISES)} (normal).")
    smart_update: str | None = _option(None, f"Update rule of the noise: {', '.join(UPDATES)} (sift).")
    smart_scale: str | None = _option(
        None, "Units of noise, step and epsilon: absolute, or relative to each token (absolute)."
    )
    smart_norm: str | None = _option(
        None,
        f"Norm of the noise: {', '.join(NORMS)} (token: its largest entry). In Python also a function, [B, S, D] ->"
        " norm.",
    )
    smart_divergence: str = _option("sym_kl", "What is returned: kl, sym_kl, js or jsd. The ascent climbs kl.")
    smart_backend: str = _option("auto", "Backend: auto, torch, triton or native.")
    smart_ascent: str = _option("perturbed", "Direction of the ascent: perturbed, or fisher (no perturbed pass in it).")
    smart_ascent_dtype: str | None = _option(None, "Precision of the ascent's passes: bfloat16 or float16.")
    smart_loss_scale: float | None = _option(None, "Factor of the ascent loss, against underflow in float16.")
    smart_freeze_parameters: bool | None = _option(None, "No parameter requires grad in the ascent.")
    smart_ascent_dropout: bool = _option(True, "Dropout in the ascent.")
    smart_shared_dropout: bool = _option(False, "The perturbed passes draw the dropout masks of the clean pass.")
    smart_freeze_batch_norm: bool = _option(False, "The perturbed passes leave BatchNorm's statistics alone.")
    smart_every_n_steps: int = _option(1, "Regularize in every n-th optimizer step only.")
    smart_start_step: int = _option(0, "First optimizer step (from 0) to regularize in.")
    smart_generator: Any = field(default=None, metadata={"help": "In Python: a torch.Generator to draw noise from."})
    smart_checkpointed: bool = _option(False, "Recompute the clean pass in the backward pass: one graph at a time.")
    smart_proximal_weight: float = _option(0.0, "Weight of the Bregman proximal term; 0 turns it off.")
    smart_proximal_beta: float = _option(0.99, "Momentum of the Bregman term's teacher, in [0, 1].")
    smart_diagnose_steps: int = _option(0, "Log noise_to_embed and ascent_ratio every n optimizer steps; 0: never.")

    def __post_init__(self) -> None:
        """Check the settings where they are made, under their own names.

        Raises:
            TypeError, ValueError: a setting that does not exist, or of the wrong type.
        """
        if self.smart_embeddings is not None:
            if not isinstance(self.smart_embeddings, str):
                raise TypeError(f"smart_embeddings must be a string, got {type(self.smart_embeddings).__name__}")
            if not all(each.strip() for each in self.smart_embeddings.split(",")):
                raise ValueError(f"smart_embeddings must not hold an empty name, got {self.smart_embeddings!r}")
        if self.smart_recipe is not None:
            check_choice("smart_recipe", self.smart_recipe, tuple(RECIPES))
        recipe = RECIPES.get(self.smart_recipe or "", {})
        settings = {**_DEFAULTS, **{_RENAMED.get(name, f"smart_{name}"): value for name, value in recipe.items()}}
        for name, value in settings.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("smart_weight", "smart_step_size", "smart_epsilon", "smart_noise_var", "smart_proximal_weight"):
            check_number(name, getattr(self, name))
        for name in ("smart_weight", "smart_proximal_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        check_number("smart_proximal_beta", self.smart_proximal_beta)
        if not 0 <= self.smart_proximal_beta <= 1:
            raise ValueError(f"smart_proximal_beta must be in [0, 1], got {self.smart_proximal_beta}")
        check_count("smart_steps", self.smart_steps)
        check_count("smart_every_n_steps", self.smart_every_n_steps, least=1)
        check_count("smart_start_step", self.smart_start_step)
        check_count("smart_diagnose_steps", self.smart_diagnose_steps)
        check_choice("smart_noise", self.smart_noise, tuple(NOISES))
        check_choice("smart_update", self.smart_update, UPDATES)
        check_choice("smart_scale", self.smart_scale, SCALES)
        check_choice("smart_divergence", self.smart_divergence, DIVERGENCES)
        check_choice("smart_ascent", self.smart_ascent, tuple(DIRECTIONS))
        if isinstance(self.smart_ascent_dtype, str):
            check_choice("smart_ascent_dtype", self.smart_ascent_dtype, tuple(_DTYPES))
        for name in (
            "smart_ascent_dropout", "smart_shared_dropout", "smart_freeze_batch_norm", "smart_checkpointed",
        ):  # fmt: skip
            check_bool(name, getattr(self, name))
        if not callable(self.smart_norm):
            check_choice("smart_norm", self.smart_norm, tuple(NORMS))
        check_name(self.smart_backend, "smart_backend")
        self.loss(lambda embed: embed, lambda divergence: divergence)  # what SMARTLoss itself refuses, early

    @classmethod
    def of(cls, smart: SMARTArguments | None, given: dict[str, Any]) -> SMARTArguments:
        """The settings of somebody who takes ``smart=SMARTArguments(...)`` or the settings themselves.

        Raises:
            TypeError: both, ``smart`` of another type, or a setting that does not exist.
        """
        if smart is None:
            return cls(**given)
        if not isinstance(smart, cls):
            raise TypeError(f"smart must be a SMARTArguments, got {type(smart).__name__}")
        if given:
            raise TypeError(f"give smart= or single settings, not both: got smart and {', '.join(given)}")
        return smart

    def runs(self, step: int) -> bool:
        """Whether the regularizer takes part in optimizer step ``step``, from 0."""
        after = step - self.smart_start_step
        return self.smart_weight != 0 and after >= 0 and after % self.smart_every_n_steps == 0

    def diagnoses(self, step: int) -> bool:
        """Whether figures of the ascent are wanted in optimizer step ``step``, from 0."""
        return self.smart_diagnose_steps > 0 and step % self.smart_diagnose_steps == 0

    def loss(
        self, eval_fn: Callable[..., Any], comparison: Callable[[Any], Callable[..., Tensor]], **more: Any
    ) -> SMARTLoss:
        """The `SMARTLoss` of ``eval_fn`` whose losses are ``comparison`` of a divergence.

        Dropout, frozen parameters and BatchNorm are options of a `Module`: they stand only if ``eval_fn`` is one.
        ``more`` are options of `SMARTLoss` that go over these settings.
        """
        options: dict[str, Any] = {
            each.name.removeprefix("smart_"): getattr(self, each.name)
            for each in fields(self)
            if each.name.removeprefix("smart_") in _PLAIN
        }
        dtype: Any = self.smart_ascent_dtype
        options["ascent_dtype"] = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        options["num_steps"] = self.smart_steps
        options["norm_fn"] = self.smart_norm if callable(self.smart_norm) else NORMS[str(self.smart_norm)]
        if isinstance(eval_fn, torch.nn.Module):
            options |= {name: getattr(self, f"smart_{name}") for name in _OF_MODULES}
        options |= more
        return SMARTLoss(eval_fn, comparison(kl_loss), comparison(LOSSES[self.smart_divergence]), **options)


_PLAIN = (
    "step_size", "epsilon", "noise_var", "noise", "backend", "update", "ascent", "scale", "generator", "loss_scale",
)  # fmt: skip
_OF_MODULES = ("freeze_parameters", "ascent_dropout", "freeze_batch_norm")
