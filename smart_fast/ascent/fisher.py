"""``ascent="fisher"``: an ascent direction without a perturbed pass.

Near the clean embedding the divergence of two outputs is a quadratic form, J^T (diag q - q q^T) J with J the Jacobian
of the logits and q their softmax. A vector-Jacobian product of q - onehot(argmax q) through the graph that made the
clean state gives a direction along which it is large, for one backward pass of the model to its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..losses import sharded, states
from ..training import compiling, ddp_fsdp
from . import precision

_STATIC = (
    "ascent='fisher' goes backward through the state, which a DistributedDataParallel with static_graph=True has made,"
    " and which would not reduce gradients then: call SMARTLoss inside the wrapped module's forward, or use 'perturbed'"
)


def gradients(
    eval_fn: Callable[..., Any], embeds: Sequence[Tensor], state: Any, args: Any, kwargs: Any, backend: str = "auto"
) -> list[Tensor]:
    """The product with the Jacobian of ``state`` for each of ``embeds``, by a backend's `direction`.

    Where gradients are disabled there is no graph: the clean pass is then done again with one.

    Raises:
        TypeError: a state that is not made of tensors.
        ValueError: a state of fewer than two classes, or one that does not depend on the embedding.
    """
    if not torch.is_grad_enabled():
        with torch.enable_grad():
            embeds = [each.detach().requires_grad_() for each in embeds]
            return gradients(eval_fn, embeds, eval_fn(*embeds, *args, **kwargs), (), {}, backend)
    outputs = states.tensors(state)
    for each in outputs:
        if each.dim() == 0 or each.shape[-1] < 2:
            raise ValueError(
                f"ascent='fisher' needs states of two classes or more, got shape {tuple(each.shape)}: use 'perturbed'"
            )
    reason = None
    if not all(each.requires_grad for each in embeds):
        reason = "embed does not require grad"
    elif not any(each.requires_grad for each in outputs):
        reason = "state has no graph"
    if reason is not None:
        raise ValueError(
            f"ascent='fisher' differentiates state with respect to embed, but {reason}: compute state from the very"
            " embed that is passed, one that requires grad, with gradients enabled; or use ascent='perturbed'"
        )
    outputs = [each for each in outputs if each.requires_grad]
    rescale = any(each.dtype == torch.float16 for each in outputs)
    seeds = [direction(each.detach(), backend, wide=rescale) for each in outputs]
    scale = None
    if rescale:
        scale = precision.sample_scale(seeds, precision.by_sample(embeds, seeds))
        seeds = [seed * precision.like_samples(scale, seed) for seed in seeds]
    if ddp_fsdp.in_use():
        ddp_fsdp.check_loss(outputs[0], _STATIC)
    seeds = [seed.to(each.dtype) for seed, each in zip(seeds, outputs, strict=True)]
    with ddp_fsdp.ascent(eval_fn):
        found = compiling.vector_jacobian_product(outputs, list(embeds), seeds)
    if any(each is None for each in found):
        raise ValueError(
            "ascent='fisher' differentiates state with respect to embed, but state does not depend on it: compute state"
            " from the very embed that is passed, or use ascent='perturbed'"
        )
    grads = [each for each in found if each is not None]
    return grads if scale is None else [precision.unscale(each, precision.like_samples(scale, each)) for each in grads]


def direction(logits: Tensor, backend: str = "torch", *, wide: bool = True) -> Tensor:
    """``softmax(logits) - onehot(argmax logits)`` over the last dimension of ``logits`` ``[..., V]``.

    Computed in fp32 (fp64 of fp64), returned so if ``wide``, else in the dtype of ``logits``. The entry of the largest
    is the sum of the others, with the sign changed: nothing cancels where it is near one.
    """
    plain = logits.numel() == 0 or sharded.is_dtensor(logits)
    return select("torch" if plain else backend, logits).fisher_direction(logits, wide)
