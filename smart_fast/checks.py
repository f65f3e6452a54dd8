"""Argument checks: they name the argument, what was given and what is expected, before anything runs."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, value: Any) -> Tensor:
    """A floating point (or complex) tensor whose last dimension is not empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name} must have a floating point dtype, got {value.dtype}")
    if value.dim() > 0 and value.shape[-1] == 0:
        raise ValueError(f"{name} must not have an empty last dimension, got shape {tuple(value.shape)}")
    return value


def check_mask(mask: Any, shape: torch.Size, device: torch.device, of: str) -> Tensor:
    """A bool tensor with one entry per row of a tensor of ``shape``, on its device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must have dtype torch.bool (True = real token), got {mask.dtype}")
    if mask.shape != shape[:-1]:
        raise ValueError(
            f"mask must have the shape of {of} without its last dimension, {tuple(shape[:-1])}, got {tuple(mask.shape)}"
        )
    check_same_device("mask", mask.device, of, device)
    return mask


def check_embeddings(
    embed: Any, mask: Any, generator: torch.Generator | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """One embedding or several, as tuples of embeddings and of a mask or None for each."""
    if type(embed) is Tensor and mask is None and generator is None:  # the usual case
        return (check_tensor("embed", embed),), (None,)
    several = isinstance(embed, (tuple, list))
    embeds = tuple(embed) if several else (embed,)
    if not embeds:
        raise ValueError("embed must hold at least one embedding, got an empty tuple")
    masks = tuple(mask) if isinstance(mask, (tuple, list)) else (mask,) * len(embeds)
    if len(masks) != len(embeds):
        raise ValueError(f"mask must hold one mask for each of the {len(embeds)} embeddings, got {len(masks)}")
    for index, (each, each_mask) in enumerate(zip(embeds, masks, strict=True)):
        name = f"embed[{index}]" if several else "embed"
        check_tensor(name, each)
        if each_mask is not None:
            check_mask(each_mask, each.shape, each.device, name)
        if generator is not None and generator.device.type != each.device.type:
            raise ValueError(f"generator must be on the device of {name}, {each.device}, got {generator.device}")
    return embeds, masks


def check_bounds(name: str, bounds: Any, embeds: Sequence[Tensor]) -> tuple[Any, Any]:
    """A pair of finite numbers, or of tensors that broadcast to each of ``embeds``, the first not above the second;
    (None, None) for None."""
    if bounds is None:
        return None, None
    if not isinstance(bounds, (tuple, list)):
        raise TypeError(f"{name} must be a pair (low, high) or None, got {type(bounds).__name__}")
    if len(bounds) != 2:
        raise ValueError(f"{name} must be a pair (low, high), got {len(bounds)} of them")
    low, high = (check_number(f"{name}[{k}]", each) for k, each in enumerate(bounds))
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and low > high:
        raise ValueError(f"{name} must not have a low above its high, got {bounds}")
    for k, each in enumerate((low, high)):
        for embed in embeds if isinstance(each, Tensor) else ():
            sizes = zip(reversed(each.shape), reversed(embed.shape), strict=False)
            if each.dim() > embed.dim() or any(size not in (1, whole) for size, whole in sizes):
                raise ValueError(
                    f"{name}[{k}] must broadcast to embed, {tuple(embed.shape)}, got shape {tuple(each.shape)}"
                )
    return low, high


def check_same_device(name: str, device: torch.device, other: str, other_device: torch.device) -> None:
    if device != other_device:
        raise ValueError(f"{name} and {other} must be on one device, got {device} and {other_device}")


def check_number(name: str, value: Any) -> Any:
    """A finite real number. Tensors pass as they are: looking into one would synchronize its device."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not (value - value == 0):  # as math.isfinite, which torch.compile does not take of a number that has changed
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_positive(name: str, value: Any) -> float:
    """A finite real number above zero, no tensor: it becomes part of a launch."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def check_count(name: str, value: Any, least: int = 0) -> int:
    """An integer, at least ``least``."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if count < least:
        expected = "not be negative" if least == 0 else f"be at least {least}"
        raise ValueError(f"{name} must {expected}, got {count}")
    return count


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of ``choices``."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
    return value


def check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")
