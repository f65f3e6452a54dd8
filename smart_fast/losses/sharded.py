"""Logits sharded over the vocabulary: which collectives complete the statistics of rows that no process holds whole.

As in Megatron-LM's vocab-parallel cross-entropy (Shoeybi et al., 2019), processes exchange a few numbers a row, never
logits: in the forward pass one all_gather of seven statistics and one all_reduce of two sums. Gradients stay local.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import log_ratio
from ..backends.base import PARTS, Backend, DivergenceSpec
from .divergences import divergence


def check_group(group: Any) -> None:
    """Check that ``group`` is a process group that this process is a member of."""
    if not dist.is_available():
        raise ValueError("process_group needs torch.distributed, which this build of torch lacks")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("process_group must contain this process")


def all_reduce(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the processes, in place; contiguous tensors only."""
    dist.all_reduce(tensor, group=group)
    return tensor


def statistics(
    backend: Backend, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None, group: Any
) -> tuple[Tensor, Tensor]:
    """Statistics of whole rows, in `Backend.divergence_forward`'s layout but for the two sums, and the width of
    the vocabulary (a number on the device). One all_gather; the local width rides along as one more row.
    """
    measured = backend.divergence_parts(input, target, spec, mask)
    width = measured.new_full((1, PARTS), float(input.shape[-1]))
    gathered = gather(torch.cat((measured, width)), group)
    return log_ratio.merge(gathered[:, :-1], spec.scale), gathered[:, -1, 0].sum()


def gather(tensor: Tensor, group: Any) -> Tensor:
    """``tensor`` of every process, stacked."""
    gathered = tensor.new_empty((dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:]))
    # Its name since torch 2.13, and before.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, tensor, group=group)
    return gathered.view(-1, *tensor.shape)


def rows(
    backend: Backend, input: Tensor, target: Tensor, spec: DivergenceSpec, mask: Tensor | None, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row ``[rows]``, statistics that `Backend.divergence_backward` takes, and the vocabulary's
    width: one all_gather and one all_reduce."""
    stats, width = statistics(backend, input, target, spec, mask, group)
    sums = all_reduce(backend.divergence_finish(input, target, stats, spec, mask), group)
    stats[:, log_ratio.SUMS] = sums  # what gradients need of the other slices
    return divergence(spec.kind).rows(sums, spec.alpha), stats, width


def agree(name: str, numbers: tuple[int, ...], width: int, group: Any, device: torch.device) -> list[int]:
    """The ``width`` of every process, after a check that all call with the same ``numbers`` (called ``name``).

    Synchronizes: how many chunks there are decides how many collectives follow.
    """
    gathered = gather(torch.tensor((*numbers, width), device=device), group).tolist()
    if any(each[:-1] != gathered[0][:-1] for each in gathered):
        raise ValueError(f"{name} must be the same in every process, got {[tuple(each[:-1]) for each in gathered]}")
    return [each[-1] for each in gathered]


Rewrap = Callable[[Tensor], Tensor]


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor; imports nothing, since only a program that uses them has one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(
    input: Any, target: Any, mask: Tensor | None, group: Any
) -> tuple[Tensor, Tensor, Tensor | None, Any, Rewrap]:
    """Local logits of DTensors, the process group that holds the rest (None: they are replicated), and what makes a
    DTensor of elementwise results. Gradients come back as DTensors.

    Raises:
        ValueError: placements other than ``[Shard(last dimension)]`` or ``[Replicate()]`` on a mesh of one dimension,
            the same for both; one DTensor and one tensor; ``group`` given as well.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if group is not None:
        raise ValueError("process_group must be None for DTensor logits: their mesh says where the rest is")
    for name, logits in (("input", input), ("target", target)):
        if not is_dtensor(logits):
            raise ValueError(f"input and target must both be DTensors or neither, {name} is a {type(logits).__name__}")
    mesh, placements, shape = input.device_mesh, input.placements, input.shape
    if target.device_mesh != mesh or target.placements != placements:
        raise ValueError(
            "input and target must have one mesh and the same placements, got "
            f"{placements} on {mesh} and {target.placements} on {target.device_mesh}"
        )
    sharded = len(placements) == 1 and placements[0] in (Shard(input.dim() - 1), Shard(-1))
    if not sharded and placements != (Replicate(),):
        raise ValueError(
            "DTensor logits must be placed as (Shard(dim=-1),), sharded over the vocabulary, or (Replicate(),), "
            f"on a mesh of one dimension; got {placements} for shape {tuple(shape)} on {mesh}"
        )
    if is_dtensor(mask):
        mask = mask.full_tensor()  # type: ignore[union-attr]

    def rewrap(terms: Tensor) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        wrapped: Tensor = DTensor.from_local(terms, mesh, placements, shape=shape, stride=stride)
        return wrapped

    return input.to_local(), target.to_local(), mask, mesh.get_group() if sharded else None, rewrap
