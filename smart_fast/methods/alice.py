"""ALICE: SMART's regularizer, and the same ascent against the gold labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_number
from ..smart import SMARTLoss

__all__ = ["AliceLoss"]


class AliceLoss(nn.Module):
    """``gold_weight * gold_loss_fn(eval_fn(embed + noise), labels) + SMARTLoss``, each with a noise of its own.

    Pereira et al., "Adversarial training for commonsense inference" (ALICE), RepL4NLP 2020. The first term's ascent
    climbs the loss of the gold labels, the second's the divergence from the clean output.

    Args:
        eval_fn, loss_fn, loss_last_fn: those of `SMARTLoss`.
        gold_loss_fn: compares a state with labels, ``gold_loss_fn(state, labels) -> scalar``.
        gold_weight: weight of the first term.
        **settings: those of `SMARTLoss`, for both terms.

    Raises:
        TypeError, ValueError: as `SMARTLoss` does; a ``gold_weight`` that is no finite number.
    """

    def __init__(
        self,
        eval_fn: Callable[..., Any],
        loss_fn: Any,
        loss_last_fn: Any = None,
        *,
        gold_loss_fn: Callable[..., Tensor] = F.cross_entropy,
        gold_weight: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.virtual = SMARTLoss(eval_fn, loss_fn, loss_last_fn, **settings)
        self.gold = SMARTLoss(eval_fn, gold_loss_fn, **{**settings, "ascent": "perturbed"})
        self.gold_weight = check_number("gold_weight", gold_weight)

    def forward(self, embed: Any, state: Any, labels: Any, *args: Any, mask: Any = None, **kwargs: Any) -> Tensor:
        """The sum of both terms. ``labels`` as ``gold_loss_fn`` takes them, the rest as in `SMARTLoss.forward`."""
        gold: Tensor = self.gold(embed, labels, *args, mask=mask, **kwargs)
        virtual: Tensor = self.virtual(embed, state, *args, mask=mask, **kwargs)
        return self.gold_weight * gold + virtual
