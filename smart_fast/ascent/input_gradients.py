"""Gradients of the ascent loss with respect to the perturbed embeddings, and to nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from ..backends import short_way_to_gradients
from ..noise import remember_generators
from ..training import compiling

LossOf = Callable[..., Tensor]


class InputGradients:
    """d loss_of(*inputs) / d inputs, without gradients of parameters.

    `torch.autograd.grad` does that, unless the graph holds a reentrant checkpoint. Whether it does shows in the first
    call and is remembered.
    """

    def __init__(self) -> None:
        self._reentrant: bool | None = None

    def __call__(self, loss_of: LossOf, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of ``loss_of(*inputs)``, a scalar, to each of ``inputs``, which require grad.

        Raises:
            TypeError, ValueError: the loss is not a tensor, or not a scalar.
            RuntimeError: the loss does not depend on the inputs.
        """
        if torch.compiler.is_compiling():
            # Clones, which Inductor takes out again, since eval_fn may modify its inputs in place.
            loss = _checked(loss_of(*[each.clone() for each in inputs]))
            return _complete(compiling.grad(loss, list(inputs)))
        if self._reentrant:
            return _by_backward(loss_of, inputs)
        if self._reentrant is False:
            try:
                return _by_grad(loss_of, inputs)
            except _ReentrantCheckpointError:
                self._reentrant = True
            return _by_backward(loss_of, inputs)
        # A second attempt must see the dropout of the first, or the first call would differ from the others.
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        rewind = None if capturing else remember_generators(inputs[0].device)
        try:
            grads = _by_grad(loss_of, inputs)
            if not capturing:
                self._reentrant = False
            return grads
        except _ReentrantCheckpointError:
            self._reentrant = True
        if rewind:
            rewind()
        return _by_backward(loss_of, inputs)


class _ReentrantCheckpointError(RuntimeError):
    """The graph holds a reentrant checkpoint, which refuses `torch.autograd.grad`."""


def _by_grad(loss_of: LossOf, inputs: Sequence[Tensor]) -> list[Tensor]:
    # Edges of the graph, since eval_fn may modify its inputs in place.
    edge_of, gradients = short_way_to_gradients() or (get_gradient_edge, _gradients)
    edges = [edge_of(each) for each in inputs]
    loss = _checked(loss_of(*inputs))
    try:
        grads = gradients(loss, edges)
    except RuntimeError as error:
        if "use_reentrant" in str(error) or "Checkpointing is not compatible" in str(error):
            raise _ReentrantCheckpointError(str(error)) from error
        raise
    return _complete(grads)


def _gradients(loss: Tensor, edges: Sequence[Any]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, edges, allow_unused=True)


def _by_backward(loss_of: LossOf, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Reentrant checkpoints only support a backward pass to every leaf, so every parameter that the forward pass meets
    is frozen until the backward pass is over: no ``.grad`` changes and no gradient hook runs.
    """
    leaves = [each.detach().requires_grad_() for each in inputs]
    frozen = _FreezeLeaves(keep=leaves)
    try:
        with frozen:
            loss = _checked(loss_of(*leaves))
        loss.backward()
    finally:
        frozen.thaw()
    return _complete([leaf.grad for leaf in leaves])


class _FreezeLeaves(TorchFunctionMode):
    """Sets ``requires_grad=False`` on every leaf that a torch function is called with, until `thaw`."""

    def __init__(self, keep: Sequence[Tensor]) -> None:
        super().__init__()
        self._keep = {id(tensor) for tensor in keep}
        self._frozen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad and id(tensor) not in self._keep:
                tensor.requires_grad_(False)
                self._frozen.append(tensor)
        return func(*args, **kwargs)

    def thaw(self) -> None:
        for tensor in self._frozen:
            tensor.requires_grad_(True)
        self._frozen.clear()


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise RuntimeError(
            "the ascent loss has no graph: eval_fn must compute the state from the embedding it is given"
        )
    return loss


def _complete(grads: Sequence[Tensor | None]) -> list[Tensor]:
    if len(grads) == 1 and grads[0] is not None:  # the usual case, without further ado
        return [grads[0]]
    missing = [index for index, grad in enumerate(grads) if grad is None]
    if missing:
        which = "the perturbed embedding" if len(grads) == 1 else f"the perturbed embeddings {missing}"
        raise RuntimeError(f"the ascent loss does not depend on {which}: eval_fn must use what it is given")
    return [grad for grad in grads if grad is not None]
