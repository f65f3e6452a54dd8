"""What projects hidden states to logits: a weight and a bias, or a module that does the multiplication itself."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_same_device, check_tensor
from . import sharded


class Weights(NamedTuple):
    """``hidden @ weight.T + bias``."""

    weight: Tensor  #: ``[V, H]``
    bias: Tensor | None  #: ``[V]``


Head = Weights | nn.Module


def of_module(module: nn.Module) -> Head:
    """The weight and bias of a `torch.nn.Linear`, parametrized ones computed; any other module as it is.

    Of PEFT's ``modules_to_save`` it is the copy that is active. What has a forward pass of its own (a LoRA adapter,
    quantized weights) or hooks around it (`torch.nn.utils.weight_norm`) is called, not read.
    """
    saved = getattr(module, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict) and isinstance(original := getattr(module, "original_module", None), nn.Module):
        active: Any = [] if module.disable_adapters else module.active_adapters
        return of_module(saved[active[0]] if active and active[0] in saved else original)
    hooks = (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    )  # fmt: skip
    if getattr(module.forward, "__func__", None) is nn.Linear.forward and not any(hooks):
        return Weights(module.weight, module.bias)  # type: ignore[arg-type]
    return module


def is_affine(module: nn.Module) -> bool:
    """Whether ``module(x) - module(t)`` is known to be ``module(x - t) - module(0)``, which keeps the precision of the
    difference: of PEFT's LoRA and DoRA on a `torch.nn.Linear`, unless dropout draws for each call."""
    layers, variants = (sys.modules.get(f"peft.tuners.lora.{name}") for name in ("layer", "variants"))
    if layers is None or variants is None or not isinstance(module, layers.Linear):
        return False
    base: Any = module.get_base_layer()
    dropout = any(each.training and getattr(each, "p", 0.0) for each in module.lora_dropout.values())
    known = all(isinstance(each, variants.DoraLinearVariant) for each in module.lora_variant.values())
    return known and not dropout and isinstance(of_module(base), Weights)


def constant(head: Head) -> Head:
    """Without gradients to weight and bias. (Autograd asks a module for none that nobody wants.)"""
    if not isinstance(head, Weights):
        return head
    return Weights(head.weight.detach(), None if head.bias is None else head.bias.detach())


def project(head: Head, hidden: Tensor) -> Tensor:
    """Logits ``[n, V]`` of hidden states ``[n, H]``."""
    if isinstance(head, Weights):
        return nn.functional.linear(hidden, *head)
    logits = head(hidden)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != hidden.shape[0]:
        given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"a head must make logits [n, V] of hidden states {list(hidden.shape)}, {type(head).__name__} made {given}"
        )
    return logits


def _width(head: Head, hidden: Tensor) -> int:
    """V. Modules that do not say are called for one token of the kind of ``hidden`` ``[..., H]``."""
    if isinstance(head, Weights):
        return head.weight.shape[0]
    known = getattr(head, "out_features", None)
    if isinstance(known, int):
        return known
    with torch.no_grad():
        return project(head, hidden.new_zeros(1, hidden.shape[-1])).shape[1]


def check(input: Any, target: Any, head: Head, other: Head | None) -> tuple[int, tuple[torch.dtype, torch.dtype]]:
    """Check shapes, dtypes and devices of both sides; returns V and the dtypes of their GEMMs.

    ``other`` projects the target, None: ``head`` does.

    Raises:
        TypeError: not tensors, not of one floating dtype a side (outside autocast).
        ValueError: shapes that do not match, two devices, two vocabularies, a weight that is not whole.
    """
    for name, hidden in (("input", input), ("target", target)):
        _check_real(name, hidden, input)
    if input.dim() == 0 or (input.shape != target.shape if other is None else input.shape[:-1] != target.shape[:-1]):
        expected = "the same shape [..., H]" if other is None else "shapes [..., H] and [..., H_target], the same ..."
        raise ValueError(
            f"input and target must be hidden states of {expected}, got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    words = _check_weight("", "input", head, input)
    if other is None:
        _check_bias("", head)
        dtype = _dtype(input=input, target=target, **_named("", head))
        return words, (dtype, dtype)
    others = _check_weight("target_", "target", other, target)
    if words != others:
        raise ValueError(
            "both sides must have one vocabulary (and one order of its words), "
            f"got {words} words of the input's head and {others} of the target's"
        )
    _check_bias("", head)
    _check_bias("target_", other)
    ours, theirs = _dtype(input=input, **_named("", head)), _dtype(target=target, **_named("target_", other))
    return words, (ours, theirs)


def _named(prefix: str, head: Head) -> dict[str, Tensor]:
    if not isinstance(head, Weights):
        return {}
    return {f"{prefix}{name}": each for name, each in head._asdict().items() if each is not None}


def _check_real(name: str, tensor: Any, input: Any) -> None:
    if check_tensor(name, tensor).is_complex():
        raise TypeError(f"{name} must be real, got {tensor.dtype}")
    if sharded.is_dtensor(tensor):  # sharded for data or over the vocabulary? Only the caller knows
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: pass its local part and process_group, or all")
    check_same_device(name, tensor.device, "input", input.device)


def _check_weight(prefix: str, side: str, head: Head, hidden: Tensor) -> int:
    """V of a head whose weight fits ``hidden``."""
    for name, tensor in _named(prefix, head).items():
        if isinstance(tensor, Tensor) and tensor.numel() == 0:
            raise ValueError(
                f"{name} must hold the parameter, got {tuple(tensor.shape)}: this is what DeepSpeed's ZeRO-3 and FSDP "
                "leave of one outside of its module's forward pass; gather it around the loss "
                "(deepspeed.zero.GatheredParameters, FullyShardedDataParallel.summon_full_params)"
            )
        _check_real(name, tensor, hidden)
    if isinstance(head, Weights) and (head.weight.dim() != 2 or head.weight.shape[1] != hidden.shape[-1]):
        flat = ": a flat one is a shard; gather it around the loss" if head.weight.dim() == 1 else ""
        raise ValueError(
            f"{prefix}weight must have shape [V, {hidden.shape[-1]}], H being that of {side}, "
            f"got {tuple(head.weight.shape)}{flat}"
        )
    return _width(head, hidden)


def _check_bias(prefix: str, head: Head) -> None:
    if isinstance(head, Weights) and head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias must have shape ({head.weight.shape[0]},), one for each row of {prefix}weight, "
            f"got {tuple(head.bias.shape)}"
        )


def _dtype(**tensors: Tensor) -> torch.dtype:
    """What all of them have, or autocast makes of them."""
    dtypes = [tensor.dtype for tensor in tensors.values()]
    device = next(iter(tensors.values())).device.type
    if torch.is_autocast_enabled(device):
        to = torch.get_autocast_dtype(device)  # of everything but float64, as autocast has it
        dtypes = [dtype if dtype == torch.float64 else to for dtype in dtypes]
    if len(set(dtypes)) > 1:
        *names, last = tensors
        given = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"{', '.join(names)} and {last} must have one dtype outside autocast, got {given}")
    return dtypes[0]
