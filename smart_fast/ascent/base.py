"""What a direction of the ascent is: an object that gives a gradient for each perturbed embedding.

A direction knows how ``eval_fn`` is to run meanwhile, and nothing of the loop around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Passes(NamedTuple):
    """How a direction may ask about the model.

    ``run(*embeds)`` gives a state, ``compare(perturbed_state, clean_state)`` the loss that is climbed, a scalar.
    ``embeds`` are the clean embeddings ``[..., D]``, ``state`` what ``run`` gives for them, with its graph.
    """

    run: Callable[..., Any]
    compare: Callable[[Any, Any], Any]
    embeds: Sequence[Tensor]
    state: Any


class Direction(Protocol):
    """One way of finding where to go."""

    def gradients(self, passes: Passes, perturbed: Sequence[Tensor]) -> list[Tensor]:
        """For each of ``perturbed`` a gradient of its shape, in fp32 where something was rescaled."""
        ...
