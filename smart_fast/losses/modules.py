"""Divergences of hidden states that a module projects: its own multiplication, chunk by chunk.

Each chunk is a checkpoint of PyTorch's, computed again in the backward pass, so that neither whole logits nor what the
module keeps of them are ever alive. Gradients reach the module's parameters through its own operations, dropout
included; what is frozen costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import autograd
from .chunks import Plan, kept
from .heads import Head, Weights, is_affine, project


def losses(plan: Plan, input: Tensor, target: Tensor, head: Head, other: Head | None, mask: Tensor | None) -> Tensor:
    """The loss of each token ``[N]`` of hidden states ``[N, H]``; ``other`` (None: ``head``) projects the target's."""
    index, mask = kept(mask)
    given = input, target
    if index is not None:
        given = input[index], target[index]
    elif mask is not None:  # whatever they hold must not reach the sums over tokens
        given = torch.where(mask.unsqueeze(-1), input, 0.0), torch.where(mask.unsqueeze(-1), target, 0.0)
    rows = []
    for start in range(0, given[0].shape[0], plan.chunk):
        part = slice(start, start + plan.chunk)
        sides = *(each[part] for each in given), head, other, None if mask is None else mask[part]
        rows.append(checkpoint(_chunk, plan, *sides, use_reentrant=False))
    loss = torch.cat(rows) if rows else (given[0].sum() + given[1].sum()).to(plan.precision).expand(0)
    if index is None:
        return loss
    return loss.new_zeros(input.shape[:1]).index_put((index,), loss)


def _chunk(plan: Plan, input: Tensor, target: Tensor, head: Head, other: Head | None, mask: Tensor | None) -> Tensor:
    if plan.shared:  # logits of zeros are those of the bias: what the difference does not have
        origin = input.new_zeros(1, input.shape[1])
        first = project(head, torch.cat((input - target, origin)))
        first = first[:-1] - first[-1:]
    else:
        first = project(head, input)
    logits = project(head if other is None else other, target)
    return autograd.projected_divergence(plan, first, logits, mask)


def shares_differences(head: Head, other: Head | None) -> bool:
    """Whether the difference of both sides' logits can be had from that of their hidden states."""
    return other is None and (isinstance(head, Weights) or is_affine(head))
