"""Attacks: on embeddings by projected gradient descent, on texts by typos and lost words."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from torch import Tensor

from smart_fast import perturbation

RADII = WEAK, STRONG = 0.1, 0.3  # in the largest entry, in units of each token's root mean square
STEPS = 5
TYPOS, LOST = 0.25, 0.2  # share of words


def ascend(loss_of: Callable[[Tensor], Tensor], embed: Tensor, mask: Tensor, radius: float) -> Tensor:
    """``embed`` moved by sign steps so that ``loss_of`` grows, each entry by at most ``radius`` times the root mean
    square of its token; where ``mask`` is False not at all."""
    found = perturbation(
        loss_of, embed.detach(), num_steps=STEPS, step_size=radius / 2, epsilon=radius, noise_var=0.0, update="sign",
        scale="relative", mask=mask,
    )  # fmt: skip
    perturbed: Tensor = found.perturbed.detach()
    return perturbed


def typos(text: str, seed: int = 0) -> str:
    """``text`` with a letter swapped, dropped, doubled or replaced within some of the words of four letters or more:
    the same for every model."""
    generator = random.Random(f"{seed} {text}")
    return " ".join(
        _misspelled(word, generator) if len(word) > 3 and generator.random() < TYPOS else word for word in text.split()
    )


def _misspelled(word: str, generator: random.Random) -> str:
    place = generator.randrange(len(word) - 1)
    here, after = word[place], word[place + 1]
    put = generator.choice((after + here, after, here + here + after, generator.choice(string.ascii_lowercase) + after))
    return word[:place] + put + word[place + 2 :]


def lost_words(text: str, seed: int = 0) -> str:
    """``text`` without some of its words, but not without all."""
    generator = random.Random(f"{seed} {text}")
    words = text.split()
    kept = [word for word in words if generator.random() >= LOST]
    return " ".join(kept or words[:1])
